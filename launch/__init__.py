"""What starts processes: the ranks of one machine (local.py), a Slurm job (slurm.py), and what each node of it runs (node.py)."""

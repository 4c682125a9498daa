"""What a Slurm job runs on each of its nodes: `python -m ltrain.launch.node RANKS CONFIG`, one task per node, started by srun."""

import os
import sys

from ltrain.launch.ranks import Place, run


def main(ranks: int, config: str) -> int:
    """Train `config` on `ranks` ranks of this node; srun says which node it is, the job script where the first rank is met."""
    place = Place(int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return run([sys.executable, "-m", "ltrain", "train", config], ranks, place).code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))

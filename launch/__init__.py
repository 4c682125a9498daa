"""What starts processes. One machine: torchrun (see the README)."""

"""Carry out a plan: on this machine, or through SLURM."""

"""Where runs can go: cluster files, SLURM's commands, a machine's resources."""

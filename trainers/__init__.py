"""What one rank does. Knows nothing of SLURM, hosts or sbatch."""

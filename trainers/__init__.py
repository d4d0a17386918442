"""What one rank does. Nothing here knows about SLURM, hosts or sbatch."""

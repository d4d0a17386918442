"""Run directories as readers see them: find runs, tell their true state, cancel them, and use their checkpoints."""

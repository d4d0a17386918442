"""What a run logs: metrics.jsonl, run.json and Weights & Biases."""

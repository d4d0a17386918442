"""Grid search over forests."""

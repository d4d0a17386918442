"""The loop and what it stands on, once, for every task."""

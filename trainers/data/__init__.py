"""Data sets that several tasks can read."""

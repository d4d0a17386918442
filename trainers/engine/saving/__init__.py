"""Checkpoints and weights between ranks and disk."""

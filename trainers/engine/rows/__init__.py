"""Rows: what a task says of each sample, in the order of the input, as `launch predict` writes it."""

"""Run directories as their readers see them."""

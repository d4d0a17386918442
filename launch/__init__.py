"""Which processes run, where, and what became of them."""

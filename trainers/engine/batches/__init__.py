"""The samples of each global batch, and each rank's share of them."""

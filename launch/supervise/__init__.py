"""One node's ranks: start them, watch them, stop them."""

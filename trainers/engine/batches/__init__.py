"""Which samples a global batch holds, and which of them each rank takes."""

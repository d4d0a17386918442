"""Look for what would go wrong, before anything is queued."""

"""What a person types: words and options become one call."""

"""What a person reads about runs."""

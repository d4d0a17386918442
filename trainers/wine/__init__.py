"""The task `wine`: grid search over random forests and extra trees."""

"""`launch doctor`: find problems of a machine or cluster before a run is queued."""

"""What `launch` and a rank agree on: files, events, heartbeats, signals, errors. Imports no torch."""

"""The files of a checkpoint: manifest, retention, tensor files, export. Imports no torch."""

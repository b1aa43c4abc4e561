"""The machine: processes, precision, paths, progress."""

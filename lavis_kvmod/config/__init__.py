"""A run file: loaded, merged, and checked against the keys that the parts declare."""

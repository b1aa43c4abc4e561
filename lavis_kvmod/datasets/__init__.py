"""Data sets and their builders, in LAVIS's form: what the YAML files under ``configs/datasets`` describe."""

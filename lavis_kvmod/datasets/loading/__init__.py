"""Samples to batches: `plans` (which samples a batch holds), `sources` (reading them), `loader` (worker processes)."""

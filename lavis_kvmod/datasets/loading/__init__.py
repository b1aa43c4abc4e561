"""Samples to batches: `plans` (which samples a batch holds), `samples` (reading them), `loader` (worker processes)."""

"""The training loop around LAVIS's RunnerBase."""

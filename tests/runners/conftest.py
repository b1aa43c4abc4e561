"""Runs in processes of their own."""

from processes import in_process, killed_before_step, runs  # noqa: F401
from whole_runs import assert_same_run, write_run  # noqa: F401

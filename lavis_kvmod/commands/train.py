"""``python -m lavis.train --cfg-path RUN.yaml``: train, validate and test by a LAVIS run file."""

from typing import Any, Dict, Optional, Sequence

from lavis_kvmod.commands.launch import build_runner, load_config, run_command
from lavis_kvmod.commands.report import train_and_report
from lavis_kvmod.system.ending import run_and_end


def train(cfg_path: str, options: Sequence[str] = ()) -> Optional[Dict[str, Any]]:
    """Run a training; returns the test splits' metrics (rank 0).

    Raises:
        ConfigurationError: listing all that is wrong, before anything heavy is loaded.
    """
    return train_and_report(build_runner(load_config(cfg_path, options)))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns the exit status."""
    return run_command(train, __doc__, argv)


if __name__ == "__main__":
    run_and_end(main)

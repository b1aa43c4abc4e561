"""``python -m lavis.evaluate --cfg-path RUN.yaml``: evaluate a model on a run file's test splits (or, without any, its
validation splits).

The model is the one the run file names (model.finetuned with model.load_finetuned=true, or its pretrained weights).
"""

import sys
from typing import Any, Dict, Optional, Sequence

from lavis_kvmod.config import ConfigurationError
from lavis_kvmod.launch import build_runner, load_config, run_command


def evaluate(cfg_path: str, options: Sequence[str] = ()) -> Optional[Dict[str, Any]]:
    """Evaluate; returns and prints the splits' metrics (rank 0).

    Raises:
        ConfigurationError: listing all that is wrong, before anything heavy is loaded.
    """
    cfg = load_config(cfg_path, [*options, "run.evaluate=true"])
    cfg.run_cfg.test_splits = cfg.run_cfg.test_splits or cfg.run_cfg.valid_splits
    if not cfg.run_cfg.test_splits:
        raise ConfigurationError(cfg_path, ["run.test_splits: names no split, so there is nothing to evaluate"])
    logs = build_runner(cfg).evaluate(skip_reload=True)
    for split, metrics in (logs or {}).items():
        print(f"\n{split}")
        for name, value in (metrics or {}).items():
            print(f"  {name:<16} {value:8.2f}" if isinstance(value, float) else f"  {name}: {value}")
    return logs


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns the exit status."""
    return run_command(evaluate, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

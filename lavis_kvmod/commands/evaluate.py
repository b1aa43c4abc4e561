"""``python -m lavis.evaluate --cfg-path RUN.yaml``: evaluate a model on a run file's test splits (or, without any, its
validation splits). Prints the metrics, and writes them with examples into the run's output folder: metrics.json,
report.md, and all predictions under result/.

The model is the one the run file names (model.finetuned with model.load_finetuned=true, or its pretrained weights),
with the trained weights of run.resume_ckpt_path if that names a checkpoint.
"""

from typing import Any, Dict, Optional, Sequence

from lavis_kvmod.commands.launch import build_runner, load_config, run_command
from lavis_kvmod.commands.report import leave_report
from lavis_kvmod.system.distributed import get_rank
from lavis_kvmod.system.ending import run_and_end
from lavis_kvmod.system.schema import ConfigurationError


def evaluate(cfg_path: str, options: Sequence[str] = ()) -> Optional[Dict[str, Any]]:
    """Evaluate; returns, prints and writes the splits' metrics (rank 0).

    Raises:
        ConfigurationError: listing all that is wrong, before anything heavy is loaded.
    """
    cfg = load_config(cfg_path, [*options, "run.evaluate=true"])
    cfg.run_cfg.test_splits = cfg.run_cfg.test_splits or cfg.run_cfg.valid_splits
    if not cfg.run_cfg.test_splits:
        raise ConfigurationError(cfg_path, ["run.test_splits: names no split, so there is nothing to evaluate"])
    from lavis_kvmod.reports import evaluation as reports

    runner = build_runner(cfg)
    runner.task.evaluated = {}
    logs = runner.evaluate(skip_reload=True)
    if get_rank() == 0:
        metrics = {split: of_split or {} for split, of_split in (logs or {}).items()}
        print(f"\n{reports.text_table(metrics)}\n")
        about = reports.provenance(cfg, cfg_path, options)
        for path in reports.write(reports.Report(metrics, runner.task.evaluated, about), runner.output_dir):
            print(path)
        leave_report(runner)
    return logs


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; returns the exit status."""
    return run_command(evaluate, __doc__, argv)


if __name__ == "__main__":
    run_and_end(main)

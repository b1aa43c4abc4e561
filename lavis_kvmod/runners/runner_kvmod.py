"""``runner_kvmod``: LAVIS's RunnerBase, on CPU and CUDA, in one process or many, that can be killed at any time.

It takes LAVIS's run section and tasks unchanged (it calls ``train_step``, ``evaluation`` and ``after_evaluation`` of
any task). What it mends, with the place in LAVIS 1.0.2, stands at each override.

Its class is built up in four files: `parts` (what a run consists of), on them `saving` (checkpoints), `epochs` (one
pass over the data), and here the run. What they use: `loaders` (what a batch holds), `steps` (one optimizer step),
`schedules`; `resuming`, `training_state` (what a checkpoint holds), `run_folder` (where it goes); `run_log`, `signals`.
"""

import contextlib
import datetime
import logging
import math
import time
from typing import Any, Dict, Optional

import torch
from lavis.common.dist_utils import is_main_process, main_process

from lavis_kvmod.models.parts import parts_table
from lavis_kvmod.runners.environment import environment
from lavis_kvmod.runners.epochs import TrainsEpochs
from lavis_kvmod.runners.run_folder import BEST
from lavis_kvmod.system.distributed import from_main, get_world_size, on_main


class RunnerKVMod(TrainsEpochs):
    """Train, validate and test a model by a LAVIS run section; docs/training.md tells what it promises.

    Args:
        cfg, task, model, datasets, job_id, folder: see `RunParts`.
    """

    def train(self) -> Optional[Dict[str, Dict[str, Any]]]:
        """Train, keep the last and the best checkpoint, then look at the test splits once, with the best.

        Returns:
            The test splits' metrics (rank 0).

        Raises:
            Stopped: after SIGTERM or Ctrl-C, when all is saved.
            FloatingPointError: for more steps than ``max_bad_steps`` whose loss or gradient is not finite.
            RunFolderError: if a checkpoint cannot be written.
        """
        start = time.monotonic()
        try:
            if self.evaluate_only:
                self.validate(0)
                return self.evaluate(skip_reload=True)
            with self.signals:
                self._begin()
                while self.state.epoch < self.max_epoch and not self._out_of_patience():
                    self._train_and_validate(self.state.epoch)
                self.task.evaluated = {}  # for the run's report
                with self.signals.nothing_to_save():
                    logs = self.evaluate("best")
            logging.info("Training time %s", datetime.timedelta(seconds=round(time.monotonic() - start)))
            return logs
        finally:
            self.profiler.close()
            self.log.close()
            self.folder.release()

    def _begin(self) -> None:
        """Resume, and write down what is being run."""
        self.log_parts()
        if self.folder.checkpoint is not None:
            self._load_checkpoint(str(self.folder.checkpoint))
        if is_main_process():
            about = environment(self.device, get_world_size())
            self.folder.add_start({**about, "resumed_from": self.folder.checkpoint and str(self.folder.checkpoint)})
        config = self._resolved_config()
        self.log.start(
            config,
            self._batches_done(),
            tensorboard=self.settings.tensorboard,
            wandb=self.settings.wandb,
        )
        if self.state.epoch >= self.max_epoch:
            logging.info("%s is trained: all %d epochs are done; only testing it", self.output_dir, self.max_epoch)

    def _train_and_validate(self, epoch: int) -> None:
        state = self.state
        if not state.trained:
            self.log_stats(self.train_epoch(epoch), "train")
            state.trained = True
            if self.valid_splits:  # an evaluation may take long, or fail
                self._save_checkpoint(epoch)
                self._stop_if_asked()
        with self.signals.nothing_to_save() if self.valid_splits else contextlib.nullcontext():
            is_best = self.validate(epoch)
        state.start_epoch(epoch + 1)
        # The best first: should the second be interrupted, the epoch's validation is repeated and writes both.
        if is_best:
            self._save_checkpoint(epoch, is_best=True)
        self._save_checkpoint(epoch, in_place=bool(self.valid_splits))
        self._stop_if_asked()

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        waited = self.state.validations_since_best
        if patience is None or waited < patience:
            return False
        best = self.state.best_epoch
        than = "a metric that is a finite number" if best is None else f"a better one than epoch {best}"
        logging.info("stopping early: %d validations without %s", waited, than)
        return True

    def validate(self, epoch: int) -> bool:
        """Evaluate the validation splits; whether the first one's ``agg_metrics`` is the best so far.

        Any finite value may be the best, also 0 or less; LAVIS saves only what is above 0 on a split named "val"
        (runner_base.py:390). Without validation splits the newest epoch counts as the best.
        """
        state = self.state
        if not self.valid_splits:
            state.best_epoch = epoch
            return True
        is_best = False
        for i, split in enumerate(self.valid_splits):
            metrics = self.eval_epoch(split, epoch)
            if i == 0:
                is_best = on_main(lambda: self._is_best(metrics, split, epoch))  # noqa: B023
            if metrics is not None:
                self.log_stats({**metrics, "epoch": epoch, "best_epoch": state.best_epoch}, split)
                logging.info("%s, epoch %d: %s", split, epoch, _short(metrics))
        state.validations_since_best = 0 if is_best else state.validations_since_best + 1
        state.best_agg_metric, state.best_epoch = from_main((state.best_agg_metric, state.best_epoch))
        return is_best

    def _is_best(self, metrics: Optional[Dict[str, Any]], split: str, epoch: int) -> bool:
        metrics = metrics or {}  # as it is on rank 0, who asks
        value = metrics.get("agg_metrics")
        if value is None:
            raise KeyError(
                f"task {type(self.task).__name__} gave no 'agg_metrics' for split {split!r}: the best "
                f"checkpoint cannot be told; it gave {sorted(metrics)}"
            )
        if not math.isfinite(value):  # nothing would be better, or worse
            logging.warning("%s, epoch %d: agg_metrics is %s, which is never the best", split, epoch, value)
            return False
        best = self.state.best_agg_metric
        if metrics.get("scored") == 0:
            logging.warning("%s has nothing to score against: the newest epoch counts as the best", split)
        elif best is not None and not value > best:
            return False
        self.state.best_agg_metric, self.state.best_epoch = float(value), epoch
        return True

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> Optional[Dict[str, Any]]:
        """Metrics of each test split (rank 0), with the best checkpoint unless ``skip_reload``."""
        if cur_epoch == "best" and not skip_reload and not from_main((self.output_dir / BEST).is_file()):
            logging.warning("there is no %s: testing with the newest weights", self.output_dir / BEST)
            skip_reload = True
        logs = {}
        for split in self.test_splits:
            metrics = logs[split] = self.eval_epoch(split, cur_epoch, skip_reload)
            if metrics is not None:
                self.log_stats(metrics, split)
                logging.info("%s: %s", split, _short(metrics))
        return logs if is_main_process() else None

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = False) -> Optional[Dict[str, Any]]:
        """Evaluate one split; LAVIS's never tells the task that there is no CUDA (runner_base.py:470).

        Raises:
            KeyError: for a split the data sets do not have, naming those they have.
        """
        if split_name not in self.dataloaders:
            raise KeyError(f"no split {split_name!r} in the data sets; there are {sorted(self.dataloaders)}")
        model = self.unwrap_dist_model(self.model)
        if cur_epoch == "best" and not skip_reload:
            self._reload_best_model(model)
        model.eval()
        self.task.before_evaluation(model=model, dataset=self.datasets[split_name])
        with self.autocast():
            results = self.task.evaluation(model, self.dataloaders[split_name], cuda_enabled=self.cuda_enabled)
        if results is None:
            return None
        return self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)

    # ------------------------------------------------------------ logs

    @main_process
    def log_parts(self) -> None:
        """The table of parts: parameters, trained or frozen, dtype."""
        model = self.unwrap_dist_model(self.model)
        if hasattr(model, "parts"):
            logging.info("model parts:\n%s", parts_table(model.parts()))


def _short(metrics: Dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if isinstance(value, (int, float)))

"""``runner_kvmod``: LAVIS's RunnerBase, on CPU and CUDA, in one process or many, that can be killed at any time.

It takes LAVIS's run section and tasks unchanged (it calls ``train_step``, ``evaluation`` and ``after_evaluation`` of
any task). What it mends, with the place in LAVIS 1.0.2, stands at each override. The parts: `epochs` (one pass over the
data), `loaders` (what a batch holds), `steps` (one optimizer step), `schedules`; `saving` and `resuming`,
`training_state` (what a checkpoint holds), `run_folder` (where it goes); `run_log`, `signals`.
"""

import contextlib
import datetime
import logging
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from lavis.common.dist_utils import is_main_process, main_process
from lavis.runners.runner_base import RunnerBase
from torch.nn.parallel import DistributedDataParallel

from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.models.parts import parts_table
from lavis_kvmod.runners.environment import environment
from lavis_kvmod.runners.epochs import TrainsEpochs
from lavis_kvmod.runners.loaders import make_loader, make_loaders
from lavis_kvmod.runners.optimizers import build_optimizer
from lavis_kvmod.runners.run_folder import BEST, RunFolder, checkpoint_problem, find_newest_run
from lavis_kvmod.runners.run_log import RunLog
from lavis_kvmod.runners.saving import SavesRuns
from lavis_kvmod.runners.schedules import Schedule
from lavis_kvmod.runners.settings import RunnerSettings
from lavis_kvmod.runners.signals import StopSignals
from lavis_kvmod.runners.steps import GradientStep
from lavis_kvmod.runners.training_state import RunState
from lavis_kvmod.system.distributed import from_main, get_rank, get_world_size, on_main
from lavis_kvmod.system.lavis_paths import set_registry_path
from lavis_kvmod.system.precision import amp_dtype, needs_grad_scaler
from lavis_kvmod.system.sharding import shard_language_model
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import WeightFile


class RunnerKVMod(TrainsEpochs, SavesRuns, RunnerBase):
    """Train, validate and test a model by a LAVIS run section; docs/training.md tells what it promises.

    Args:
        cfg, task, model, datasets, job_id: LAVIS's.
        folder: the run's, if it is open already (see `open_folder`).
    """

    def __init__(self, cfg, task, model, datasets, job_id, folder: Optional[RunFolder] = None):
        self.folder = folder
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        self._load_what_is_evaluated()
        self.state = RunState()
        self.log = RunLog(self.output_dir, active=is_main_process())
        self.signals = StopSignals()
        self._gradient_step: Optional[GradientStep] = None
        self._schedule: Optional[Schedule] = None

    @cached_property
    def settings(self) -> RunnerSettings:
        """The keys of the run section, checked."""
        return RunnerSettings.of(self.config.run_cfg)

    @classmethod
    def open_folder(cls, run_cfg, name: Optional[str] = None) -> RunFolder:
        """The folder of this run: a new one, or with ``resume_ckpt_path: auto`` that of the newest run in
        ``output_dir`` that has a good checkpoint. Rank 0 chooses and locks it.

        Raises:
            RunFolderError: if another run is using that folder.
            CheckpointError: if the checkpoint that ``resume_ckpt_path`` names is damaged, or no run's.
        """
        opened: List[RunFolder] = []

        def choose() -> Tuple[Path, Optional[Path], bool]:
            output_dir = Path.cwd() / Path(run_cfg.output_dir).expanduser()
            resume = run_cfg.get("resume_ckpt_path", None)
            checkpoint = None
            if resume and resume != "auto":
                checkpoint = WeightFile("checkpoint to resume from", resume, "run.resume_ckpt_path").fetch()
                problem = checkpoint_problem(checkpoint)
                if problem is not None:
                    raise CheckpointError(problem)
            folder = find_newest_run(output_dir) if resume == "auto" else None
            if folder is None:
                folder = RunFolder.create(output_dir, name)
                folder.checkpoint = checkpoint
                if resume == "auto":
                    logging.info("no run in %s has a checkpoint to go on from: starting a new one", output_dir)
            opened.append(folder)
            return folder.path, folder.checkpoint, folder.continues

        chosen = on_main(choose)
        return opened[0] if opened else RunFolder(*chosen)

    def setup_output_dir(self) -> None:
        """Write where the user stands, into a folder of this run alone; LAVIS joins the path to its own package
        (runner_base.py:343), and cannot be set up twice in one process (:357)."""
        if self.folder is None:
            self.folder = self.open_folder(self.config.run_cfg, self.job_id)
        self.output_dir = self.folder.path
        self.job_id = self.output_dir.name
        self.result_dir = self.output_dir / "result"
        on_main(lambda: self.result_dir.mkdir(parents=True, exist_ok=True))  # LAVIS's tasks write here from all ranks
        set_registry_path("output_dir", self.output_dir)
        set_registry_path("result_dir", self.result_dir)

    # ------------------------------------------------------------ model and optimizer

    @property
    def model(self):
        """The model on its device, wrapped for several processes; LAVIS's is None where the model already is on the
        device (runner_base.py:85)."""
        if self._wrapped_model is None:
            model = self._model
            if not self.cuda_enabled:
                model = model.float()  # as LAVIS's load_model: half precision is slow or missing on CPUs
            for parameter in model.parameters():
                if parameter.requires_grad:  # a GradScaler cannot unscale fp16 gradients
                    parameter.data = parameter.data.float()
            ignored: List[str] = []
            if self.settings.fsdp:
                ignored = shard_language_model(model, self.device.type)
            self._model = model.to(self.device)
            if self.use_distributed:
                # DDP has no public way to leave parameters alone; this is what its own tests use.
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._model, ignored)
                self._wrapped_model = DistributedDataParallel(
                    self._model,
                    device_ids=[self.config.run_cfg.gpu] if self.cuda_enabled else None,
                    broadcast_buffers=False,  # all buffers are frozen
                )
            else:
                self._wrapped_model = self._model
        return self._wrapped_model

    @property
    def amp(self):
        """``run.amp``: see `lavis_kvmod.system.precision`."""
        return self.settings.amp

    @property
    def scaler(self):
        """A gradient scaler for fp16 on a GPU, else None."""
        if self._scaler is None and needs_grad_scaler(self.amp, self.device.type):
            self._scaler = torch.amp.GradScaler(self.device.type)
        return self._scaler

    def autocast(self):
        """The run's autocast context."""
        dtype = amp_dtype(self.amp, self.device.type)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    @property
    def optimizer(self):
        """AdamW over the model's own parameter groups, else LAVIS's."""
        if self._optimizer is None:
            model = self.unwrap_dist_model(self.model)
            self._optimizer = build_optimizer(model, self.config.run_cfg) or super().optimizer
        return self._optimizer

    @property
    def schedule(self) -> Schedule:
        """Learning rates by position."""
        if self._schedule is None:
            self._schedule = Schedule(self.lr_scheduler, self.optimizer)
        return self._schedule

    @property
    def gradient_step(self) -> GradientStep:
        """What adds up gradients and steps."""
        if self._gradient_step is None:
            self._gradient_step = GradientStep(
                model=self.model,
                inner=self.unwrap_dist_model(self.model),
                train_step=self.task.train_step,
                optimizer=self.optimizer,
                scaler=self.scaler,
                autocast=self.autocast,
                max_grad_norm=self.settings.max_grad_norm,
                world_size=get_world_size(),
                device=self.device,
            )
        return self._gradient_step

    # ------------------------------------------------------------ data

    @property
    def valid_splits(self) -> List[str]:
        """As LAVIS's, which logs a line at each look where there are none."""
        return self.settings.valid_splits

    @property
    def dataloaders(self) -> Dict[str, Any]:
        """A loader for each split; LAVIS's opens a CUDA stream (dataloader_utils.py:56), drops the last batch, and so
        trains on nothing where there are fewer samples than a batch (:536).

        Raises:
            ValueError: for an empty split.
            NotImplementedError: for streamed data sets that cannot make a loader themselves.
        """
        if self._dataloaders is None:
            is_mixed = not self.evaluate_only
            self.datasets, self._dataloaders = make_loaders(
                self.datasets,
                self._loader,
                seed=int(self.config.run_cfg.seed),
                ratios=self.settings.train_dataset_ratios if is_mixed else None,
                num_batches=self.settings.iters_per_inner_epoch if is_mixed else None,
            )
        return self._dataloaders

    def _loader(self, split: str, dataset: Any) -> Loader:
        run = self.config.run_cfg
        used = [*self.valid_splits, *self.test_splits, *([] if self.evaluate_only else self.train_splits)]
        return make_loader(
            split,
            dataset,
            is_train=split in self.train_splits,
            may_be_empty=split not in used,
            batch_size=int(run.batch_size_train if split == "train" else run.batch_size_eval),
            num_workers=int(run.num_workers),
            seed=int(run.seed),
            rank=get_rank(),
            world_size=get_world_size(),
            pin_memory=self.cuda_enabled,
            group_by_image=self._groups_by_image(),
        )

    @property
    def max_epoch(self) -> int:
        """``run.max_epoch``; with ``run.max_iters`` as many as have so many batches, the last one cut short."""
        max_iters = self.settings.max_iters
        if max_iters is None or self.evaluate_only:
            return int(self.config.run_cfg.max_epoch)
        return -(-int(max_iters) // len(self.train_loader))

    def batches_in(self, epoch: int) -> int:
        """How many batches of an epoch are trained on."""
        whole, max_iters = len(self.train_loader), self.settings.max_iters
        return whole if max_iters is None else min(whole, int(max_iters) - epoch * whole)

    def _groups_by_image(self) -> bool:
        """``run.group_by_image``; ``auto`` does where a model takes such batches, and questions are answered.

        Raises:
            ValueError: if the model does not.
        """
        wanted, can = self.settings.group_by_image, hasattr(self._model, "soft_prompts")
        if wanted == "auto":
            return can and getattr(self.task, "target", None) == "answer"
        if wanted and not can:
            raise ValueError(f"run.group_by_image: {type(self._model).__name__} takes an image for each question")
        return bool(wanted)

    # ------------------------------------------------------------ the run

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
                with self.signals.nothing_to_save():
                    logs = self.evaluate("best")
            logging.info("Training time %s", datetime.timedelta(seconds=round(time.monotonic() - start)))
            return logs
        finally:
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

    def _is_best(self, metrics: Dict[str, Any], split: str, epoch: int) -> bool:
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

    def evaluate(self, cur_epoch="best", skip_reload: bool = False) -> Optional[Dict[str, Any]]:
        """Metrics of each test split (rank 0), with the best checkpoint unless ``skip_reload``."""
        if cur_epoch == "best" and not skip_reload and not from_main((self.output_dir / BEST).is_file()):
            logging.warning("there is no %s: testing with the newest weights", self.output_dir / BEST)
            skip_reload = True
        logs = {}
        for split in self.test_splits:
            logs[split] = self.eval_epoch(split, cur_epoch, skip_reload)
            if logs[split] is not None:
                self.log_stats(logs[split], split)
                logging.info("%s: %s", split, _short(logs[split]))
        return logs if is_main_process() else None

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch, skip_reload: bool = False):
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

    def log_stats(self, stats: Dict[str, Any], split_name: str) -> None:
        """A line of log.txt (rank 0)."""
        self.log.facts(split_name, stats, self._batches_done())

    @main_process
    def log_parts(self) -> None:
        """The table of parts: parameters, trained or frozen, dtype."""
        model = self.unwrap_dist_model(self.model)
        if hasattr(model, "parts"):
            logging.info("model parts:\n%s", parts_table(model.parts()))


def _short(metrics: Dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if isinstance(value, (int, float)))

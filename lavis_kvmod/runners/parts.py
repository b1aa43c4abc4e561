"""What a run consists of, each part made when it is first asked for: folder, model, optimizer, step, data."""

import contextlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Tuple

import torch
from lavis.common.dist_utils import is_main_process
from lavis.runners.runner_base import RunnerBase
from torch import nn

from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.runners.compiling import Plan, begin_step, compile_parts, plan
from lavis_kvmod.runners.loaders import make_loader, make_loaders
from lavis_kvmod.runners.optimizers import build_optimizer
from lavis_kvmod.runners.profiling import BatchProfiler
from lavis_kvmod.runners.run_folder import RunFolder, checkpoint_problem, find_newest_run
from lavis_kvmod.runners.run_log import RunLog
from lavis_kvmod.runners.schedules import Schedule
from lavis_kvmod.runners.settings import RunnerSettings
from lavis_kvmod.runners.signals import StopSignals
from lavis_kvmod.runners.steps import GradientStep
from lavis_kvmod.runners.training_state import RunState
from lavis_kvmod.system.distributed import data_parallel, get_rank, get_world_size, on_main
from lavis_kvmod.system.lavis_paths import set_registry_path
from lavis_kvmod.system.paths import absolute
from lavis_kvmod.system.precision import amp_dtype, needs_grad_scaler
from lavis_kvmod.system.sharding import shard_language_model
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import WeightFile

__all__ = ["RunParts"]

# About how many target tokens a sample has.
_TOKENS = 4


class RunParts(RunnerBase):
    """LAVIS's RunnerBase with parts of ours.

    Args:
        cfg, task, model, datasets, job_id: LAVIS's.
        folder: the run's, if it is open already (see `open_folder`).
    """

    # LAVIS's, which has no types.
    device: torch.device
    output_dir: Path
    datasets: Dict[str, Any]
    _model: nn.Module
    _wrapped_model: Optional[nn.Module]
    _optimizer: Optional[torch.optim.Optimizer]
    _scaler: Optional[torch.amp.GradScaler]
    _dataloaders: Optional[Dict[str, Any]]

    def __init__(
        self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str, folder: Optional[RunFolder] = None
    ):
        self._opened = folder
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
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
    def open_folder(cls, run_cfg: Any, name: Optional[str] = None) -> RunFolder:
        """The folder of this run: a new one, or with ``resume_ckpt_path: auto`` that of the newest run in
        ``output_dir`` that has a good checkpoint. Rank 0 chooses and locks it.

        Raises:
            RunFolderError: if another run is using that folder.
            CheckpointError: if the checkpoint that ``resume_ckpt_path`` names is damaged, or no run's.
        """
        opened: List[RunFolder] = []

        def choose() -> Tuple[Path, Optional[Path], bool]:
            output_dir = absolute(run_cfg.output_dir)
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
        self.folder: RunFolder = self._opened or self.open_folder(self.config.run_cfg, self.job_id)
        self.output_dir = self.folder.path
        self.job_id: str = self.output_dir.name
        self.result_dir = self.output_dir / "result"
        on_main(lambda: self.result_dir.mkdir(parents=True, exist_ok=True))  # LAVIS's tasks write here from all ranks
        set_registry_path("output_dir", self.output_dir)
        set_registry_path("result_dir", self.result_dir)

    # ------------------------------------------------------------ model and optimizer

    @property
    def model(self) -> nn.Module:
        """The model on its device, wrapped for several processes; LAVIS's is None where the model already is on the
        device (runner_base.py:85)."""
        if self._wrapped_model is None:
            model = self._model
            if not self.cuda_enabled:
                model = model.float()  # as LAVIS's load_model: half precision is slow or missing on CPUs
            for parameter in model.parameters():
                if parameter.requires_grad:  # a GradScaler cannot unscale fp16 gradients
                    parameter.data = parameter.data.float()
            if self.settings.fsdp:
                shard_language_model(model, self.device.type)
            self._model = model.to(self.device)
            if not self.evaluate_only:
                compile_parts(self._model, self.compile_plan, self.device)
            self._wrapped_model = self._model
            if self.use_distributed:
                self._wrapped_model = data_parallel(self._model, self.config.run_cfg.gpu if self.cuda_enabled else None)
        return self._wrapped_model

    @cached_property
    def compile_plan(self) -> Plan:
        """What ``run.compile`` and ``run.cuda_graphs`` come to."""
        settings = self.settings
        return plan(settings.compile, settings.cuda_graphs, self.device.type, fsdp=settings.fsdp)

    @property
    def amp(self) -> Any:
        """``run.amp``: see `lavis_kvmod.system.precision`."""
        return self.settings.amp

    @property
    def scaler(self) -> Optional[torch.amp.GradScaler]:
        """A gradient scaler for fp16 on a GPU, else None."""
        if self._scaler is None and needs_grad_scaler(self.amp, self.device.type):
            self._scaler = torch.amp.GradScaler(self.device.type)
        return self._scaler

    def autocast(self) -> ContextManager:
        """The run's autocast context."""
        dtype = amp_dtype(self.amp, self.device.type)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the model's own parameter groups, else LAVIS's."""
        if self._optimizer is None:
            model = self.unwrap_dist_model(self.model)
            self._optimizer = build_optimizer(model, self.config.run_cfg) or super().optimizer
        return self._optimizer

    @cached_property
    def profiler(self) -> BatchProfiler:
        """What looks at some batches, if ``run.profiler`` asks for it."""
        return BatchProfiler(self.settings.profiler, self.output_dir, self.device)

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
                train_step=self._train_step,
                optimizer=self.optimizer,
                scaler=self.scaler,
                autocast=self.autocast,
                max_grad_norm=self.settings.max_grad_norm,
                usual_weight=_TOKENS * int(self.config.run_cfg.batch_size_train),
                world_size=get_world_size(),
                device=self.device,
            )
        return self._gradient_step

    def _train_step(self, model: nn.Module, samples: Dict[str, Any]) -> Any:
        begin_step(self.compile_plan)
        return self.task.train_step(model=model, samples=samples)

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

    # ------------------------------------------------------------ where it stands

    def _batches_done(self) -> int:
        if "train" not in self.dataloaders:  # in an evaluation
            return 0
        return self.state.epoch * len(self.train_loader) + self.state.batch

    def log_stats(self, stats: Dict[str, Any], split_name: str) -> None:
        """A line of log.txt (rank 0)."""
        self.log.facts(split_name, stats, self._batches_done())

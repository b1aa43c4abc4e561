"""``runner_kvmod``: LAVIS's RunnerBase, on CPU and CUDA, in one process or many, that can be killed at any time.

It takes LAVIS's run section and tasks unchanged (it calls ``train_step``, ``evaluation`` and ``after_evaluation`` of
any task). What it mends, with the place in LAVIS 1.0.2, stands at each override. The parts: `loaders` (what a batch
holds), `steps` (one optimizer step), `schedules`, `training_state` (what a checkpoint holds), `run_folder` (where it
goes), `run_log`, `signals`.
"""

import contextlib
import datetime
import logging
import math
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from lavis.common.dist_utils import is_main_process, main_process
from lavis.datasets.data_utils import concat_datasets, prepare_sample, reorg_datasets_by_split
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from lavis_kvmod import checkpoints
from lavis_kvmod.checkpoints import CheckpointError
from lavis_kvmod.datasets.bad_samples import BadSampleCounter
from lavis_kvmod.distributed import barrier, from_main, gather, get_rank, get_world_size, on_main
from lavis_kvmod.models.parts import parts_table
from lavis_kvmod.plugin import set_registry_path
from lavis_kvmod.precision import amp_dtype, needs_grad_scaler
from lavis_kvmod.progress import Progress
from lavis_kvmod.runners import resuming
from lavis_kvmod.runners.environment import environment
from lavis_kvmod.runners.loaders import PADDING, EpochLoader, EvalLoader, StreamLoader, stay_calm, stream_of
from lavis_kvmod.runners.optimizers import build_optimizer
from lavis_kvmod.runners.pace import Pace
from lavis_kvmod.runners.run_folder import BEST, RunFolder, checkpoint_problem, find_newest_run
from lavis_kvmod.runners.run_log import RunLog
from lavis_kvmod.runners.schedules import Schedule
from lavis_kvmod.runners.signals import Stopped, StopSignals
from lavis_kvmod.runners.steps import GradientStep
from lavis_kvmod.runners.training_state import RunState, get_rng_state, set_rng_state
from lavis_kvmod.sharding import shard_language_model

KEEP_LAST = 2
MAX_BAD_STEPS = 3


class RunnerKVMod(RunnerBase):
    """Train, validate and test a model by a LAVIS run section; docs/training.md tells what it promises.

    Args:
        cfg, task, model, datasets, job_id: LAVIS's.
        folder: the run's, if it is open already (see `open_folder`).
    """

    def __init__(self, cfg, task, model, datasets, job_id, folder: Optional[RunFolder] = None):
        self.folder = folder
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        self.state = RunState()
        self.log = RunLog(self.output_dir, active=is_main_process())
        self.signals = StopSignals()
        self._gradient_step: Optional[GradientStep] = None
        self._schedule: Optional[Schedule] = None

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
            resume = None if run_cfg.evaluate else run_cfg.get("resume_ckpt_path", None)
            checkpoint = None
            if resume and resume != "auto":
                checkpoint = Path(resume).expanduser()
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
        self.result_dir.mkdir(parents=True, exist_ok=True)
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
            if self._run_key("fsdp", False):
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
        """``run.amp``: see `lavis_kvmod.precision`."""
        return self._run_key("amp", False)

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
            max_norm = self._run_key("max_grad_norm", None)
            self._gradient_step = GradientStep(
                model=self.model,
                inner=self.unwrap_dist_model(self.model),
                train_step=self.task.train_step,
                optimizer=self.optimizer,
                scaler=self.scaler,
                autocast=self.autocast,
                max_grad_norm=None if max_norm is None else float(max_norm),
                world_size=get_world_size(),
                device=self.device,
            )
        return self._gradient_step

    def _run_key(self, key: str, default):
        value = self.config.run_cfg.get(key, None)
        return default if value is None else value

    # ------------------------------------------------------------ data

    @property
    def dataloaders(self) -> Dict[str, Any]:
        """A loader for each split; LAVIS's opens a CUDA stream (dataloader_utils.py:56), drops the last batch, and so
        trains on nothing where there are fewer samples than a batch (:536).

        Raises:
            ValueError: for an empty split.
            NotImplementedError: for streamed data sets that cannot make a loader themselves.
        """
        if self._dataloaders is None:
            by_split = reorg_datasets_by_split(self.datasets)
            self.datasets = {split: _joined(split, sets) for split, sets in by_split.items()}
            self._dataloaders = {split: self._loader(split, data) for split, data in sorted(self.datasets.items())}
        return self._dataloaders

    def _loader(self, split: str, dataset):
        run = self.config.run_cfg
        is_train = split in self.train_splits
        settings = dict(
            batch_size=int(run.batch_size_train if split == "train" else run.batch_size_eval),
            num_workers=int(run.num_workers),
            seed=int(run.seed),
            rank=get_rank(),
            world_size=get_world_size(),
            pin_memory=self.cuda_enabled,
        )
        stream = stream_of(dataset)
        if stream is not None:
            return StreamLoader(stream.make_loader(is_train=is_train, worker_init_fn=stay_calm, **settings))
        if isinstance(dataset, (tuple, list)) or not hasattr(dataset, "__len__"):
            raise NotImplementedError(
                f"split {split!r}: runner_kvmod reads map-style data sets, and one streamed set that has make_loader; "
                "use runner_base for other webdataset pipelines"
            )
        used = [*self.valid_splits, *self.test_splits, *([] if self.evaluate_only else self.train_splits)]
        if len(dataset) == 0 and split in used:
            raise ValueError(f"split {split!r} of the data set is empty")
        logging.info("%s: %d samples", split, len(dataset))
        make = EpochLoader if is_train else EvalLoader
        return make(dataset, collate=getattr(dataset, "collater", None), **settings)

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
        self.log.start(
            self._resolved_config(),
            self._batches_done(),
            tensorboard=self._run_key("tensorboard", "auto"),
            wandb=self._run_key("wandb", False),
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
        with self.signals.nothing_to_save() if self.valid_splits else contextlib.nullcontext():
            is_best = self.validate(epoch)
        state.start_epoch(epoch + 1)
        # The best first: should the second be interrupted, the epoch's validation is repeated and writes both.
        if is_best:
            self._save_checkpoint(epoch, is_best=True)
        self._save_checkpoint(epoch, in_place=bool(self.valid_splits))
        barrier()  # no rank may look for a file that rank 0 is still writing

    def _out_of_patience(self) -> bool:
        patience = self._run_key("patience", None)
        waited = self.state.validations_since_best
        if patience is None or waited < patience:
            return False
        logging.info("stopping early: %d validations without a better one than epoch %s", waited, self.state.best_epoch)
        return True

    def validate(self, epoch: int) -> bool:
        """Evaluate the validation splits; whether the first one's ``agg_metrics`` is the best so far.

        Any value may be the best, also 0 or less; LAVIS saves only what is above 0 on a split named "val"
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
        best = self.state.best_agg_metric
        if best is not None and not value > best:
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

    # ------------------------------------------------------------ one epoch

    def train_epoch(self, epoch: int) -> Dict[str, Any]:
        """Train what is left of an epoch; returns its facts for log.txt.

        Gradients are accumulated over ``accum_grad_iters`` batches, averaged, and what is left at the epoch's end is
        not lost (LAVIS sums them and lets leftovers run into the next epoch, base_task.py:215).

        Raises:
            FloatingPointError: see `train`, naming the batch.
            BadDataError: if the share of samples that cannot be read is above the data set's ``max_bad_share``.
            Stopped: see `train`.
        """
        state, model, loader = self.state, self.model, self.train_loader
        if state.epoch != epoch:
            state.start_epoch(epoch)
        model.train()
        loader.set_epoch(epoch, state.batch)
        total = len(loader)
        self._bad_samples = self._count_bad_samples()
        progress = Progress(loader, f"epoch {epoch}", self.log_freq, start=state.batch, total=total)
        pace = Pace(total * self.max_epoch, done=self._batches_done(), samples=state.samples)
        samples = None
        for i, samples in enumerate(progress, start=state.batch):
            pace.got_data()
            samples = prepare_sample(samples, cuda_enabled=self.cuda_enabled)
            samples.update(epoch=epoch, num_iters_per_epoch=total, iters=i)
            is_last, stop = self._train_batch(samples, i, total)
            state.batch = i + 1
            pace.done_batch()
            rate = self.optimizer.param_groups[0]["lr"]
            progress.status(f"loss {state.mean_loss():.4f} lr {rate:.2e}")
            if (i + 1) % self.log_freq == 0 or i + 1 == total:
                facts = {
                    "epoch": epoch,
                    "batch": i + 1,
                    "loss": round(state.mean_loss(), 4),
                    "lr": rate,
                    **pace.facts(state.samples, self.device),
                }
                self.log.timing(facts, self._batches_done())
            if is_last and state.batch < total:  # at the end of the epoch there is more to save
                self._save_in_between(epoch, stop)
        if state.batch != total:
            raise RuntimeError(f"the loader of the training data promised {total} batches and gave {state.batch}")
        return self._epoch_facts(epoch, samples)

    def _train_batch(self, samples: Dict[str, Any], i: int, total: int) -> Tuple[bool, bool]:
        """Whether a step was due, and whether some rank was asked to stop."""
        state, accumulate = self.state, self.accum_grad_iters
        group_start = i - i % accumulate
        group_size = min(accumulate, total - group_start)
        is_last = i + 1 == group_start + group_size
        self.schedule.set(epoch=state.epoch, step=i // accumulate, steps_per_epoch=-(-total // accumulate))
        bad_samples = samples.pop("bad_samples", [])
        size = 0 if samples.get(PADDING) else _num_samples(samples)
        num_samples, num_bad, stop = self.gradient_step.add(
            samples,
            num_batches=group_size,
            is_last=is_last,
            counts=[size, len(bad_samples), self.signals.received is not None],
        )
        state.samples += int(num_samples)
        bad_samples = gather(bad_samples) if num_bad else []
        state.bad_samples = list(dict.fromkeys([*state.bad_samples, *bad_samples]))
        self._bad_samples.update(int(num_samples), bad_samples)
        if is_last:
            self._step(i)
        if not self.use_distributed:  # nobody to agree with, so what came during the step counts too
            stop = self.signals.received is not None
        return is_last, bool(stop)

    def _step(self, i: int) -> None:
        state = self.state
        result = self.gradient_step.finish()
        if result.problem is None:
            state.steps_counted += 1
            state.loss_sum += result.loss
            if math.isfinite(result.grad_norm):  # fp16's scaler finds its scale by overflowing now and then
                state.norms_counted += 1
                state.grad_norm_sum += result.grad_norm
                state.grad_norm_max = max(state.grad_norm_max, result.grad_norm)
            return
        state.bad_steps += 1
        allowed = int(self._run_key("max_bad_steps", MAX_BAD_STEPS))
        where = f"{result.problem} in epoch {state.epoch}, batch {i}"
        if state.bad_steps > allowed:
            raise FloatingPointError(
                f"{where}; {state.bad_steps} steps of this run were bad, and max_bad_steps is {allowed}. The last "
                f"checkpoint in {self.output_dir} is intact"
            )
        logging.warning("%s: step skipped (%d of at most %d)", where, state.bad_steps, allowed)
        self.log_stats({"bad_step": result.problem, "epoch": state.epoch, "batch": i}, "train")

    def _count_bad_samples(self) -> BadSampleCounter:
        """A counter that knows those met before a resume."""
        dataset = self.datasets["train"]
        parts = getattr(dataset, "datasets", [dataset])
        shares = [part.max_bad_share for part in parts if hasattr(part, "max_bad_share")]
        log = logging.warning if is_main_process() else logging.debug
        counter = BadSampleCounter(max(shares), log=log) if shares else BadSampleCounter(log=log)
        counter.update(self.state.samples, self.state.bad_samples)
        return counter

    def _save_in_between(self, epoch: int, stop: bool) -> None:
        every = self._run_key("save_every_n_iters", None)
        done, before = self.state.batch, self.state.batch - self.accum_grad_iters
        if stop or (every is not None and done // every > before // every):
            self._save_checkpoint(epoch)
        if stop:
            barrier()
            raise Stopped(next(signum for signum in gather([self.signals.received]) if signum is not None))

    def _epoch_facts(self, epoch: int, samples: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        state = self.state
        rates = self.schedule.rates()
        facts: Dict[str, Any] = {
            "epoch": epoch,
            "loss": f"{state.mean_loss():.4f}",
            "lr": f"{rates.pop('lr'):.3e}",
            "grad_norm": f"{state.grad_norm_sum / max(state.norms_counted, 1):.4f}",
            "grad_norm_max": f"{state.grad_norm_max:.4f}",
        }
        if rates:
            facts["lrs"] = {name: f"{rate:.3e}" for name, rate in rates.items()}
        share = self._prefix_attention_share(samples)
        if share is not None:
            facts["prefix_attention_share"] = f"{share:.4f}"
        num_bad = self._bad_samples.report(epoch)
        if num_bad:
            facts["bad_samples"] = num_bad
        logging.info("train, epoch %d: loss %s", epoch, facts["loss"])
        return facts

    @torch.no_grad()
    def _prefix_attention_share(self, samples: Optional[Dict[str, Any]]) -> Optional[float]:
        """On the epoch's last batch, without touching the run's randomness."""
        model = self.unwrap_dist_model(self.model)
        if samples is None or not hasattr(model, "prefix_attention_share"):
            return None
        randomness = get_rng_state(self.device)
        model.eval()
        with self.autocast():
            share = model.prefix_attention_share(samples)
        model.train()
        set_rng_state(randomness, self.device)
        return share

    def _batches_done(self) -> int:
        if "train" not in self.dataloaders:  # in an evaluation
            return 0
        return self.state.epoch * len(self.train_loader) + self.state.batch

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

    # ------------------------------------------------------------ checkpoints and logs

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False, in_place: bool = False) -> None:
        """Write what is trained, and all that a resumed run needs to go on as if nothing had happened. All ranks call
        it; rank 0 writes.

        Raises:
            RunFolderError: if it cannot be written.
            FloatingPointError: if a parameter is not finite; what is on the disk stays.
        """
        randomness = gather([get_rng_state(self.device)])
        # On all ranks: asked for its state, a sharded layer lets go of what it gathered.
        weights = checkpoints.trained_state_dict(self.unwrap_dist_model(self.model))

        def write() -> None:
            _check_finite(weights)
            contents = {
                "model": weights,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "config": self._resolved_config(),
                "epoch": cur_epoch,
                "best_agg_metric": self.state.best_agg_metric,
                "best_epoch": self.state.best_epoch,
                "state": self.state.to_dict(),
                "data": resuming.data_order(self.config.run_cfg, self.train_loader, get_world_size()),
                "rng": randomness,
                "log": self.log.text(),
            }
            if is_best:
                path = self.folder.save_best(contents)
            else:
                keep = int(self._run_key("keep_last", KEEP_LAST))
                path = self.folder.save_last(contents, keep=keep, in_place=in_place)
            logging.info("saved %s (epoch %d)", path, cur_epoch)

        on_main(write)

    def _reload_best_model(self, model):
        """Load the best checkpoint's weights (LAVIS fails if none was saved, runner_base.py:597).

        Raises:
            CheckpointError: if it is damaged.
        """
        path = self.output_dir / BEST
        problem = on_main(lambda: checkpoint_problem(path))
        if problem is not None:
            raise CheckpointError(problem)
        self._load_trained(model, checkpoints.read(path), path)
        return model

    def _load_checkpoint(self, url_or_filename: str) -> None:
        """Resume: weights, optimizer, scaler, position, best metric, randomness and log (LAVIS loads strictly what it
        saved in part, runner_base.py:628, and forgets the rest).

        Raises:
            FileNotFoundError, CheckpointError: if it cannot be read or does not fit.
        """
        contents = checkpoints.read(url_or_filename)
        resuming.check(contents, url_or_filename)
        resuming.warn_of_changes(contents, self._resolved_config(), get_world_size())
        self._load_trained(self.unwrap_dist_model(self.model), contents, url_or_filename)
        resuming.load_optimizer(self.optimizer, contents["optimizer"], url_or_filename)
        if self.scaler is not None and contents.get("scaler"):
            self.scaler.load_state_dict(contents["scaler"])
        self.state = RunState.from_checkpoint(contents)
        order = resuming.data_order(self.config.run_cfg, self.train_loader, get_world_size())
        resuming.find_position(self.state, contents.get("data"), order)
        resuming.restore_randomness(contents.get("rng"), self.device, get_rank(), get_world_size())
        if is_main_process() and "log" in contents:
            self.log.restore(contents["log"])
        if not on_main(lambda: resuming.bring_best(self.state, Path(url_or_filename), self.output_dir / BEST)):
            self.state.best_agg_metric = self.state.best_epoch = None
            self.state.validations_since_best = 0
        self.start_epoch = self.state.epoch
        logging.info("resumed from %s at epoch %d, batch %d", url_or_filename, self.state.epoch, self.state.batch)

    @staticmethod
    def _load_trained(model, state: Dict[str, Any], source) -> None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        frozen = set(model.state_dict()) - trained
        checkpoints.load_weights(model, state["model"], source=source, may_lack=frozen)

    def _resolved_config(self) -> Dict[str, Any]:
        return OmegaConf.to_container(self.config.config, resolve=True)

    def log_stats(self, stats: Dict[str, Any], split_name: str) -> None:
        """A line of log.txt (rank 0)."""
        self.log.facts(split_name, stats, self._batches_done())

    @main_process
    def log_parts(self) -> None:
        """The table of parts: parameters, trained or frozen, dtype."""
        model = self.unwrap_dist_model(self.model)
        if hasattr(model, "parts"):
            logging.info("model parts:\n%s", parts_table(model.parts()))


def _joined(split: str, datasets: List[Any]):
    """One data set of a split's: LAVIS's concatenation, or the only one if it streams."""
    if len(datasets) == 1 and stream_of(datasets[0]) is not None:
        return datasets[0]
    if any(stream_of(dataset) is not None for dataset in datasets):
        raise NotImplementedError(f"split {split!r}: a streamed data set cannot be mixed with others; got {datasets}")
    return concat_datasets({split: datasets})[split]


def _num_samples(samples: Dict[str, Any]) -> int:
    for key in ("image", "text_input", "instance_id"):
        if key in samples:
            return len(samples[key])
    return 1


def _check_finite(weights: Dict[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite: not saved; the checkpoints on the disk stay as they were")


def _short(metrics: Dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if isinstance(value, (int, float)))

"""``runner_kvmod``: LAVIS's RunnerBase, on CPU and CUDA, in one process or many.

It takes LAVIS's run section and tasks unchanged (it calls ``train_step``, ``evaluation`` and ``after_evaluation`` of
any task). What it mends, with the place in LAVIS 1.0.2, stands at each override.
"""

import contextlib
import datetime
import logging
import math
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from lavis.common.dist_utils import is_main_process, main_process
from lavis.datasets.data_utils import prepare_sample
from lavis.runners.runner_base import RunnerBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lavis_kvmod import checkpoints
from lavis_kvmod.distributed import barrier, get_rank, get_world_size
from lavis_kvmod.models.parts import parts_table
from lavis_kvmod.plugin import set_registry_path
from lavis_kvmod.precision import amp_dtype, needs_grad_scaler
from lavis_kvmod.progress import Progress

BEST, LAST = "checkpoint_best.pth", "checkpoint_last.pth"


class RunnerKVMod(RunnerBase):
    """Train, validate and test a model by a LAVIS run section.

    Beside LAVIS's keys, ``run`` may hold ``amp: bf16`` and ``max_grad_norm`` (gradient clipping).
    """

    def __init__(self, cfg, task, model, datasets, job_id):
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        self.best_agg_metric: Optional[float] = None
        self.best_epoch: Optional[int] = None

    def setup_output_dir(self) -> None:
        """Write where the user stands; LAVIS joins the path to its own package (runner_base.py:343), and cannot be
        set up twice in one process (:357)."""
        self.output_dir = Path.cwd() / Path(self.config.run_cfg.output_dir).expanduser() / self.job_id
        self.result_dir = self.output_dir / "result"
        self.result_dir.mkdir(parents=True, exist_ok=True)
        set_registry_path("output_dir", self.output_dir)
        set_registry_path("result_dir", self.result_dir)

    # ------------------------------------------------------------ model and optimiser

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
            self._model = model.to(self.device)
            if self.use_distributed:
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
        return self.config.run_cfg.get("amp", False)

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

    # ------------------------------------------------------------ data

    def create_loaders(
        self, datasets, num_workers, batch_sizes, is_trains, collate_fns, dataset_ratios=None
    ) -> List[DataLoader]:
        """A loader for each split; LAVIS's opens a CUDA stream (dataloader_utils.py:56), drops the last batch, and so
        trains on nothing where there are fewer samples than a batch (:536).

        Raises:
            ValueError: for an empty split.
            NotImplementedError: for streamed data sets.
        """
        loaders = []
        splits = sorted(self.datasets)  # the order RunnerBase.dataloaders builds these lists in
        for split, dataset, batch_size, is_train, collate in zip(splits, datasets, batch_sizes, is_trains, collate_fns):
            if isinstance(dataset, (tuple, list)) or not hasattr(dataset, "__len__"):
                raise NotImplementedError(
                    f"split {split!r}: runner_kvmod reads map-style data sets; use runner_base for webdataset pipelines"
                )
            used = [*self.valid_splits, *self.test_splits, *([] if self.evaluate_only else self.train_splits)]
            if len(dataset) == 0 and split in used:
                raise ValueError(f"split {split!r} of the data set is empty")
            loaders.append(
                DataLoader(
                    dataset,
                    batch_size=batch_size,
                    sampler=self._sampler(dataset, is_train),
                    num_workers=num_workers,
                    pin_memory=self.cuda_enabled,
                    collate_fn=collate,
                    drop_last=False,
                )
            )
        return loaders

    def _sampler(self, dataset, is_train: bool):
        rank, world_size = get_rank(), get_world_size()
        if is_train:  # its order depends on seed and epoch alone
            return DistributedSampler(dataset, world_size, rank, shuffle=True, seed=self.config.run_cfg.seed)
        # DistributedSampler would repeat samples to give all ranks as many; evaluation counts each once.
        return range(rank, len(dataset), world_size)

    # ------------------------------------------------------------ the run

    def train(self) -> Optional[Dict[str, Dict[str, Any]]]:
        """Train, keep the last and the best checkpoint, then look at the test splits once, with the best.

        Returns:
            The test splits' metrics (rank 0).
        """
        start = time.monotonic()
        if self.evaluate_only:
            self.validate(0)
            return self.evaluate(skip_reload=True)
        self.log_parts()
        self.log_config()
        if self.resume_ckpt_path is not None:
            self._load_checkpoint(self.resume_ckpt_path)

        for epoch in range(self.start_epoch, self.max_epoch):
            self.log_stats(self.train_epoch(epoch), "train")
            is_best = self.validate(epoch)
            self._save_checkpoint(epoch)
            if is_best:
                self._save_checkpoint(epoch, is_best=True)
            barrier()  # no rank may look for a file that rank 0 is still writing

        logs = self.evaluate("best")
        logging.info("Training time %s", datetime.timedelta(seconds=round(time.monotonic() - start)))
        return logs

    def validate(self, epoch: int) -> bool:
        """Evaluate the validation splits; whether the first one's ``agg_metrics`` is the best so far (rank 0).

        Any value may be the best, also 0 or less; LAVIS saves only what is above 0 on a split named "val"
        (runner_base.py:390). Without validation splits the newest epoch counts as the best.
        """
        is_best = not self.valid_splits
        for i, split in enumerate(self.valid_splits):
            metrics = self.eval_epoch(split, epoch)
            if metrics is None:  # not rank 0
                continue
            if i == 0:
                value = metrics.get("agg_metrics")
                if value is None:
                    raise KeyError(
                        f"task {type(self.task).__name__} gave no 'agg_metrics' for split {split!r}: the best "
                        f"checkpoint cannot be told; it gave {sorted(metrics)}"
                    )
                is_best = self.best_agg_metric is None or value > self.best_agg_metric
                if is_best:
                    self.best_agg_metric, self.best_epoch = value, epoch
            self.log_stats({**metrics, "epoch": epoch, "best_epoch": self.best_epoch}, split)
            logging.info("%s, epoch %d: %s", split, epoch, _short(metrics))
        return is_best

    def evaluate(self, cur_epoch="best", skip_reload: bool = False) -> Optional[Dict[str, Any]]:
        """Metrics of each test split (rank 0), with the best checkpoint unless ``skip_reload``."""
        logs = {}
        for split in self.test_splits:
            logs[split] = self.eval_epoch(split, cur_epoch, skip_reload)
            if logs[split] is not None:
                self.log_stats(logs[split], split)
                logging.info("%s: %s", split, _short(logs[split]))
        return logs if is_main_process() else None

    def train_epoch(self, epoch: int) -> Dict[str, str]:
        """One pass over the training data.

        Gradients are accumulated over ``accum_grad_iters`` batches, averaged, and what is left at the epoch's end is
        not lost (LAVIS sums them and lets leftovers run into the next epoch, base_task.py:215).

        Raises:
            FloatingPointError: for a loss that is not finite, naming the batch.
        """
        model = self.model
        model.train()
        loader = self.train_loader
        loader.sampler.set_epoch(epoch)
        total, loss_sum = len(loader), 0.0
        progress = Progress(loader, f"epoch {epoch}", self.log_freq)
        for i, samples in enumerate(progress):
            samples = prepare_sample(samples, cuda_enabled=self.cuda_enabled)
            samples.update(epoch=epoch, num_iters_per_epoch=total, iters=i)
            self.lr_scheduler.step(cur_epoch=epoch, cur_step=i)

            group_start = i - i % self.accum_grad_iters
            group_size = min(self.accum_grad_iters, total - group_start)
            steps_now = i + 1 == group_start + group_size
            # DDP exchanges gradients only with the batch that completes a group.
            wait = self.use_distributed and not steps_now
            with model.no_sync() if wait else contextlib.nullcontext():
                with self.autocast():
                    loss = self.task.train_step(model=model, samples=samples)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the loss is {value} in epoch {epoch}, batch {i} ({_identify(samples)}); the last "
                        f"checkpoint in {self.output_dir} is intact"
                    )
                self._scaled(loss / group_size).backward()
            if steps_now:
                self._step()
            loss_sum += value
            progress.status(f"loss {value:.4f} lr {self.optimizer.param_groups[0]['lr']:.2e}")
        stats = {
            "epoch": epoch,
            "loss": f"{self._mean_over_ranks(loss_sum / total):.4f}",
            "lr": f"{self.optimizer.param_groups[0]['lr']:.3e}",
        }
        logging.info("train, epoch %d: loss %s", epoch, stats["loss"])
        return stats

    def _scaled(self, loss):
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _step(self) -> None:
        max_norm = self.config.run_cfg.get("max_grad_norm", None)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if max_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, float(max_norm))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def _mean_over_ranks(self, value: float) -> float:
        if not self.use_distributed:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.item() / get_world_size()

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

    @main_process
    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write what is trained, and what a resumed run needs, to checkpoint_last.pth or checkpoint_best.pth."""
        path = self.output_dir / (BEST if is_best else LAST)
        checkpoints.save(
            {
                "model": checkpoints.trained_state_dict(self.unwrap_dist_model(self.model)),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "config": self.config.to_dict(),
                "epoch": cur_epoch,
                "best_agg_metric": self.best_agg_metric,
                "best_epoch": self.best_epoch,
            },
            path,
        )
        logging.info("saved %s (epoch %d)", path, cur_epoch)

    def _reload_best_model(self, model):
        """Load the best checkpoint's weights (LAVIS fails if none was saved, runner_base.py:597)."""
        self._load_trained(model, checkpoints.read(self.output_dir / BEST), self.output_dir / BEST)
        return model

    def _load_checkpoint(self, url_or_filename: str) -> None:
        """Resume: weights, optimiser, scaler, epoch and best metric (LAVIS loads strictly what it saved in part,
        runner_base.py:628, and forgets the best metric).

        Raises:
            FileNotFoundError, CheckpointError: if it cannot be read or does not fit.
        """
        state = checkpoints.read(url_or_filename)
        self._load_trained(self.unwrap_dist_model(self.model), state, url_or_filename)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.start_epoch = state["epoch"] + 1
        self.best_agg_metric = state.get("best_agg_metric")
        self.best_epoch = state.get("best_epoch")
        logging.info("resumed from %s at epoch %d", url_or_filename, self.start_epoch)

    @staticmethod
    def _load_trained(model, state: Dict[str, Any], source) -> None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        frozen = set(model.state_dict()) - trained
        checkpoints.load_weights(model, state["model"], source=source, may_lack=frozen)

    @main_process
    def log_parts(self) -> None:
        """The table of parts: parameters, trained or frozen, dtype."""
        model = self.unwrap_dist_model(self.model)
        if hasattr(model, "parts"):
            logging.info("model parts:\n%s", parts_table(model.parts()))


def _short(metrics: Dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if isinstance(value, (int, float)))


def _identify(samples: Dict[str, Any]) -> str:
    for key in ("instance_id", "question_id", "image_id", "image_key", "text_input"):
        if key in samples:
            return f"{key} {list(samples[key])[:8]}"
    return "its samples carry no id"

"""The keys of the ``run:`` section that a run and its runner read: LAVIS's, and those of ``runner_kvmod``."""

from typing import Any, Dict, List, Literal, Optional, Union

from lavis_kvmod.runners.profiling import ProfilerSettings
from lavis_kvmod.runners.run_log import is_installed
from lavis_kvmod.system.schema import Settings, key, not_known

__all__ = ["NOT_READ", "RunSettings", "RunnerSettings"]

# LAVIS's keys that change nothing here, and why.
NOT_READ = {
    "use_dist_eval_sampler": "every sample is evaluated once, on one rank, whatever it says",
    "dist_backend": "the device decides: nccl between GPUs, gloo between CPU processes",
    "rank": "torchrun or SLURM tells each process its own",
    "gpu": "torchrun or SLURM tells each process its own",
    "task_type": "LAVIS's dialogue models alone read it",
}


class RunSettings(Settings):
    """LAVIS's keys, which a run of any task and runner has. LAVIS reads many without a default; these are its recipes'
    values."""

    task: str = key("kvmod_vqa", "`kvmod_vqa`, `kvmod_captioning`, or any of LAVIS's")
    runner: Optional[str] = key(None, "`runner_kvmod` for this model, else LAVIS's `runner_base`")
    device: str = key("cuda", "`cuda` or `cpu`", expected="cuda or cpu")
    output_dir: str = key(
        "output",
        "where run folders are made, relative to where you stand",
        min_length=1,
        expected="the path of a folder (YAML wants a number in quotes)",
    )
    seed: int = key(42, "of the order of the data, dropout and augmentation", ge=0)

    train_splits: List[str] = key(["train"], "what is trained on, together", expected="a list of names")
    valid_splits: List[str] = key(
        [], "what is evaluated after each epoch; the first one tells the best", expected="a list of names"
    )
    test_splits: List[str] = key(
        [], "what is evaluated at the end, with the best checkpoint", expected="a list of names"
    )
    evaluate: bool = key(False, "evaluate only; `python -m lavis.evaluate` sets it")
    resume_ckpt_path: Optional[str] = key(
        None, "a path or URL, or `auto` ([training.md](training.md)); in an evaluation, the weights to evaluate"
    )

    max_epoch: int = key(1, "epochs", gt=0)
    batch_size_train: int = key(16, "samples in a batch of each process", gt=0)
    batch_size_eval: int = key(16, "the same, in an evaluation", gt=0)
    accum_grad_iters: int = key(1, "batches a step; what is left at an epoch's end makes a smaller one", gt=0)
    num_workers: int = key(4, "processes that read data, for each process that trains", ge=0)

    lr_sched: str = key(
        "linear_warmup_cosine_lr", "`linear_warmup_cosine_lr`, `linear_warmup_step_lr`, or one that you register"
    )
    init_lr: float = key(1e-5, "learning rate after the warm-up", gt=0)
    min_lr: float = key(0.0, "the lowest it falls to", ge=0)
    warmup_steps: int = key(0, "optimizer steps in which it rises from `warmup_lr`", ge=0)
    warmup_lr: float = key(-1.0, "where the warm-up begins; below 0: at `init_lr`")
    lr_decay_rate: Optional[float] = key(None, "factor an epoch, for `linear_warmup_step_lr`", gt=0, le=1)
    weight_decay: float = key(0.05, "AdamW's, for weights but not for biases and norms", ge=0)
    beta2: float = key(0.999, "AdamW's", ge=0, lt=1)
    amp: Union[bool, Literal["fp16", "bf16"], None] = key(
        False,
        "`true` or `fp16`: autocast with a gradient scaler, on CUDA; `bf16`: without one; trained parameters are fp32 "
        "always",
        expected="true, false, fp16 or bf16",
    )

    log_freq: int = key(50, "batches between two lines of progress", gt=0)
    distributed: bool = key(False, "set by what starts the processes: torchrun or SLURM")
    world_size: int = key(1, "set by what starts the processes", gt=0)
    dist_url: str = key("env://", "where the processes meet")

    def conflicts(self) -> List[str]:
        """Keys that do not go together."""
        found = []
        if self.lr_sched == "linear_warmup_step_lr" and self.lr_decay_rate is None:
            found.append("lr_decay_rate: linear_warmup_step_lr needs it, a number above 0, at most 1; got none")
        if self.evaluate and self.resume_ckpt_path == "auto":
            found.append("resume_ckpt_path: auto goes on with a training; an evaluation takes the path of a checkpoint")
        if not self.evaluate and not self.train_splits:
            found.append(
                "train_splits: names no split, so there is nothing to train; set run.evaluate: true, or [train]"
            )
        elif not self.evaluate and self.train_splits != ["train"]:  # the others are read as they are evaluated
            found.append(
                f"train_splits: what is trained on is the split 'train', got {', '.join(self.train_splits)}; to train "
                "on more, name its files there, too: build_info.annotations.train.storage: [train.csv, val.csv]"
            )
        return found


class RunnerSettings(RunSettings):
    """What ``runner_kvmod`` reads: LAVIS's keys, and its own."""

    save_every_n_iters: Optional[int] = key(
        None, "also save in the middle of an epoch, at the first step behind every n-th batch", gt=0
    )
    keep_last: int = key(2, "`checkpoint_last.pth`, `checkpoint_last-1.pth`, …", gt=0)
    max_grad_norm: Optional[float] = key(None, "clip the gradient's norm", gt=0)
    max_bad_steps: int = key(
        3,
        "steps that may be skipped, in the whole run, for a loss or gradient that is not finite; one more ends the run",
        ge=0,
    )
    patience: Optional[int] = key(None, "stop after so many validations without a better `agg_metrics`", gt=0)
    deterministic: bool = key(False, "only algorithms that give the same bits every time; raises where CUDA has none")
    kv_lr_scale: float = key(1.0, "multiplies the learning rate of the prefix generator and its gates", gt=0)
    lr_layer_decay: float = key(1.0, "layer-wise decay of an unfrozen ViT's rate (LAVIS main's name)", gt=0, le=1)
    tensorboard: Union[bool, Literal["auto"]] = key("auto", "`auto`: if it is installed")
    wandb: Union[bool, Dict[str, Any]] = key(
        False, "`true`, or arguments of `wandb.init`", expected="true, false or arguments of wandb.init"
    )
    profiler: Union[bool, Dict[str, Any]] = key(
        False,
        "`true`, or `{skip, batches}` (5 and 3): PyTorch's profiler looks at some batches and writes `profile/` into "
        "the run's folder",
        expected="true, false or {skip, batches}",
    )
    compile: bool = key(
        False,
        "`torch.compile` for what is trained and the frozen parts it is trained behind "
        "([performance.md](performance.md#compiling))",
    )
    cuda_graphs: Union[bool, Literal["auto"]] = key(
        False,
        "compile, and record CUDA graphs, of decoding too; `auto`: where that can be done. Untried: no GPU has run it "
        "yet",
        expected="true, false or auto",
    )
    log_peak_memory: bool = key(False, "log the most memory that each epoch's training took, on the GPU from its start")
    dist_timeout: float = key(60.0, "minutes after which a process gives up waiting for the others", gt=0)
    train_dataset_ratios: Optional[Dict[str, float]] = key(
        None,
        "how often a batch comes from each data set, by its name ([training.md](training.md#several-data-sets)); "
        "without, their samples are mixed",
        expected="a number above 0 for each data set",
    )
    max_iters: Optional[int] = key(None, "batches in the whole run, instead of `max_epoch`", gt=0)
    iters_per_inner_epoch: Optional[int] = key(
        None, "batches in an epoch, after which is validated; those of the data by default", gt=0
    )
    group_by_image: Union[bool, Literal["auto"]] = key(
        "auto",
        "bring an image's questions together and encode it once a batch; `auto`: where questions are answered "
        "([training.md](training.md#one-image-many-questions))",
    )
    fsdp: bool = key(False, "spread the frozen OPT over the GPUs ([several_gpus.md](several_gpus.md))")

    def conflicts(self) -> List[str]:
        """Keys that do not go together, and trackers that are not installed."""
        found = super().conflicts()
        if self.train_dataset_ratios is not None and not all(r > 0 for r in self.train_dataset_ratios.values()):
            found.append(
                f"train_dataset_ratios: expected numbers above 0, got {self.train_dataset_ratios}; leave out "
                "of the run file what is not to be trained on"
            )
        if isinstance(self.profiler, dict):
            unknown = [not_known(name, ProfilerSettings.model_fields) for name in self.profiler]
            told = [text for name, text in zip(self.profiler, unknown) if name not in ProfilerSettings.model_fields]
            found += [f"profiler: {text}" for text in [*told, *ProfilerSettings.check(self.profiler)[1]]]
        if self.patience is not None and not self.valid_splits:
            found.append("patience: it counts validations, and run.valid_splits is empty; set both, or neither")
        for name, wanted in (("tensorboard", self.tensorboard is True), ("wandb", bool(self.wandb))):
            if wanted and not is_installed(name):
                found.append(f"{name}: {name} is not installed; pip install {name}, or set run.{name}=false")
        return found

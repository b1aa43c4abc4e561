"""Whether a run file can run here: its faults, its weights, the disk and the memory it takes."""

import logging
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.config.loading import KVModConfig, load_config
from lavis_kvmod.datasets.storage import stored, strings
from lavis_kvmod.doctor.findings import MISSING, NOTE, OK, WARN, WRONG, Finding
from lavis_kvmod.doctor.machine import GIB, Machine, gib, hf_cache, nearest, torch_hub
from lavis_kvmod.memory import MemoryEstimate, estimate
from lavis_kvmod.memory.runs import (
    Change,
    changes_that_fit,
    evaluation_step,
    fits,
    largest_batch,
    training_step,
    with_allowance,
)
from lavis_kvmod.models.settings import ModelSettings, SettingsError, settings_of
from lavis_kvmod.runners.settings import RunnerSettings
from lavis_kvmod.system.paths import absolute, resolve_config
from lavis_kvmod.system.precision import amp_dtype
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.weights.finding import WeightFile

# Words by which a problem is told that something is not there, rather than that it is wrong.
_ABSENT = re.compile(
    r"no such|no folder|no shards found|cannot be reached|is not installed|has no CUDA|not found|no file", re.IGNORECASE
)

# The part that a key's file fills.
_PART_OF_KEY = {
    "model.vit_checkpoint": "visual_encoder",
    "model.opt_model": "opt_model",
    "model.aux_checkpoint": "aux_encoder",
}


def run_file_findings(cfg_path: str, options: Sequence[str], machine: Machine) -> List[Finding]:
    """All that is to be said of a run file on this machine."""
    with _warnings_logged() as warned:
        try:
            cfg: Optional[KVModConfig] = load_config(cfg_path, options, starts=False)
            problems: List[str] = []
        except FileNotFoundError as error:
            return [Finding(MISSING, str(error))]
        except ConfigurationError as error:
            problems = error.problems
            cfg = _unchecked(cfg_path, options)
    found = [Finding(MISSING if _ABSENT.search(problem) else WRONG, problem) for problem in problems]
    found += [Finding(WARN, warning) for warning in dict.fromkeys(warned)]
    if cfg is None:
        return found
    if not any(problem.startswith("datasets") for problem in problems):
        found += data_findings(cfg.datasets_cfg)
    declared = settings_of(cfg.model_cfg)
    if declared is None:
        text = f"{cfg.model_cfg.arch} is LAVIS's own: its weights and memory are not looked at"
        return [*found, Finding(NOTE, text)]
    try:
        settings = declared.from_config(cfg.model_cfg)
        files = settings.weight_files()
    except (SettingsError, ImportError):  # among the problems
        return found
    sound = [file for file in files if not any(problem.startswith(f"{file.key}:") for problem in problems)]
    if not isinstance(settings, ModelSettings):
        text = f"memory is not computed for {cfg.model_cfg.arch}"
        return [*found, *weight_findings(sound, {}), Finding(NOTE, text)]
    try:
        training, evaluation = _memory(cfg, machine)
    except Exception as error:  # sizes that are among the problems, or a PyTorch that cannot run without tensors
        logging.debug("no estimate", exc_info=True)
        text = f"memory cannot be told: {type(error).__name__}: {_first_line(error)}"
        return [*found, *weight_findings(sound, {}), Finding(NOTE, text)]
    either = training or evaluation
    found += weight_findings(sound, either.weights if either else {})
    if training is not None and not any(problem.startswith("run.keep_last:") for problem in problems):
        keep_last = cfg.run_cfg.get("keep_last", None) or RunnerSettings.default_of("keep_last")
        found += output_findings(absolute(cfg.run_cfg.output_dir), training.gradients, keep_last)
    return found + memory_findings(cfg, settings, machine, training, evaluation)


def _unchecked(cfg_path: str, options: Sequence[str]) -> Optional[KVModConfig]:
    """The run file merged, though it has faults; None if it cannot be."""
    try:
        return KVModConfig(resolve_config(cfg_path), options)
    except Exception:  # whatever is wrong has been told
        logging.debug("%s cannot be merged", cfg_path, exc_info=True)
        return None


@contextmanager
def _warnings_logged() -> Iterator[List[str]]:
    """The warnings that are logged inside, instead of on the terminal."""
    messages: List[str] = []

    class _Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger(), _Keep(logging.WARNING)
    before = logger.handlers[:]
    logger.handlers[:] = [handler]
    try:
        yield messages
    finally:
        logger.handlers[:] = before


# ------------------------------------------------------------ data


def data_findings(sections: DictConfig) -> List[Finding]:
    """The folders in which each data set's files lie, of the splits that the run uses."""
    found = []
    for name, section in sections.items():
        files = [stored(storage) for storage in _storages(section.get("build_info"))]
        folders = dict.fromkeys(str(file if file.is_dir() else file.parent) for file in files)
        found.append(Finding(OK, f"data: {name!s}: {', '.join(folders) or 'comes with the package'}"))
    return found


def _storages(section: Any) -> Iterator[str]:
    """All ``storage`` values below a ``build_info``, and paths that stand in place of such an entry."""
    if OmegaConf.is_dict(section):
        for key, value in section.items():
            if key not in ("url", "pattern"):
                yield from _storages(value)
    elif section is not None:
        yield from strings(section)


# ------------------------------------------------------------ weights and disk


def weight_findings(files: Sequence[WeightFile], sizes: Mapping[str, int]) -> List[Finding]:
    """Where each file of weights lies; those that cannot be had are among the run file's problems already.

    Args:
        files: what the model is built from.
        sizes: bytes of its parts, for what is still to be downloaded.
    """
    found, to_come = [], 0
    for file in files:
        had = file.absence() is None
        path = file.local_path() if had else None
        if file.build is not None:
            folder = _demo_part(file)
            text = "built here on first use, once" if folder is None else str(folder)
            found.append(Finding(NOTE if folder is None else OK, f"{file.part}: {text}"))
        elif path is not None:
            found.append(Finding(OK, f"{file.part}: {path}"))
        elif had:
            size = sizes.get(_PART_OF_KEY.get(file.key, ""), 0)
            to_come += size
            about = f", about {gib(size)}" if size else ""
            found.append(Finding(NOTE, f"{file.part}: downloaded on first use from {file.source}{about}"))
    if to_come:
        found += _download_space(to_come)
    return found


def _demo_part(file: WeightFile) -> Optional[Path]:
    from lavis_kvmod.demo import parts

    return parts.built("vision" if file.key == "model.vit_checkpoint" else "language")


def _download_space(needed: int) -> List[Finding]:
    free = min(shutil.disk_usage(nearest(path)).free for path in (hf_cache(), torch_hub()))
    if free >= needed:
        return []
    text = f"about {gib(needed)} are to be downloaded, and {gib(free)} are free"
    return [Finding(WRONG, text, "free some, or set HF_HOME and TORCH_HOME to folders on a larger disk")]


def output_findings(folder: Path, trained: int, keep_last: int) -> List[Finding]:
    """Whether checkpoints of ``trained`` bytes of parameters have room in the output folder: the last ones, the best,
    and the one being written. Each holds the parameters and AdamW's two states."""
    there = nearest(folder)
    free, needed = shutil.disk_usage(there).free, (keep_last + 2) * 3 * trained
    text = f"output: {folder}, {gib(free)} free; checkpoints take up to {gib(needed)}"
    if free < needed:
        return [Finding(WRONG, text, "free some, or set run.output_dir to a folder on a larger disk")]
    return [Finding(OK, text)]


# ------------------------------------------------------------ memory


def _memory(cfg: KVModConfig, machine: Machine) -> Tuple[Optional[MemoryEstimate], Optional[MemoryEstimate]]:
    """What training and evaluating take, each None where the run does not do it."""
    run, model = cfg.run_cfg, cfg.model_cfg
    more = _device(cfg, machine)
    training = None if run.evaluate else estimate(model, **training_step(model, run), **more)
    evaluates = bool(run.valid_splits or run.test_splits)
    return training, estimate(model, **evaluation_step(model, run), **more) if evaluates else None


def _device(cfg: KVModConfig, machine: Machine) -> Dict[str, Any]:
    shards = max(len(machine.gpus), 1) if cfg.run_cfg.get("fsdp", False) else 1
    return dict(device=str(cfg.run_cfg.device).split(":")[0], shards=shards)


def storage_findings(settings: ModelSettings, amp: Any, device: str) -> List[Finding]:
    """Frozen weights in another half precision than the run computes in: autocast's copies of OPT's stay until the
    backward pass has used them."""
    dtype = amp_dtype(amp, str(device).split(":")[0])
    computes = None if dtype is None else {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    other = [f"model.{key}" for key in ("vit_precision", "opt_precision") if getattr(settings, key) != computes]
    half = [key for key in other if getattr(settings, key[len("model.") :]) != "fp32"]
    if computes is None or not half or not str(device).startswith("cuda"):
        return []
    text = (
        f"{' and '.join(half)} differ from run.amp ({computes}): weights are converted at every step, OPT's kept twice"
    )
    return [Finding(WARN, text, " ".join(f"{key}={computes}" for key in half))]


def memory_findings(
    cfg: KVModConfig,
    settings: ModelSettings,
    machine: Machine,
    training: Optional[MemoryEstimate],
    evaluation: Optional[MemoryEstimate],
) -> List[Finding]:
    """Whether training and evaluating fit, and what to change where they do not."""
    run = cfg.run_cfg
    found = storage_findings(settings, run.get("amp", False), run.device) if training is not None else []
    if training is not None:
        text = f"training with batches of {run.batch_size_train} takes {_parts(training)}"
        found.append(
            fit_finding(text, training.total, machine, run.device, lambda room: _train_step(cfg, machine, room))
        )
    if evaluation is not None:
        text = f"evaluating with batches of {run.batch_size_eval} takes {_parts(evaluation)}"
        found.append(
            fit_finding(text, evaluation.total, machine, run.device, lambda room: _eval_step(cfg, machine, room))
        )
        if run.get("inference_method") == "rank":
            found.append(Finding(NOTE, "run.inference_method: rank is counted as if answers were generated"))
    return found


def _parts(found: MemoryEstimate) -> str:
    kept = sum(found.weights.values())
    rest = found.total - kept - found.gradients - found.optimizer
    trained = f", gradients and AdamW {gib(found.gradients + found.optimizer)}" if found.optimizer else ""
    return f"{gib(found.total)} (weights {gib(kept)}{trained}, the batch {gib(rest)})"


def fit_finding(text: str, computed: int, machine: Machine, device: str, step: Callable[[int], str]) -> Finding:
    """Whether ``computed`` bytes fit the device.

    Args:
        text: what takes them.
        step: given the bytes of the device, what to do where they do not fit.
    """
    if not str(device).startswith("cuda"):
        total = machine.memory_total
        if total is None or computed + GIB <= total:
            return Finding(OK, f"{text}; computed")
        return Finding(WRONG, f"{text}, computed; this machine has {gib(total)}", step(total))
    if not machine.gpus:
        return Finding(NOTE, f"{text}, computed; a GPU should have {gib(with_allowance(computed))} for it")
    gpu = min(machine.gpus, key=lambda gpu: gpu.total)
    if not fits(computed, gpu.total):
        mark = WRONG if computed > gpu.total else WARN
        return Finding(
            mark,
            f"{text}, computed, with allowance {gib(with_allowance(computed))}; {gpu.name} has {gib(gpu.total)}",
            step(gpu.total),
        )
    if not fits(computed, min(gpu.free for gpu in machine.gpus)):
        text = f"{text}, computed; other processes hold too much of the GPU's memory"
        return Finding(WARN, text, "end them (nvidia-smi names them), or choose a GPU by CUDA_VISIBLE_DEVICES")
    return Finding(OK, f"{text}, computed; it fits {gpu.name} with {gib(gpu.total)}")


def _train_step(cfg: KVModConfig, machine: Machine, room: int) -> str:
    run, model = cfg.run_cfg, cfg.model_cfg

    def compute(options: Mapping[str, Any]) -> int:
        changed = OmegaConf.merge({"model": model, "run": run}, OmegaConf.from_dotlist(_dotlist(options)))
        return estimate(changed.model, **training_step(changed.model, changed.run), **_device(cfg, machine)).total

    changes = changes_that_fit(
        room,
        batch_size=run.batch_size_train,
        accum_grad_iters=run.get("accum_grad_iters", 1),
        can_recompute=not model.get("opt_grad_checkpoint", False),
        compute=compute,
    )
    return advice(changes, sharded=bool(run.get("fsdp", False)))


def _eval_step(cfg: KVModConfig, machine: Machine, room: int) -> str:
    run, step = cfg.run_cfg, evaluation_step(cfg.model_cfg, cfg.run_cfg)
    size = largest_batch(
        room,
        batch_size=run.batch_size_eval // 2,
        compute=lambda n: estimate(cfg.model_cfg, **{**step, "batch_size": n}, **_device(cfg, machine)).total,
    )
    return f"run.batch_size_eval={size}" if size else advice([], sharded=bool(run.get("fsdp", False)))


def advice(changes: Sequence[Change], sharded: bool) -> str:
    """The changes as options of a run, with what each takes."""
    if not changes:
        more = "" if sharded else ", or run.fsdp=true on several GPUs (torchrun)"
        return f"not even one image at a time fits: a GPU with more memory, or a smaller language model{more}"
    return "; or ".join(f"{' '.join(_dotlist(change.options))} ({gib(change.computed)})" for change in changes)


def _dotlist(options: Mapping[str, Any]) -> List[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

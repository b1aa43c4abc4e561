"""To go on from a checkpoint: does it fit, what has changed, and where in the data does it stand?"""

import logging
import random
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sized, Tuple

import numpy as np
import torch
from torch.optim import Optimizer

from lavis_kvmod.datasets.seeding import stable_hash
from lavis_kvmod.runners.run_folder import checkpoint_problem
from lavis_kvmod.runners.training_state import RunState, set_rng_state
from lavis_kvmod.weights import files
from lavis_kvmod.weights.files import CheckpointError

__all__ = [
    "bring_best",
    "changes",
    "check",
    "data_order",
    "find_position",
    "load_optimizer",
    "restore_randomness",
    "warn_of_changes",
]

# Of the run section: what may change without changing what is trained.
_HARMLESS = set(
    "output_dir resume_ckpt_path num_workers log_freq save_every_n_iters keep_last patience max_bad_steps "
    "tensorboard wandb evaluate batch_size_eval valid_splits test_splits distributed world_size rank gpu dist_url "
    "dist_backend dist_timeout report_metric valid_loss".split()
)
_MISSING = "(not there)"


def check(contents: Any, source: str) -> None:
    """Whether this is the checkpoint of a run.

    Raises:
        CheckpointError: if it lacks something.
    """
    lacking = [key for key in ("model", "optimizer", "epoch") if not isinstance(contents, dict) or key not in contents]
    if lacking:
        raise CheckpointError(
            f"{source}: a run cannot go on from it, it lacks {', '.join(lacking)}; to start from its weights, set "
            "model.finetuned and model.load_finetuned: true"
        )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> List[str]:
    """The keys of two resolved configs that differ and matter for what is trained, with both values."""
    before, after = dict(_flat(old)), dict(_flat(new))
    told = []
    for key in sorted(set(before) | set(after)):
        section, _, name = key.partition(".")
        if section == "run" and name.split(".")[0] in _HARMLESS:
            continue
        was, now = before.get(key, _MISSING), after.get(key, _MISSING)
        if was != now:
            told.append(f"{key}: {was} -> {now}")
    return told


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def warn_of_changes(contents: Mapping[str, Any], config: Dict[str, Any], world_size: int) -> None:
    """Tell what is not as it was: the run goes on, but not as it would have."""
    told = changes(contents.get("config") or {}, config) if contents.get("config") else []
    before = len(contents["rng"]) if contents.get("rng") else None
    if before not in (None, world_size):
        told.append(f"number of processes: {before} -> {world_size}")
    if told:
        logging.warning(
            "the run goes on with other settings than it was begun with, so not exactly as it would have:%s",
            "".join(f"\n    {change}" for change in told),
        )


def load_optimizer(optimizer: Optimizer, state: Dict[str, Any], source: str) -> None:
    """The optimizer's memory from a checkpoint; its settings (weight decay, multipliers) stay those of the run file.

    Raises:
        CheckpointError: if it was made for other parameters.
    """
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{source}: its optimizer does not fit this model ({error}); go on with the settings it was begun with, or "
            "start from its weights with model.finetuned"
        ) from error
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)


def data_order(run_cfg: Any, loader: Any, world_size: int) -> Dict[str, Any]:
    """What decides which samples a position in an epoch stands behind."""
    dataset = getattr(loader, "dataset", None)
    return {
        "seed": int(run_cfg.seed),
        "num_samples": len(dataset) if isinstance(dataset, Sized) else None,
        "num_batches": len(loader),
        "global_batch": int(run_cfg.batch_size_train) * world_size,
        "accum_grad_iters": int(run_cfg.get("accum_grad_iters", 1)),
        **loader.order,
    }


def find_position(state: RunState, before: Optional[Mapping[str, Any]], now: Mapping[str, Any]) -> None:
    """Set ``state.batch`` to where the data go on, if they are read differently than ``before``.

    With another number of processes or batch size, but the same data and seed, the order of the samples is the same:
    the run goes on behind the last sample it saw, or a few before, where a step begins. Else the epoch begins anew.
    """
    if before is None or state.trained or state.batch == 0 or dict(before) == dict(now):
        return
    fixed = {"seed", "num_samples", "readers", "grouped", "mixture"}
    if now["readers"] is not None or now.get("mixture") is not None:
        fixed |= {"num_batches", "global_batch"}
    if any((before.get(key) or None) != (now.get(key) or None) for key in fixed):
        logging.warning("the training data are read in another order than before: epoch %d begins anew", state.epoch)
        state.start_epoch(state.epoch)
        return
    seen = state.batch * before["global_batch"]
    batch = min(seen // now["global_batch"], now["num_batches"])
    state.batch = batch - batch % now["accum_grad_iters"]
    again = seen - state.batch * now["global_batch"]
    if again:
        state.samples = max(0, state.samples - again)
        logging.warning("%d samples of epoch %d will be seen twice: steps are other than before", again, state.epoch)


def restore_randomness(
    states: Optional[List[Mapping[str, Any]]], device: torch.device, rank: int, world_size: int
) -> None:
    """This rank's generators as they were; seeded anew if the number of processes has changed."""
    if states is not None and len(states) == world_size:
        set_rng_state(states[rank], device)
        return
    if states is not None:
        seed = stable_hash("resumed", rank, states[0]["torch"].sum().item())
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def bring_best(state: RunState, source: Path, target: Path) -> bool:
    """See that the best checkpoint that ``state`` speaks of stands at ``target``, taken from beside ``source`` if need
    be; False, with a warning, if it is nowhere."""
    if state.best_epoch is None:
        return True
    for candidate in (target, source, source.with_name(target.name)):
        if not candidate.is_file() or not _is_best(candidate, state):
            continue
        if candidate != target:
            with files.whole_or_nothing(target) as temporary:
                shutil.copyfile(candidate, temporary)
        return True
    logging.warning(
        "the best checkpoint so far (epoch %d) is not beside %s: the best is looked for among what comes",
        state.best_epoch,
        source,
    )
    return False


def _is_best(path: Path, state: RunState) -> bool:
    problem = checkpoint_problem(path)
    if problem is not None:
        logging.warning("%s", problem)
        return False
    contents = files.read(path, mmap=True)
    return contents["epoch"] == contents.get("best_epoch") == state.best_epoch

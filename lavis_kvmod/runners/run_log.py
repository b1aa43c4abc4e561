"""What a run writes down about itself.

``log.txt`` (LAVIS's format: the config, then one JSON object a line) holds facts that depend on the run alone, so that
it is the same after an interruption. What depends on the machine goes to ``timing.txt``. TensorBoard and Weights &
Biases get both.
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Union

from omegaconf import OmegaConf

from lavis_kvmod.weights import files

__all__ = ["RunLog", "is_installed"]

LOG, TIMING = "log.txt", "timing.txt"


class RunLog:
    """Writes into a run's folder; one that is not ``active`` (ranks but 0) writes nothing.

    Args:
        folder: the run's.
        active: whether to write.
    """

    def __init__(self, folder: Path, active: bool = True):
        self._folder = folder
        self._active = active
        self._trackers: List[Any] = []

    def start(self, config: Dict[str, Any], step: int, tensorboard: Union[bool, str], wandb: Any) -> None:
        """Write config.yaml, and log.txt's head if it is not there; begin with TensorBoard and Weights & Biases.

        Args:
            config: resolved, as plain values.
            step: batches trained so far, where a resumed run's curves go on.
            tensorboard: true, false, or auto: if it is installed.
            wandb: none or false, true, or a mapping with arguments of ``wandb.init``, which stand before ours.
        """
        if not self._active:
            return
        with files.whole_or_nothing(self._folder / "config.yaml") as temporary:
            OmegaConf.save(OmegaConf.create(config), temporary)
        if not (self._folder / LOG).exists():
            self._append(LOG, json.dumps(config, indent=4))
        if tensorboard is True or (tensorboard == "auto" and is_installed("tensorboard")):
            self._trackers.append(_TensorBoard(self._folder, step))
        if wandb:
            self._trackers.append(_WandB(self._folder, {} if wandb is True else dict(wandb), config))

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.close()
        self._trackers.clear()

    def text(self) -> str:
        """log.txt so far, for a checkpoint."""
        path = self._folder / LOG
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def restore(self, text: str) -> None:
        """Put log.txt back to what it was when a checkpoint was written."""
        if self._active:
            with files.whole_or_nothing(self._folder / LOG) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def facts(self, split: str, facts: Mapping[str, Any], step: int) -> None:
        """A line of log.txt, its keys with the split in front, as LAVIS's."""
        line = {f"{split}_{key}": value for key, value in facts.items()}
        self._write(LOG, line, step)

    def timing(self, facts: Mapping[str, Any], step: int) -> None:
        """A line of timing.txt."""
        self._write(TIMING, facts, step)

    def _write(self, name: str, line: Mapping[str, Any], step: int) -> None:
        if not self._active:
            return
        self._append(name, json.dumps(line))
        for tracker in self._trackers:
            tracker.write(_numbers(line), step)

    def _append(self, name: str, line: str) -> None:
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, numbers: Dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, arguments: Dict[str, Any], config: Dict[str, Any]):
        import wandb

        known = folder / "wandb_id"
        if known.exists():
            arguments.setdefault("id", known.read_text().strip())
        ours = {"project": "lavis-kvmod", "name": folder.name, "dir": str(folder), "config": config, "resume": "allow"}
        self._run = wandb.init(**{**ours, **arguments})
        known.write_text(self._run.id)

    def write(self, numbers: Dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        logging.debug("cannot tell whether %s is installed", package, exc_info=True)
        return False


def _numbers(facts: Mapping[str, Any]) -> Dict[str, float]:
    """What can be drawn as a curve; LAVIS's log has numbers as text."""
    numbers = {}
    for name, value in facts.items():
        number = _number(value)
        if number is not None:
            numbers[name] = number
        elif isinstance(value, Mapping):
            numbers.update({f"{name}/{inner}": n for inner, n in _numbers(value).items()})
    return numbers


def _number(value: Any) -> Optional[float]:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return None
    return None

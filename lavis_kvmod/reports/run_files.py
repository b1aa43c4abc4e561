"""What a run's folder tells: read from its files alone, so that it can be told again at any time."""

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from omegaconf import OmegaConf

from lavis_kvmod.tasks.evaluation import Row

__all__ = ["PARTS_FILE", "PICTURES_FILE", "Run", "read_run"]

PARTS_FILE = "parts.json"
PICTURES_FILE = "report/pictures.json"  # of the examples, by split and instance id, as data: addresses
_METRICS_FILE = "metrics.json"  # of an evaluation


@dataclass
class Run:
    """A run as its files tell it; what is not there is empty.

    Attributes:
        config: of the run, secrets left out as in config.yaml; ``config_text`` as it stands there.
        facts: by split, the lines of log.txt as numbers, in order.
        predictions: by split, of the best epoch, else the last.
        pictures: by split and instance id.
    """

    name: str
    folder: Path
    config: Dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    facts: Dict[str, List[Dict[str, float]]] = field(default_factory=dict)
    environment: Dict[str, Any] = field(default_factory=dict)
    parts: List[Dict[str, Any]] = field(default_factory=list)
    predictions: Dict[str, List[Row]] = field(default_factory=dict)
    pictures: Dict[str, Dict[str, str]] = field(default_factory=dict)

    def curve(self, split: str, key: str) -> List[Tuple[float, float]]:
        """(epoch, value) of a fact."""
        lines = self.facts.get(split, [])
        return [(line["epoch"], line[key]) for line in lines if "epoch" in line and key in line]

    def metrics(self, split: str) -> Dict[str, float]:
        """The last line of a split."""
        lines = self.facts.get(split) or [{}]
        return {key: value for key, value in lines[-1].items() if key not in ("epoch", "best_epoch")}


def read_run(folder: Path) -> Run:
    """Read the files of a run's folder.

    Raises:
        FileNotFoundError: if it is no folder of a run: it has no log.txt.
    """
    log = folder / "log.txt"
    if not log.is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, with its log.txt; there is none")
    config_file = folder / "config.yaml"
    run = Run(folder.resolve().name, folder)
    if config_file.is_file():
        run.config_text = config_file.read_text(encoding="utf-8")
        # ${oc.env:…} stays as it is written: it may be a token
        run.config = OmegaConf.to_container(OmegaConf.load(config_file), resolve=False)  # type: ignore[assignment]
    evaluated = _json(folder / _METRICS_FILE, {})
    splits = ["train", *_splits(run.config), *(name for name in evaluated if name != "provenance")]
    run.facts = _facts(log.read_text(encoding="utf-8"), splits)
    starts = _json(folder / "environment.json", {}).get("starts") or [{}]
    run.environment = {"versions": evaluated.get("provenance", {}).get("versions", {}), **starts[-1]}
    run.parts = _json(folder / PARTS_FILE, [])
    run.predictions = {split: rows for split in splits for rows in [_predictions(folder, split)] if rows}
    run.pictures = _json(folder / PICTURES_FILE, {})
    return run


def _splits(config: Mapping[str, Any]) -> List[str]:
    section = config.get("run") or {}
    return [split for key in ("valid_splits", "test_splits") for split in section.get(key) or []]


def _json(path: Path, otherwise: Any) -> Any:
    """What is in a JSON file, if it is of the same type as ``otherwise``, which stands for one that cannot be read."""
    if not path.is_file():
        return otherwise
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        logging.warning("%s is left out of the report: %s", path, error)
        return otherwise
    return found if isinstance(found, type(otherwise)) else otherwise


def _facts(text: str, splits: List[str]) -> Dict[str, List[Dict[str, float]]]:
    facts: Dict[str, List[Dict[str, float]]] = {}
    for line in _objects(text):
        fitting = [split for split in splits if line and all(key.startswith(f"{split}_") for key in line)]
        if fitting:  # not the config at the head
            split = max(fitting, key=len)
            numbers = {key[len(split) + 1 :]: _number(value) for key, value in line.items()}
            facts.setdefault(split, []).append({key: value for key, value in numbers.items() if value is not None})
    return facts


def _objects(text: str) -> Iterator[Dict[str, Any]]:
    """The JSON objects of a log, whether on one line or on many; what is half-written ends them."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            found, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield found


def _number(value: Any) -> Optional[float]:
    """LAVIS's log has numbers as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _predictions(folder: Path, split: str) -> List[Row]:
    """The rows of the best epoch, else of the last one."""
    files = {path.stem.rpartition("_epoch")[2]: path for path in (folder / "result").glob(f"{split}_epoch*.json")}
    files = {epoch: path for epoch, path in files.items() if epoch == "best" or epoch.isdigit()}
    if not files:
        return []
    newest = max(files, key=lambda epoch: math.inf if epoch == "best" else int(epoch))
    rows = _json(files[newest], [])
    return [row for row in rows if isinstance(row, dict) and {"instance_id", "image", "prediction"} <= set(row)]

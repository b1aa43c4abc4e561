"""Read shards to their end: to know how many samples they hold, and whether all can be used."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy, some_of
from lavis_kvmod.datasets.shards.files import INDEX, Contents, Shard, find_shards, index_text, read_index
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA, Kind, rows_by_sample
from lavis_kvmod.system.progress import Progress
from lavis_kvmod.weights.files import sha256, whole_or_nothing

__all__ = ["Counted", "count", "count_all", "write_indices"]


class Counted(NamedTuple):
    """A shard that has been read to its end: what it holds, its keys, and a line for each row that cannot be used."""

    contents: Contents
    keys: List[str]
    problems: List[str]


def count(path: Path, kind: Kind) -> Counted:
    """Read a shard to its end.

    Raises:
        FileNotFoundError: if it is not there.
    """
    keys: List[str] = []
    problems: List[str] = []
    texts = targets = 0
    for key, rows in rows_by_sample(path, kind):
        keys.append(key)
        texts += len(rows)
        targets += sum(bool(row.annotation.get(kind.target)) for row in rows)
        problems += [f"{row.annotation['source']}: {row.problem}" for row in rows if row.problem]
    first, last = min(keys, default=""), max(keys, default="")
    return Counted(Contents(len(keys), texts, targets, first, last, path.stat().st_size), keys, problems)


def count_all(shards: Sequence[Shard], kind: Kind, policy: BadSamplePolicy, split: str) -> List[Shard]:
    """The shards, each with its contents: those without an index are read to their end.

    Predictions are told apart by their key, so no two shards may share one.

    Raises:
        BadDataError: for samples that cannot be used, as ``policy`` says, and for keys that two shards have.
    """
    unknown = [shard for shard in shards if shard.contents is None]
    counted = {shard.path: count(shard.path, kind) for shard in Progress(unknown, f"counting {split}", log_every=10)}
    problems = [problem for one in counted.values() for problem in one.problems]
    policy.judge(problems, sum(one.contents.texts for one in counted.values()), f"samples of {split}")
    shards = [Shard(s.path, s.contents or counted[s.path].contents) for s in shards]
    first_with: Dict[str, Path] = {}
    repeated = []
    for shard in _overlapping(shards):
        keys = counted[shard.path].keys if shard.path in counted else count(shard.path, kind).keys
        repeated += [f"{key} in {first_with[key]} and {shard.path}" for key in keys if key in first_with]
        first_with.update(dict.fromkeys(keys, shard.path))
    if repeated:
        raise BadDataError(
            f"{split}: {len(repeated)} keys are in two shards; pack with another --prefix, or rename{some_of(repeated)}"
        )
    return shards


def _overlapping(shards: Sequence[Shard]) -> List[Shard]:
    """Shards whose keys do not all lie before or behind those of every other shard."""
    ordered = sorted((shard for shard in shards if shard.counted.images), key=lambda shard: shard.counted.first_key)
    found: Dict[Path, Shard] = {}
    furthest: Optional[Shard] = None
    for shard in ordered:
        if furthest is not None and shard.counted.first_key <= furthest.counted.last_key:
            found.update({furthest.path: furthest, shard.path: shard})
        if furthest is None or shard.counted.last_key > furthest.counted.last_key:
            furthest = shard
    return list(found.values())


def write_indices(patterns: Sequence[str], kind_name: Optional[str] = None, skip_bad: bool = False) -> List[Path]:
    """Read shards that are there, and write the index beside them.

    Args:
        patterns: see `find_shards`.
        kind_name: ``vqa`` or ``caption``; by default, what the first sample is.
        skip_bad: go on, although there are samples that cannot be used.

    Returns:
        The indices' paths.

    Raises:
        BadDataError: for shards that are not there, cut short, or hold samples that cannot be used; or if there is an
            index already.
    """
    shards = find_shards(patterns)
    folders = dict.fromkeys(shard.path.parent for shard in shards)
    existing = [str(folder / INDEX) for folder in folders if read_index(folder) is not None]
    if existing:
        raise BadDataError(f"there is an index already; remove it to write it anew{some_of(existing)}")
    kind = {kind.name: kind for kind in (VQA, CAPTION)}[kind_name] if kind_name else _kind_of(shards[0].path)
    found: Dict[Path, List[Shard]] = {folder: [] for folder in folders}
    problems: List[str] = []
    for shard in Progress(shards, "reading shards", log_every=10):
        counted = count(shard.path, kind)
        problems += counted.problems
        contents = counted.contents._replace(sha256=sha256(shard.path))
        found[shard.path.parent].append(Shard(shard.path, contents))
    total = sum(shard.counted.texts for of_folder in found.values() for shard in of_folder)
    BadSamplePolicy("skip" if skip_bad else "raise", 1.0).judge(problems, total, "samples")
    for folder, of_folder in found.items():
        with whole_or_nothing(folder / INDEX) as temporary:
            temporary.write_text(index_text(kind, of_folder, complete=True), encoding="utf-8")
    return [folder / INDEX for folder in found]


def _kind_of(path: Path) -> Kind:
    as_questions = count(path, VQA)
    return CAPTION if len(as_questions.problems) == as_questions.contents.texts else VQA

"""The batches of an evaluation, on ranks that may have more or fewer of them than others."""

from typing import Any, Callable, Dict, Iterable, Iterator, NamedTuple, Optional

from lavis_kvmod.system.distributed import gather
from lavis_kvmod.system.sharding import is_sharded


class Step(NamedTuple):
    """A batch; whether its results count; whether all ranks have targets in theirs, where they keep in step."""

    samples: Dict[str, Any]
    counts: bool
    all_have_targets: bool


def steps(
    loader: Any, batches: Iterable[Dict[str, Any]], model: Any, has_targets: Callable[[Dict[str, Any]], bool]
) -> Iterator[Step]:
    """The batches of this rank.

    A sharded language model must be run equally often on all ranks, or they would wait for each other for ever. A rank
    that has no more batches then repeats its last one (the first sample, if it never had any), which does not count.

    Args:
        loader: where ``batches`` come from, asked for a first sample.
        batches: the loader, or what shows its progress.
        has_targets: whether a batch has what a loss needs.
    """
    opt = getattr(model, "opt_model", None)
    if opt is None or not is_sharded(opt):
        for samples in batches:
            yield Step(samples, counts=True, all_have_targets=has_targets(samples))
        return
    own = iter(batches)
    last: Dict[str, Any] = {}
    while True:
        mine: Optional[Dict[str, Any]] = next(own, None)
        if not any(gather([mine is not None])):
            return
        counts, last = mine is not None, mine or last or _first_sample(loader)
        yield Step(dict(last), counts, all(gather([has_targets(last)])))


def _first_sample(loader: Any) -> Dict[str, Any]:
    if hasattr(loader, "first_sample"):  # streamed
        return loader.first_sample()
    return loader.collate_fn([loader.dataset[0]])

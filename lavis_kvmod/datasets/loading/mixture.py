"""Batches drawn from several data sets by ratio, as LAVIS's MultiIterLoader does; here they can be resumed."""

import contextlib
import random
from typing import Any, Dict, Generator, Iterator, List, Mapping

from lavis_kvmod.datasets.loading.loader import Batch, Loader
from lavis_kvmod.datasets.seeding import stable_hash

__all__ = ["Mixture"]


class Mixture:
    """A loader of epochs of a length of their own, each batch from one of several loaders.

    Which one is drawn under seed, epoch and the batch's number, alike on all ranks. Each loader goes through its own
    epochs, from one to the next, so that a data set's samples come equally often, however often it is drawn from.

    Attributes:
        order: see `lavis_kvmod.datasets.loading.loader.Source`; ``mixture`` are the ratios.

    Args:
        loaders: by the data set's name; each has its own worker processes.
        ratios: how often each is drawn from, by the same names; what they add up to does not matter.
        num_batches: in an epoch.
        dataset: all of them, concatenated.
        seed: for the draw.
    """

    def __init__(
        self, loaders: Mapping[str, Loader], ratios: Mapping[str, float], *, num_batches: int, dataset: Any, seed: int
    ):
        self.dataset = dataset
        self._loaders = list(loaders.values())
        self._weights = [float(ratios[name]) for name in loaders]
        self._num_batches, self._seed = num_batches, seed
        self._epoch, self._start = 0, 0
        readers = [loader.order["readers"] for loader in self._loaders if loader.order["readers"] is not None]
        self.order: Dict[str, Any] = {
            "readers": readers[0] if readers else None,
            "grouped": any(loader.order["grouped"] for loader in self._loaders),
            "mixture": {name: float(ratios[name]) for name in loaders},
        }

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._num_batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Which epoch is read next, and how many of its batches have been had already."""
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[Batch]:
        drawn = self._draw(self._epoch)
        before = [number for epoch in range(self._epoch) for number in self._draw(epoch)] + drawn[: self._start]
        with contextlib.ExitStack() as stack:
            reading = [
                stack.enter_context(contextlib.closing(_endless(loader, before.count(number))))
                for number, loader in enumerate(self._loaders)
            ]
            for number in drawn[self._start :]:
                yield next(reading[number])

    def first_sample(self) -> Batch:
        """A batch of one sample, also on a rank that has none of its own."""
        return self._loaders[0].first_sample()

    def _draw(self, epoch: int) -> List[int]:
        """The loader of each of an epoch's batches."""
        rng = random.Random(stable_hash("mixture", self._seed, epoch))
        return rng.choices(range(len(self._loaders)), self._weights, k=self._num_batches)


def _endless(loader: Loader, position: int) -> Generator[Batch, None, None]:
    """The batches of a loader from one on, counted over its epochs."""
    epoch, start = divmod(position, len(loader))
    while True:
        loader.set_epoch(epoch, start)
        yield from loader
        epoch, start = epoch + 1, 0

"""LAVIS's data sets over tar shards.

They are read as a stream, so there is no ``dataset[index]``: a runner asks for a loader (`ShardDataset.make_loader`).
"""

import logging
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Union

from lavis_kvmod.datasets.annotated import (
    AnnotatedDataset,
    Annotation,
    CaptionEvalData,
    CaptionTrainData,
    Sample,
    VQAEvalData,
    VQATrainData,
)
from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy
from lavis_kvmod.datasets.images import BadImageError, read_image
from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.datasets.seeding import seeded
from lavis_kvmod.datasets.settings import ShardSettings
from lavis_kvmod.datasets.shards.files import Shard
from lavis_kvmod.datasets.shards.plan import RankPlan
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA, Kind, Row
from lavis_kvmod.datasets.shards.stream import BatchStream, IndexedRows, RowReader, ShardSource, UncountedRows

__all__ = [
    "ShardDataset",
    "WdsCaptionEvalData",
    "WdsCaptionTrainData",
    "WdsVQAEvalData",
    "WdsVQATrainData",
]

SHUFFLE_BUFFER = ShardSettings.default_of("shuffle_buffer")


class ShardDataset(AnnotatedDataset):
    """A split in shards. Subclasses say what of.

    ``annotation`` is empty: the samples of an evaluation carry theirs (``annotation``).

    Args:
        vis_processor, text_processor: LAVIS processors.
        shards: in the order of evaluation; with their contents, or else with an ``epoch_size``.
        policy: what happens to samples that cannot be used.
        epoch_size: samples in an epoch of training, of all ranks; all there are, if None.
        shuffle_buffer: samples that are shuffled among each other in training, in each worker.
        answer_list: the answers to choose from, for tasks that rank them.
        split: its name, for messages.

    Raises:
        ValueError: for shards of unknown lengths without ``epoch_size``, or without a single sample.
    """

    kind: Kind
    for_training: bool

    def __init__(
        self,
        vis_processor: Callable,
        text_processor: Callable,
        shards: Sequence[Shard],
        *,
        policy: BadSamplePolicy = BadSamplePolicy(),  # noqa: B008  (frozen)
        epoch_size: Optional[int] = None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        answer_list: Optional[Sequence[str]] = None,
        split: str = "shards",
    ):
        super().__init__(vis_processor, text_processor, [], policy=policy, answer_list=answer_list)
        self.split = split
        self.shards = list(shards)
        self.shuffle_buffer = shuffle_buffer
        contents = [shard.contents for shard in self.shards]
        self._reader = RowReader(
            kind=self.kind,
            per_image=self.kind == CAPTION and not self.for_training,
            needs_target=self.for_training or any(known is not None and known.targets for known in contents),
            skips=policy.skips,
        )
        self.num_rows: Optional[int] = None
        if all(known is not None for known in contents):
            self.num_rows = sum(map(self._reader.num_counted, self.shards))
        self.epoch_size = (self.num_rows or 0) if epoch_size is None else epoch_size
        if not self.epoch_size:
            names = f"{self.shards[0].path} and {len(self.shards) - 1} more" if self.shards else "no shards"
            raise ValueError(
                f"expected shards with samples in them, and an index or an epoch_size that says how many; got {names}"
            )

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.epoch_size

    def __getitem__(self, index: int) -> Sample:
        """There is none.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "shards are read in order and have no sample by index: use runner: runner_kvmod, or iterate over "
            "dataset.make_loader(…)"
        )

    def make_loader(
        self,
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        is_train: Optional[bool] = None,
        pin_memory: bool = False,
        group_by_image: bool = False,
    ) -> Loader:
        """One rank's batches, whose sequence is a function of shards, seed, epoch, world_size and num_workers.

        In training all ranks get as many batches. Where the samples do not go round, a rank's last batch is smaller, or
        is one that counts nothing (``is_padding``). In evaluation the samples come in order, each once.

        Args:
            batch_size: samples in a batch of one rank.
            num_workers, pin_memory: as `torch.utils.data.DataLoader`.
            seed: for order and augmentation.
            rank, world_size: as usual.
            is_train: whether to shuffle; by default, what the split is for.
            group_by_image: whether a batch has an image once for all its samples that show it, in one augmented view
                (see `lavis_kvmod.datasets.loading.samples.SampleSource`); the order stays.
        """
        is_train = self.for_training if is_train is None else is_train
        streams = world_size * max(1, num_workers)
        rows: Union[UncountedRows, IndexedRows]
        if self.num_rows is None:
            rows = UncountedRows(self.shards, self._reader, seed, streams)
        else:
            rows = IndexedRows(self.shards, self._reader, seed if is_train else None, self.epoch_size)
        plan = RankPlan(self.epoch_size, batch_size, rank, world_size, max(1, num_workers), even=is_train)
        buffer = self.shuffle_buffer if is_train else 1
        source = ShardSource(BatchStream(self, rows, plan, buffer, seed, grouped=group_by_image))
        self._log(plan, streams)
        return Loader(source, num_workers=num_workers, pin_memory=pin_memory)

    def _log(self, plan: RankPlan, streams: int) -> None:
        total = "samples not counted" if self.num_rows is None else f"{self.num_rows} samples"
        logging.info(
            "%s: %d shards, %s; an epoch has %d, in %d batches of %d on each of %d ranks",
            *(self.split, len(self.shards), total, len(self), plan.num_batches, plan.batch_size, plan.world_size),
        )
        if self.for_training and streams > len(self.shards):
            logging.info(
                "%s: %d readers (ranks times workers) for %d shards, so several read the same shard; more and smaller "
                "shards (lavis-kvmod pack --max-count) are read faster",
                *(self.split, streams, len(self.shards)),
            )

    def sample_of(
        self, rows: Iterable[Row], *, seed: int, epoch: int, views: Optional[Dict[str, Sample]] = None
    ) -> Sample:
        """The sample of the first row, or, with ``on_bad_sample: skip``, of the first that can be used.

        Augmentation depends on seed, epoch and the row's ``instance_id`` alone; with ``views``, on the image's name
        instead, and what is seen of an image is taken from there, or put there.

        Raises:
            BadDataError: see `AnnotatedDataset.__getitem__`.
        """
        bad: List[str] = []
        for row in rows:
            annotation = row.annotation
            try:
                if row.problem:
                    raise BadImageError(f"{annotation['source']}: {row.problem}")
                name = annotation["instance_id"] if views is None else row.image_name.rpartition("/")[2]
                with seeded(seed, epoch, name):
                    # All questions of an image share its pixels, and no other image of any shard does.
                    seen = (views or {}).get(row.image_name) or self._seen(
                        read_image(row.image, name=annotation["source"]), {**annotation, "image": row.image_name}
                    )
                    texts = self._texts(annotation)
            except BadImageError as error:
                bad.append(str(error))
                self._note(bad, error)
                continue
            if views is not None:
                views[row.image_name] = seen
            return {**seen, **texts, "bad_samples": bad}
        raise BadDataError("no row to make a sample of")


class _Evaluated(ShardDataset):
    """Samples carry their annotation, since there is no list of all of them."""

    for_training = False

    def _texts(self, annotation: Annotation) -> Sample:
        return {**super()._texts(annotation), "annotation": annotation}


class WdsVQATrainData(ShardDataset, VQATrainData):
    """Questions with their answers, for training."""

    kind, for_training = VQA, True


class WdsVQAEvalData(_Evaluated, ShardDataset, VQAEvalData):
    """Questions by id, with their annotation."""

    kind = VQA


class WdsCaptionTrainData(ShardDataset, CaptionTrainData):
    """Images with one caption each, for training; an image with five captions comes five times."""

    kind, for_training = CAPTION, True


class WdsCaptionEvalData(_Evaluated, ShardDataset, CaptionEvalData):
    """Images, each once, with their annotation."""

    kind = CAPTION

"""From the data sets of a run to its loaders."""

import logging
from typing import Any, Dict, List, Optional

from lavis.datasets.data_utils import concat_datasets
from torch.utils.data import ChainDataset, ConcatDataset

from lavis_kvmod.datasets.loading.images import first_with_same_image
from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource

__all__ = ["joined", "make_loader", "stream_of"]


def make_loader(
    split: str,
    dataset: Any,
    *,
    is_train: bool,
    may_be_empty: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    rank: int,
    world_size: int,
    pin_memory: bool,
    group_by_image: bool = False,
) -> Loader:
    """The loader of a split.

    Args:
        dataset: see `joined`.
        is_train: whether the order is drawn anew in each epoch.
        may_be_empty: whether the run does not use the split.
        batch_size, num_workers, seed, rank, world_size, pin_memory: as usual.
        group_by_image: whether the samples of an image come together, and it once: see `SampleSource`.

    Raises:
        ValueError: for an empty split.
        NotImplementedError: for streamed data sets that cannot make a loader themselves.
    """
    workers: Dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
    share = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    stream = stream_of(dataset)
    if stream is not None:
        return stream.make_loader(is_train=is_train, seed=seed, **share, **workers)
    if isinstance(dataset, (tuple, list)) or not hasattr(dataset, "__len__"):
        raise NotImplementedError(
            f"split {split!r}: runner_kvmod reads map-style data sets, and one streamed set that has make_loader; "
            "use runner_base for other webdataset pipelines"
        )
    if len(dataset) == 0 and not may_be_empty:
        raise ValueError(f"split {split!r} of the data set is empty")
    images = first_with_same_image(dataset) if group_by_image else None
    of_images = "" if images is None else f" of {len(set(images.tolist()))} images, each encoded once in a batch"
    logging.info("%s: %d samples%s", split, len(dataset), of_images)
    plan = SamplePlan(len(dataset), **share, seed=seed if is_train else None, images=images)
    return Loader(SampleSource(dataset, plan, seed), **workers)


def joined(split: str, datasets: List[Any]) -> Any:
    """One data set of a split's: LAVIS's concatenation, or the only one if it streams.

    Raises:
        NotImplementedError: for a streamed one among others.
    """
    if len(datasets) == 1 and stream_of(datasets[0]) is not None:
        return datasets[0]
    if any(stream_of(dataset) is not None for dataset in datasets):
        raise NotImplementedError(f"split {split!r}: a streamed data set cannot be mixed with others; got {datasets}")
    return concat_datasets({split: datasets})[split]


def stream_of(dataset: Any) -> Optional[Any]:
    """The data set that makes its own loader (``make_loader``), alone or as the only one of a concatenation."""
    while isinstance(dataset, (ConcatDataset, ChainDataset)):
        parts = list(dataset.datasets)
        if len(parts) != 1:
            return None
        dataset = parts[0]
    return dataset if hasattr(dataset, "make_loader") else None

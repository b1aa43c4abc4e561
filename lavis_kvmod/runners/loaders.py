"""From the data sets of a run to its loaders."""

import logging
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split
from torch.utils.data import ChainDataset, ConcatDataset

from lavis_kvmod.datasets.loading.images import first_with_same_image
from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.datasets.loading.mixture import Mixture
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource

__all__ = ["joined", "make_loader", "make_loaders", "stream_of"]


def make_loaders(
    datasets: Mapping[str, Mapping[str, Any]],
    make: Callable[[str, Any], Loader],
    *,
    seed: int,
    ratios: Optional[Mapping[str, float]] = None,
    num_batches: Optional[int] = None,
) -> Tuple[Dict[str, Any], Dict[str, Union[Loader, Mixture]]]:
    """The data set of each split, and its loader.

    The sets of a split are concatenated. With ``ratios`` or ``num_batches`` the split ``train`` is a `Mixture`: of its
    data sets by those ratios, or of their concatenation alone; an epoch has ``num_batches`` or, by default, as many as
    the sets have together.

    Args:
        datasets: by the data set's name, then by split.
        make: makes the loader of a split from its data set.
        seed: for the draw.

    Raises:
        ValueError: for ratios of data sets that are not there, or not of all that are.
    """
    by_split = reorg_datasets_by_split(datasets)
    whole = {
        split: concat_datasets({split: sets})[split] if ratios and split == "train" else joined(split, sets)
        for split, sets in by_split.items()
    }
    loaders: Dict[str, Union[Loader, Mixture]] = {}
    for split, dataset in sorted(whole.items()):
        if split != "train" or not (ratios or num_batches):
            loaders[split] = make(split, dataset)
            continue
        parts = {"all": dataset}
        if ratios:
            parts = {name: splits[split] for name, splits in datasets.items() if split in splits}
            _check_ratios(ratios, list(parts))
        each = {name: make(split, part) for name, part in parts.items()}
        length = num_batches or sum(map(len, each.values()))
        loaders[split] = Mixture(each, ratios or {"all": 1.0}, num_batches=length, dataset=dataset, seed=seed)
        logging.info("%s: an epoch has %d batches, drawn from %s", split, length, ratios or "one after the other")
    return whole, loaders


def _check_ratios(ratios: Mapping[str, float], names: Sequence[str]) -> None:
    if set(ratios) != set(names):
        raise ValueError(
            f"run.train_dataset_ratios: expected a number for each data set with a train split, {', '.join(names)}; "
            f"got {', '.join(ratios)}"
        )


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
        return stream.make_loader(is_train=is_train, seed=seed, group_by_image=group_by_image, **share, **workers)
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
        raise NotImplementedError(
            f"split {split!r}: a streamed data set cannot be mixed with others, but by "
            f"run.train_dataset_ratios; got {datasets}"
        )
    return concat_datasets({split: datasets})[split]


def stream_of(dataset: Any) -> Optional[Any]:
    """The data set that makes its own loader (``make_loader``), alone or as the only one of a concatenation."""
    while isinstance(dataset, (ConcatDataset, ChainDataset)):
        parts = list(dataset.datasets)
        if len(parts) != 1:
            return None
        dataset = parts[0]
    return dataset if hasattr(dataset, "make_loader") else None

"""Several images in a sample: pictures side by side, the tiles of a large one, the frames of a video.

    image 1 ─► encoders ─► tokens, prefix  + place 1 ─┐
    image 2 ─► encoders ─► tokens, prefix  + place 2 ─┴─► [ prefix 1 | prefix 2 | tokens 1 | tokens 2 ] ─► connector

Each goes through the frozen encoders by itself, and all that a connector attends to stands side by side. A learned
vector for each place says which is which; it is zero at first, so that a model begins by seeing the images as a set.

Samples with equally many images go through the connector together (`by_number`): nothing is padded, nothing has to be
masked, and what a sample comes to does not depend on its batch.
"""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import PrefixGenerator
from lavis_kvmod.models.vision.feature_cache import FrozenFeatures

__all__ = ["ImagePlaces", "Seen", "by_number", "each_by_itself", "images_each", "in_order", "in_windows", "one_by_one"]


class Seen(NamedTuple):
    """What the frozen encoders made of samples with k images each.

    ``visual_tokens`` (b, k * n, width); ``pooled`` (b, k, …) or None. ``places`` (b, k) is None in a model of one image
    a sample: ``pooled`` is then (b, …).
    """

    visual_tokens: Tensor
    pooled: Optional[Tensor]
    places: Optional[Tensor] = None


def by_number(samples: Mapping[str, Any]) -> List[Tuple[List[int], Dict[str, Any]]]:
    """The images of a batch, samples with equally many together: which samples, and their ``image`` (r, k, 3, H, W),
    ``image_place`` (r, k) and, where there is one, ``image_key``. A batch of one image a sample stays as it is.

    Args:
        samples: ``image`` (b, 3, H, W), or (b, k, 3, H, W) with ``image_mask`` (b, k), true where there is an image (by
            default everywhere), and ``image_place`` (b, k), the place of each (by default its number among the
            sample's).

    Raises:
        ValueError: for a mask or places of another shape, or a sample without an image.
    """
    image = samples["image"]
    if image.ndim != 5:
        return [(list(range(len(image))), dict(samples))]
    shape = tuple(image.shape[:2])
    mask = _of_images(samples, "image_mask", shape)
    places = _of_images(samples, "image_place", shape)
    if mask is None:  # nothing to be looked at
        return [(list(range(shape[0])), {**samples, **({} if places is None else {"image_place": places})})]
    mask = mask.bool()
    places = mask.long().cumsum(1) - 1 if places is None else places
    there = [[i for i, is_there in enumerate(row) if is_there] for row in mask.tolist()]
    if [] in there:
        raise ValueError(f"expected an image in each sample; sample {there.index([])} of the batch has none")
    keys = samples.get("image_key")
    groups = []
    for number in sorted(set(map(len, there))):
        rows = [row for row, own in enumerate(there) if len(own) == number]
        row, column = torch.tensor(rows).unsqueeze(1), torch.tensor([there[row] for row in rows])
        whole = len(rows) == shape[0] and number == shape[1]
        part = {
            "image": image if whole else image[row.to(image.device), column.to(image.device)],
            "image_place": places[row, column],
        }
        if keys is not None:
            part["image_key"] = [keys[row] for row in rows]
        groups.append((rows, part))
    return groups


def _of_images(samples: Mapping[str, Any], name: str, shape: Tuple[int, ...]) -> Optional[Tensor]:
    value = samples.get(name)
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected (b, k) = {shape}, as image has it, got {tuple(value.shape)}")
    return None if value is None else value.cpu()


def images_each(image: Tensor) -> int:
    """How many images a sample of (b, 3, H, W), or of (b, k, 3, H, W), has."""
    return image.shape[1] if image.ndim == 5 else 1


def in_order(parts: Sequence[Tensor], rows: Sequence[List[int]]) -> Tensor:
    """What was computed for the groups of `by_number`, as the samples stand in the batch."""
    order = torch.tensor([row for own in rows for row in own]).argsort()
    return torch.cat(list(parts))[order.to(parts[0].device)]


def each_by_itself(samples: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[List[int]]]:
    """The images of a batch's samples (or, with ``image_index``, of what they show) as a batch of one image each, and
    which of them are each sample's. Where there are none, one that is black and nobody's: a step then still has what it
    trains, as ranks expect of each other."""
    image, keys = samples["image"], samples.get("image_key")
    numbers = [[i] for i in range(len(image))]
    if image.ndim == 5:
        shape = tuple(image.shape[:2])
        given = _of_images(samples, "image_mask", shape)
        mask = torch.ones(shape, dtype=torch.bool) if given is None else given.bool()
        counted = (mask.flatten().cumsum(0) - 1).view(shape).tolist()
        numbers = [[n for n, there in zip(*row) if there] for row in zip(counted, mask.tolist())]
        image = image[mask.to(image.device)]
        keys = None if keys is None else [key for own in keys for key in own]
        if not len(image):
            image, keys = image.new_zeros(1, *image.shape[1:]), None
    alone = {"image": image} if keys is None else {"image": image, "image_key": keys}
    shown = samples.get("image_index")
    return alone, numbers if shown is None else [numbers[i] for i in shown.tolist()]


def in_windows(samples: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Long sequences as batches of short ones: ``window`` images each, each ``stride`` (by default ``window``) on from
    the one before, the last as far as there are images.

    Args:
        samples: ``image`` (b, k, 3, H, W), as many of each sample; ``window``, ``stride``; ``image_key`` where there is
            one. Places are counted anew in each window.

    Raises:
        ValueError: for a window without images, a stride that passes images over, or samples of which some have fewer
            images, or images at places of their own (tiles).
    """
    image, window = samples["image"], samples["window"]
    stride = samples.get("stride", window)
    if image.ndim != 5 or "image_place" in samples or not samples.get("image_mask", torch.ones(1)).all():
        raise ValueError("window: expected image (b, k, 3, H, W), as many in each sample and no tiles")
    if not 1 <= stride <= window:
        raise ValueError(
            f"window, stride: expected a stride of 1 to the window, so that each image is seen; got {window}, {stride}"
        )
    count = 1 + max(0, -((window - image.shape[1]) // stride))  # the rest, rounded up
    rest = {key: value for key, value in samples.items() if key not in ("window", "stride", "image_mask")}
    found = []
    for own in (slice(i * stride, i * stride + window) for i in range(count)):
        keys = {"image_key": [row[own] for row in samples["image_key"]]} if "image_key" in samples else {}
        found.append({**rest, "image": image[:, own], **keys})
    return found


def one_by_one(samples: Mapping[str, Any]) -> Tuple[Tensor, Any]:
    """The images of a batch, each by itself (b * k, 3, H, W), and their keys, or None."""
    image, keys = samples["image"], samples.get("image_key")
    if image.ndim != 5:
        return image, keys
    return image.flatten(0, 1), None if keys is None else [key for own in keys for key in own]


class ImagePlaces(nn.Module):
    """Where an image stands among those of its sample: a vector for its visual tokens, and one for its prefix tokens.

    Args:
        num_places: how many places there are.
        visual_width: of the visual tokens.
        prefix_width: of the prefix tokens, before they become Keys and Values; None without a prefix.
        expected: what a message says of ``num_places``.
    """

    def __init__(
        self, num_places: int, visual_width: int, prefix_width: Optional[int] = None, expected: str = "max_images"
    ):
        super().__init__()
        self.visual = nn.Parameter(torch.zeros(num_places, 1, visual_width))
        self.prefix = None if prefix_width is None else nn.Parameter(torch.zeros(num_places, 1, prefix_width))
        self.expected = expected

    def forward(self, features: FrozenFeatures, samples: Mapping[str, Any]) -> Seen:
        """Features of each of b * k images, and their samples, to what stands side by side.

        Raises:
            ValueError: for a place that there is not.
        """
        places, image = samples.get("image_place"), samples["image"]
        k = images_each(image)
        highest = k - 1 if places is None else int(places.max())
        if highest >= len(self.visual):
            raise ValueError(
                f"expected at most {len(self.visual)} images a sample (model.{self.expected}), got {highest + 1}"
            )
        tokens = features.visual_tokens
        if places is None:
            places = torch.arange(k, device=tokens.device).expand(len(image), k)
        places = places.to(tokens.device)
        tokens = (tokens + self.visual[places.flatten()].to(tokens.dtype)).unflatten(0, (-1, k)).flatten(1, 2)
        pooled = None if features.pooled is None else features.pooled.unflatten(0, (-1, k))
        return Seen(tokens, pooled, places)

    def key_value(
        self, generator: PrefixGenerator, pooled: Tensor, places: Tensor, own_softmax: bool
    ) -> Tuple[Tensor, Tensor]:
        """Features (b, k, …) of images at their places (b, k) to Keys and Values of all their prefixes, each
        (b, h, k * p, d), or (c, b, h, k * p, d) per layer."""
        tokens = generator.tokens(pooled.flatten(0, 1))  # (b * k, p, hidden)
        if self.prefix is not None:
            tokens = tokens + self.prefix[places.flatten()]
        key, value = generator.project(tokens, own_softmax)
        return _side_by_side(key, places.shape[1]), _side_by_side(value, places.shape[1])


def _side_by_side(of_each: Tensor, k: int) -> Tensor:
    """(…, b * k, h, p, d) -> (…, b, h, k * p, d)"""
    return of_each.unflatten(-4, (-1, k)).transpose(-4, -3).flatten(-3, -2)

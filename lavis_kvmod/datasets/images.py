"""Read an image file as RGB, whatever its kind, or say why it cannot be read.

What LAVIS's data sets do (``Image.open(path).convert("RGB")``) clips 16-bit grey to white, shows what lies hidden under
transparency, leaves photographs lying on their side, and, because importing LAVIS sets
``ImageFile.LOAD_TRUNCATED_IMAGES`` (coco_caption_datasets.py:14), fills up half an image with grey in silence.
"""

import contextlib
import io
import os
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Union

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

__all__ = ["BadImageError", "read_image"]

ImageSource = Union[str, Path, bytes, BinaryIO]

_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
# Formats whose grey of more than 8 bits older Pillows open as 32-bit integers, in the range of 16 bits.
_SIXTEEN_BIT_AS_INTEGER = ("PNG", "PPM")


class BadImageError(ValueError):
    """An image that cannot be found or read; the message names it and says why."""


def read_image(source: ImageSource, *, max_pixels: Optional[int] = None, name: Optional[str] = None) -> Image.Image:
    """The image as RGB, decoded, upright and with nothing left to read.

    CMYK, palette, grey and 16-bit grey images are converted (16 bits are scaled to 8, not clipped), transparency is
    laid on white, the EXIF orientation is applied, and of an animation the first frame is taken.

    Args:
        source: a path, the file's bytes, or a binary file object.
        max_pixels: more pixels than this are refused, by the size in the header, before anything is decoded. Pillow's
            own limit (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million) where not given.
        name: what messages call the image; the path where not given.

    Raises:
        BadImageError: for whatever cannot be read whole: not an image, truncated, broken, too large, missing.
    """
    if name is None:
        name = str(source) if isinstance(source, (str, Path)) else "an image given as bytes"
    if isinstance(source, bytes):
        if not source:
            raise BadImageError(f"{name}: the file is empty (0 bytes)")
        source = io.BytesIO(source)
    try:
        with _no_truncated_images(), Image.open(source) as image:
            _refuse_bomb(image, Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels)
            image.load()
            return _to_rgb(_upright(image), image.format)
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:  # damaged files make Pillow's decoders raise errors of almost any type
        raise BadImageError(f"{name}: {_reason(source, error)}") from error


@contextlib.contextmanager
def _no_truncated_images() -> Iterator[None]:
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _refuse_bomb(image: Image.Image, limit: Optional[int]) -> None:
    width, height = image.size
    if limit is not None and width * height > limit:
        raise Image.DecompressionBombError(f"{width} x {height} pixels are more than the limit of {limit}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read tells no orientation; the pixels have been decoded already
        return image


def _to_rgb(image: Image.Image, file_format: Optional[str]) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "I" and file_format in _SIXTEEN_BIT_AS_INTEGER:
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}) of unknown range; save it as 8 or 16 bits")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.uint32)  # 0 … 65535 = 255 * 257
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def _reason(source, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        if isinstance(source, (str, Path)) and os.path.getsize(source) == 0:
            return "the file is empty (0 bytes)"
        return "not an image of a format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        return f"refused as a decompression bomb: {error}"
    return f"not readable: {error or type(error).__name__}"

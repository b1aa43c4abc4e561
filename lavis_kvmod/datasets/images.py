"""Read an image file as RGB, whatever its kind, or say why it cannot be read.

What LAVIS's data sets do (``Image.open(path).convert("RGB")``) clips 16-bit grey to white, shows what lies hidden under
transparency, leaves photographs lying on their side, and, because importing LAVIS sets
``ImageFile.LOAD_TRUNCATED_IMAGES`` (coco_caption_datasets.py:14), fills up half an image with grey in silence.
"""

import contextlib
import io
import os
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Sequence, Union

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from lavis_kvmod.system.quiet import LibraryWarning, gathered_warnings

__all__ = ["FORMATS", "BadImageError", "format_of", "read_image"]

ImageSource = Union[str, Path, bytes, BinaryIO]

# Pillow takes the format from a file's contents, whatever its name says, and knows some that are programs: for a
# "photo.jpg" that is PostScript it starts Ghostscript. These are pictures made of pixels, and decoded by Pillow itself.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

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
    max_pixels = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        try:
            with _warnings_name(name):
                return _decoded(source, max_pixels)
        except Exception:  # damaged files make Pillow's decoders raise errors of almost any type
            pixels_alone = _png_without_side_data(source)
            if pixels_alone is not None:
                with contextlib.suppress(Exception):
                    return _decoded(io.BytesIO(pixels_alone), max_pixels)
            raise
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:
        raise BadImageError(f"{name}: {_reason(source, error)}") from error


def format_of(data: bytes) -> str:
    """The one of `FORMATS` that an image file's bytes are in.

    Raises:
        BadImageError: for anything else.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return str(image.format)
    except Exception as error:
        raise BadImageError(_reason(data, error)) from error


def _decoded(source: Union[str, Path, BinaryIO], max_pixels: Optional[int]) -> Image.Image:
    with _no_truncated_images(), Image.open(source, formats=FORMATS) as image:
        _refuse_bomb(image, max_pixels)
        image.load()
        return _to_rgb(_upright(image), image.format)


_PNG = b"\x89PNG\r\n\x1a\n"


def _png_without_side_data(source: Union[str, Path, BinaryIO]) -> Optional[bytes]:
    """A PNG's pixels and what else is seen of it, without comments, colour profile and the like; None for other files.

    Pillow refuses files whose side data is broken or unpacks to more than a megabyte, though their pixels are whole.
    """
    if isinstance(source, (str, Path)):
        data = Path(source).read_bytes() if os.path.isfile(source) else b""
    else:
        source.seek(0)
        data = source.read()
    if not data.startswith(_PNG):
        return None
    kept, start = [_PNG], len(_PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, kind, content, sum
        kind = data[start + 4 : start + 8]
        is_whole = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and is_whole):  # an upper case letter: critical
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


@contextlib.contextmanager
def _warnings_name(image: str) -> Iterator[None]:
    """Pillow's warnings say what is wrong with a file, not with which."""
    gathered: Sequence[LibraryWarning] = ()
    try:
        with gathered_warnings() as gathered:
            yield
    finally:
        for told in gathered:
            warnings.warn_explicit(f"{image}: {told.text}", UserWarning, told.file, told.line)


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


def _reason(source: ImageSource, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        if isinstance(source, (str, Path)) and os.path.getsize(source) == 0:
            return "the file is empty (0 bytes)"
        return f"not an image of a format that is read ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"refused as a decompression bomb: {error}"
    return f"not readable: {str(error) or type(error).__name__}"

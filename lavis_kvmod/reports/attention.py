"""Pictures of attention: heat over the image, and the prefix's share by layer and head."""

import textwrap
from typing import List, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

__all__ = ["heat_map", "panels", "share_table"]

SIDE = 224  # pixels of a panel
_GAP, _LINE, _FONT = 12, 16, 13
# Nothing to most: blue, red, orange, yellow, and how opaque over the grey image.
_COLOURS = np.array([[20, 20, 90, 150], [150, 10, 60, 150], [240, 110, 0, 150], [255, 235, 60, 160]])

Panel = Tuple[Image.Image, str]


def heat_map(image: Image.Image, weights: torch.Tensor) -> Image.Image:
    """``weights`` (side, side), as the image lies, laid over it in grey; yellow is the greatest of them, blue none."""
    picture = image.convert("L").convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = weights.detach().float().cpu().numpy()
    levels = values / max(float(values.max()), 1e-12)
    smooth = Image.fromarray((levels * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return Image.alpha_composite(picture, Image.fromarray(_coloured(np.asarray(smooth) / 255.0))).convert("RGB")


def share_table(shares: torch.Tensor) -> Image.Image:
    """The prefix's share, (layers, heads) in [0, 1], as a table of coloured cells."""
    cell, head = 44, 40
    layers, heads = shares.shape
    sheet = Image.new("RGB", (head + heads * cell, _LINE + 4 + layers * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT)
    for j in range(heads):
        draw.text((head + j * cell + 4, 2), f"h {j + 1}", fill="black", font=font)
    for i in range(layers):
        top = _LINE + 4 + i * cell
        draw.text((2, top + cell // 3), f"layer {i + 1}"[:7] if i < 9 else f"l {i + 1}", fill="black", font=font)
        for j in range(heads):
            share, left = float(shares[i, j]), head + j * cell
            shade = round(255 * (1 - share))
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=(shade, shade, 255))
            draw.text((left + 6, top + cell // 3), f"{share:.0%}", fill="white" if share > 0.6 else "black", font=font)
    return sheet


def panels(title: str, shown: Sequence[Panel], columns: int = 4) -> Image.Image:
    """Pictures with a text below each, in rows, below a title."""
    font = ImageFont.load_default(size=_FONT)
    columns = max(1, min(columns, len(shown)))
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    width = max(sum(_width(image) for image, _ in row) for row in rows) + _GAP
    title_lines = textwrap.wrap(title, max(20, width // 7)) or [""]
    heights = [max(image.height + _LINE * len(_lines(image, text)) for image, text in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (width, _GAP + _LINE * len(title_lines) + _GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title_lines):
        draw.text((_GAP, _GAP + i * _LINE), line, fill="black", font=font)
    top = _GAP + _LINE * len(title_lines) + _GAP
    for row, height in zip(rows, heights):
        left = _GAP
        for image, text in row:
            sheet.paste(image, (left, top))
            for i, line in enumerate(_lines(image, text)):
                draw.text((left, top + image.height + i * _LINE), line, fill="black", font=font)
            left += _width(image)
        top += height
    return sheet


def _width(image: Image.Image) -> int:
    return image.width + _GAP


def _lines(image: Image.Image, text: str) -> List[str]:
    return textwrap.wrap(text, max(8, image.width // 7))


def _coloured(levels: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] -> (h, w, 4), RGBA."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(levels, at, _COLOURS[:, i]) for i in range(4)], axis=-1).astype(np.uint8)

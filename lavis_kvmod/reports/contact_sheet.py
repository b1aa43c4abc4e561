"""Pictures in rows under a heading each, as one image (PNG) or page (HTML)."""

import base64
import html
import io
from pathlib import Path
from typing import List, NamedTuple, Sequence

from PIL import Image, ImageDraw

from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["Shown", "SheetRow", "require_kind", "write_sheet"]

KINDS = (".png", ".html")
_SIDE, _TEXT, _GAP = 128, 16, 6


class Shown(NamedTuple):
    """A picture and what stands under it."""

    picture: Image.Image
    label: str


class SheetRow(NamedTuple):
    """A heading, and the pictures under it."""

    heading: str
    shown: List[Shown]


def require_kind(path: Path) -> None:
    """Raises ValueError for a file that `write_sheet` would not write."""
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(KINDS)}")


def write_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write a contact sheet, PNG or HTML by the file's ending.

    Raises:
        ValueError: for another ending.
    """
    require_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as temporary:
        if path.suffix == ".png":
            _as_picture(rows).save(temporary, "png")
        else:
            temporary.write_text(_as_page(rows), encoding="utf-8")


def _thumbnail(picture: Image.Image) -> Image.Image:
    """Small pictures are enlarged by whole pixels."""
    factor = _SIDE // max(picture.size)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    return small


def _as_picture(rows: Sequence[SheetRow]) -> Image.Image:
    columns = max(len(row.shown) for row in rows)
    cell, height = _SIDE + _GAP, _SIDE + 2 * _TEXT + _GAP
    sheet = Image.new("RGB", (columns * cell + _GAP, len(rows) * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = r * height + _GAP
        draw.text((_GAP, top), _plain(row.heading), fill="black")
        for c, shown in enumerate(row.shown):
            left = _GAP + c * cell
            sheet.paste(_thumbnail(shown.picture), (left, top + _TEXT))
            draw.text((left, top + _TEXT + _SIDE), _plain(shown.label)[: _SIDE // 6], fill="black")
    return sheet


def _plain(text: str) -> str:
    """What Pillow's own font can draw."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _as_page(rows: Sequence[SheetRow]) -> str:
    parts = ["<!doctype html><meta charset=utf-8><title>contact sheet</title>"]
    parts.append("<style>figure{display:inline-block;margin:4px;font:12px sans-serif}h2{font:16px sans-serif}</style>")
    for row in rows:
        parts.append(f"<h2>{html.escape(row.heading)}</h2>")
        for shown in row.shown:
            file = io.BytesIO()
            _thumbnail(shown.picture).save(file, "png")
            data, label = base64.b64encode(file.getvalue()).decode(), html.escape(shown.label)
            parts.append(f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><br>{label}</figure>')
    return "\n".join(parts) + "\n"

"""What a file is that should hold weights and does not, told by how it begins."""

from pathlib import Path
from typing import Optional, Union
from zipfile import BadZipFile, ZipFile, is_zipfile

_HEAD_BYTES = 512
_HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")
_BINARY = (
    (b"\x89HDF", "an HDF5 file, as Keras and TensorFlow write"),
    (b"GGUF", "a GGUF file, as llama.cpp reads"),
    (b"\x1f\x8b", "a gzip archive: unpack it, and name what is in it"),
)


def other_kind(path: Path, name: Optional[Union[str, Path]] = None) -> Optional[str]:
    """What this file is, if it clearly is no file of weights, or one of another format than its name says; else None.

    Args:
        path: the file.
        name: what it is called, if not as ``path`` says.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    named_safetensors = Path(name or path).suffix == ".safetensors"
    if not head:
        return "empty (0 bytes)"
    if _is_safetensors(head, path.stat().st_size):
        return None if named_safetensors else "a safetensors file under another name: let its name end in .safetensors"
    if is_zipfile(path):
        other = _other_zip(path)
        if other is None and named_safetensors:
            return "a PyTorch file under another name: let its name end in .pth"
        return other
    for start, kind in _BINARY:
        if head.startswith(start):
            return kind
    return _text(head)


def _is_safetensors(head: bytes, size: int) -> bool:
    """Its header's length stands in the first 8 bytes, and the header is JSON."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _other_zip(path: Path) -> Optional[str]:
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
    except BadZipFile:  # damaged: reading it says how
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program: save its state_dict() with torch.save"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return "a zip archive without PyTorch's data.pkl"


def _text(head: bytes) -> Optional[str]:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, which stands for the file itself: fetch that with `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        return "an HTML (or XML) page: a site's answer (a login, a quota, a missing file) in place of the file"
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < _HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return None
    printable = all(character.isprintable() or character.isspace() for character in text)
    if not printable or len(text.encode()) < len(head) - 3:  # a character may be cut at the end
        return None
    return f"a text file that begins with {text.strip()[:40]!r}"

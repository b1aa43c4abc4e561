"""Weight files behind a URL, kept in the download cache.

Two URLs may end in one name (``run1/checkpoint_best.pth``, ``run2/checkpoint_best.pth``), so a file is kept by its
whole URL, in a folder of its own below the cache of `torch.hub`. A file that has changed behind its URL, as far as the
server tells (``ETag``, ``Last-Modified``), is fetched anew.

What LAVIS has published keeps the place where LAVIS itself keeps it, by its bare name, so that it is on the disk once.
A bare name is trusted for one other kind of file: one whose name carries the start of its SHA-256, as `torch.hub` names
them (``efficientnet-b3-5fb5a3c3.pth``), if it has that sum.
"""

import hashlib
import json
import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import IO, Dict, Mapping, Optional
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from filelock import FileLock
from torch.hub import get_dir
from tqdm import tqdm

from lavis_kvmod.weights.files import sha256, whole_or_nothing
from lavis_kvmod.weights.kinds import other_kind

REACH_TIMEOUT_S = 5
DOWNLOAD_TIMEOUT_S = 60  # without a byte

_PUBLISHED_BY_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/"
_SUM_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")
_BLOCK = 2**20
# What a server says about which version of a file it has, the surer first.
_VERSION = ("ETag", "Last-Modified")


def is_url(source: str) -> bool:
    """Whether this is the address of a file."""
    return urlparse(source).scheme in ("http", "https")


def cached(url: str) -> Optional[Path]:
    """The file of ``url`` on this machine, or None; asks no server."""
    return next((path for path in (_by_bare_name(url), _place(url)) if path is not None and path.is_file()), None)


@lru_cache(maxsize=None)
def reachable(url: str) -> bool:
    """Whether a server answers for ``url``; asked once a process."""
    return _answer(url) is not None


def fetch(url: str) -> Path:
    """The file of ``url``: the one in the cache, or a download if there is none or the server has another by now.

    Of several processes of a machine the first downloads, and the others wait for it: by a lock and no barrier between
    ranks, as in LAVIS, since a rank that comes when the file is there would pass by the barrier that another waits in.

    Raises:
        OSError: if the download fails, or what comes is no file of weights.
    """
    known = _by_bare_name(url)
    if known is not None and known.is_file():
        return known
    path = _place(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file() or _has_changed(url, path):
            _download(url, path)
    return path


def _place(url: str) -> Path:
    """Where the file of ``url`` is kept."""
    name = _bare_name(url)
    checkpoints = Path(get_dir()) / "checkpoints"
    if url.startswith(_PUBLISHED_BY_LAVIS):
        return checkpoints / name
    return checkpoints / "lavis_kvmod" / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def _bare_name(url: str) -> str:
    return os.path.basename(urlparse(url).path) or "file"


def _by_bare_name(url: str) -> Optional[Path]:
    """Where other programs keep ``url`` by its bare name, if that is certain to be the same file."""
    path = Path(get_dir()) / "checkpoints" / _bare_name(url)
    if url.startswith(_PUBLISHED_BY_LAVIS):
        return path
    start = _SUM_IN_NAME.search(path.name)
    if start is None or not path.is_file():
        return None
    return path if _sha256_of(path, path.stat().st_mtime_ns).startswith(start[1]) else None


@lru_cache(maxsize=None)
def _sha256_of(path: Path, mtime_ns: int) -> str:
    return sha256(path)


def _has_changed(url: str, path: Path) -> bool:
    now = _answer(url) or {}
    try:
        then = json.loads(_note(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # killed between the file and the note
        then = {}
    told = next((key for key in _VERSION if key in now), None)
    if told is None or now[told] == then.get(told):
        return False
    logging.warning("%s has changed on the server: it is downloaded again", url)
    return True


def _note(path: Path) -> Path:
    """Beside a file: what the server said about its version."""
    return path.with_name(f"{path.name}.version.json")


def _answer(url: str) -> Optional[Dict[str, str]]:
    """What a server says about the version of ``url``; None if there is no such file, no server, or no network."""
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return None
    try:
        with urlopen(Request(url, method="HEAD"), timeout=REACH_TIMEOUT_S) as answer:
            return _version(answer.headers)
    except HTTPError as error:  # a server may refuse to be asked and still give the file
        return None if error.code in (404, 410) else {}
    except OSError:
        return None


def _version(headers: Mapping[str, str]) -> Dict[str, str]:
    return {key: headers[key] for key in _VERSION if headers.get(key)}


def _download(url: str, path: Path) -> None:
    with urlopen(Request(url), timeout=DOWNLOAD_TIMEOUT_S) as answer, whole_or_nothing(path) as temporary:
        expected = int(answer.headers.get("Content-Length") or 0)
        with open(temporary, "wb") as file:
            got = _copy(answer, file, expected, path.name)
        if expected and got != expected:
            raise OSError(f"the connection ended after {got:,} of {expected:,} bytes")
        other = other_kind(temporary, path.name)
        if other is not None:
            raise OSError(f"what came is {other}")
        version = _version(answer.headers)
    with whole_or_nothing(_note(path)) as temporary:
        temporary.write_text(json.dumps(version), encoding="utf-8")


def _copy(source: IO[bytes], target: IO[bytes], expected: int, name: str) -> int:
    got = 0
    with tqdm(total=expected or None, desc=name, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        for block in iter(lambda: source.read(_BLOCK), b""):
            target.write(block)
            got += len(block)
            progress.update(len(block))
    return got

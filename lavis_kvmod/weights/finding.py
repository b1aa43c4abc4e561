"""Where weight files come from: a local path, a file already in the download cache, or a download.

Nothing here opens a file (see `lavis_kvmod.weights.reading`), and nothing needs LAVIS, which takes seconds to import.
"""

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterable, List, Optional
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from filelock import FileLock

from lavis_kvmod.weights.files import check_sha256

REACH_TIMEOUT_S = 5
_HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class MissingWeightsError(FileNotFoundError):
    """Weights that are neither on disk nor to be downloaded: which, from where, and the key that takes a path."""


@dataclass(frozen=True)
class WeightFile:
    """One file (or Hugging Face folder) of weights.

    Attributes:
        part: what it is for, in the user's words.
        source: local path, URL, or the name of a Hugging Face repository; None if nothing is known. A
            ``#sha256=HEX`` behind it is taken off, and what is fetched is checked against it.
        key: the config key that takes a local path.
        is_hf_folder: the source is a Hugging Face folder or repository name.
        build: makes the file on this machine, in place of a source (the demo's parts are trained on first use).
    """

    part: str
    source: Optional[str]
    key: str
    is_hf_folder: bool = False
    build: Optional[Callable[[], Path]] = None
    sha256: Optional[str] = field(init=False, default=None)

    def __post_init__(self):
        source, found, digest = (self.source or "").partition("#sha256=")
        if found:
            object.__setattr__(self, "source", source)
            object.__setattr__(self, "sha256", digest)

    def local_path(self) -> Optional[Path]:
        """The file on this machine, or None if it would have to be downloaded or does not exist."""
        if not self.source:
            return None
        path = Path(self.source).expanduser()
        if path.exists():
            return path
        if self.is_hf_folder:
            return _hf_cached(self.source)
        if _is_url(self.source):
            cached = _url_cache_path(self.source)
            return cached if cached.is_file() else None
        return None

    def problem(self) -> Optional[str]:
        """Why this cannot be had, or None. Asks the network only for what is not on disk."""
        if self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            return f"{self.part}: expected 64 hexadecimal digits behind {self.source}#sha256=, got {self.sha256!r}"
        if self.build is not None or self.local_path() is not None:
            return None
        remedy = f"set {self.key} to a local {'folder' if self.is_hf_folder else 'file'}"
        if not self.source:
            return f"{self.part}: no weights known for it; {remedy}"
        if self._is_remote():
            url = f"https://huggingface.co/{self.source}" if self.is_hf_folder else self.source
            if _reachable(url):
                return None
            return f"{self.part}: {url} is not in the download cache and cannot be reached; {remedy}"
        of_blip2 = self.key.endswith(("pretrained", "finetuned", "checkpoint argument"))
        if of_blip2 and self._names_repository() and not self.is_hf_folder:
            remedy += (
                "; a Hugging Face repository is not downloaded for it, but the local folder of a BLIP-2's is taken"
            )
        return f"{self.part}: no such {'folder' if self.is_hf_folder else 'file'} {self.source}; {remedy}"

    def _is_remote(self) -> bool:
        if self.is_hf_folder:
            return self._names_repository()
        return _is_url(self.source)

    def _names_repository(self) -> bool:
        """Whether it reads "owner/name"; anything that looks more like a path is meant as one."""
        looks_like_a_path = self.source.startswith((".", "/", "~")) or self.source.endswith((".pth", ".safetensors"))
        return self.source.count("/") == 1 and not looks_like_a_path

    def fetch(self) -> Path:
        """The local path, after building or downloading if need be. Of several processes of a machine the first
        downloads, and the others wait for it.

        Raises:
            MissingWeightsError: if it can be had neither way.
            CheckpointError: if its SHA-256 is another than the one given.
        """
        require([self])
        path = self._fetch()
        if self.sha256 is not None:
            check_sha256(path, self.sha256)
        return path

    def _fetch(self) -> Path:
        if self.build is not None:
            return self.build()
        path = self.local_path()
        if path is not None:
            return path
        try:
            return _download_hf(self.source) if self.is_hf_folder else _download_url(self.source)
        except OSError as error:
            raise MissingWeightsError(
                f"{self.part}: downloading {self.source} failed ({error}); set {self.key} to a local file"
            ) from error


def require(files: Iterable[WeightFile]) -> None:
    """Raise one `MissingWeightsError` that lists all weights which cannot be had."""
    problems: List[str] = [problem for file in files for problem in [file.problem()] if problem]
    if problems:
        raise MissingWeightsError("missing weights:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _is_url(source: str) -> bool:
    return urlparse(source).scheme in ("http", "https")


def _url_cache_path(url: str) -> Path:
    from timm.models.hub import get_cache_dir

    return Path(get_cache_dir()) / os.path.basename(urlparse(url).path)


def _hf_cached(repo: str) -> Optional[Path]:
    """The snapshot folder of a Hugging Face repository, if its config and weights are in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        weights = [try_to_load_from_cache(repo, name) for name in _HF_WEIGHTS]
    except HFValidationError:  # a path, not a repository's name
        return None
    found = [Path(path) for path in weights if isinstance(path, str)]
    if found and (found[0].parent / "config.json").is_file():
        return found[0].parent
    return None


def _download_url(url: str) -> Path:
    """Into the cache that timm and LAVIS use. A lock and no barrier between ranks, as in LAVIS: a rank that comes when
    the file is there would pass by the barrier that another waits in, and each machine has a cache of its own."""
    from timm.models.hub import download_cached_file

    path = _url_cache_path(url)
    with FileLock(f"{path}.lock"):
        return Path(download_cached_file(url, check_hash=False, progress=not path.is_file()))


def _download_hf(repo: str) -> Path:
    """What PyTorch needs of a repository; Hugging Face's client locks each file itself."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]))


@lru_cache(maxsize=None)
def _reachable(url: str) -> bool:
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    try:
        urlopen(Request(url, method="HEAD"), timeout=REACH_TIMEOUT_S).close()
        return True
    except HTTPError as error:
        return error.code not in (404, 410)
    except OSError:
        return False

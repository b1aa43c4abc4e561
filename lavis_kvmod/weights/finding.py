"""Where weight files come from: a local path, a file already in the download cache, or a download.

Files are looked at here, and read in `lavis_kvmod.weights.reading`. Nothing needs LAVIS, which takes seconds to import.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, List, Optional

from lavis_kvmod.system.paths import expanded
from lavis_kvmod.weights import downloads
from lavis_kvmod.weights.files import CheckpointError, check_sha256, quick_problem
from lavis_kvmod.weights.hf_folders import folder_problem

_HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Repositories of Hugging Face's first days have no owner in their names.
_WITHOUT_OWNER = ("bert-base-uncased",)


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
        look: what is wrong with a folder, as far as a look tells, or None; by default that of an OPT's or BLIP-2's.
    """

    part: str
    source: Optional[str]
    key: str
    is_hf_folder: bool = False
    build: Optional[Callable[[], Path]] = None
    look: Optional[Callable[[Path], Optional[str]]] = None
    sha256: Optional[str] = field(init=False, default=None)

    def __post_init__(self) -> None:
        source, found, digest = (self.source or "").partition("#sha256=")
        if found:
            object.__setattr__(self, "source", source)
            object.__setattr__(self, "sha256", digest)

    def local_path(self) -> Optional[Path]:
        """The file on this machine, or None if it would have to be downloaded or does not exist.

        Raises:
            FileNotFoundError: for ``~`` where there is no home folder.
        """
        if not self.source:
            return None
        path = expanded(self.source)
        if path.exists():
            return path
        if self.is_hf_folder:
            return _hf_cached(self.source)
        return downloads.cached(self.source) if downloads.is_url(self.source) else None

    def problem(self) -> Optional[str]:
        """Why this cannot be had, or not be read as far as a look at it tells; None if nothing is seen. Asks the
        network only for what is not on disk."""
        return self.absence() or self._fault()

    def absence(self) -> Optional[str]:
        """Why this cannot be had, or None; what is on disk is not looked at."""
        if self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            return f"{self.part}: expected 64 hexadecimal digits behind {self.source}#sha256=, got {self.sha256!r}"
        try:
            if self.build is not None or self.local_path() is not None:
                return None
        except FileNotFoundError as error:
            return f"{self.part}: {error}, or {self.key} to a path without ~"
        remedy = f"set {self.key} to a local {'folder' if self.is_hf_folder else 'file'}"
        if not self.source:
            return f"{self.part}: no weights known for it; {remedy}"
        url = self._url()
        if url is not None:
            if downloads.reachable(url):
                return None
            return f"{self.part}: {url} is not in the download cache and cannot be reached; {remedy}"
        of_blip2 = self.key.endswith(("pretrained", "finetuned", "checkpoint argument"))
        if of_blip2 and _names_repository(self.source) and not self.is_hf_folder:
            remedy += (
                "; a Hugging Face repository is not downloaded for it, but the local folder of a BLIP-2's is taken"
            )
        return f"{self.part}: no such {'folder' if self.is_hf_folder else 'file'} {self.source}; {remedy}"

    def _fault(self) -> Optional[str]:
        path = None if self.build is not None else self.local_path()
        if path is None:
            return None
        if path.is_dir():
            problem = self.look(path) if self.look else folder_problem(path, language_model=self.is_hf_folder)
        elif self.is_hf_folder:
            problem = f"expected the folder of {self.part if self.look else 'an OPT model'}, got the file {path}"
        else:
            problem = quick_problem(path)
        return problem and f"{self.key}: {problem}"

    def _url(self) -> Optional[str]:
        """Where it would be downloaded from, if anywhere."""
        if self.source and self.is_hf_folder:
            named = _names_repository(self.source) or self.source in _WITHOUT_OWNER
            return f"https://huggingface.co/{self.source}" if named else None
        return self.source if self.source and downloads.is_url(self.source) else None

    def fetch(self) -> Path:
        """The local path, after building or downloading if need be. Of several processes of a machine the first
        downloads, and the others wait for it.

        Raises:
            MissingWeightsError: if it can be had neither way.
            CheckpointError: if its SHA-256 is another than the one given.
        """
        absence = self.absence()
        if absence is not None:
            raise MissingWeightsError(_listed("missing weights", [absence]))
        path = self._fetch()
        if self.sha256 is not None:
            check_sha256(path, self.sha256)
        return path

    def _fetch(self) -> Path:
        if self.build is not None:
            return self.build()
        path = self.local_path()
        if path is not None and not downloads.is_url(str(self.source)):
            return path
        try:
            return _download_hf(str(self.source)) if self.is_hf_folder else downloads.fetch(str(self.source))
        except OSError as error:
            raise MissingWeightsError(
                f"{self.part}: downloading {self.source} failed ({error}); set {self.key} to a local file"
            ) from error


def require(weights: Iterable[WeightFile]) -> None:
    """See that all of these can be had, and read as far as a look at them tells.

    Raises:
        MissingWeightsError: listing all that is wrong, if some cannot be had.
        CheckpointError: listing all that is wrong, if some cannot be read.
    """
    weights = list(weights)
    absences = [absence for file in weights for absence in [file.absence()] if absence]
    problems = [problem for file in weights for problem in [file.problem()] if problem]
    if absences:
        raise MissingWeightsError(_listed("missing weights", problems))
    if problems:
        raise CheckpointError(_listed("weights that cannot be read", problems))


def _listed(what: str, problems: List[str]) -> str:
    return f"{what}:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _names_repository(source: str) -> bool:
    """Whether it reads "owner/name"; anything that looks more like a path is meant as one."""
    looks_like_a_path = source.startswith((".", "/", "~")) or source.endswith((".pth", ".safetensors"))
    return source.count("/") == 1 and not looks_like_a_path


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


def _download_hf(repo: str) -> Path:
    """What PyTorch needs of a repository; Hugging Face's client locks each file itself."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=["*.json", "*.txt", "*.safetensors", "pytorch_model*.bin"]))

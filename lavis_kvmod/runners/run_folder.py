"""The folder of a run: made for one run alone, locked while it goes on, with checkpoints of which a good one is always
there.

    output_dir/20261122-101500/     one run, named by its start
        checkpoint_last.pth         the newest; checkpoint_last-1.pth the one before, and so on
        checkpoint_best.pth         the best by the first validation split
        log.txt  timing.txt         what happened; how fast
        config.yaml  environment.json
        result/                     predictions
"""

import datetime
import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from zipfile import ZipFile

from filelock import FileLock, Timeout

from lavis_kvmod.runners.training_state import RunState
from lavis_kvmod.weights import files

__all__ = ["BEST", "LAST", "RunFolder", "RunFolderError", "checkpoint_problem", "find_newest_run"]

BEST, LAST = "checkpoint_best.pth", "checkpoint_last.pth"
_NEXT = "checkpoint_next.pth"  # whole, but not yet in its place
_LOCK = ".lock"
_ABOUT = "environment.json"

# Seconds to wait for the lock: data workers of a killed run hold it until they notice, within 5 s.
_LOCK_WAIT = 15


class RunFolderError(RuntimeError):
    """A run folder that cannot be used or written."""


class RunFolder:
    """A run's folder. Use `create` or `reopen`; the constructor neither makes nor locks anything (ranks but 0).

    Args:
        path: of the folder.
        checkpoint: to resume from, if any.

    Attributes:
        continues: whether the run goes on in the folder it was in.
    """

    def __init__(self, path: Path, checkpoint: Optional[Path] = None, continues: bool = False):
        self.path, self.checkpoint, self.continues = Path(path), checkpoint, continues
        self._lock = FileLock(str(self.path / _LOCK))

    @classmethod
    def create(cls, output_dir: Path, name: Optional[str] = None) -> "RunFolder":
        """A new, locked folder in ``output_dir``; also where another run starts in the same second.

        Raises:
            OSError: if it cannot be made.
        """
        name = name or datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        number = 1 + max((_about(path)["number"] for path in _runs(output_dir)), default=0)
        path, attempt = output_dir / name, 1
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                attempt += 1
                path = output_dir / f"{name}-{attempt}"
        folder = cls(path)
        folder.lock()
        folder._write_about({"number": number, "starts": []})
        return folder

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """The folder of a run that goes on in it, locked and tidied.

        Raises:
            RunFolderError: if another run is using it.
        """
        folder = cls(path, continues=True)
        folder.lock()
        _remove_leftovers_of(path)
        return folder

    def lock(self) -> None:
        """Claim the folder for this process, until it ends or `release` is called.

        Raises:
            RunFolderError: if another process has it, naming that process.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            logging.info("waiting up to %d s for %s, which another run is using", _LOCK_WAIT, self.path)
            try:
                self._lock.acquire(timeout=_LOCK_WAIT)
            except Timeout:
                raise RunFolderError(
                    f"{self.path} is in use by another run{_who(self.path)}; two runs cannot share a folder. Wait for "
                    "it or stop it, or set run.resume_ckpt_path to one of its checkpoints to go on in a new folder"
                ) from None
        except (OSError, NotImplementedError) as error:
            if not _has_no_locks(error):
                raise
            logging.warning("%s: this file system has no locks; see that no second run uses the folder", self.path)

    def release(self) -> None:
        """Give the folder free."""
        self._lock.release(force=True)

    def add_start(self, about: Dict[str, Any]) -> None:
        """Note in environment.json who starts, or goes on with, this run, and with what versions."""
        known = _about(self.path)
        known["starts"].append(about)
        self._write_about(known)

    def _write_about(self, about: Dict[str, Any]) -> None:
        with files.whole_or_nothing(self.path / _ABOUT) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    # ------------------------------------------------------------ checkpoints

    def save_last(self, contents: Dict[str, Any], *, keep: int = 1, in_place: bool = False) -> Path:
        """Write checkpoint_last.pth; those before it move on by one, and ``keep`` of them stay in all.

        At every moment a whole checkpoint is there, and after a failure all that were.

        Args:
            contents: what is saved.
            keep: how many.
            in_place: replace the newest instead: the same state, with something added.

        Raises:
            RunFolderError: if it cannot be written.
        """
        path, new = self.path / LAST, self.path / _NEXT
        self._write(contents, new, meant=path)
        if not in_place:
            _rotate(self.path, keep)
            files.sync(self.path)
        os.replace(new, path)
        files.sync(self.path)
        return path

    def save_best(self, contents: Dict[str, Any]) -> Path:
        """Write checkpoint_best.pth; raises as `save_last`."""
        path = self.path / BEST
        self._write(contents, path, meant=path)
        return path

    def _write(self, contents: Dict[str, Any], path: Path, meant: Path) -> None:
        try:
            files.save(contents, path)
        except (OSError, RuntimeError) as error:  # torch turns some OSErrors into RuntimeErrors
            free = shutil.disk_usage(self.path).free
            kept = [p.name for p in _checkpoints(self.path)]
            raise RunFolderError(
                f"{meant} could not be written ({_reason(error)}; {free / 2**20:,.0f} MiB are free there). "
                f"Checkpoints that are intact: {', '.join(kept) or 'none yet'}. Make room, then go on with "
                "run.resume_ckpt_path=auto"
            ) from error


def find_newest_run(output_dir: Path) -> Optional[RunFolder]:
    """The newest run in ``output_dir`` that has a good checkpoint, opened to go on from it; None if there is none.

    Newest is the one begun last, by a number that each run takes (clocks jump). A checkpoint is trusted after every
    byte of it was checked; one that fails is told and set aside (``.unreadable`` is added to its name).

    Raises:
        RunFolderError: if another run is using that folder.
    """
    for path in sorted(_runs(output_dir), key=lambda path: (_about(path)["number"], path.name), reverse=True):
        if _checkpoints(path):
            folder = RunFolder.reopen(path)  # first, or a run at work might rename what is looked at here
            folder.checkpoint, bad = _newest_good(path)
            if folder.checkpoint is not None:
                for unreadable in bad:  # or they would take a good one's place when the next is saved
                    os.replace(unreadable, unreadable.with_name(unreadable.name + ".unreadable"))
                return folder
            folder.release()
        logging.info("%s has no checkpoint to go on from", path)
    return None


def checkpoint_problem(path: Path) -> Optional[str]:
    """Why a checkpoint cannot be resumed from, after reading every byte of it; None if it can."""
    try:
        if files.can_be_mapped(path):  # else it is read, and so checked, as a whole
            with ZipFile(path) as file:
                damaged = file.testzip()
            if damaged is not None:
                return f"{path}: damaged ({damaged} does not match its checksum)"
        contents = files.read(path, mmap=True)
    except Exception as error:  # a damaged file makes its readers raise whatever it may be
        return _told(path, error)
    lacking = [key for key in ("model", "optimizer", "epoch") if not isinstance(contents, dict) or key not in contents]
    return f"{path}: not the checkpoint of a run, it lacks {', '.join(lacking)}" if lacking else None


def remove_leftovers(output_dir: Path) -> None:
    """Remove what writers that were killed left in the run folders of ``output_dir``, where no run is going on."""
    for path in _runs(output_dir):
        lock = FileLock(str(path / _LOCK))
        try:
            with lock.acquire(timeout=0):
                _remove_leftovers_of(path)
        except (OSError, NotImplementedError):  # in use (a Timeout), not ours to tidy, or without locks
            continue


def _remove_leftovers_of(path: Path) -> None:
    for file in [*path.rglob(".*.tmp"), path / _NEXT]:
        if file.is_file():
            file.unlink()
            logging.info("removed %s, which a run that was killed left half-written", file)


def _newest_good(path: Path) -> Tuple[Optional[Path], List[Path]]:
    """The good checkpoint that is furthest on, and those that were found bad on the way."""
    candidates, bad = [], []
    for file in _checkpoints(path):
        try:
            state = RunState.from_checkpoint(files.read(file, mmap=True))
            candidates.append(((state.epoch, state.batch, state.trained), file))
        except Exception as error:  # as above
            logging.warning("%s; looking for an older one", _told(file, error))
            bad.append(file)
    # sorted is stable: of equals, the one that stands first in _checkpoints
    for _, file in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
        problem = checkpoint_problem(file)
        if problem is None:
            return file, bad
        logging.warning("%s; looking for an older one", problem)
        bad.append(file)
    return None, bad


def _checkpoints(path: Path) -> List[Path]:
    """What is there of last, last-1, …, best."""
    older = sorted(path.glob(f"{Path(LAST).stem}-*.pth"), key=_age)
    return [file for file in (path / LAST, *older, path / BEST) if file.is_file()]


def _age(path: Path) -> int:
    number = path.stem.rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else 10**9


def _rotate(path: Path, keep: int) -> None:
    """Make room at checkpoint_last.pth, which itself stays until it is replaced."""
    names = [path / LAST] + [path / f"{Path(LAST).stem}-{i}.pth" for i in range(1, keep)]
    if names[0].exists():
        # A gap (a checkpoint that was set aside) takes up the move.
        gap = next((i for i, name in enumerate(names) if not name.exists()), keep - 1)
        for i in range(gap, 0, -1):
            _move_or_link(names[i - 1], names[i], link=i == 1)
    for file in _checkpoints(path):
        if file.name.startswith(Path(LAST).stem + "-") and file not in names:
            file.unlink()


def _move_or_link(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            second_name = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            os.link(source, second_name)
            os.replace(second_name, target)
            return
        except OSError:  # a file system without links: for a moment checkpoint_last-1.pth is the newest
            pass
    os.replace(source, target)


def _runs(output_dir: Path) -> List[Path]:
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if (path / _ABOUT).is_file() or (path / LAST).is_file()]


def _about(path: Path) -> Dict[str, Any]:
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        return {"number": int(about["number"]), "starts": list(about["starts"])}
    except (OSError, ValueError, KeyError, TypeError):  # written by an older version, or damaged
        return {"number": 0, "starts": []}


def _has_no_locks(error: Exception) -> bool:
    """Whether a lock failed because the file system has none; filelock's word for ENOSYS is NotImplementedError."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in (
        errno.ENOLCK,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
    )


def _who(path: Path) -> str:
    starts = _about(path)["starts"]
    if not starts:
        return ""
    return " (process {pid} on {host}, since {time})".format_map(
        {key: starts[-1].get(key, "?") for key in ("pid", "host", "time")}
    )


def _told(path: Path, error: Exception) -> str:
    """The error, which may be any, with the file's name in front."""
    text = str(error).strip().split("\n")[0][:300]
    return text if str(path) in text else f"{path}: damaged, or not the checkpoint of a run ({text})"


def _reason(error: BaseException) -> str:
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).strip().split("\n")[0][:200]

"""Frames of a video file, evenly spaced or one a scene, by PyAV: what lies between is passed over, not decoded."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

from PIL import Image

from lavis_kvmod.datasets.images import BadImageError
from lavis_kvmod.datasets.scenes import CANDIDATES, middles_of_scenes, thumbnail

__all__ = ["VIDEO_SUFFIXES", "header_problem", "read_frames"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


class _Video(NamedTuple):
    container: Any
    stream: Any
    seconds: float
    frames: float  # as far as the header tells


def header_problem(path: str) -> Optional[str]:
    """What a video's header tells against it, without decoding anything; None if nothing."""
    try:
        with _opened(path):
            return None
    except BadImageError as error:
        return str(error)


def read_frames(path: str, count: int, by: str = "uniform") -> List[Tuple[float, Image.Image]]:
    """``count`` frames and their seconds; of a shorter video all it has.

    ``by`` is ``uniform``, the middles of as many equal parts, or ``scene``, one of each of as many scenes
    (`lavis_kvmod.datasets.scenes`). Each is looked for from the key frame before it, so that a video of hours takes as
    long as a short one; by scene, eight times as many are looked at.

    Raises:
        BadImageError: for what is no video, has no frames or one, says nothing of its length, or is cut short.
    """
    with _opened(path) as video:
        count = min(count, round(video.frames))
        times = _middles(video, count)
        if by == "scene":
            candidates = _middles(video, min(count * CANDIDATES, round(video.frames)))
            small = [thumbnail(_frame_at(video, time, path)) for time in candidates]
            times = [candidates[i] for i in middles_of_scenes(small, count)]
        return [(time, _frame_at(video, time, path)) for time in times]


def _middles(video: _Video, count: int) -> List[float]:
    """The middles of so many equal parts, in seconds."""
    return [(i + 0.5) * video.seconds / count for i in range(count)]


@contextmanager
def _opened(path: str) -> Iterator[_Video]:
    av = _pyav(path)
    name = Path(path).name
    try:
        container = av.open(path)
    except (OSError, ValueError) as error:  # PyAV's errors are of both kinds
        raise BadImageError(f"{path}: not readable as a video: {getattr(error, 'strerror', None) or error}") from error
    with container:
        if not container.streams.video:
            raise BadImageError(f"{path}: {name} has no frames: there is no video in it")
        stream = container.streams.video[0]
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        frames = stream.frames or seconds * float(stream.average_rate or 0)
        if not seconds or not frames:
            raise BadImageError(f"{path}: its header says nothing of its length, or has no frames; write it anew")
        if round(frames) < 2:
            raise BadImageError(f"{path}: it has one frame; name a picture under columns.image instead")
        yield _Video(container, stream, seconds, frames)


def _frame_at(video: _Video, time: float, path: str) -> Image.Image:
    """The frame that is shown at a time."""
    base, start = video.stream.time_base, video.stream.start_time or 0
    shown = None
    try:
        video.container.seek(int(time / base) + start, stream=video.stream, backward=True)
        for frame in video.container.decode(video.stream):
            if frame.pts is not None and (frame.pts - start) * base > time and shown is not None:
                break
            shown = frame
            if frame.pts is not None and (frame.pts - start) * base > time:
                break
        if shown is not None and shown.pts is not None:
            behind = time - float((shown.pts - start) * base)
            if behind > 2 * video.seconds / video.frames:  # more than a frame's time: there should be others
                shown = None
    except (OSError, ValueError) as error:
        raise BadImageError(f"{path}: {_cut_short(video, time)}: {error}") from error
    if shown is None:
        raise BadImageError(f"{path}: {_cut_short(video, time)}")
    return shown.to_image()


def _cut_short(video: _Video, time: float) -> str:
    return f"cut short or broken: no frame at {time:.1f} s, and its header says {video.seconds:.1f} s"


def _pyav(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise BadImageError(
            f'{path}: videos take PyAV ({error}): pip install av (or this package with "[video]")'
        ) from error
    return av

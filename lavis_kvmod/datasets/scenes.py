"""``frames_by: scene``: which of a video's frames to see, one of each scene.

candidates   a a a a a a a b b c c c        evenly spaced, small
                          ^   ^             the largest differences of neighbours cut
chosen             a       b   c            the middle of each scene
"""

from typing import List, Sequence

import numpy as np
from PIL import Image

__all__ = ["CANDIDATES", "middles_of_scenes", "thumbnail"]

CANDIDATES = 8  # looked at for each frame that is seen, so that a long video costs no more than a short one
SIDE = 16  # of a thumbnail in pixels: what moves within a scene changes few of them
CUT = 8.0  # the mean difference, of 255, below which two candidates are of one scene


def thumbnail(frame: Image.Image) -> np.ndarray:
    """A frame, small: (16, 16, 3) float32, 0 to 255."""
    return np.asarray(frame.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)


def middles_of_scenes(thumbnails: Sequence[np.ndarray], count: int) -> List[int]:
    """Which of n candidates to see, ``count`` of them (at most n), in their order.

    The ``count`` - 1 largest differences of neighbours cut the video into scenes. Where there are fewer cuts than that,
    the longest scene is halved until there are enough: a video of one scene gives evenly spaced frames.
    """
    changes = np.abs(np.diff(np.stack(list(thumbnails)), axis=0)).mean((1, 2, 3))  # (n - 1,)
    largest = np.argsort(-changes, kind="stable")[: count - 1]
    bounds = [0, *sorted(int(i) + 1 for i in largest if changes[i] >= CUT), len(thumbnails)]
    while len(bounds) <= count:
        longest = max(range(len(bounds) - 1), key=lambda i: bounds[i + 1] - bounds[i])
        bounds.insert(longest + 1, (bounds[longest] + bounds[longest + 1]) // 2)
    return [(begin + end - 1) // 2 for begin, end in zip(bounds, bounds[1:])]

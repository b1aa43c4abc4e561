"""What happens to samples that cannot be used: ``on_bad_sample: raise|skip`` and ``max_bad_share``.

Rows that are wrong are found when a data set is built. Images are opened only when they are needed; one that cannot be
read then travels with the batch as a line of text under ``bad_samples``, and whoever uses the batch counts it.
"""

import logging
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Sequence, Union

from lavis_kvmod.datasets.cells import short
from lavis_kvmod.datasets.settings import SampleSettings

__all__ = ["BadDataError", "BadSampleCounter", "BadSamplePolicy", "PROBLEMS_SHOWN", "some_of"]

# Problems a message spells out before it only counts the rest.
PROBLEMS_SHOWN = 12
_CHARACTERS_SHOWN = 1000  # of a problem

# Before the end of an epoch a share is judged as if at least so many samples had been seen: a single bad image in the
# first batch is no reason to stop.
_SEEN_BEFORE_JUDGING = 1000


class BadDataError(ValueError):
    """Data that cannot be trained on or evaluated; ``problems`` holds one line for each thing that is wrong."""

    def __init__(self, problems: Union[str, Sequence[str]]):
        self.problems: List[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def some_of(problems: Sequence[str], shown: int = PROBLEMS_SHOWN) -> str:
    """The first problems, one an indented line (long ones without their middle), and how many more there are."""
    lines = [f"\n    {short(problem, _CHARACTERS_SHOWN)}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"\n    … and {len(problems) - shown} more")
    return "".join(lines)


@dataclass(frozen=True)
class BadSamplePolicy:
    """What to do with a sample that cannot be used.

    Attributes:
        on_bad_sample: ``raise``, or ``skip`` to go on without it, counted and reported.
        max_bad_share: the share of bad samples above which ``skip`` stops too.
    """

    on_bad_sample: str = SampleSettings.default_of("on_bad_sample")
    max_bad_share: float = SampleSettings.default_of("max_bad_share")

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "BadSamplePolicy":
        """From a data set's section.

        Raises:
            BadDataError: for values that are not known.
        """
        keys = ("on_bad_sample", "max_bad_share")
        settings, problems = SampleSettings.check({key: section[key] for key in keys if key in section})
        if problems:
            raise BadDataError(problems)
        return cls(settings.on_bad_sample, settings.max_bad_share)

    @property
    def skips(self) -> bool:
        """Whether bad samples are left out."""
        return self.on_bad_sample == "skip"

    def judge(self, problems: Sequence[str], total: int, what: str = "rows") -> None:
        """Decide over a data set's bad rows, all of them known: nothing, a warning, or an error.

        Args:
            problems: a line for each bad row.
            total: how many rows there are, bad ones included.
            what: what is counted, for the message.

        Raises:
            BadDataError: if there are any and ``on_bad_sample`` is ``raise``, or too many.
        """
        if not problems:
            return
        found = f"{len(problems)} of {total} {what} cannot be used"
        if not self.skips:
            raise BadDataError(f"{found}; mend them, or set on_bad_sample: skip{some_of(problems)}")
        if len(problems) > self.max_bad_share * total:
            raise BadDataError(f"{found}, more than max_bad_share: {self.max_bad_share:g}{some_of(problems)}")
        logging.warning("%s and are left out%s", found, some_of(problems))


class BadSampleCounter:
    """Counts the samples of an epoch that could not be read, and stops when there are too many.

    A bad sample is counted once an epoch, however often it is met: a data set that skips it may meet it twice.

    Args:
        max_share: the share of bad samples, of all seen, above which `BadDataError` is raised: while the epoch runs as
            soon as that many of 1,000 samples are bad, and exactly at its end.
        log: takes the report, as ``logging.warning`` does.
    """

    def __init__(self, max_share: float = 0.05, log: Callable[..., None] = logging.warning):
        self.max_share = max_share
        self._log = log
        self._asked_for = 0
        self._bad: Dict[str, None] = {}  # in the order met

    @property
    def num_bad(self) -> int:
        """How many bad samples there have been in this epoch."""
        return len(self._bad)

    @property
    def num_seen(self) -> int:
        """How many samples have been asked for in this epoch, bad ones included."""
        return max(self._asked_for, self.num_bad)

    def update(self, num_samples: int, texts: Sequence[str] = ()) -> None:
        """Count a batch: the samples in it, those that stand in for bad ones included, and the lines of its
        ``bad_samples``.

        Raises:
            BadDataError: if the share is above the limit, whatever may still come.
        """
        self._asked_for += num_samples
        self._bad.update(dict.fromkeys(texts))
        self._judge(max(self.num_seen, _SEEN_BEFORE_JUDGING))

    def report(self, epoch: Any) -> int:
        """End an epoch: log what was bad, if anything, and start anew. Returns how many samples were bad.

        Raises:
            BadDataError: if the share is above the limit.
        """
        try:
            self._judge(self.num_seen)
            bad = self.num_bad
            if bad:
                self._log(
                    "epoch %s: %d of %d samples could not be read and were skipped%s",
                    epoch,
                    bad,
                    self.num_seen,
                    some_of(list(self._bad)),
                )
            return bad
        finally:
            self._asked_for = 0
            self._bad.clear()

    def _judge(self, seen: int) -> None:
        if self.num_bad > self.max_share * seen:
            raise BadDataError(
                f"{self.num_bad} of {self.num_seen} samples could not be read, more than "
                f"max_bad_share: {self.max_share:g}{some_of(list(self._bad))}"
            )

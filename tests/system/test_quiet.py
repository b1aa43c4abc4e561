"""A log says of each cause how often it came, and holds other things too."""

import io
import logging

from lavis_kvmod.commands.launch import set_up_logging
from lavis_kvmod.system.quiet import CountsWarnings


def lines_of(say):
    """What a handler with the filter writes, while something is said to its logger."""
    written, logger = io.StringIO(), logging.Logger("of a run")
    handler = logging.StreamHandler(written)
    handler.addFilter(CountsWarnings())
    logger.addHandler(handler)
    say(logger)
    return written.getvalue().splitlines()


def test_one_cause_is_counted_and_others_are_told():
    def say(log):
        for i in range(1000):
            log.warning("question %d was cut", i)
            if i % 500 == 0:
                log.warning("something else")
            log.info("step %d", i) if i < 3 else log.error("an error") if i == 600 else None

    lines = lines_of(say)
    cut = [line for line in lines if "was cut" in line]
    assert cut[:11] == [f"question {i} was cut" for i in range(11)]
    numbers = [12, 24, 48, 96, 192, 384, 768]
    told = "question {} was cut ({} warnings of this kind so far; the next is told at {})"
    assert cut[11:] == [told.format(n - 1, n, 2 * n) for n in numbers]
    assert [line for line in lines if "was cut" not in line] == [
        *("something else", "step 0", "step 1", "step 2", "something else", "an error"),
    ]


def test_the_commands_log_so(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    set_up_logging()
    try:
        assert [type(each) for handler in root.handlers for each in handler.filters] == [CountsWarnings]
    finally:
        root.setLevel(level)

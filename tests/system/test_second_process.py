"""Two processes on one terminal: results, failures, and who ends whom."""

import logging
import math
import time

import pytest

from lavis_kvmod.system import progress
from lavis_kvmod.system.second_process import SecondProcess, SecondProcessError


def test_its_result_comes_here_and_its_failure_is_told_there_and_here(capfd):
    with SecondProcess("roots", math.sqrt, 4.0) as other, SecondProcess("wrong", math.sqrt, -1.0) as failing:
        assert other.result() == 2.0
        with pytest.raises(SecondProcessError, match="wrong: ValueError: .*"):
            failing.result()
    assert "Traceback" in capfd.readouterr().err
    with SecondProcess("gone", exit, 3) as other, pytest.raises(SecondProcessError, match="gone: .* status 3"):
        other.result()


def test_an_error_here_ends_it():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), SecondProcess("sleeps", time.sleep, 300) as other:
        raise KeyboardInterrupt
    assert not other._process.is_alive() and time.monotonic() - start < 60


def test_lines_say_whose_they_are_and_no_bar_is_drawn(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        with progress.sharing_terminal("with prefix"):
            logging.info("two\nlines of %s", "text")
            assert list(progress.Progress(range(2), "epoch 0", log_every=2)) == [0, 1]
        logging.info("alone")
    first, second, last = caplog.messages
    assert first == "with prefix | two\nwith prefix | lines of text"
    assert second.startswith("with prefix | epoch 0 [2/2]") and last == "alone"

import pytest

from lavis_kvmod.system.text_cleaning import one_line


@pytest.mark.parametrize("text", ["a cat", " a\ncat\n", "a\r\n\tcat", "a\u00a0\u2028\u3000cat", "a \x0b\x0c cat"])
def test_white_space_becomes_one_space(text):
    assert one_line(text) == "a cat"


def test_nothing_but_white_space_is_nothing():
    assert one_line(" \n\t") == one_line("") == ""

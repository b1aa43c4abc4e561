"""Text that must stand on one line: a line break is where the language model's texts end."""


def one_line(text: str) -> str:
    """``text`` with each run of white space (line breaks, tabs, no-break spaces) as one space, and none at its ends.

    What is learned, ranked and compared goes through here. Generation stops at a newline, so a target with one inside
    could never be said; and what is told apart by white space alone is told apart by nothing that a model can write.
    """
    return " ".join(text.split())

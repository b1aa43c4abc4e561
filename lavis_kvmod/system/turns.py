"""What a conversation is made of, for those who read it and those who learn it."""

from typing import Optional, Sequence, Tuple

__all__ = ["MARK", "Turn", "marks_in"]

MARK = "<image>"  # where an image stands in a question, as LLaVA's files have it
# What is asked, and what is answered; None where the answer is to be written.
Turn = Tuple[str, Optional[str]]


def marks_in(turns: Sequence[Turn]) -> int:
    """How many places for images a conversation names."""
    return sum(question.count(MARK) for question, _ in turns)

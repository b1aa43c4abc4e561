"""Answers as VQA's official evaluation compares them, which LAVIS carries (``lavis/common/vqa_tools/vqa_eval.py``)."""

from functools import lru_cache

from lavis.common.vqa_tools.vqa_eval import VQAEval


@lru_cache(maxsize=1)
def _official() -> VQAEval:
    return VQAEval()


@lru_cache(maxsize=100_000)
def normalise(answer: str) -> str:
    """An answer without punctuation, articles and case, numbers as digits."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    return _official().processDigitArticle(without_punctuation(answer))


def without_punctuation(answer: str) -> str:
    """An answer without punctuation, which is all that is done to people's answers."""
    return _official().processPunctuation(answer)

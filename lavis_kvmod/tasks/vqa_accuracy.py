"""How right an answer is: VQA's soft accuracy where people disagreed, exact match where there is one answer.

Normalisation is the official evaluation's, which LAVIS carries (``lavis/common/vqa_tools/vqa_eval.py``).
"""

from collections import defaultdict
from functools import lru_cache
from typing import Dict, Iterable, List, Tuple

from lavis.common.vqa_tools.vqa_eval import VQAEval

# With fewer annotators than this, leave-one-out averaging could not reach 1.
ANNOTATORS_FOR_CONSENSUS = 4


@lru_cache(maxsize=1)
def _official() -> VQAEval:
    return VQAEval()


@lru_cache(maxsize=100_000)
def normalise(answer: str) -> str:
    """An answer without punctuation, articles and case, numbers as digits."""
    return _official().processDigitArticle(_without_punctuation(answer))


def _without_punctuation(answer: str) -> str:
    return _official().processPunctuation(answer.replace("\n", " ").replace("\t", " ").strip())


def accuracy(prediction: str, answers: List[str]) -> float:
    """How right ``prediction`` is, in [0, 1].

    With 4 answers or more, VQA's official soft accuracy (arXiv 1505.00468): the mean, over all ways to leave one
    annotator out, of min(1, matching others / 3); as officially, the prediction is normalised, people's answers only
    lose punctuation, and only where they differ. With fewer: 1 if it equals one of them, both normalised.

    Raises:
        ValueError: without answers.
    """
    if not answers:
        raise ValueError("an answer needs at least one reference answer to be scored against")
    predicted = normalise(prediction)
    if len(answers) < ANNOTATORS_FOR_CONSENSUS:
        return float(any(normalise(answer) == predicted for answer in answers))
    if len(set(answers)) > 1:
        answers = [_official().processPunctuation(answer) for answer in answers]
    matches = [answer == predicted for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def accuracy_by_type(scored: Iterable[Tuple[float, str]]) -> Dict[str, float]:
    """Mean accuracy in per cent, ``overall`` and by question type, from (accuracy, type) pairs."""
    by_type = defaultdict(list)
    for value, question_type in scored:
        by_type["overall"].append(value)
        if question_type:
            by_type[question_type].append(value)
    return {name: 100 * sum(values) / len(values) for name, values in by_type.items()}

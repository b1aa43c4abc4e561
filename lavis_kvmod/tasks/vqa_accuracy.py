"""How right an answer is: VQA's soft accuracy where people disagreed, exact match where there is one answer.

Normalisation is the official evaluation's: see `lavis_kvmod.datasets.normalisation`.
"""

from collections import defaultdict
from typing import Dict, Iterable, List, NamedTuple

from lavis_kvmod.datasets.normalisation import normalise, without_punctuation

# With fewer annotators than this, leave-one-out averaging could not reach 1.
ANNOTATORS_FOR_CONSENSUS = 4


def is_soft(answers: List[str]) -> bool:
    """Whether so many people answered that `accuracy` is VQA's soft one."""
    return len(answers) >= ANNOTATORS_FOR_CONSENSUS


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
    if not is_soft(answers):
        return float(any(normalise(answer) == predicted for answer in answers))
    matches = [answer == predicted for answer in _as_compared(answers)]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def cannot_be_matched(answers: List[str]) -> bool:
    """Whether no prediction at all could be right: the official rule normalises predictions alone, so that ten times
    "Two" is matched by nothing ("Two" is read as "2"). The official files' answers are normalised already."""
    return is_soft(answers) and not any(normalise(answer) == answer for answer in _as_compared(answers))


def _as_compared(answers: List[str]) -> List[str]:
    """What the official evaluation compares the normalised prediction with."""
    if len(set(answers)) == 1:
        return answers
    return [without_punctuation(answer) for answer in answers]


class Scored(NamedTuple):
    """A scored answer: its accuracy, whether that is the soft one, and the types of its question, if known."""

    accuracy: float
    soft: bool
    question_type: str = ""
    answer_type: str = ""


def summarise(scored: Iterable[Scored]) -> Dict[str, float]:
    """Means in per cent: ``overall``, ``vqa_accuracy`` (of the softly scored answers), ``exact_match`` (of the
    others), ``answer_type/…`` and ``question_type/…``. What no answer belongs to has no key."""
    groups = defaultdict(list)
    for row in scored:
        groups["overall"].append(row.accuracy)
        groups["vqa_accuracy" if row.soft else "exact_match"].append(row.accuracy)
        if row.answer_type:
            groups[f"answer_type/{row.answer_type}"].append(row.accuracy)
        if row.question_type:
            groups[f"question_type/{row.question_type}"].append(row.accuracy)
    return {name: 100 * sum(values) / len(values) for name, values in groups.items()}

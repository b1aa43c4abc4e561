"""What each frozen encoder knows: a question type's answers, read from its features by a linear probe.

A probe is a logistic regression on the standardised features of the training images, asked about those of the split
that is compared on (G. Alain, Y. Bengio, arXiv 1610.01644). Of the image encoder it reads the mean of the visual
tokens, of the second encoder the pooled features (of a grid their mean). What it cannot read may still be there, for
something that is not linear.
"""

import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from lavis_kvmod.models.vision.feature_cache import FrozenFeatures

__all__ = ["Asked", "ENCODERS", "probe"]

ENCODERS = ("vit", "aux")
_MOST_ANSWERS = 50  # of a type that is a classification
_MOST_IMAGES = 5000


class Asked(NamedTuple):
    """A question of a type about an image, and its answer."""

    image: str
    type: str
    question: str
    answer: str


def probe(
    train: Sequence[Asked], test: Sequence[Asked], features: Mapping[str, FrozenFeatures]
) -> Dict[str, Dict[str, float]]:
    """By question type, what a probe of each encoder has right of the test images, in per cent.

    Only types whose question is the same for all images can be asked of features alone; others are left out, and so is
    the second encoder where there is none. Nothing is probed without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        logging.info("the encoders are not probed: scikit-learn is not installed (pip install 'lavis-kvmod[demo]')")
        return {}
    found: Dict[str, Dict[str, float]] = {}
    for kind in _askable(train):
        known, unknown = ([row for row in rows if row.type == kind] for rows in (train, test))
        for encoder in ENCODERS:
            seen, answers = _examples(encoder, known[:_MOST_IMAGES], features)
            asked, right = _examples(encoder, unknown, features)
            if len(seen) and len(asked):
                model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
                score = model.fit(seen, answers).score(asked, right)
                found.setdefault(kind, {})[encoder] = round(100 * float(score), 2)
    return found


def _askable(rows: Sequence[Asked]) -> List[str]:
    """Types of one question and a few answers, in their order."""
    questions: Dict[str, Any] = {}
    answers: Dict[str, Any] = {}
    for row in rows:
        questions.setdefault(row.type, set()).add(row.question)
        answers.setdefault(row.type, set()).add(row.answer)
    return [kind for kind in questions if len(questions[kind]) == 1 and 1 < len(answers[kind]) <= _MOST_ANSWERS]


def _examples(
    encoder: str, rows: Sequence[Asked], features: Mapping[str, FrozenFeatures]
) -> Tuple[np.ndarray, np.ndarray]:
    """Features (n, f) and answers (n,); empty where the encoder says nothing of the images."""
    inputs, answers = [], []
    for row in rows:
        own = features.get(row.image)
        part = None if own is None else own.visual_tokens.float().mean(0) if encoder == "vit" else own.pooled
        if part is not None:
            inputs.append(part.float().reshape(-1, part.shape[-1]).mean(0).numpy())
            answers.append(row.answer)
    return np.array(inputs), np.array(answers)

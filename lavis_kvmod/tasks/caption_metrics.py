"""COCO's caption metrics by ``pycocoevalcap``, without network, and without Java where there is none.

METEOR and SPICE are Java programs, and SPICE wants models that pycocoevalcap would download on its first use: what
cannot be computed here is left out, with the reason; it is never 0 and never fetched.
"""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import get_stanford_models
from pycocoevalcap.spice import spice as spice_module

from lavis_kvmod.tasks.caption_tokens import java_problem, tokenise

# What `run.caption_metrics` may name, in the order of the tables; "Bleu" is Bleu_1 … Bleu_4.
METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")

# CIDEr weighs words by how few of the images they are said of. Of one image that is 0 whatever was said; of a few, it
# says little. COCO's splits have 5,000.
FEW_IMAGES = 50


class CaptionScores(NamedTuple):
    """Scores of a set of captions.

    Attributes:
        metrics: the set's, under LAVIS's names (``Bleu_1`` …) and in its units: CIDEr in 0 … 10, the others 0 … 1.
        by_image: each metric's values by image, in the order given; NaN where the image could not be scored.
        scored: how many images could be.
        tokeniser: ``ptb`` or ``simple``.
        left_out: the metrics that are not there, each with the reason.
        notes: what to know before the figures are compared with others.
    """

    metrics: Dict[str, float]
    by_image: Dict[str, List[float]]
    scored: int
    tokeniser: str
    left_out: Dict[str, str]
    notes: List[str]


def score_captions(
    captions: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[str] = METRICS
) -> CaptionScores:
    """Score one caption an image against that image's references.

    Args:
        captions: what was predicted, one for each image.
        references: people's captions of each image; without any word in them the image is not scored.
        wanted: which of `METRICS` to compute.
    """
    counts = [len(of_image) for of_image in references]
    tokenised = tokenise([*captions, *(text for of_image in references for text in of_image)])
    words = iter(tokenised.captions)
    results = [next(words) for _ in captions]
    truths = [[text for text in [next(words) for _ in range(count)] if text] for count in counts]

    images = [i for i, of_image in enumerate(truths) if of_image]
    gts, res = {i: truths[i] for i in images}, {i: [results[i]] for i in images}
    metrics: Dict[str, float] = {}
    by_image: Dict[str, List[float]] = {}
    left_out: Dict[str, str] = {}
    for name in METRICS if images else ():
        if name not in wanted:
            continue
        reason = _reason_against(name, len(images))
        if reason is None:
            try:
                scores = _SCORERS[name](gts, res)
            except (OSError, subprocess.SubprocessError, ValueError) as error:  # a Java program that broke
                if name not in _JAVA_PROGRAMS:
                    raise
                reason = f"its Java program failed ({type(error).__name__}: {error})"
        if reason is not None:
            left_out[name] = reason
            continue
        for key, (value, values) in scores.items():
            metrics[key] = float(value)
            by_image[key] = [float("nan")] * len(captions)
            for i, one in zip(images, values):
                by_image[key][i] = float(one)

    notes = []
    if tokenised.reason:
        notes.append(f"captions were split by the simple tokeniser: {tokenised.reason}")
    if "CIDEr" in metrics and len(images) < FEW_IMAGES:
        notes.append(f"CIDEr of {len(images)} images says little: its word weights come from them alone")
    return CaptionScores(metrics, by_image, len(images), tokenised.tokeniser, left_out, notes)


def aggregate(metrics: Dict[str, float]) -> Optional[float]:
    """What the best checkpoint is chosen by: LAVIS's CIDEr + BLEU-4, or the one of them that is there, else None."""
    there = [metrics[name] for name in ("CIDEr", "Bleu_4") if name in metrics]
    return sum(there) if there else None


# ---------------------------------------------------------------- the scorers: (gts, res) -> {name: (mean, by image)}


def _bleu(gts: dict, res: dict) -> Dict[str, tuple]:
    means, by_image = Bleu(4).compute_score(gts, res, verbose=0)
    return {f"Bleu_{n}": pair for n, pair in enumerate(zip(means, by_image), start=1)}


def _rouge(gts: dict, res: dict) -> Dict[str, tuple]:
    return {"ROUGE_L": Rouge().compute_score(gts, res)}


def _cider(gts: dict, res: dict) -> Dict[str, tuple]:
    return {"CIDEr": Cider().compute_score(gts, res)}


def _meteor(gts: dict, res: dict) -> Dict[str, tuple]:
    separated = {i: [text.replace("|||", "") for text in texts] for i, texts in gts.items()}
    with _running_meteor() as meteor:
        return {"METEOR": meteor.compute_score(separated, res)}


@contextmanager
def _running_meteor() -> Iterator[Meteor]:
    meteor = Meteor()
    try:
        yield meteor
    finally:
        process = meteor.meteor_p
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            with _ignoring_broken_pipes():
                stream.close()
        if meteor.lock.locked():  # after a failure; its __del__ would wait for the lock for ever
            meteor.lock.release()


@contextmanager
def _ignoring_broken_pipes() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        pass


def _spice(gts: dict, res: dict) -> Dict[str, tuple]:
    mean, by_image = spice_module.Spice().compute_score(gts, res)
    return {"SPICE": (mean, [scores["All"]["f"] for scores in by_image])}


_SCORERS: Dict[str, Callable[[dict, dict], Dict[str, tuple]]] = {
    "Bleu": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
    "SPICE": _spice,
}
_JAVA_PROGRAMS = ("METEOR", "SPICE")


def _reason_against(name: str, num_images: int) -> Optional[str]:
    """Why a metric cannot be computed here, or None."""
    if name in _JAVA_PROGRAMS and java_problem() is not None:
        return java_problem()
    if name == "SPICE":
        return _spice_problem()
    if name == "CIDEr" and num_images == 1:
        return "of one image it is 0 whatever was said"
    return None


def _spice_problem() -> Optional[str]:
    folder = Path(spice_module.__file__).parent
    for jar in (f"{get_stanford_models.JAR}.jar", f"{get_stanford_models.JAR}-models.jar"):
        if not (folder / get_stanford_models.SPICELIB / jar).is_file():
            return f"{jar} is not there; python -m {get_stanford_models.__name__} downloads it"
    if not os.access(folder, os.W_OK):
        return f"it writes into {folder}, which is read-only"
    return None


__all__ = ["FEW_IMAGES", "METRICS", "CaptionScores", "aggregate", "score_captions"]

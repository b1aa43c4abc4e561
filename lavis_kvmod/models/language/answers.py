"""Which answers a batch of questions is trained on: one a question, drawn by weight, or all of them."""

import random
from itertools import accumulate
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The answers in the loss, the question (row of the batch) each belongs to (k,), and their weights (k,), or None
    where all count 1. What is drawn stands for all answers of its question, and so weighs what they weigh together."""

    rows: Tensor
    answers: List[str]
    weights: Optional[Tensor]


def answers_of(samples: Mapping[str, Any], *, draw: bool) -> Targets:
    """The answers to train on (or, in evaluation, to take the loss of).

    Args:
        samples: ``text_input``, ``answer`` (all answers of all questions in one list), ``n_answers`` (b,) and
            ``weight`` (one for each answer), as LAVIS's collater gives them; ``sample_seeds``, a number for each
            question that the draw hangs on, in our loaders' batches (of run seed, epoch and sample: so neither on what
            else is in the batch, nor on processes or a resumption). Without, PyTorch's generator draws.
        draw: draw one answer for each question, by weight; else take all, weighted.

    Raises:
        ValueError: if the counts do not fit, or for a question without an answer.
    """
    counts = [int(n) for n in samples["n_answers"]]
    answers, weight = samples["answer"], samples["weight"].float().cpu()
    if sum(counts) != len(answers) or len(weight) != len(answers):
        raise ValueError(
            f"expected one weight for each answer and as many answers as n_answers says; got "
            f"{len(answers)} answers, {len(weight)} weights, n_answers adding up to {sum(counts)}"
        )
    if 0 in counts:
        raise ValueError(f"sample {counts.index(0)} of the batch has no answer to train on")
    if not draw:
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Targets(rows, answers, weight)
    seeds = samples.get("sample_seeds") or torch.randint(2**62, (len(counts),)).tolist()
    ends = list(accumulate(counts))
    groups = [slice(end - count, end) for count, end in zip(counts, ends)]
    drawn, weights = zip(*(_draw(answers[group], weight[group], seed) for group, seed in zip(groups, seeds)))
    together = None if set(weights) == {1.0} else torch.tensor(weights)
    return Targets(torch.arange(len(counts)), list(drawn), together)


def _draw(answers: Sequence[str], weight: Tensor, seed: int) -> Tuple[str, float]:
    """One of the answers, and what they weigh together; where no weight is above 0 all are alike."""
    weights = weight.clamp(min=0).tolist()
    total = round(sum(weights), 5)  # LAVIS's shares, of float32, add up to 1
    if not total:
        weights, total = [1.0] * len(answers), 1.0
    return random.Random(seed).choices(answers, weights)[0], total


def mean_loss(token_loss: Tensor, token_weights: Optional[Tensor]) -> Dict[str, Tensor]:
    """The (weighted) mean ``loss`` of tokens (k,), and ``loss_weight``, what it is a mean over: their number, or the
    sum of their weights."""
    if token_weights is None:
        return {"loss": token_loss.mean(), "loss_weight": token_loss.new_tensor(len(token_loss))}
    mass = token_weights.sum()
    return {"loss": (token_weights * token_loss).sum() / mass, "loss_weight": mass}

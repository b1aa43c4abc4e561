"""Which answers a batch of questions is trained on: one a question, drawn by weight, or all of them."""

import random
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The answers in the loss, the question (row of the batch) each belongs to (k,), and their weights (k,), or None
    where all count 1."""

    rows: Tensor
    answers: List[str]
    weights: Optional[Tensor]


def answers_of(samples: Mapping[str, Any], *, draw: bool) -> Targets:
    """The answers to train on (or, in evaluation, to take the loss of).

    Args:
        samples: ``text_input``, ``answer`` (all answers of all questions in one list), ``n_answers`` (b,) and
            ``weight`` (one for each answer), as LAVIS's collater gives them.
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
    drawn, start = [], 0
    for question, count in zip(samples["text_input"], counts):
        choices = slice(start, start + count)
        rng = _answer_rng(samples.get("epoch"), question, answers[choices])
        drawn.append(_draw(answers[choices], weight[choices], rng))
        start += count
    return Targets(torch.arange(len(counts)), drawn, None)


def _draw(answers: Sequence[str], weight: Tensor, rng: random.Random) -> str:
    """One of the answers; where no weight is above 0 all are alike."""
    weights = weight.clamp(min=0).tolist()
    if not sum(weights) > 0:
        weights = [1.0] * len(answers)
    return rng.choices(answers, weights)[0]


def _answer_rng(epoch: Optional[int], question: str, answers: Sequence[str]) -> random.Random:
    """Draws an answer to train on. Within a run, which tells the epoch, the draw hangs on the question alone, not on
    how the data is spread over processes or where a run was resumed."""
    if epoch is None:
        return random.Random(int(torch.randint(2**62, ())))
    return random.Random(f"{epoch} {question} {answers}")


def mean_loss(token_loss: Tensor, token_weights: Optional[Tensor]) -> Dict[str, Tensor]:
    """The (weighted) mean ``loss`` of tokens (k,), and ``loss_weight``, what it is a mean over: their number, or the
    sum of their weights."""
    if token_weights is None:
        return {"loss": token_loss.mean(), "loss_weight": token_loss.new_tensor(len(token_loss))}
    mass = token_weights.sum()
    return {"loss": (token_weights * token_loss).sum() / mass, "loss_weight": mass}

"""A language model that answers what is asked of things that were described together, in any order.

"What colour is the seven?" takes a description in which a colour and a digit belong together. Here each phrase of a
description ("red seven left") is one vector, the sum of its words' embeddings, as a query of the Q-Former may write it;
the phrases come in any order, some of them twice. All is text: there are no pictures here to leak.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.processors.blip_processors import BlipQuestionProcessor
from torch import Tensor
from transformers import GPT2Tokenizer

from lavis_kvmod.demo.language import (
    BOS,
    IGNORED,
    PAD,
    PROMPTS,
    LanguageRecipe,
    fit,
    opt_config,
    save_bpe,
    save_model,
)

__all__ = ["Asked", "DescribedLanguageRecipe", "Draw", "train_described_language_model"]

_question_text = BlipQuestionProcessor()


class Asked(NamedTuple):
    """A question about something that was described in these phrases, and its answer."""

    phrases: List[str]
    question: str
    answer: str


# Something new to describe, and all that is asked about it.
Draw = Callable[[np.random.Generator], List[Asked]]


@dataclass(frozen=True)
class DescribedLanguageRecipe(LanguageRecipe):
    """As the demo's, and what stands before the BOS."""

    steps: int = 500
    phrases: int = 8  # vectors of a description, at least
    longest: int = 8  # and at most; those of a batch have equally many
    noise: float = 0.1  # on them, as a share of their spread: what a Q-Former writes is not exact
    texts: int = 600  # things whose texts the tokenizer is trained on


def train_described_language_model(recipe: DescribedLanguageRecipe, folder: Path, draw: Draw) -> float:
    """Train tokenizer and model and save both to ``folder``; draws from torch's global generator.

    Returns:
        The share of answers that are continued exactly, on 400 new things.
    """
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    texts = []
    for asked in (each for _ in range(recipe.texts) for each in draw(rng)):
        texts += [f" {' '.join(asked.phrases)}", _prompted(asked) + f" {asked.answer}\n"]
    tokenizer = save_bpe(texts, recipe, folder)
    model = OPTForCausalLM(opt_config(recipe, len(tokenizer)))
    words = _Words(tokenizer)

    def loss() -> Tensor:
        logits, labels = _continued(model, _batch(words, recipe, rng, draw, recipe.batch_size), recipe.noise)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    fit(model, recipe, loss)
    save_model(model, folder)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        logits, labels = _continued(model, _batch(words, recipe, rng, draw, 400), 0.0)
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).float().mean().item()


class _Words:
    """Token ids by text, each computed once."""

    def __init__(self, tokenizer: GPT2Tokenizer):
        self._tokenizer = tokenizer
        self._known: Dict[str, List[int]] = {}

    def __call__(self, text: str) -> List[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


class _Passage(NamedTuple):
    """Token ids: of each phrase before the BOS, of the prompt from the BOS on, of the answer."""

    phrases: List[List[int]]
    given: List[int]
    answer: List[int]


def _prompted(asked: Asked) -> str:
    return PROMPTS[0].replace("{}", _question_text(asked.question))


def _batch(
    words: _Words, recipe: DescribedLanguageRecipe, rng: np.random.Generator, draw: Draw, size: int
) -> List[_Passage]:
    """So many passages, whose descriptions are equally long."""
    length = int(rng.integers(recipe.phrases, recipe.longest + 1))
    return [_passage(words, length, rng, draw(rng)) for _ in range(size)]


def _passage(words: _Words, length: int, rng: np.random.Generator, asked_of_it: Sequence[Asked]) -> _Passage:
    """One of the questions, behind a description of ``length`` phrases in a new order."""
    asked = asked_of_it[int(rng.integers(len(asked_of_it)))]
    said = list(asked.phrases)
    said += [said[int(rng.integers(len(said)))] for _ in range(length - len(said))]
    phrases = [words(f" {said[i]}") for i in rng.permutation(len(said))]
    return _Passage(phrases, [BOS, *words(_prompted(asked))], words(f" {asked.answer}\n"))


def _continued(model: OPTForCausalLM, passages: Sequence[_Passage], noise: float) -> Tuple[Tensor, Tensor]:
    """What the model expects next (b, t, vocabulary) and what comes (b, t)."""
    longest = max(len(each.given) + len(each.answer) for each in passages)
    ids = torch.tensor([_padded([*each.given, *each.answer], longest, PAD) for each in passages])
    labels = torch.tensor(
        [_padded([*[IGNORED] * len(each.given), *each.answer], longest, IGNORED) for each in passages]
    )
    described = _vectors(model, [each.phrases for each in passages])
    if noise:
        described = described + noise * described.detach().std() * torch.randn_like(described)
    seen = torch.cat([torch.ones(described.shape[:2], dtype=torch.long), (ids != PAD).long()], dim=1)
    logits = model(input_ids=ids, query_embeds=described, attention_mask=seen).logits
    return logits[:, described.shape[1] : -1], labels[:, 1:]


def _vectors(model: OPTForCausalLM, phrases: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """The sum of each phrase's word embeddings: (b, phrases, width)."""
    longest = max(len(ids) for said in phrases for ids in said)
    ids = torch.tensor([[_padded(phrase, longest, PAD) for phrase in said] for said in phrases])
    return (model.get_input_embeddings()(ids) * (ids != PAD).unsqueeze(-1)).sum(2)


def _padded(ids: Sequence[int], length: int, fill: int) -> List[int]:
    return [*ids, *[fill] * (length - len(ids))]

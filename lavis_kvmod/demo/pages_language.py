"""A language model for pages of digits: it answers what is asked of several things that were described together.

"What colour is the seven?" takes a description in which a colour and a digit belong together. Here each phrase of a
page's description ("red seven left") is one vector, the sum of its words' embeddings, as a query of the Q-Former may
write it; the phrases come in any order, some of them twice. All is text: there are no pictures here to leak.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.processors.blip_processors import BlipQuestionProcessor
from torch import Tensor
from transformers import GPT2Tokenizer

from lavis_kvmod.demo import digits, pages
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

__all__ = ["PagesLanguageRecipe", "train_pages_language_model"]

_SETTINGS = pages.PageSettings()
_question_text = BlipQuestionProcessor()


@dataclass(frozen=True)
class PagesLanguageRecipe(LanguageRecipe):
    """As the demo's, and what stands before the BOS."""

    steps: int = 500
    phrases: int = 8  # vectors of a description
    noise: float = 0.1  # on them, as a share of their spread: what a Q-Former writes is not exact
    texts: int = 600  # pages whose texts the tokenizer is trained on


def train_pages_language_model(recipe: PagesLanguageRecipe, folder: Path) -> float:
    """Train tokenizer and model and save both to ``folder``; draws from torch's global generator.

    Returns:
        The share of answers that are continued exactly, on 400 pages.
    """
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    texts = []
    for page in (_draw_page(rng) for _ in range(recipe.texts)):
        for question in pages.questions(page):
            texts += [f" {' '.join(pages.phrases(page))}", _asked(question) + f" {question.answer}\n"]
    tokenizer = save_bpe(texts, recipe, folder)
    model = OPTForCausalLM(opt_config(recipe, len(tokenizer)))
    words = _Words(tokenizer)

    def loss() -> Tensor:
        logits, labels = _continued(model, words, recipe, rng, recipe.batch_size, recipe.noise)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    fit(model, recipe, loss)
    save_model(model, folder)
    with torch.no_grad():
        logits, labels = _continued(model, words, recipe, np.random.default_rng(1), 400, 0.0)
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


def _draw_page(rng: np.random.Generator) -> pages.Page:
    """A page of two digits that nobody has written."""
    scans = [digits.Scan(0, int(digit), "", "") for digit in rng.permutation(10)[: _SETTINGS.digits_a_page]]
    return pages.draw_page(scans, _SETTINGS, rng, 0, "", False)


def _asked(question: pages.PageQuestion) -> str:
    return PROMPTS[0].replace("{}", _question_text(question.question))


def _continued(
    model: OPTForCausalLM,
    words: _Words,
    recipe: PagesLanguageRecipe,
    rng: np.random.Generator,
    count: int,
    noise: float,
) -> Tuple[Tensor, Tensor]:
    """What the model expects next (b, t, vocabulary) and what comes (b, t), for questions about ``count`` new pages."""
    phrases, rows = [], []
    for _ in range(count):
        page = _draw_page(rng)
        asked = pages.questions(page)
        question = asked[int(rng.integers(len(asked)))]
        said = pages.phrases(page)
        said += [said[int(rng.integers(len(said)))] for _ in range(recipe.phrases - len(said))]
        phrases.append([words(f" {said[i]}") for i in rng.permutation(len(said))])
        rows.append(([BOS, *words(_asked(question))], words(f" {question.answer}\n")))
    longest = max(len(given) + len(answer) for given, answer in rows)
    ids = torch.tensor([_padded([*given, *answer], longest, PAD) for given, answer in rows])
    labels = torch.tensor([_padded([*[IGNORED] * len(given), *answer], longest, IGNORED) for given, answer in rows])
    described = _vectors(model, phrases)
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

"""The demo's language model: a small OPT, pre-trained on text alone to answer from what stands before the BOS.

A large OPT can do that from its own pre-training, and BLIP-2 counts on it: the Q-Former's output stands before the
prompt's BOS as a soft description. A language model that never saw a description there gives the Q-Former nothing to
learn from. One that saw captions alone, always in one order and of one length, can be taught, but slowly: most of the
descriptions here are therefore bags of words.
"""

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple, TypeVar

import torch
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipQuestionProcessor
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import GPT2Tokenizer, OPTConfig

from lavis_kvmod.demo import digits
from lavis_kvmod.system.progress import Progress

__all__ = [
    *("BOS", "IGNORED", "PAD", "PROMPTS"),
    *("LanguageRecipe", "accuracy", "fit", "opt_config", "save_bpe", "save_model", "save_tokenizer"),
    "train_language_model",
]

# The demo's recipe uses the first; the others are what else a user may try.
PROMPTS = ("Question: {} Short answer:", "Question: {} Answer:", "{}")

Item = TypeVar("Item")

# As in OPT's own tokenizer: these ids, and `</s>` for BOS, EOS and unknown alike.
_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
PAD, BOS = 1, 2
IGNORED = -100


@dataclass(frozen=True)
class LanguageRecipe:
    """Geometry and pre-training of the demo's OPT. The defaults are the demo's."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 512
    max_positions: int = 128
    vocab_size: int = 512  # at most; the corpus needs fewer
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    init_std: float = 0.04  # OPT's 0.02 is for wider models
    caption_share: float = 0.2  # of the passages; the others are questions
    bag_share: float = 0.7  # of the descriptions; the others are captions
    longest_bag: int = 16  # words
    seed: int = 0


@dataclass(frozen=True)
class _Passage:
    """Text before the BOS; what is given after it; the continuation asked for."""

    description: str
    prompt: str
    continuation: str


def train_language_model(recipe: LanguageRecipe, folder: Path) -> float:
    """Train tokenizer and model and save both to ``folder``, as Hugging Face does.

    Sequences are ``[description][BOS]Question: … Short answer: …\\n`` and, some of them,
    ``[description][BOS]caption\\n``; the loss is on the answer or the caption. Draws from torch's global generator.

    Args:
        recipe: see `LanguageRecipe`.
        folder: exists; receives ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Returns:
        What `accuracy` says of the model.
    """
    scans = _every_scan()
    tokenizer = save_tokenizer(recipe, folder)
    model = OPTForCausalLM(opt_config(recipe, len(tokenizer)))

    def loss() -> Tensor:
        passages = [_draw_passage(scans, recipe) for _ in range(recipe.batch_size)]
        return model(**_batch(tokenizer, passages)).loss

    fit(model, recipe, loss)
    save_model(model, folder)
    return accuracy(model, tokenizer)


def fit(model: nn.Module, recipe: LanguageRecipe, loss_of_step: Callable[[], Tensor]) -> None:
    """Train ``model`` for the recipe's steps; it is left in eval mode."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.1
    )
    progress = Progress(range(recipe.steps), "demo: pre-training the language model", log_every=100)
    for _ in progress:
        loss = loss_of_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.status(f"loss {loss.item():.3f}")
    model.eval()


def save_model(model: OPTForCausalLM, folder: Path) -> None:
    """Write what ``AutoModelForCausalLM.from_pretrained`` reads."""
    # The output layer is the embedding: safetensors refuses to write one tensor under two names.
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)


@torch.no_grad()
def accuracy(model: OPTForCausalLM, tokenizer: GPT2Tokenizer) -> float:
    """The share of captions and answers that are continued exactly (greedily), over all scans and prompts."""
    passages = _corpus(_every_scan())
    correct = 0
    for start in range(0, len(passages), 240):
        batch = _batch(tokenizer, passages[start : start + 240])
        labels = batch.pop("labels")[:, 1:]
        guess = model(**batch).logits[:, :-1].argmax(-1)
        correct += ((guess == labels) | (labels == IGNORED)).all(1).sum().item()
    return correct / len(passages)


def save_tokenizer(recipe: LanguageRecipe, folder: Path) -> GPT2Tokenizer:
    """Train a byte-level BPE on the corpus and save it as OPT's is, for ``AutoTokenizer``.

    BOS (``</s>``) comes first, padding has id 1, and the newline that ends an answer is one token.
    """
    corpus = []
    for passage in _corpus(_every_scan()):
        corpus += [passage.description, passage.prompt + passage.continuation]
    return save_bpe(corpus, recipe, folder)


def save_bpe(corpus: Sequence[str], recipe: LanguageRecipe, folder: Path) -> GPT2Tokenizer:
    """As `save_tokenizer`, for any texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        corpus,
        vocab_size=recipe.vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        show_progress=False,
    )
    bpe.save_model(str(folder))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "errors": "replace",
        "model_max_length": recipe.max_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return GPT2Tokenizer.from_pretrained(str(folder))


def opt_config(recipe: LanguageRecipe, vocab_size: int) -> OPTConfig:
    """The geometry of the demo's OPT."""
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        word_embed_proj_dim=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        ffn_dim=recipe.ffn_dim,
        max_position_embeddings=recipe.max_positions,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=recipe.init_std,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )


# ---------------------------------------------------------------- the corpus


def _every_scan() -> List[digits.Scan]:
    """Every combination of ink, digit and paper. As text: there are no pictures here to leak."""
    combinations = product(digits.INKS, range(len(digits.DIGIT_WORDS)), digits.PAPERS)
    return [digits.Scan(index, digit, ink, paper) for index, (ink, digit, paper) in enumerate(combinations)]


_caption_text = BlipCaptionProcessor()
_question_text = BlipQuestionProcessor()


def _captioning(scan: digits.Scan) -> _Passage:
    text = _caption_text(digits.caption(scan))
    return _Passage(text, "", text + "\n")


def _asking(scan: digits.Scan, question: digits.Question, prompt: str) -> _Passage:
    description = _caption_text(digits.caption(scan))
    asked = prompt.replace("{}", _question_text(question.question))
    return _Passage(description, asked, f" {question.answer}\n")


def _corpus(scans: Sequence[digits.Scan]) -> List[_Passage]:
    """Every caption, and every question in every prompt."""
    captions = [_captioning(scan) for scan in scans]
    return captions + [
        _asking(scan, question, prompt) for scan in scans for question in digits.questions(scan) for prompt in PROMPTS
    ]


def _draw_passage(scans: Sequence[digits.Scan], recipe: LanguageRecipe) -> _Passage:
    """A passage to train on. The demo's own prompt comes as often as all others together."""
    scan = _one_of(scans)
    if _chance(recipe.caption_share):
        passage = _captioning(scan)
    else:
        prompt = PROMPTS[0] if _chance(0.5) else _one_of(PROMPTS[1:])
        passage = _asking(scan, _one_of(digits.questions(scan)), prompt)
    if _chance(recipe.bag_share):
        passage = replace(passage, description=_bag(passage.description, scan, recipe.longest_bag))
    return passage


def _bag(description: str, scan: digits.Scan, longest: int) -> str:
    """A description's words in any order and number, each that matters at least once."""
    words = description.split()
    bag = [scan.ink, digits.DIGIT_WORDS[scan.digit], scan.paper]
    bag += [_one_of(words) for _ in range(_draw(longest - len(bag) + 1))]
    shuffled = [bag[i] for i in torch.randperm(len(bag)).tolist()]
    # A space in front makes the first word's token that of a word within a text.
    return (" " if _chance(0.7) else "") + " ".join(shuffled)


def _draw(count: int) -> int:
    return int(torch.randint(count, ()))


def _one_of(items: Sequence[Item]) -> Item:
    return items[_draw(len(items))]


def _chance(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def _batch(tokenizer: GPT2Tokenizer, passages: Sequence[_Passage]) -> Dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each (b, t), padded on the right."""
    rows: List[Tuple[List[int], List[int]]] = []
    for passage in passages:
        before = tokenizer(passage.description, add_special_tokens=False).input_ids
        given = tokenizer(passage.prompt).input_ids if passage.prompt else [BOS]
        asked = tokenizer(passage.continuation, add_special_tokens=False).input_ids
        rows.append((before + given + asked, [IGNORED] * len(before + given) + asked))
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    ids, labels = zip(*rows)
    return {
        "input_ids": padded(ids, PAD),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, IGNORED),
    }

"""The demo's language model: a small OPT, pre-trained on text alone to answer from what stands before the BOS.

A large OPT can do that from its own pre-training, and BLIP-2 counts on it: the Q-Former's output stands before the
prompt's BOS as a soft description. A language model that never saw a description there gives the Q-Former nothing to
learn from.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import List, Sequence, Tuple

import torch
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipQuestionProcessor
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import GPT2Tokenizer, OPTConfig

from lavis_kvmod.demo import digits
from lavis_kvmod.progress import Progress

__all__ = ["PROMPT", "LanguageRecipe", "accuracy", "save_tokenizer", "train_language_model"]

PROMPT = "Question: {} Short answer:"

# As in OPT's own tokenizer: these ids, and `</s>` for BOS, EOS and unknown alike.
_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
_PAD, _BOS = 1, 2
_IGNORED = -100


@dataclass(frozen=True)
class LanguageRecipe:
    """Geometry and pre-training of the demo's OPT. The defaults are the demo's."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 512
    max_positions: int = 128
    vocab_size: int = 512
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    caption_share: float = 0.2
    longest_description: int = 24
    seed: int = 0


@dataclass(frozen=True)
class _Passage:
    """Text before the BOS, text after it that is given, and the continuation asked for."""

    description: str
    prompt: str
    continuation: str


def train_language_model(recipe: LanguageRecipe, folder: Path) -> float:
    """Train tokenizer and model and save both to ``folder``, as Hugging Face does.

    Sequences are ``[description][BOS]Question: … Short answer: …\\n``, about a fifth of them
    ``[description][BOS]caption\\n``. Draws from torch's global generator.

    Args:
        recipe: see `LanguageRecipe`.
        folder: exists; receives ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Returns:
        The share of passages that the model continues exactly, over all captions and questions.
    """
    scans = _every_scan()
    tokenizer = save_tokenizer(recipe, folder, scans)
    model = OPTForCausalLM(_config(recipe, len(tokenizer))).train()
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
        passages = [_draw_passage(scans, recipe) for _ in range(recipe.batch_size)]
        loss = model(**_batch(tokenizer, passages)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.status(f"loss {loss.item():.3f}")

    model.eval()
    # The output layer is the embedding: safetensors refuses to write one tensor under two names.
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    return accuracy(model, tokenizer)


@torch.no_grad()
def accuracy(model: OPTForCausalLM, tokenizer: GPT2Tokenizer) -> float:
    """The share of passages continued exactly (greedily), over all captions and questions."""
    passages = [passage for scan in _every_scan() for passage in (_captioning(scan), *_questions(scan))]
    correct = 0
    for start in range(0, len(passages), 240):
        batch = _batch(tokenizer, passages[start : start + 240])
        labels = batch.pop("labels")[:, 1:]
        guess = model(**batch).logits[:, :-1].argmax(-1)
        correct += ((guess == labels) | (labels == _IGNORED)).all(1).sum().item()
    return correct / len(passages)


def save_tokenizer(recipe: LanguageRecipe, folder: Path, scans: Sequence[digits.Scan] = ()) -> GPT2Tokenizer:
    """Train the byte-level BPE on the passages and save it as OPT's is saved, for ``AutoTokenizer``."""
    import json

    corpus = []
    for scan in scans or _every_scan():
        for passage in (_captioning(scan), *_questions(scan)):
            corpus += [passage.description, passage.prompt + passage.continuation]
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


def _config(recipe: LanguageRecipe, vocab_size: int) -> OPTConfig:
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
        pad_token_id=_PAD,
        bos_token_id=_BOS,
        eos_token_id=_BOS,
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


def _questions(scan: digits.Scan) -> List[_Passage]:
    description = _caption_text(digits.caption(scan))
    return [
        _Passage(description, PROMPT.format(_question_text(q.question)), f" {q.answer}\n")
        for q in digits.questions(scan)
    ]


def _draw(count: int) -> int:
    return int(torch.randint(count, ()))


def _draw_passage(scans: Sequence[digits.Scan], recipe: LanguageRecipe) -> _Passage:
    scan = scans[_draw(len(scans))]
    if torch.rand(()) < recipe.caption_share:
        passage = _captioning(scan)
    else:
        asked = _questions(scan)
        passage = asked[_draw(len(asked))]
    return passage


def _batch(tokenizer: GPT2Tokenizer, passages: Sequence[_Passage]):
    """``input_ids``, ``attention_mask`` and ``labels``, each (b, t), padded on the right; no loss before the BOS."""
    rows: List[Tuple[List[int], List[int]]] = []
    for passage in passages:
        before = tokenizer(passage.description, add_special_tokens=False).input_ids
        given = tokenizer(passage.prompt).input_ids if passage.prompt else [_BOS]
        asked = tokenizer(passage.continuation, add_special_tokens=False).input_ids
        rows.append((before + given + asked, [_IGNORED] * len(before + given) + asked))
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

    ids, labels = zip(*rows)
    return {
        "input_ids": padded(ids, _PAD),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, _IGNORED),
    }

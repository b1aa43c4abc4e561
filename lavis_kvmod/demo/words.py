"""The demo's vocabulary for the Q-Former's text side: the words of the handwriting's captions, each one token."""

import json
from pathlib import Path
from typing import List

from lavis_kvmod.demo import digits

__all__ = ["save_vocabulary", "vocabulary"]

# BERT's, at the places where its own vocabulary has its first ones; [DEC] comes last, as LAVIS adds it.
_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary() -> List[str]:
    """Special tokens and words, in the order of their ids."""
    words = {"a", "on", "paper", *digits.INKS, *digits.PAPERS, *digits.DIGIT_WORDS}
    return _SPECIAL_TOKENS + sorted(words)


def save_vocabulary(folder: Path) -> None:
    """Write what ``BertTokenizer.from_pretrained`` reads into an existing folder."""
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

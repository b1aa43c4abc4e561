"""BERT's tokenizer, and its weights as a start for the Q-Former (arXiv 1810.04805; LAVIS's ``blip2.py``)."""

import re
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from transformers import BertTokenizer

from lavis_kvmod.weights.files import CheckpointError, StateDict
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import read_folder

__all__ = ["BERT_POSITIONS", "BLIP2_VOCABULARY", "bert_files", "load_bert_tokenizer", "start_from_bert"]

# bert-base-uncased with [DEC], which a text to be generated begins with.
BLIP2_VOCABULARY = 30523
BERT_POSITIONS = 512
_BOS = "[DEC]"
# What BERT has and the Q-Former does not: the pooler, and the head for pairs of sentences.
_NOT_THE_QFORMERS = re.compile(r"(bert\.)?(pooler|embeddings\.token_type_embeddings)\.|cls\.seq_relationship\.")


def _demo_words() -> Path:
    from lavis_kvmod.demo import parts

    return parts.words()


def bert_files(name: str) -> WeightFile:
    """Where tokenizer and weights come from: a local folder, a Hugging Face name, or the demo's own words."""
    build = _demo_words if name == "demo" else None
    return WeightFile("BERT", name, "model.bert_model", is_hf_folder=True, build=build, look=_vocabulary_problem)


def _vocabulary_problem(folder: Path) -> Optional[str]:
    """What is wrong with a folder of BERT's: of this all need the tokenizer, and weights only some."""
    if any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        return None
    return f"expected BERT's vocab.txt or tokenizer.json in {folder}, got neither"


def load_bert_tokenizer(name: str) -> Any:
    """BERT's tokenizer with ``[DEC]`` as BOS, as LAVIS adds it.

    Raises:
        MissingWeightsError: if it is neither on disk nor to be downloaded.
    """
    tokenizer = BertTokenizer.from_pretrained(str(bert_files(name).fetch()))
    tokenizer.add_special_tokens({"bos_token": _BOS})
    return tokenizer


def start_from_bert(qformer: nn.Module, name: str) -> None:
    """Give a Q-Former BERT's weights: text side and self-attention as they are, the queries' feed-forward a copy of the
    text's. Cross-attention, which BERT has none of, stays random, as does the word ``[DEC]``.

    Raises:
        MissingWeightsError, CheckpointError: if the weights cannot be had, or do not fit.
    """
    folder = bert_files(name).fetch()
    bert = {
        _modern(key): value
        for key, value in read_folder(folder, torch.float32).items()
        if not _NOT_THE_QFORMERS.match(key)
    }
    state = qformer.state_dict()
    given: StateDict = {}
    for key in state:
        source = key.replace("_query.", ".") if "_query." in key else key
        if source in bert:
            given[key] = _with_new_words(bert[source], state[key])
    wanted = [key for key in state if ".crossattention." not in key and not key.endswith("position_ids")]
    lacking = [key for key in wanted if key not in given and not key.startswith("cls.predictions.decoder.")]
    if lacking:
        raise CheckpointError(
            f"{folder}: expected the weights of a BERT of the Q-Former's size; {len(lacking)} are missing, such as "
            f"{lacking[0]}; set model.bert_model to one, or model.from_bert: false to start from random weights"
        )
    qformer.load_state_dict({**state, **given})


def _modern(key: str) -> str:
    """Published BERTs call the LayerNorm's weights gamma and beta, and may leave out ``bert.``."""
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return key if key.startswith(("bert.", "cls.")) else f"bert.{key}"


def _with_new_words(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """``value`` with the rows that ``own`` has more (words that were added to the vocabulary)."""
    if value.shape[1:] == own.shape[1:] and len(value) < len(own):
        return torch.cat([value, own[len(value) :]])
    return value

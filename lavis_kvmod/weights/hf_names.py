"""What LAVIS and Hugging Face call BLIP-2's tensors: one table, read in both directions.

Everything is the same number for number but one thing: LAVIS keeps the Query's and the Value's bias of the ViT apart
(its Keys have none), Hugging Face keeps one bias for Query, Key and Value. A Key bias adds the same to all scores of a
softmax, so that it may be left out without changing the result.
"""

import re
from pathlib import Path
from typing import Dict, Iterable, List, Mapping, Optional, Pattern, Sequence, Tuple, Union

import torch

from lavis_kvmod.weights.files import CheckpointError, listing
from lavis_kvmod.weights.tensors import LazyTensor

Tensors = Mapping[str, LazyTensor]

_BLOCK, _HF_BLOCK = "visual_encoder.blocks.#.", "vision_model.encoder.layers.#."
_LAYER, _HF_LAYER = "Qformer.bert.encoder.layer.#.", "qformer.encoder.layer.#."

# (LAVIS, Hugging Face): "#" is a layer's number; "*" at the end is `weight` and `bias`, and in OPT whatever follows.
TABLE: Tuple[Tuple[str, str], ...] = (
    ("query_tokens", "query_tokens"),
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    (_BLOCK + "norm1.*", _HF_BLOCK + "layer_norm1.*"),
    (_BLOCK + "attn.qkv.weight", _HF_BLOCK + "self_attn.qkv.weight"),
    (_BLOCK + "attn.proj.*", _HF_BLOCK + "self_attn.projection.*"),
    (_BLOCK + "norm2.*", _HF_BLOCK + "layer_norm2.*"),
    (_BLOCK + "mlp.fc1.*", _HF_BLOCK + "mlp.fc1.*"),
    (_BLOCK + "mlp.fc2.*", _HF_BLOCK + "mlp.fc2.*"),
    ("ln_vision.*", "vision_model.post_layernorm.*"),
    ("Qformer.bert.embeddings.LayerNorm.*", "qformer.layernorm.*"),
    (_LAYER + "attention.self.query.*", _HF_LAYER + "attention.attention.query.*"),
    (_LAYER + "attention.self.key.*", _HF_LAYER + "attention.attention.key.*"),
    (_LAYER + "attention.self.value.*", _HF_LAYER + "attention.attention.value.*"),
    (_LAYER + "attention.output.dense.*", _HF_LAYER + "attention.output.dense.*"),
    (_LAYER + "attention.output.LayerNorm.*", _HF_LAYER + "attention.output.LayerNorm.*"),
    (_LAYER + "crossattention.self.query.*", _HF_LAYER + "crossattention.attention.query.*"),
    (_LAYER + "crossattention.self.key.*", _HF_LAYER + "crossattention.attention.key.*"),
    (_LAYER + "crossattention.self.value.*", _HF_LAYER + "crossattention.attention.value.*"),
    (_LAYER + "crossattention.output.dense.*", _HF_LAYER + "crossattention.output.dense.*"),
    (_LAYER + "crossattention.output.LayerNorm.*", _HF_LAYER + "crossattention.output.LayerNorm.*"),
    (_LAYER + "intermediate_query.dense.*", _HF_LAYER + "intermediate_query.dense.*"),
    (_LAYER + "output_query.dense.*", _HF_LAYER + "output_query.dense.*"),
    (_LAYER + "output_query.LayerNorm.*", _HF_LAYER + "output_query.LayerNorm.*"),
    ("opt_proj.*", "language_projection.*"),
    ("opt_model.model.decoder.*", "language_model.model.decoder.*"),
    ("opt_model.lm_head.*", "language_model.lm_head.*"),
)
# The exception: these two make one.
Q_BIAS, V_BIAS = _BLOCK + "attn.q_bias", _BLOCK + "attn.v_bias"
HF_QKV_BIAS = _HF_BLOCK + "self_attn.qkv.bias"
# A buffer 0, 1, 2, … of LAVIS's, which Hugging Face's Q-Former has no use for.
POSITION_IDS = "Qformer.bert.embeddings.position_ids"
# OPT's output embedding is its input embedding.
LM_HEAD, EMBEDDING = "opt_model.lm_head.weight", "opt_model.model.decoder.embed_tokens.weight"
# Rows of the published OPTs' embeddings.
OPT_ROWS = 50272
# What this package adds, and Hugging Face's BLIP-2 has no place for.
PREFIX = ("kv_prefix.", "kv_gate", "aux_tokens.", "aux_encoder.")

Rules = Sequence[Tuple[Pattern[str], str]]

_HF_ROOTS = ("vision_model.", "qformer.", "language_projection.", "language_model.")


def _compiled(pattern: str) -> Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace("#", r"(\d+)").replace(r"\*", "(.+)"))


def _filled(pattern: str, groups: Iterable[str]) -> str:
    for group in groups:
        pattern = re.sub(r"[#*]", group, pattern, count=1)
    return pattern


_TO_HF = [(_compiled(lavis), hf) for lavis, hf in TABLE]
_TO_LAVIS = [(_compiled(hf), lavis) for lavis, hf in TABLE]
_Q_BIAS, _V_BIAS, _HF_QKV = _compiled(Q_BIAS), _compiled(V_BIAS), _compiled(HF_QKV_BIAS)


def _rename(name: str, rules: Rules) -> Optional[str]:
    for pattern, target in rules:
        match = pattern.fullmatch(name)
        if match:
            return _filled(target, match.groups())
    return None


def are_hf(names: Iterable[str]) -> bool:
    """Whether these are Hugging Face's names."""
    return any(name.startswith(_HF_ROOTS) for name in names)


def to_hf(tensors: Tensors, source: Union[str, Path]) -> Dict[str, LazyTensor]:
    """Tensors under LAVIS's names -> the same under Hugging Face's; an output embedding that is tied is left out.

    Raises:
        CheckpointError: listing the names that Hugging Face's BLIP-2 has no counterpart for.
    """
    converted, unknown = {}, []
    for name, tensor in tensors.items():
        block = _Q_BIAS.fullmatch(name)
        if block:
            v_bias = tensors[_filled(V_BIAS, block.groups())]
            converted[_filled(HF_QKV_BIAS, block.groups())] = _qkv_bias(tensor, v_bias)
        elif _V_BIAS.fullmatch(name) or name == POSITION_IDS or _is_tied(name, tensors):
            continue
        else:
            target = _rename(name, _TO_HF)
            if target is None:
                unknown.append(name)
            else:
                converted[target] = tensor
    if unknown:
        raise CheckpointError(f"{source}: Hugging Face's BLIP-2 has no counterpart of\n{listing('tensors', unknown)}")
    return converted


def _is_tied(name: str, tensors: Tensors) -> bool:
    if name != LM_HEAD or EMBEDDING not in tensors or tensors[name].data is None:
        return False
    return tensors[name].data == tensors[EMBEDDING].data


def _qkv_bias(q_bias: LazyTensor, v_bias: LazyTensor) -> LazyTensor:
    def read() -> torch.Tensor:
        query, value = q_bias.read(), v_bias.read()
        return torch.cat([query, torch.zeros_like(query), value])

    return LazyTensor(q_bias.dtype, (3 * q_bias.shape[0],), read)


def to_lavis(tensors: Tensors, source: Union[str, Path], positions: int = 512) -> Dict[str, LazyTensor]:
    """Tensors under Hugging Face's names -> the same under LAVIS's, with the buffer and the tied name that it keeps.

    Raises:
        CheckpointError: listing the names that LAVIS's BLIP-2 OPT has no counterpart for.
    """
    converted, unknown = {}, []
    for name, tensor in tensors.items():
        block = _HF_QKV.fullmatch(name)
        if block:
            width = tensor.shape[0] // 3
            converted[_filled(Q_BIAS, block.groups())] = tensor.rows(0, width)
            converted[_filled(V_BIAS, block.groups())] = tensor.rows(2 * width, 3 * width)
            continue
        target = _rename(name, _TO_LAVIS)
        if target is None:
            unknown.append(name)
        else:
            converted[target] = tensor
    if unknown:
        raise CheckpointError(f"{source}: LAVIS's BLIP-2 OPT has no counterpart of\n{listing('tensors', unknown)}")
    if any(name.startswith("Qformer.") for name in converted):
        converted[POSITION_IDS] = LazyTensor.of(torch.arange(positions).expand(1, -1))
    if EMBEDDING in converted and LM_HEAD not in converted:
        converted[LM_HEAD] = converted[EMBEDDING]
    return converted


def within_vocabulary(tensors: Tensors) -> Dict[str, LazyTensor]:
    """``tensors`` (LAVIS's names) with OPT's embeddings cut to the rows that OPT has: Hugging Face adds some."""
    return {
        name: tensor.rows(0, OPT_ROWS) if name in (EMBEDDING, LM_HEAD) and tensor.shape[0] > OPT_ROWS else tensor
        for name, tensor in tensors.items()
    }


def layers(names: Iterable[str], prefix: str) -> List[int]:
    """The numbers behind ``prefix`` (such as ``visual_encoder.blocks.``) in these names, sorted."""
    found = {re.match(re.escape(prefix) + r"(\d+)\.", name) for name in names if name.startswith(prefix)}
    return sorted({int(match[1]) for match in found if match})


def missing(names: Iterable[str]) -> List[str]:
    """What a whole model with this many layers would hold besides ``names`` (LAVIS's)."""
    names = set(names)
    blocks = _up_to_last(layers(names, "visual_encoder.blocks."))
    qformer = layers(names, "Qformer.bert.encoder.layer.")
    cross = sorted({i for i in qformer if any(n.startswith(f"{_LAYER[:-2]}{i}.crossattention.") for n in names)})
    expected = {EMBEDDING, "opt_model.model.decoder.embed_positions.weight"}
    for pattern in [lavis for lavis, _ in TABLE] + [Q_BIAS, V_BIAS]:
        if pattern.startswith("opt_model."):
            continue
        numbers: Iterable[int] = [0]
        if "#" in pattern:
            in_qformer = cross if "crossattention" in pattern else _up_to_last(qformer)
            numbers = blocks if pattern.startswith(_BLOCK) else in_qformer
        for number in numbers:
            one = pattern.replace("#", str(number))
            expected |= {one[:-1] + kind for kind in ("weight", "bias")} if one.endswith("*") else {one}
    # OPT's layers differ with its settings, but all of them are alike.
    decoder = "opt_model.model.decoder.layers."
    inside = {name[len(decoder) :].split(".", 1)[1] for name in names if name.startswith(decoder)}
    expected |= {f"{decoder}{i}.{rest}" for i in _up_to_last(layers(names, decoder)) for rest in inside}
    return sorted(expected - names)


def _up_to_last(numbers: List[int]) -> range:
    return range(numbers[-1] + 1 if numbers else 1)  # a whole model has one at least

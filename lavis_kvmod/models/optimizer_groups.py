"""Which parameters decay, and which learn at a rate of their own."""

import re
from typing import Any, Dict, List

from torch import nn

# A ViT's block number in a parameter's name: EVA's and the demo's, CLIP's.
_VIT_BLOCK = re.compile(r"visual_encoder\.(?:blocks|transformer\.resblocks)\.(\d+)\.")
# Norms by the names they have in LAVIS's ViTs, its Q-Former and OPT; the prefix's tokens and gates, images' places.
_NO_DECAY = re.compile(
    r"(^|[._])(ln|bn|norm\d*|layernorm)([._]|$)|kv_prefix\..*(prefix_tokens|position_embeddings)$|^image_places\.|(^|\.)kv_gate$",
    re.IGNORECASE,
)
# The prefix's own parts, in front of a connector's Keys and of the gated layers'.
_PREFIX = ("kv_prefix.", "kv_gate", "gated_layers.kv_prefix.", "gated_layers.kv_gate")


def optimizer_groups(
    model: nn.Module, *, weight_decay: float, vit_layer_decay: float = 1.0, kv_lr_scale: float = 1.0
) -> List[Dict[str, Any]]:
    """The trained parameters in groups for ``torch.optim``: ``params``, ``weight_decay``, ``lr_scale``, ``name``.

    No decay for vectors (biases, norms), norms of other shapes, prefix tokens and gates. ``lr_scale`` multiplies
    the scheduled learning rate: ``kv_lr_scale`` for the prefix generator and its gates, ``vit_layer_decay`` to the
    power of the number of layers above for an unfrozen ViT (BEiT's layer-wise decay, arXiv 2106.08254; LAVIS main's
    ``lr_layer_decay``), 1 for all else.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = [int(found[1]) for name, _ in trained for found in [_VIT_BLOCK.match(name)] if found]
    depth = max(blocks, default=-1) + 1
    groups: Dict[str, Dict[str, Any]] = {}
    for name, parameter in trained:
        part, scale = "trained", 1.0
        if name.startswith(_PREFIX):
            part, scale = "kv_prefix", kv_lr_scale
        elif name.startswith("visual_encoder."):
            layer = _vit_layer(name, depth)
            part, scale = f"vit_layer_{layer}", vit_layer_decay ** (depth + 1 - layer)
        decays = parameter.ndim > 1 and not name.endswith("bias") and not _NO_DECAY.search(name)
        group = groups.setdefault(
            f"{part}_{'decay' if decays else 'no_decay'}",
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale},
        )
        group["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]


def _vit_layer(name: str, depth: int) -> int:
    """0 for the embeddings, 1 to ``depth`` for the blocks, depth + 1 for what stands behind them."""
    block = _VIT_BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    embeddings = ("patch_embed", "cls_token", "pos_embed", "conv1", "class_embedding", "positional_embedding", "ln_pre")
    return 0 if name.split(".")[1] in embeddings else depth + 1

"""The frozen language model: LAVIS's OPT, from a Hugging Face name or folder, or the demo's own."""

from functools import partial
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

import torch
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTDecoder, OPTDecoderLayer, OPTForCausalLM
from torch import Tensor
from transformers import AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPast

from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.grad_checkpoint import recompute_in_backward
from lavis_kvmod.models.language.attention import use_cached_attention
from lavis_kvmod.models.language.recorded import Recordings
from lavis_kvmod.system.precision import DTYPES
from lavis_kvmod.weights.finding import MissingWeightsError, WeightFile
from lavis_kvmod.weights.reading import load_weights, read_folder


class ReadLayer(OPTDecoderLayer):
    """LAVIS's ``OPTDecoderLayer``, which as the last one need not go on where nothing is read.

    What a position says to others, its Keys and Values, is done with attention; the feed-forward half, two thirds of a
    layer's work, is then of use only where a token is predicted that counts.
    """

    def forward(self, hidden_states: Tensor, *args: Any, read: Optional[Tensor] = None, **kwargs: Any) -> Any:
        """As LAVIS's, (b, t, width) -> (b, t, width), first of a tuple; with ``read`` (k,), which of the b * t
        positions are wanted, (k, width)."""
        if read is None:
            return super().forward(hidden_states, *args, **kwargs)
        first = self.do_layer_norm_before  # in front of both halves, or (350m) behind them
        asks = self.self_attn_layer_norm(hidden_states) if first else hidden_states
        attended = self.self_attn(asks, attention_mask=kwargs.get("attention_mask"))[0]
        states = (hidden_states + attended).flatten(0, 1)[read]
        if not first:
            states = self.self_attn_layer_norm(states)
        inner = self.activation_fn(self.fc1(self.final_layer_norm(states) if first else states))
        states = states + self.fc2(inner)
        return (states if first else self.final_layer_norm(states),)


class CausalDecoder(OPTDecoder):
    """LAVIS's ``OPTDecoder``, which also takes a batch whose padding stands behind all that counts.

    In a causal language model no token sees what is behind it, so such a batch needs no mask: none is made, none is
    added to the scores, and attention takes the kernel that knows what causal means. At the tokens that are no padding
    the result is that of the mask, to rounding.
    """

    _is_compiled = False

    def forward(
        self,
        *args: Any,
        is_causal: bool = False,
        position: Optional[Tensor] = None,
        seen: Optional[Tensor] = None,
        read: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Any:
        """As LAVIS's; with ``is_causal``, ``inputs_embeds`` (b, t, width) alone, and nothing is kept for later.
        ``position`` and ``seen`` are then a `Packing`'s, of rows that hold several texts; ``read`` (k,) says which of
        the b * t positions are wanted, whose states are then (k, width)."""
        if not is_causal:
            return super().forward(*args, **kwargs)
        # Another number of positions in each batch would have the compiler begin again.
        inside = None if self._is_compiled else read
        states = self._causal(kwargs["inputs_embeds"], position, seen, inside)
        states = states if read is inside else states.flatten(0, 1)[read]
        return BaseModelOutputWithPast(last_hidden_state=states)

    def compile_causal(self, mode: str) -> None:
        """Have the way of what is trained behind compiled by `torch.compile`, not that of decoding."""
        self._causal = torch.compile(self._causal, mode=mode)  # type: ignore[method-assign]
        self._is_compiled = True

    def _causal(
        self, states: Tensor, position: Optional[Tensor], seen: Optional[Tensor], read: Optional[Tensor]
    ) -> Tensor:
        states = self._placed(states, position)
        for layer in self.layers[:-1]:
            states = layer(states, attention_mask=seen, use_cache=False)[0]
        return self._read(self.layers[-1](states, attention_mask=seen, use_cache=False, read=read)[0])

    def behind(self, past: Sequence[Any], states: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """The next positions' states (r, t, width), at ``position`` (r, t), behind each layer's ``past`` (see
        `CachedAttention`), of which those are seen that ``seen`` (r, 1, t, all) says."""
        states = self._placed(states, position)
        for layer, own in zip(self.layers, past):
            states = layer(states, attention_mask=seen, past_key_value=own, use_cache=False)[0]
        return self._read(states)

    def _placed(self, states: Tensor, position: Optional[Tensor]) -> Tensor:
        offset = self.embed_positions.offset
        if position is None:
            positions = self.embed_positions.weight[offset : offset + states.shape[1]]
        else:
            positions = self.embed_positions.weight[offset + position]
        return (states if self.project_in is None else self.project_in(states)) + positions

    def _read(self, states: Tensor) -> Tensor:
        if self.final_layer_norm is not None:
            states = self.final_layer_norm(states)
        return states if self.project_out is None else self.project_out(states)


class FrozenOPT(OPTForCausalLM):
    """LAVIS's OPT, frozen, with fused attention that writes its Keys and Values in place.

    Texts are generated by `lavis_kvmod.models.language.decoding`. Its own ``generate`` is transformers', which with
    LAVIS's class recomputes the whole sequence at every step (``past`` and ``past_key_values`` are not one name).

    Attributes:
        recordings: where decoding's steps are recorded as CUDA graphs; None, as at first, without.
    """

    recordings: Optional[Recordings] = None

    def __init__(self, config: OPTConfig):
        super().__init__(config)
        self.model.decoder.__class__ = CausalDecoder
        use_cached_attention(self.model.decoder.layers)
        self.model.decoder.layers[-1].__class__ = ReadLayer
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenOPT":
        """Stay in eval mode whatever ``mode`` says: no dropout in a frozen language model."""
        return super().train(False)


# Trained on this machine on first use.
_BUILT_HERE = ("demo", "demo-pages", "demo-easy")


def _built_here(name: str) -> Path:
    from lavis_kvmod.demo import parts

    return parts.language_model(parts.LANGUAGE_MODELS[name])


def language_model_weights(name: str) -> WeightFile:
    """Where the language model comes from: a local folder, a Hugging Face name, or the demo's own."""
    return WeightFile(
        "language model",
        name,
        "model.opt_model",
        is_hf_folder=True,
        build=partial(_built_here, name) if name in _BUILT_HERE else None,
    )


# What facebook/opt-NAME's config.json says, for counting parameters where it is not at hand (arXiv 2205.01068).
_OPT_GEOMETRY = {
    "facebook/opt-125m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "facebook/opt-1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32),
    "facebook/opt-2.7b": dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32),
    "facebook/opt-6.7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
}


def opt_config(name: str, folder: Optional[Path]) -> OPTConfig:
    """The geometry of the language model ``name``: from its folder, else what is known of its name.

    Raises:
        MissingWeightsError: if nothing is known of it.
    """
    if folder is not None:
        return OPTConfig.from_pretrained(str(folder))
    if name in _BUILT_HERE:
        from lavis_kvmod.demo import parts

        return parts.language_model_config(parts.LANGUAGE_MODELS[name])
    if name not in _OPT_GEOMETRY:
        raise MissingWeightsError(
            f"language model: {name} is not on this machine, and its size is only known for {', '.join(_OPT_GEOMETRY)}"
        )
    geometry = _OPT_GEOMETRY[name]
    width = geometry["hidden_size"]
    return OPTConfig(vocab_size=50272, ffn_dim=4 * width, word_embed_proj_dim=width, **geometry)


def build_language_model(
    name: str, *, precision: str = "fp16", use_grad_checkpoint: bool = False, load: bool = True
) -> Tuple[FrozenOPT, Any]:
    """The frozen OPT and its tokenizer, from a Hugging Face name or folder.

    Weights are read file by file and stored in ``precision`` at once, so that no second copy of the model is held.
    With ``load=False`` the model has no weights (``meta`` device) and there is no tokenizer.

    Returns:
        (FrozenOPT, tokenizer or None)

    Raises:
        MissingWeightsError: if it is neither on disk nor to be downloaded.
        CheckpointError: if its files are not those of its config.
    """
    file = language_model_weights(name)
    folder = file.fetch() if load else file.local_path()
    with empty_weights():
        model = FrozenOPT(opt_config(name, folder))
    if use_grad_checkpoint:
        recompute_in_backward(model.model.decoder.layers)
    model.to(DTYPES[precision])
    model.tie_weights()
    if not load or folder is None:
        return model, None

    state = read_folder(folder, DTYPES[precision])
    # Meta's own repositories hold the bare decoder; what transformers saves from OPTForCausalLM holds "model." too.
    state = {k if k.startswith(("model.", "lm_head.")) else f"model.{k}": v for k, v in state.items()}
    state.pop("model.decoder.version", None)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    load_weights(model, state, source=folder, may_lack=tied, assign=True)
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(str(folder), use_fast=False)

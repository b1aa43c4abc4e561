"""The frozen towers: the ViT and the OPT language model, from LAVIS's own classes and from local files.

LAVIS's loaders download from fixed addresses; here every source is a key of the config, and nothing is fetched that
a checkpoint would replace.
"""

import operator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping, NamedTuple, Optional

import torch
from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from torch import Tensor, nn
from transformers import AutoTokenizer

from lavis_kvmod.checkpoints import CheckpointError, load_weights, read_folder, read_weights
from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.grad_checkpoint import recompute_in_backward
from lavis_kvmod.weights import MissingWeightsError, WeightFile

BLIP2_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# ---------------------------------------------------------------- image encoder


@dataclass(frozen=True)
class VisionEncoder:
    """How one ``vit_model`` is built and where its weights are."""

    build: Callable[..., nn.Module]
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = operator.attrgetter("blocks")
    url: Optional[str] = None
    build_weights: Optional[Callable[[], Path]] = None  # instead of an address


def _eva_clip_g(image_size: int, drop_path_rate: float, **geometry) -> nn.Module:
    """EVA-CLIP-G without its last block (the geometry of LAVIS's ``create_eva_vit_g``)."""
    defaults = dict(patch_size=14, embed_dim=1408, depth=39, num_heads=16, mlp_ratio=4.3637)
    return eva_vit.VisionTransformer(
        img_size=image_size,
        use_mean_pooling=False,
        qkv_bias=True,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{**defaults, **geometry},
    )


def _clip_l(image_size: int, drop_path_rate: float, **geometry):
    """CLIP ViT-L/14 without its last two blocks (the geometry of LAVIS's ``create_clip_vit_L``)."""
    defaults = dict(patch_size=14, width=1024, layers=22, heads=16)
    return clip_vit.VisionTransformer(
        input_resolution=image_size,
        use_grad_checkpointing=False,
        **{**defaults, **geometry},
    )


def _demo_vit(image_size: int, drop_path_rate: float, **geometry):
    from lavis_kvmod.demo.vision import build_vision_encoder

    return build_vision_encoder(image_size, **geometry)


def _demo_vision_weights() -> Path:
    from lavis_kvmod.demo import parts

    return parts.vision_weights()


def _demo_language_model() -> Path:
    from lavis_kvmod.demo import parts

    return parts.language_model()


VISION_ENCODERS = {
    "eva_clip_g": VisionEncoder(_eva_clip_g, url=f"{BLIP2_FILES}/eva_vit_g.pth"),
    "clip_L": VisionEncoder(
        _clip_l,
        blocks=operator.attrgetter("transformer.resblocks"),
        url=f"{BLIP2_FILES}/clip_vit_L.pth",
    ),
    "demo": VisionEncoder(_demo_vit, build_weights=_demo_vision_weights),
}


def vision_weights(name: str, checkpoint: Optional[str] = None) -> WeightFile:
    """Where the weights of ``vit_model: name`` come from."""
    encoder = VISION_ENCODERS[name]
    return WeightFile(
        f"image encoder {name}",
        checkpoint or encoder.url,
        "model.vit_checkpoint",
        build=None if checkpoint else encoder.build_weights,
    )


def interpolate_positions(vit: nn.Module, state: Dict[str, Tensor]) -> None:
    """Bring the position embedding in ``state`` (the ViT's names), if there is one, to the image size of ``vit``."""
    module = clip_vit if isinstance(vit, clip_vit.VisionTransformer) else eva_vit
    module.interpolate_pos_embed(vit, state)


class Vision(NamedTuple):
    """The ViT, the LayerNorm BLIP-2 puts behind it, and whether the latter's weights were in the ViT's file."""

    visual_encoder: nn.Module
    ln_vision: LayerNorm
    ln_vision_loaded: bool


def build_vision_encoder(
    name: str,
    *,
    checkpoint: Optional[str] = None,
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
    precision: str = "fp16",
    geometry: Mapping[str, Any] = (),
    load: bool = True,
) -> Vision:
    """The ViT with its weights, and ``ln_vision``.

    The weight file may hold the bare ViT (LAVIS's EVA file: blocks and heads beyond what BLIP-2 uses are left out),
    or ``visual_encoder.*`` with ``ln_vision.*``. Weights of convolutions and linear layers are stored in
    ``precision``, the others in float32, as LAVIS does for fp16. With ``load=False`` the ViT has no weights (``meta``
    device) and no file is looked for.

    Raises:
        MissingWeightsError, CheckpointError: if the weights cannot be had, or do not fit.
    """
    encoder = VISION_ENCODERS[name]
    with empty_weights():
        vit = encoder.build(image_size, drop_path_rate, **dict(geometry))
    if use_grad_checkpoint:
        recompute_in_backward(encoder.blocks(vit))
    for module in vit.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(DTYPES[precision])
    ln_vision = LayerNorm(vit.num_features)
    if not load:
        return Vision(vit, ln_vision, False)

    path = vision_weights(name, checkpoint).fetch()
    state = read_weights(path)
    norm = {k[len("ln_vision.") :]: v for k, v in state.items() if k.startswith("ln_vision.")}
    if norm:
        load_weights(ln_vision, norm, source=path)
    prefixed = {k[len("visual_encoder.") :]: v for k, v in state.items() if k.startswith("visual_encoder.")}
    state = prefixed or state
    interpolate_positions(vit, state)
    own = set(vit.state_dict())
    if not own & set(state):
        raise CheckpointError(f"{path} holds no weights of the image encoder {name}")
    load_weights(vit, {k: v for k, v in state.items() if k in own}, source=path, assign=True)
    return Vision(vit, ln_vision, bool(norm))


# ---------------------------------------------------------------- language model


class FrozenOPT(OPTForCausalLM):
    """LAVIS's OPT, frozen, and generating with its Key/Value cache.

    LAVIS's ``prepare_inputs_for_generation`` takes ``past``; transformers 4.26 passes ``past_key_values``, so stock
    LAVIS recomputes the whole sequence at every decoding step.
    """

    def __init__(self, config):
        super().__init__(config)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenOPT":
        """Stay in eval mode whatever ``mode`` says: no dropout in a frozen language model."""
        return super().train(False)

    def prepare_inputs_for_generation(self, input_ids=None, query_embeds=None, past_key_values=None, **kwargs):
        """See the class; arguments as transformers 4.26 gives them."""
        kwargs.setdefault("past", past_key_values)
        return super().prepare_inputs_for_generation(input_ids, query_embeds, **kwargs)


def language_model_weights(name: str) -> WeightFile:
    """Where the language model comes from: a local folder, a Hugging Face name, or the demo's own."""
    return WeightFile(
        "language model",
        name,
        "model.opt_model",
        is_hf_folder=True,
        build=_demo_language_model if name == "demo" else None,
    )


# What facebook/opt-NAME's config.json says, for counting parameters where it is not at hand (arXiv 2205.01068).
_OPT_GEOMETRY = {
    "facebook/opt-125m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "facebook/opt-1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32),
    "facebook/opt-2.7b": dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32),
    "facebook/opt-6.7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
}


def _opt_config(name: str, folder: Optional[Path]) -> OPTConfig:
    if folder is not None:
        return OPTConfig.from_pretrained(str(folder))
    if name == "demo":
        from lavis_kvmod.demo import parts

        return parts.language_model_config()
    if name not in _OPT_GEOMETRY:
        raise MissingWeightsError(
            f"language model: {name} is not on this machine, and its size is only known for {', '.join(_OPT_GEOMETRY)}"
        )
    geometry = _OPT_GEOMETRY[name]
    width = geometry["hidden_size"]
    return OPTConfig(vocab_size=50272, ffn_dim=4 * width, word_embed_proj_dim=width, **geometry)


def build_language_model(name: str, *, precision: str = "fp16", use_grad_checkpoint: bool = False, load: bool = True):
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
        model = FrozenOPT(_opt_config(name, folder))
    if use_grad_checkpoint:
        recompute_in_backward(model.model.decoder.layers)
    model.to(DTYPES[precision])
    model.tie_weights()
    if not load:
        return model, None

    state = read_folder(folder, DTYPES[precision])
    # Meta's own repositories hold the bare decoder; what transformers saves from OPTForCausalLM holds "model." too.
    state = {k if k.startswith(("model.", "lm_head.")) else f"model.{k}": v for k, v in state.items()}
    state.pop("model.decoder.version", None)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    load_weights(model, state, source=folder, may_lack=tied, assign=True)
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(str(folder), use_fast=False)

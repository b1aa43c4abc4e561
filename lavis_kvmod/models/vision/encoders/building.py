"""An image encoder with its weights, from local files.

LAVIS's loaders download from fixed addresses; here every source is a key of the config, and nothing is fetched that
a checkpoint would replace.
"""

from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple, cast

from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from torch import Tensor, nn

from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.grad_checkpoint import recompute_in_backward
from lavis_kvmod.models.vision.attention import use_fused_attention
from lavis_kvmod.models.vision.encoders.registry import VISION_ENCODERS
from lavis_kvmod.system.precision import DTYPES
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import load_weights, read_weights


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
    own = getattr(vit, "interpolate_positions", None)
    if own is not None:
        own(state)
    elif isinstance(vit, clip_vit.VisionTransformer):
        clip_vit.interpolate_pos_embed(vit, state)
    elif isinstance(vit, eva_vit.VisionTransformer):
        eva_vit.interpolate_pos_embed(vit, state)


class Vision(NamedTuple):
    """The ViT, the LayerNorm BLIP-2 puts behind it, and whether the latter's weights were in the ViT's file."""

    visual_encoder: nn.Module
    ln_vision: LayerNorm
    ln_vision_loaded: bool

    @property
    def width(self) -> int:
        """Of the visual tokens."""
        return int(cast(Any, self.visual_encoder).num_features)

    @property
    def num_tokens(self) -> Optional[int]:
        """How many visual tokens an image gives; None where the ViT does not say."""
        return num_tokens(self.visual_encoder)


def num_tokens(vit: nn.Module) -> Optional[int]:
    """How many visual tokens a ViT gives: what its ``num_tokens`` says, or has a position embedding (EVA's, CLIP's)."""
    told = getattr(vit, "num_tokens", None)
    if told is not None:
        return int(told)
    for name in ("pos_embed", "positional_embedding"):
        positions = getattr(vit, name, None)
        if isinstance(positions, Tensor):
            return int(positions.shape[-2])
    return None


def known_num_tokens(name: str, image_size: int, geometry: Mapping[str, Any]) -> Optional[int]:
    """As `num_tokens`, of the encoder ``vit_model: name``, before it is loaded."""
    called = (name, image_size, repr(dict(geometry)))
    if called not in _KNOWN:  # to be built, though without weights, it takes a second
        with empty_weights():
            _KNOWN[called] = num_tokens(VISION_ENCODERS[name].build(image_size, 0.0, **geometry))
    return _KNOWN[called]


_KNOWN: Dict[Tuple[str, int, str], Optional[int]] = {}


def build_vision_encoder(
    name: str,
    *,
    checkpoint: Optional[str] = None,
    image_size: int = 224,
    drop_path_rate: float = 0.0,
    use_grad_checkpoint: bool = False,
    precision: str = "fp16",
    geometry: Optional[Mapping[str, Any]] = None,
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
        vit = encoder.build(image_size, drop_path_rate, **(geometry or {}))
    use_fused_attention(vit)
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

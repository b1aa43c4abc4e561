"""What every model of the family shares: the image's way as far as the Q-Former, what is trained, precision, loading.

    image ─► image encoder ─► ln_vision ─► visual tokens ─┐
      └────► auxiliary encoder ─► pooled ─► KV prefix ────┴─► Q-Former ─► …

A member adds what stands behind the Q-Former, and its losses.
"""

import contextlib
from typing import Any, ClassVar, ContextManager, Dict, List, Mapping, Optional, Tuple, Type, cast

import torch
from lavis.models.blip2_models.blip2 import Blip2Base
from torch import Tensor, nn

from lavis_kvmod.models import loading
from lavis_kvmod.models.connectors.kv_prefix import KVPrefix, KVPrefixGenerator, prefix_of_each_layer
from lavis_kvmod.models.connectors.registry import Connector
from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.optimizer_groups import optimizer_groups
from lavis_kvmod.models.parts import PartSummary, summarise, train_only
from lavis_kvmod.models.settings import PREFIX_GATES, ImageSideSettings
from lavis_kvmod.models.vision.auxiliary import AuxiliaryEncoder
from lavis_kvmod.models.vision.feature_cache import DEFAULT_GIB, FrozenFeatureCache, FrozenFeatures
from lavis_kvmod.models.vision.feature_files import FeatureFiles, fingerprint
from lavis_kvmod.models.vision.prefix_controls import controlled
from lavis_kvmod.system.paths import absolute, resource
from lavis_kvmod.system.precision import (
    autocast,
    computes_in,
    cpu_has_bf16,
    frozen_dtype_on_cpu,
    stored_dtype,
    surrounding_autocast,
)
from lavis_kvmod.weights import finding
from lavis_kvmod.weights.reading import LoadReport

__all__ = ["KVModBase", "SoftPromptModel", "model_type_files"]


def model_type_files(arch: str, *model_types: str) -> Dict[str, str]:
    """LAVIS's ``PRETRAINED_MODEL_CONFIG_DICT``: model type -> the YAML that is shipped for it."""
    return {name: f"configs/models/{arch}/{name}.yaml" for name in model_types}


class KVModBase(Blip2Base):
    """A BLIP-2 model whose Q-Former also attends to a Key/Value prefix written by a second encoder.

    Args:
        visual_encoder: ViT, (b, 3, H, H) -> (b, n, width).
        ln_vision: the LayerNorm BLIP-2 puts behind it.
        qformer: connector over visual tokens of that width: the Q-Former, or what stands in its place.
        num_query_token: how many query tokens, where the connector reads any.
        freeze_vit: False also trains the ViT and ``ln_vision`` (LAVIS's captioning recipe).
        image_size: side of the input image in pixels, as the ViT was built.
        cache_frozen_features, feature_cache_gib: see `FrozenFeatureCache`.
        feature_cache_dir: where `FeatureFiles` are read from, once `open_feature_files` is called.
        ln_vision_loaded: whether ``ln_vision``, which has no file of its own, came with the ViT handed in; else a
            checkpoint must hold it.
        prefix_control: see `lavis_kvmod.models.vision.prefix_controls`; may be set anew at any time.

    A subclass adds its own parts, then calls `_add_prefix` and `_freeze`.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[Dict[str, str]] = {}
    default_model_type: ClassVar[str]
    # The keys of the model section, of which `from_settings` gets an instance.
    settings_class: ClassVar[Type[ImageSideSettings]] = ImageSideSettings
    # The parts behind the Q-Former, in the figure's order, and whether they are trained.
    behind_qformer: ClassVar[Mapping[str, bool]] = {}
    # What else a checkpoint of a training holds, though no gradient reaches it; what of it a checkpoint may lack.
    kept_in_training: ClassVar[Tuple[str, ...]] = ()
    of_this_training: ClassVar[Tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        visual_encoder: nn.Module,
        ln_vision: nn.Module,
        qformer: Connector,
        num_query_token: int,
        freeze_vit: bool = True,
        image_size: int = 224,
        cache_frozen_features: bool = False,
        feature_cache_gib: float = DEFAULT_GIB,
        feature_cache_dir: Optional[str] = None,
        ln_vision_loaded: bool = True,
        prefix_control: str = "none",
    ):
        super().__init__()
        # Names and order as in LAVIS's models: they are the names in its checkpoints.
        self.query_tokens: Any = None  # (1, q, hidden); stage 1's Q-Former has always some
        if getattr(qformer, "reads_queries", True):
            self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, qformer.hidden_size))
            nn.init.normal_(self.query_tokens, std=0.02)
        # What the connector makes of an image.
        self.num_outputs: int = getattr(qformer, "num_outputs", num_query_token)
        self.visual_encoder = visual_encoder
        self.ln_vision = ln_vision
        self.Qformer = qformer
        self.freeze_vit = freeze_vit
        self.image_size = image_size
        self.feature_cache_dir = feature_cache_dir
        caches = cache_frozen_features or feature_cache_dir is not None
        self.feature_cache = FrozenFeatureCache(feature_cache_gib if cache_frozen_features else 0) if caches else None
        self.ln_vision_loaded = ln_vision_loaded
        self.prefix_control = prefix_control
        self.swap_prefix = False  # at test time: another image's prefix, to see whether it is used

    def _add_prefix(
        self,
        kv_prefix: Optional[KVPrefixGenerator],
        aux_encoder: Optional[AuxiliaryEncoder],
        prefix_gate: str,
        aux_tokens: Optional[nn.Module] = None,
    ) -> None:
        """Add the prefix's generator, or what makes tokens in its place, the encoder it reads, and the gates.

        Raises:
            ValueError: for an unknown ``prefix_gate``, or a prefix without its encoder.
        """
        if (kv_prefix is None and aux_tokens is None) != (aux_encoder is None):
            raise ValueError("kv_prefix and aux_encoder belong together: give both or neither")
        if prefix_gate not in PREFIX_GATES:
            raise ValueError(f"prefix_gate: expected one of {PREFIX_GATES}, got {prefix_gate!r}")
        self.kv_prefix = kv_prefix
        self.aux_encoder = aux_encoder
        self.kv_gate: Optional[nn.Parameter] = None
        if kv_prefix is not None and prefix_gate == "tanh":
            # One gate a head and layer; closed at first, so that training starts from stock BLIP-2.
            gates = torch.zeros(self.Qformer.num_cross_attention_layers, self.Qformer.num_attention_heads)
            self.kv_gate = nn.Parameter(gates)

    # ------------------------------------------------------------ what is trained

    @property
    def trained_parts(self) -> Tuple[str, ...]:
        """Attribute names of the parts that are trained."""
        parts = ["kv_prefix", "kv_gate", "Qformer", "query_tokens"]
        parts += [part for part, is_trained in self.behind_qformer.items() if is_trained]
        if not self.freeze_vit:
            parts += ["visual_encoder", "ln_vision"]
        return tuple(part for part in parts if getattr(self, part) is not None)

    def _freeze(self) -> None:
        train_only(self, self.trained_parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> "KVModBase":
        """Set training mode; frozen parts stay in eval mode (no dropout, no BatchNorm update)."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
            self.ln_vision.eval()
        return self

    def parts(self) -> List[PartSummary]:
        """The model's parts in the figure's order: see `PartSummary`."""
        order = ["visual_encoder", "ln_vision", "aux_encoder", "kv_prefix", "kv_gate", "query_tokens", "Qformer"]
        order += self.behind_qformer
        found = [summarise(name, getattr(self, name)) for name in order if getattr(self, name) is not None]
        return [row for row in found if row.parameters]  # a connector may be nothing but the projection behind it

    def get_optimizer_params(
        self, weight_decay: float, lr_scale: float = 1.0, kv_lr_scale: float = 1.0
    ) -> List[Dict[str, Any]]:
        """LAVIS main's hook for the optimiser (``lr_scale`` is its layer-wise decay): see `optimizer_groups`."""
        return optimizer_groups(self, weight_decay=weight_decay, vit_layer_decay=lr_scale, kv_lr_scale=kv_lr_scale)

    # ------------------------------------------------------------ image -> features and prefix

    def frozen_features(self, samples: Mapping[str, Any]) -> FrozenFeatures:
        """What both encoders make of ``samples["image"]`` (b, 3, H, H), from the cache where there is one.

        Raises:
            ValueError: if the images have another shape than the ViT was built for.
        """
        image = samples["image"]
        expected = (3, self.image_size, self.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"expected images (b, {', '.join(map(str, expected))}), got {tuple(image.shape)}: the image "
                f"processor's image_size and model.image_size must agree"
            )
        keys = samples.get("image_key")
        if self.feature_cache is None or keys is None:
            features = self._encode_image(image)
        else:
            features = self.feature_cache(keys, image, self._encode_to_keep)
        if surrounding_autocast(self.device.type) is None:  # what is trained then computes in float32
        return controlled(self.prefix_control, features, swap=self.swap_prefix)

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
from lavis_kvmod.models.connectors.kv_prefix import KVPrefix, PrefixGenerator, for_each_layer, prefix_of_each_layer
from lavis_kvmod.models.connectors.registry import Connector
from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.optimizer_groups import optimizer_groups
from lavis_kvmod.models.parts import PartSummary, summarise, train_only
from lavis_kvmod.models.settings import PREFIX_GATES, ImageSideSettings
from lavis_kvmod.models.several_images import ImagePlaces, Seen, by_number, images_each, one_by_one
from lavis_kvmod.models.vision.auxiliary import Auxiliary
from lavis_kvmod.models.vision.feature_cache import DEFAULT_GIB, FrozenFeatureCache, FrozenFeatures
from lavis_kvmod.models.vision.feature_files import FeatureFiles, fingerprint
from lavis_kvmod.models.vision.prefix_controls import controlled
from lavis_kvmod.models.vision.token_merging import merge_tokens
from lavis_kvmod.models.vision.token_pooling import pool_tokens
from lavis_kvmod.system.paths import absolute, resource
from lavis_kvmod.system.precision import (
    autocast,
    computes_in,
    converts,
    cpu_has_bf16,
    frozen_dtype_on_cpu,
    no_autocast,
    stored_dtype,
    stored_dtypes,
    surrounding_autocast,
)
from lavis_kvmod.weights import finding
from lavis_kvmod.weights.reading import LoadReport

__all__ = ["KVModBase", "model_type_files"]


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
        prefix_dropout: the share of samples that are trained without their prefix (BRAVE, arXiv 2404.07204).
        image_places: for samples of several images; None takes one image a sample.
        pool_visual_tokens: so many times so many neighbouring visual tokens become their mean.
        merge_visual_tokens: visual tokens that are alike become their mean, until so many are left.

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
        prefix_dropout: float = 0.0,
        image_places: Optional[ImagePlaces] = None,
        pool_visual_tokens: int = 1,
        merge_visual_tokens: Optional[int] = None,
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
        self.image_places = image_places
        self.pool_visual_tokens, self.merge_visual_tokens = pool_visual_tokens, merge_visual_tokens
        self.Qformer = qformer
        self.freeze_vit = freeze_vit
        self.image_size = image_size
        self.feature_cache_dir = feature_cache_dir
        caches = cache_frozen_features or feature_cache_dir is not None
        self.feature_cache = FrozenFeatureCache(feature_cache_gib if cache_frozen_features else 0) if caches else None
        self.ln_vision_loaded = ln_vision_loaded
        self.prefix_control = prefix_control
        self.prefix_dropout = prefix_dropout
        self.swap_prefix = False  # at test time: another image's prefix, to see whether it is used

    def _add_prefix(
        self,
        kv_prefix: Optional[PrefixGenerator],
        aux_encoder: Optional[Auxiliary],
        prefix_gate: str,
        *other_readers: Optional[nn.Module],
    ) -> None:
        """Add the prefix's generator, the encoder that it (or what else reads it) reads, and the gates.

        Raises:
            ValueError: for an unknown ``prefix_gate``, or a prefix without its encoder.
        """
        if all(reader is None for reader in (kv_prefix, *other_readers)) != (aux_encoder is None):
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
        parts = ["image_places", "kv_prefix", "kv_gate", "Qformer", "query_tokens"]
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
        order = ["visual_encoder", "ln_vision", "aux_encoder", "image_places"]
        order += ["kv_prefix", "kv_gate", "query_tokens", "Qformer", *self.behind_qformer]
        found = [summarise(name, getattr(self, name)) for name in order if getattr(self, name) is not None]
        return [row for row in found if row.parameters]  # a connector may be nothing but the projection behind it

    def get_optimizer_params(
        self, weight_decay: float, lr_scale: float = 1.0, kv_lr_scale: float = 1.0
    ) -> List[Dict[str, Any]]:
        """LAVIS main's hook for the optimiser (``lr_scale`` is its layer-wise decay): see `optimizer_groups`."""
        return optimizer_groups(self, weight_decay=weight_decay, vit_layer_decay=lr_scale, kv_lr_scale=kv_lr_scale)

    # ------------------------------------------------------------ image -> features and prefix

    def frozen_features(self, samples: Mapping[str, Any]) -> FrozenFeatures:
        """What both encoders make of ``samples["image"]`` (b, 3, H, H), from the cache where there is one; or of each
        of b * k images (b, k, 3, H, H).

        Raises:
            ValueError: if the images have another shape than the ViT was built for.
        """
        image, keys = one_by_one(samples)
        expected = (3, self.image_size, self.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"expected images (b, {', '.join(map(str, expected))}), got {tuple(image.shape)}: the image "
                f"processor's image_size and model.image_size must agree"
            )
        if self.feature_cache is None or keys is None:
            features = self._encode_image(image)
        else:
            features = self.feature_cache(keys, image, self._encode_to_keep)
        if surrounding_autocast(self.device.type) is None:  # what is trained then computes in float32
            features = features._replace(
                visual_tokens=features.visual_tokens.to(cast(Tensor, self.ln_vision.weight).dtype)
            )
        if self.pool_visual_tokens > 1:
            features = features._replace(visual_tokens=pool_tokens(features.visual_tokens, self.pool_visual_tokens))
        if self.merge_visual_tokens is not None:
            merged, _ = merge_tokens(features.visual_tokens, self.merge_visual_tokens)
            features = features._replace(visual_tokens=merged)
        each = images_each(samples["image"])
        return controlled(self.prefix_control, features, swap=self.swap_prefix, each=each)

    def seen(self, samples: Mapping[str, Any]) -> Seen:
        """`frozen_features`, those of a sample's images side by side: see `lavis_kvmod.models.several_images`.

        Raises:
            ValueError: as `frozen_features`; for more images a sample than the model has places for.
        """
        image = samples["image"]
        if self.image_places is None and image.ndim == 5 and image.shape[1] > 1:
            raise ValueError(f"expected one image a sample, got {image.shape[1]}; for several set model.max_images")
        features = self.frozen_features(samples)
        return Seen(*features) if self.image_places is None else self.image_places(features, samples)

    def fingerprint(self) -> Dict[str, str]:
        """What the frozen encoders' features depend on: see `lavis_kvmod.models.vision.feature_files.fingerprint`."""
        return fingerprint(
            self.image_size,
            None if self.aux_encoder is None else self.aux_encoder.form,
            visual_encoder=self.visual_encoder,
            ln_vision=self.ln_vision,
            aux_encoder=self.aux_encoder,
        )

    def open_feature_files(self) -> None:
        """Have features read from ``feature_cache_dir``, if one was named; to be called when all weights are loaded.

        Raises:
            FeatureFilesError: if there are none, or they are of other encoders.
        """
        if self.feature_cache is not None and self.feature_cache_dir is not None:
            self.feature_cache.files = FeatureFiles(absolute(self.feature_cache_dir), self.fingerprint())

    def _encode_to_keep(self, image: Tensor) -> FrozenFeatures:
        """In the precision of the tower's weights: autocast adds a half-precision tower's layers up in float32."""
        features = self._encode_image(image)
        return features._replace(visual_tokens=features.visual_tokens.to(stored_dtype(self.visual_encoder)))

    def _encode_image(self, image: Tensor) -> FrozenFeatures:
        """(b, 3, H, H) -> visual tokens (b, n, width), auxiliary features (b, f) or (b, p, f), or None."""
        with self.autocast_for(self.visual_encoder):
            with torch.no_grad() if self.freeze_vit else contextlib.nullcontext():
                visual_tokens = self.ln_vision(self.visual_encoder(image))
            pooled = None if self.aux_encoder is None else self.aux_encoder(image)
        return FrozenFeatures(visual_tokens, pooled)

    def queries(self, rows: int) -> Optional[Tensor]:
        """The query tokens for each of ``rows`` images (rows, q, hidden); None where the connector reads none."""
        return None if self.query_tokens is None else self.query_tokens.expand(rows, -1, -1)

    def dropped(self, pooled: Optional[Tensor]) -> Optional[Tensor]:
        """Which samples of a training batch go without their prefix (b,), drawn anew; None where none does."""
        if pooled is None or not (self.training and self.prefix_dropout):
            return None
        return torch.rand(len(pooled), device=pooled.device) < self.prefix_dropout

    def prefixes(
        self, pooled: Optional[Tensor], dropped: Optional[Tensor] = None, places: Optional[Tensor] = None
    ) -> Optional[List[KVPrefix]]:
        """Auxiliary features -> one prefix for each cross-attention layer, or None without KV modulation.

        ``dropped`` (b,) says which samples go without theirs, if that has been drawn; ``places`` (b, k), where each of
        a sample's k images stands, whose features are then (b, k, …).
        """
        if self.kv_prefix is None or pooled is None:
            return None
        dropped = self.dropped(pooled) if dropped is None else dropped
        layers = self.Qformer.num_cross_attention_layers
        if self.image_places is not None and places is not None:
            made = self.image_places.key_value(self.kv_prefix, pooled, places, own_softmax=self.kv_gate is not None)
            return for_each_layer(made, layers, self.kv_gate, dropped)
        return prefix_of_each_layer(self.kv_prefix, pooled, layers, self.kv_gate, dropped)

    # ------------------------------------------------------------ one image, many texts

    @torch.no_grad()
    def prefix_attention_share(self, samples: Dict[str, Any]) -> Optional[float]:
        """How much of its attention the Q-Former gives to the prefix, in [0, 1]; None without KV modulation.

        The mean over images, cross-attention layers, heads and queries. With a gate, whose two softmaxes each sum to
        one, it is |tanh(g)| / (1 + |tanh(g)|).
        """
        if self.kv_prefix is None:
            return None
        total = 0.0
        for rows, part in by_number(samples):
            maps = torch.stack(self.encode(part, output_attentions=True).query_output.cross_attentions).float().abs()
            of_prefix = maps[..., : images_each(part["image"]) * self.kv_prefix.num_positions].sum(-1)
            total += (of_prefix / maps.sum(-1)).mean().item() * len(rows)
        return total / len(samples["image"])

    # ------------------------------------------------------------ precision

    @property
    def device(self) -> torch.device:
        """Where the model is. (LAVIS lists all parameters to say so.)"""
        return cast(Tensor, self.ln_vision.weight).device

    def autocast_for(self, part: nn.Module) -> ContextManager[None]:
        """The context that a part computes in: see `computes_in`. A surrounding autocast (the run's) stays in force but
        for a part that has nothing to convert: no weight of it, and no activation, is converted at a step."""
        device_type = self.device.type
        surrounding, stored = surrounding_autocast(device_type), stored_dtype(part)
        dtype = computes_in(stored, surrounding)
        if not converts([weights for run in self._run_inside(part) for weights in stored_dtypes(run)], dtype):
            return no_autocast(device_type)
        return autocast(device_type, None if dtype in (surrounding, torch.float32) else dtype)

    def _run_inside(self, part: nn.Module) -> List[nn.Module]:
        """The modules that are run where a part is."""
        return [part]

    def float(self) -> "KVModBase":
        """What LAVIS's ``load_model`` calls for the CPU: trained parameters in float32, frozen half-precision ones in
        bfloat16 where the processor has it (float32 would double their memory), else in float32."""
        has_bf16 = cpu_has_bf16()
        for parameter in self.parameters():
            target = torch.float32 if parameter.requires_grad else frozen_dtype_on_cpu(parameter.dtype, has_bf16)
            parameter.data = parameter.data.to(target)
        return self

    # ------------------------------------------------------------ building and loading

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """Absolute path of a model type's YAML.

        Raises:
            ValueError: for an unknown type, naming the known ones.
        """
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            known = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise ValueError(f"model_type: expected one of {known}; got {model_type!r}")
        return str(resource(cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]))

    @classmethod
    def from_settings(cls, settings: Any, load: bool = True) -> "KVModBase":
        """The parts that the settings describe, put together; frozen towers with their weights if ``load``."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> "KVModBase":
        """Build from a ``model:`` section: frozen towers from their files, then the checkpoint it names.

        Raises:
            SettingsError: listing all faults of the section.
            MissingWeightsError: listing all weights that cannot be had, before any is loaded.
        """
        settings = cls.settings_class.from_config(cfg)
        finding.require(settings.weight_files())
        model = cls.from_settings(settings)
        loading.load_named_checkpoint(model, settings)
        model.open_feature_files()
        return model

    @classmethod
    def without_weights(cls, cfg: Mapping[str, Any]) -> "KVModBase":
        """The model of a ``model:`` section without memory for its weights: for counting, not for running.

        Raises:
            SettingsError: as `from_config`.
            MissingWeightsError: if the language model's size is not known.
        """
        with empty_weights():
            return cls.from_settings(cls.settings_class.from_config(cfg), load=False)

    def load_checkpoint(self, url_or_filename: str) -> LoadReport:
        """See `lavis_kvmod.models.loading.load_checkpoint`."""
        return loading.load_checkpoint(self, url_or_filename)

    load_from_pretrained = load_checkpoint

    def after_loading(self, report: LoadReport) -> None:
        """What a member does once a checkpoint was loaded."""

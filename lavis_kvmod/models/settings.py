"""Every key of the ``model:`` section: its default, its meaning, its check. Each default stands here and only here."""

from typing import Any, Dict, List, Literal, Mapping, Optional

from lavis_kvmod.models.language.opt import language_model_weights
from lavis_kvmod.models.language.text import check_prompt
from lavis_kvmod.models.vision.auxiliary import AUXILIARY_ENCODERS, auxiliary_weights
from lavis_kvmod.models.vision.encoders import VISION_ENCODERS, vision_weights
from lavis_kvmod.models.vision.feature_cache import DEFAULT_GIB
from lavis_kvmod.system.schema import Settings, SettingsError, key, not_known
from lavis_kvmod.weights.finding import WeightFile

PREFIX_GATES = ("none", "tanh")
ANSWER_LOSSES = ("sample", "all")

ARCH = "blip2_opt_kvmod"
Precision = Literal["fp16", "bf16", "fp32"]
_GEOMETRY = "a table of sizes"


class Blip2OPTSettings(Settings):
    """LAVIS's keys for ``blip2_opt``, with its meanings."""

    arch: str = key(ARCH, "the model; LAVIS reads it")
    model_type: Optional[str] = key(None, "the defaults to start from; `pretrain_opt2.7b` where there is none")

    load_finetuned: bool = key(True, "load `finetuned`, else `pretrained`")
    finetuned: Optional[str] = key(None, "this checkpoint (LAVIS's or ours; path or URL)")
    load_pretrained: bool = key(True, "`false`, with `load_finetuned: false`: load neither")
    pretrained: Optional[str] = key(None, "this one; `null` starts the Q-Former from random weights")

    vit_model: str = key("eva_clip_g", "the image encoder: `eva_clip_g`, `clip_L`, `demo`")
    image_size: int = key(224, "side of the input image in pixels", gt=0)
    vit_precision: Precision = key("fp16", "storage of the ViT's weights; always fp32 where the ViT is trained")
    freeze_vit: bool = key(True, "`false` also trains the ViT and `ln_vision`; LAVIS trains `ln_vision` in either case")
    drop_path_rate: float = key(0.0, "of the ViT", ge=0, lt=1)
    use_grad_checkpoint: bool = key(
        False, "compute the ViT's activations again in the backward pass (where it is trained)"
    )

    num_query_token: int = key(32, "query tokens, and so soft-prompt vectors", gt=0)

    opt_model: str = key("facebook/opt-2.7b", "Hugging Face name, or a local folder")
    prompt: str = key("", "in front of captions; with `{}`, the frame of a question")
    max_txt_len: int = key(32, "most tokens of a caption, or of a prompt with its question", gt=0)
    apply_lemmatizer: bool = key(False, "not supported: lemmatise the answers afterwards")


class ModelSettings(Blip2OPTSettings):
    """The ``model:`` section of a LAVIS YAML, for ``arch: blip2_opt_kvmod``: LAVIS's keys, and this package's."""

    kv_modulation: bool = key(True, "`false` builds stock BLIP-2 OPT")
    num_prefix_tokens: int = key(8, "Key/Value positions in front of the visual tokens", gt=0)
    prefix_gate: Literal["none", "tanh"] = key(
        "none",
        "`none`: one softmax over prefix and visual tokens; `tanh`: the prefix's own softmax, added behind tanh(g), "
        "with g per head and layer, 0 at the start",
    )
    prefix_sharing: Literal["shared", "per_layer"] = key(
        "shared", "`shared`: one prefix for all cross-attention layers; `per_layer`: one each"
    )
    aux_encoder: str = key(
        "efficientnet-b3", "`efficientnet-b0` … `b7`, `efficientnet-lite0`, `timm:NAME`: what the prefix is made from"
    )
    aux_checkpoint: Optional[str] = key(None, "path or URL of the encoder's weights; its ImageNet weights by default")
    aux_image_size: Optional[int] = key(None, "side in pixels it sees (bilinear); as given by default", gt=0)
    vit_checkpoint: Optional[str] = key(None, "path or URL of the ViT's weights; LAVIS's by default")
    opt_precision: Precision = key("fp16", "storage of OPT's weights")
    opt_grad_checkpoint: bool = key(
        False, "compute OPT's activations again in the backward pass: less memory, more time ([sizes.md](sizes.md))"
    )
    answer_loss: Literal["sample", "all"] = key(
        "sample",
        "`sample`: one answer a question, drawn by weight (in each epoch anew); `all`: all of them, weighted",
    )
    cache_frozen_features: bool = key(
        False, "remember the frozen encoders' output by `image_key` (small sets without augmentation)"
    )
    feature_cache_gib: float = key(
        DEFAULT_GIB,
        "how much of it each process keeps: 0.72 MB an image with EVA-CLIP-G in fp16, so 5,900 images; what comes when "
        "it is full is encoded each time",
        gt=0,
    )
    vit_geometry: Dict[str, Any] = key({}, "overrides of sizes, for small models", expected=_GEOMETRY)
    qformer_geometry: Dict[str, Any] = key({}, "overrides of sizes, for small models", expected=_GEOMETRY)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> "ModelSettings":
        """Translate a ``model:`` section (dict or OmegaConf).

        Raises:
            SettingsError: listing every unknown key and every bad value.
        """
        unknown = [not_known(str(name), cls.model_fields) for name in cfg if name not in cls.model_fields]
        settings, problems = cls.check(cfg)
        if unknown or problems:
            raise SettingsError([*unknown, *problems])
        return settings

    def conflicts(self) -> List[str]:
        """What is wrong beyond types and bounds, in the user's words; looks at no file."""
        found = []
        if self.vit_model not in VISION_ENCODERS:
            found.append(VISION_ENCODERS.unknown(self.vit_model))
        if self.aux_encoder not in AUXILIARY_ENCODERS:
            found.append(AUXILIARY_ENCODERS.unknown(self.aux_encoder))
        if self.load_finetuned and not self.finetuned:
            found.append("finetuned: load_finetuned is true, so a checkpoint is needed here; got none")
        if self.cache_frozen_features and not self.freeze_vit:
            found.append("cache_frozen_features: needs freeze_vit: true, a trained ViT's features change")
        if self.apply_lemmatizer:
            found.append("apply_lemmatizer: not supported; lemmatise the answers after predict_answers")
        return [*found, *check_prompt("prompt", self.prompt)]

    def checkpoint(self) -> Optional[WeightFile]:
        """The BLIP-2 (or our own) checkpoint to load, if one is asked for."""
        if not (self.load_finetuned or self.load_pretrained):
            return None
        name = "finetuned" if self.load_finetuned else "pretrained"
        source = getattr(self, name)
        return WeightFile(f"{name} checkpoint", source, f"model.{name}") if source else None

    def weight_files(self) -> List[WeightFile]:
        """All files the model is built from."""
        files = [
            vision_weights(self.vit_model, self.vit_checkpoint),
            language_model_weights(self.opt_model),
            auxiliary_weights(self.aux_encoder, self.aux_checkpoint) if self.kv_modulation else None,
            self.checkpoint(),
        ]
        return [file for file in files if file is not None]


__all__ = ["ANSWER_LOSSES", "ARCH", "PREFIX_GATES", "ModelSettings", "SettingsError"]

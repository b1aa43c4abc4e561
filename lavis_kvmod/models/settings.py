"""Every key of the ``model:`` section: its default, its meaning, its check. Each default stands here and only here."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional

from lavis_kvmod.models.language.opt import language_model_weights
from lavis_kvmod.models.language.text import check_prompt
from lavis_kvmod.models.vision import auxiliary
from lavis_kvmod.models.vision.encoders import VISION_ENCODERS, vision_weights
from lavis_kvmod.models.vision.feature_cache import DEFAULT_GIB
from lavis_kvmod.weights.finding import WeightFile

PREFIX_GATES = ("none", "tanh")
PREFIX_SHARING = ("shared", "per_layer")
ANSWER_LOSSES = ("sample", "all")
PRECISIONS = ("fp16", "bf16", "fp32")


class SettingsError(ValueError):
    """Faults in the ``model:`` section, all of them, one a line."""

    def __init__(self, problems: List[str]):
        self.problems = problems
        super().__init__("model:\n" + "\n".join(f"  - {problem}" for problem in problems))


@dataclass
class ModelSettings:
    """The ``model:`` section of a LAVIS YAML, for ``arch: blip2_opt_kvmod``.

    The first groups are LAVIS's keys for ``blip2_opt`` with its meanings; the last two are this package's.
    """

    # which model (LAVIS reads these two itself)
    arch: str = "blip2_opt_kvmod"
    model_type: Optional[str] = None

    # checkpoints: `finetuned` if load_finetuned, else `pretrained`; null trains the Q-Former from random weights
    load_finetuned: bool = True
    finetuned: Optional[str] = None
    load_pretrained: bool = True
    pretrained: Optional[str] = None

    # frozen image encoder
    vit_model: str = "eva_clip_g"
    vit_checkpoint: Optional[str] = None  # path or URL; null takes LAVIS's
    vit_geometry: Dict[str, Any] = field(default_factory=dict)  # overrides, for small models
    image_size: int = 224
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    vit_precision: str = "fp16"
    freeze_vit: bool = True

    # Q-Former
    num_query_token: int = 32
    qformer_geometry: Dict[str, Any] = field(default_factory=dict)  # overrides, for small models

    # frozen language model
    opt_model: str = "facebook/opt-2.7b"  # Hugging Face name or local folder
    opt_precision: str = "fp16"
    opt_grad_checkpoint: bool = False
    prompt: str = ""
    max_txt_len: int = 32
    apply_lemmatizer: bool = False

    # KV modulation
    kv_modulation: bool = True
    num_prefix_tokens: int = 8
    prefix_gate: str = "none"
    prefix_sharing: str = "shared"
    aux_encoder: str = "efficientnet-b3"
    aux_checkpoint: Optional[str] = None  # path or URL; null takes the encoder's ImageNet weights
    aux_image_size: Optional[int] = None

    # training
    answer_loss: str = "sample"
    cache_frozen_features: bool = False
    feature_cache_gib: float = DEFAULT_GIB  # in each process

    @classmethod
    def from_config(cls, cfg: Mapping) -> "ModelSettings":
        """Translate a ``model:`` section (dict or OmegaConf).

        Raises:
            SettingsError: listing every unknown key and every bad value.
        """
        given = _plain(cfg)
        known = {f.name for f in fields(cls)}
        problems = [_unknown_key(key, known) for key in given if key not in known]
        settings = cls(**{key: value for key, value in given.items() if key in known})
        problems += settings.problems()
        if problems:
            raise SettingsError(problems)
        return settings

    def problems(self) -> List[str]:
        """What is wrong with the values, in the user's words; looks at no file."""
        found = []
        choices = {
            "vit_model": tuple(VISION_ENCODERS),
            "prefix_gate": PREFIX_GATES,
            "prefix_sharing": PREFIX_SHARING,
            "answer_loss": ANSWER_LOSSES,
            "vit_precision": PRECISIONS,
            "opt_precision": PRECISIONS,
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                found.append(f"{key}: expected one of {', '.join(allowed)}; got {getattr(self, key)!r}")
        switches = ["freeze_vit", "kv_modulation", "load_finetuned", "cache_frozen_features"]
        switches += ["use_grad_checkpoint", "opt_grad_checkpoint"]
        for key in switches:
            if not isinstance(getattr(self, key), bool):
                found.append(f"{key}: expected true or false, got {getattr(self, key)!r}")
        counts = ["image_size", "num_query_token", "max_txt_len", "num_prefix_tokens"]
        if self.aux_image_size is not None:
            counts.append("aux_image_size")
        for key in counts:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                found.append(f"{key}: expected a whole number above 0, got {value!r}")
        limit = self.feature_cache_gib
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            found.append(f"feature_cache_gib: expected a number above 0, got {limit!r}")
        for key in ("vit_geometry", "qformer_geometry"):
            if not isinstance(getattr(self, key), dict):
                found.append(f"{key}: expected a table of sizes, got {getattr(self, key)!r}")
        if not auxiliary.is_known(self.aux_encoder):
            found.append(auxiliary.unknown_auxiliary_encoder(self.aux_encoder))
        if self.load_finetuned and not self.finetuned:
            found.append("finetuned: load_finetuned is true, so a checkpoint is needed here; got none")
        if self.cache_frozen_features and not self.freeze_vit:
            found.append("cache_frozen_features: needs freeze_vit: true, a trained ViT's features change")
        if self.apply_lemmatizer:
            found.append("apply_lemmatizer: not supported; lemmatise the answers after predict_answers")
        found += check_prompt("prompt", self.prompt)
        return found

    def checkpoint(self) -> Optional[WeightFile]:
        """The BLIP-2 (or our own) checkpoint to load, if one is asked for."""
        key = "finetuned" if self.load_finetuned else "pretrained"
        source = getattr(self, key)
        return WeightFile(f"{key} checkpoint", source, f"model.{key}") if source else None

    def weight_files(self) -> List[WeightFile]:
        """All files the model is built from."""
        files = [vision_weights(self.vit_model, self.vit_checkpoint)]
        files.append(language_model_weights(self.opt_model))
        if self.kv_modulation:
            files.append(auxiliary.auxiliary_weights(self.aux_encoder, self.aux_checkpoint))
        files.append(self.checkpoint())
        return [file for file in files if file is not None]


def _plain(cfg: Mapping) -> Dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)


def _unknown_key(key: str, known) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
    return f"{key}: unknown key{hint}"

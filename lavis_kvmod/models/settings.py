"""Every key of the ``model:`` section: its default, its meaning, its check. Each default stands here and only here."""

from typing import Any, ClassVar, Dict, List, Literal, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union, cast

from lavis_kvmod.models.connectors import CONNECTORS
from lavis_kvmod.models.connectors.aux_tokens import Place
from lavis_kvmod.models.connectors.registry import ConnectorKind
from lavis_kvmod.models.language.bert import BERT_POSITIONS, bert_files
from lavis_kvmod.models.language.opt import language_model_weights
from lavis_kvmod.models.language.text import check_prompt
from lavis_kvmod.models.vision.auxiliary import AUXILIARY_ENCODERS, auxiliary_weights, map_side
from lavis_kvmod.models.vision.encoders import VISION_ENCODERS, known_num_tokens, vision_weights
from lavis_kvmod.models.vision.feature_cache import DEFAULT_GIB
from lavis_kvmod.models.vision.token_merging import merged_number
from lavis_kvmod.models.vision.token_pooling import pooled_number
from lavis_kvmod.system.schema import Settings, SettingsError, key
from lavis_kvmod.system.tiles import TilesSettings
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import holds

PREFIX_GATES = ("none", "tanh")
ANSWER_LOSSES = ("sample", "all")

ARCH = "blip2_opt_kvmod"
Precision = Literal["fp16", "bf16", "fp32"]
_GEOMETRY = "a table of sizes"

SettingsType = TypeVar("SettingsType", bound="ImageSideSettings")


class Blip2Settings(Settings):
    """The keys that LAVIS's BLIP-2 models share, with its meanings."""

    arch: str = key(ARCH, "the model; LAVIS reads it")
    model_type: Optional[str] = key(None, "the defaults to start from: by default the pre-trained model's")

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

    num_query_token: int = key(
        32, "query tokens, and so soft-prompt vectors; `linear` and `mlp` give one a visual token instead", gt=0
    )


class Blip2OPTSettings(Settings):
    """What ``blip2_opt`` reads beside them."""

    opt_model: str = key(
        "facebook/opt-2.7b",
        "Hugging Face name, or a local folder; `demo`, `demo-pages`, `demo-easy`: built on this machine",
    )
    prompt: str = key("", "in front of captions; with `{}`, the frame of a question")
    max_txt_len: int = key(32, "most tokens of a caption, or of a prompt with its question", gt=0)
    apply_lemmatizer: bool = key(False, "not supported: lemmatise the answers afterwards")


class ImageSideSettings(Blip2Settings):
    """What this package's models share: the prefix, and the way of an image to the Q-Former's output."""

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
    aux_encoder: Union[str, List[str]] = key(
        "efficientnet-b3",
        "`efficientnet-b0` … `b7`, `efficientnet-lite0`, `timm:NAME`: what the prefix is made from; of a list of "
        "them each writes its own, in this order",
    )
    aux_checkpoint: Union[None, str, List[Optional[str]]] = key(
        None, "path or URL of the encoder's weights, or a list of them; its ImageNet weights by default"
    )
    aux_image_size: Optional[int] = key(None, "side in pixels it sees (bilinear); as given by default", gt=0)
    prefix_source: Literal["pooled", "grid"] = key(
        "pooled",
        "what the prefix is made from: `pooled`, one vector an image; `grid`, the encoder's last map, a prefix token a "
        "cell with a position embedding",
    )
    prefix_grid: Optional[int] = key(
        None, "with `grid`, pool the map to so many rows and columns; as it is by default", gt=0
    )
    prefix_control: Literal["none", "constant", "shuffled", "untrained", "vit"] = key(
        "none",
        "for experiments, what the prefix is made from instead: `constant` (a learned constant prefix), `shuffled` "
        "(another image's features), `untrained` (an encoder with random weights), `vit` (the ViT's own mean token)",
    )
    vit_checkpoint: Optional[str] = key(None, "path or URL of the ViT's weights; LAVIS's by default")
    cache_frozen_features: bool = key(
        False, "remember the frozen encoders' output by `image_key` (small sets without augmentation)"
    )
    feature_cache_gib: float = key(
        DEFAULT_GIB,
        "how much of it each process keeps: 0.72 MB an image with EVA-CLIP-G in fp16, so 5,900 images; what comes when "
        "it is full is encoded each time",
        gt=0,
    )
    feature_cache_dir: Optional[str] = key(
        None, "read it from the files that `lavis-kvmod cache-features` wrote here ([performance.md](performance.md))"
    )
    vit_geometry: Dict[str, Any] = key({}, "overrides of sizes, for small models", expected=_GEOMETRY)
    qformer_geometry: Dict[str, Any] = key({}, "overrides of sizes, for small models", expected=_GEOMETRY)

    @classmethod
    def from_config(cls: Type[SettingsType], cfg: Mapping[str, Any]) -> SettingsType:
        """Translate a ``model:`` section (dict or OmegaConf).

        Raises:
            SettingsError: listing every unknown key and every bad value.
        """
        settings, problems = cls.check_all(cfg)
        if problems:
            raise SettingsError(problems)
        return settings

    def conflicts(self) -> List[str]:
        """What is wrong beyond types and bounds, in the user's words; looks at no file."""
        found = super().conflicts()
        if self.vit_model not in VISION_ENCODERS:
            found.append(VISION_ENCODERS.unknown(self.vit_model))
        found += self._auxiliary_conflicts()
        if self.load_finetuned and not self.finetuned:
            found.append("finetuned: load_finetuned is true, so a checkpoint is needed here; got none")
        if self.prefix_control != "none" and not self.kv_modulation:
            found.append(f"prefix_control: {self.prefix_control} needs kv_modulation: true, there is no prefix")
        if self.cache_frozen_features and not self.freeze_vit:
            found.append("cache_frozen_features: needs freeze_vit: true, a trained ViT's features change")
        if self.feature_cache_dir and not self.freeze_vit:
            found.append("feature_cache_dir: needs freeze_vit: true, a trained ViT's features change")
        return found

    def _auxiliary_conflicts(self) -> List[str]:
        names, files = self._aux_names, self.aux_checkpoint
        unknown = [AUXILIARY_ENCODERS.unknown(name) for name in names if name not in AUXILIARY_ENCODERS]
        if not names or unknown:
            return unknown or ["aux_encoder: expected a name, or a list of names, got an empty list"]
        if files is not None and len(names) != len([files] if isinstance(files, str) else files):
            return [
                f"aux_checkpoint: expected a list of {len(names)}, one for each aux_encoder, with null for published "
                f"weights; got {files!r}"
            ]
        if self.prefix_source == "pooled":
            return self._of_no_use(("prefix_grid",), "read with prefix_source: grid alone")
        found = self._of_no_use(("num_prefix_tokens",), "of prefix_source: pooled; a grid has a prefix token a cell")
        size = self.aux_image_size or self.image_size
        for name, side in ((name, map_side(name, size)) for name in names):
            if side is None:
                found.append(f"prefix_source: {name} has no last map to make a grid of; set pooled")
            elif (self.prefix_grid or 0) > side:
                found.append(
                    f"prefix_grid: expected at most {side}, the rows of {name}'s last map at {size} px, got "
                    f"{self.prefix_grid}; a larger aux_image_size gives a larger map"
                )
        return found

    def _of_no_use(self, names: Sequence[str], why: str) -> List[str]:
        """Keys that say something, and are not read."""
        return [
            f"{name}: {why}; expected {self.default_of(name)}, the default, got {getattr(self, name)}"
            for name in names
            if getattr(self, name) != self.default_of(name)
        ]

    @property
    def _aux_names(self) -> List[str]:
        return [self.aux_encoder] if isinstance(self.aux_encoder, str) else self.aux_encoder

    @property
    def aux_encoders(self) -> List[Tuple[str, Optional[str]]]:
        """The auxiliary encoders in their order, each with its ``aux_checkpoint``."""
        names, files = self._aux_names, self.aux_checkpoint
        return list(zip(names, files if isinstance(files, list) else [files] * len(names)))

    def grid_side(self) -> Optional[int]:
        """Rows and columns of the grid that the prefix is made from; None where the features are pooled.

        Raises:
            ImportError: if an encoder's package is missing.
        """
        if self.prefix_grid is not None or self.prefix_source == "pooled":
            return self.prefix_grid
        size = self.aux_image_size or self.image_size
        return min(map_side(name, size) or 1 for name in self._aux_names)

    def checkpoint(self) -> Optional[WeightFile]:
        """The BLIP-2 (or our own) checkpoint to load, if one is asked for."""
        if not (self.load_finetuned or self.load_pretrained):
            return None
        name = "finetuned" if self.load_finetuned else "pretrained"
        source = getattr(self, name)
        return WeightFile(f"{name} checkpoint", source, f"model.{name}") if source else None

    def below_finetuned(self) -> Optional[WeightFile]:
        """``pretrained`` where the model takes its ``ln_vision`` from there: what is on this machine of the finetuned
        checkpoint and of the ViT's file has none (ours hold what was trained)."""
        if not (self.load_finetuned and self.finetuned and self.pretrained):
            return None
        for file in (self.checkpoint(), vision_weights(self.vit_model, self.vit_checkpoint)):
            if file is None or file.build is not None:
                return None
            path = None if file.absence() else file.local_path()
            if path is None or holds(path, "ln_vision.") is not False:
                return None
        return WeightFile("pretrained checkpoint", self.pretrained, "model.pretrained")

    def weight_files(self) -> List[WeightFile]:
        """All files the model is built from."""
        files = [
            vision_weights(self.vit_model, self.vit_checkpoint),
            self.language_files(),
            *(auxiliary_weights(*each) for each in self.aux_encoders if self.reads_aux_weights),
            self.checkpoint(),
            self.below_finetuned(),
        ]
        return [file for file in files if file is not None]

    @property
    def reads_aux_weights(self) -> bool:
        """Whether the auxiliary encoder is there, with the weights it was trained to."""
        return self.kv_modulation and self.prefix_control != "untrained"

    def language_files(self) -> WeightFile:
        """What stands behind the Q-Former, or reads its texts."""
        raise NotImplementedError


class ModelSettings(ImageSideSettings, Blip2OPTSettings):
    """The ``model:`` section of a LAVIS YAML, for ``arch: blip2_opt_kvmod``."""

    connector: str = key(
        "qformer",
        "from visual tokens to the soft prompt: `qformer`, `linear`, `mlp`, `perceiver`, `c_abstractor`, "
        "`visual_abstractor` ([connectors.md](connectors.md))",
    )
    connector_geometry: Dict[str, Any] = key({}, "sizes of a connector that is not the Q-Former", expected=_GEOMETRY)
    aux_fusion: Optional[Literal["prefix", "tokens", "visual_tokens", "queries"]] = key(
        None,
        "how the second encoder comes in: `prefix`, in all cross-attention to the image (the connector's, the gated "
        "layers'), the default where there is any; `tokens`, in front of the soft prompt, else; to compare with: "
        "`visual_tokens`, in front of those, and `queries`, added to the query tokens",
    )
    fusion: Literal["soft_prompt", "gated_cross_attention"] = key(
        "soft_prompt",
        "how the language model sees the image: `soft_prompt`, as vectors before the text; `gated_cross_attention`, by "
        "Flamingo's layers between its own",
    )
    gated_every: int = key(
        4, "with `gated_cross_attention`, in front of every how many of OPT's layers one stands", gt=0
    )
    qformer_text_input: bool = key(
        False,
        "hand the question to the Q-Former, too, beside its queries (BLIP-2's own VQA finetuning, InstructBLIP); needs "
        "a checkpoint with a text side, such as stage 1's",
    )
    bert_model: str = key(
        "bert-base-uncased", "with `qformer_text_input`: Hugging Face name, or a local folder, of the tokenizer"
    )
    prefix_dropout: float = key(
        0.0, "the share of samples that are trained without their prefix, drawn anew in each batch", ge=0, lt=1
    )
    max_images: int = key(
        1, "most images of a sample: several pictures, the frames of a video ([inputs.md](inputs.md))", gt=0
    )
    tiles: Optional[Dict[str, Any]] = key(
        None,
        "a large image as a whole and in tiles: `{grids, max_tiles}`; `{}` takes the defaults ([inputs.md](inputs.md))",
        expected="a table",
    )
    pool_visual_tokens: int = key(
        1, "so many times so many neighbouring visual tokens become their mean: 2 leaves a quarter", gt=0
    )
    merge_visual_tokens: Optional[int] = key(
        None, "visual tokens that are alike become their mean, until so many are left (ToMe); all by default", gt=0
    )
    num_aux_tokens: int = key(
        1,
        "with `aux_fusion` other than `prefix`, how many; of `queries` 1, the same for all, or `num_query_token`",
        gt=0,
    )
    opt_precision: Precision = key("fp16", "storage of OPT's weights")
    opt_grad_checkpoint: bool = key(
        False, "compute OPT's activations again in the backward pass: less memory, more time ([sizes.md](sizes.md))"
    )
    answer_loss: Literal["sample", "all"] = key(
        "sample",
        "`sample`: one answer a question, drawn by weight (in each epoch anew); `all`: all of them, weighted",
    )
    split_texts: bool = key(
        False,
        "in training, cut each caption at a random token: what is before it is given, what is behind it is learnt "
        "(BLIP-2's prefix language modelling)",
    )

    tables: ClassVar[Dict[str, Type[Settings]]] = {"tiles": TilesSettings}

    def conflicts(self) -> List[str]:
        """As for all models, and what is wrong with the connector and the prompt."""
        found = [*super().conflicts(), *self._connector_conflicts(), *self._image_conflicts()]
        found += self._merging_conflicts()
        if self.apply_lemmatizer:
            found.append("apply_lemmatizer: not supported; lemmatise the answers after predict_answers")
        return [*found, *check_prompt("prompt", self.prompt)]

    @property
    def num_places(self) -> int:
        """How many places an image can have in its sample; 1 where each is alone in it."""
        return self.max_images if self.tiles is None else TilesSettings.of(self.tiles).num_places

    @property
    def images_a_sample(self) -> int:
        """The most images that go through the encoders for a sample."""
        return self.max_images if self.tiles is None else TilesSettings.of(self.tiles).most_images

    @property
    def connector_kind(self) -> ConnectorKind:
        """What is known of the connector before it is built."""
        return CONNECTORS[self.connector]

    @property
    def aux_tokens(self) -> int:
        """How many tokens the second encoder gives; 0 where it gives a prefix."""
        return self.num_aux_tokens * (self._fusion != "prefix" and self.kv_modulation)

    @property
    def aux_place(self) -> Place:
        """What those tokens join."""
        return "tokens" if self._fusion == "prefix" else cast(Place, self._fusion)

    @property
    def _fusion(self) -> str:
        return self.aux_fusion or ("prefix" if self._takes_prefix else "tokens")

    @property
    def _takes_prefix(self) -> bool:
        """Whether anything attends to the image, so that a prefix can stand in front of it."""
        return self.connector_kind.attends or self.fusion == "gated_cross_attention"

    def visual_tokens(self) -> Optional[int]:
        """How many visual tokens an image has in front of the connector; None where the image encoder does not say."""
        known = known_num_tokens(self.vit_model, self.image_size, self.vit_geometry)
        if known is None or self.merge_visual_tokens is None:
            return self.merge_visual_tokens if known is None else pooled_number(known, self.pool_visual_tokens)
        return merged_number(known, self.merge_visual_tokens)

    def num_soft_prompt(self) -> Optional[int]:
        """How many vectors stand before the text; None where the image encoder does not say."""
        if self.fusion != "soft_prompt":
            return 0
        of_image: Optional[int] = self.num_query_token
        if self.connector_kind.one_a_token:
            of_image = self.visual_tokens()
        of_aux = self.aux_tokens if self.aux_place == "tokens" else 0
        return None if of_image is None else of_image + of_aux

    def _image_conflicts(self) -> List[str]:
        """What takes one image a sample, and each of its visual tokens."""
        if self.connector not in CONNECTORS:
            return []
        found = []
        if self.tiles is not None and self.max_images > 1:
            found.append(f"tiles: expected max_images: 1, the images that are cut into tiles, got {self.max_images}")
        if not self.connector_kind.attends:
            attend = ", ".join(name for name in CONNECTORS if CONNECTORS[name].attends)
            why = f"connector {self.connector} has no attention to any number of visual tokens; take one of {attend}"
            found += self._of_no_use(("max_images", "tiles", "pool_visual_tokens"), why)
            if not self.connector_kind.one_a_token:
                grid = f"connector {self.connector} takes the visual tokens as a grid, which merged ones are not"
                found += self._of_no_use(("merge_visual_tokens",), grid)
        elif self.fusion != "soft_prompt":
            found += self._of_no_use(("max_images", "tiles"), f"fusion: {self.fusion} takes one image a sample")
        if self.qformer_text_input:
            found += self._of_no_use(("max_images", "tiles"), "qformer_text_input takes one image a sample")
        if self.aux_tokens:
            found += self._of_no_use(
                ("max_images", "tiles"), f"aux_fusion: {self._fusion} takes one image a sample; set prefix"
            )
        return found

    def _merging_conflicts(self) -> List[str]:
        if self.merge_visual_tokens is None or self.vit_model not in VISION_ENCODERS:
            return []
        if self.pool_visual_tokens > 1:
            return self._of_no_use(("pool_visual_tokens",), "merge_visual_tokens leaves fewer tokens, too; take one")
        try:
            self.visual_tokens()
        except ValueError as error:
            return [str(error)]
        except TypeError:  # a vit_geometry that is none; told when the encoder is built
            pass
        return []

    def _connector_conflicts(self) -> List[str]:
        if self.connector not in CONNECTORS:
            return [CONNECTORS.unknown(self.connector)]
        found = self.connector_kind.geometry_problems(self.connector, self.connector_geometry)
        if self.qformer_text_input and self.connector != "qformer":
            found.append(f"qformer_text_input: connector {self.connector} reads no text; expected connector: qformer")
        positions = self.qformer_geometry.get("max_position_embeddings", BERT_POSITIONS)
        if self.qformer_text_input and isinstance(positions, int) and self.max_txt_len > positions:
            found.append(f"max_txt_len: expected at most BERT's {positions} positions, got {self.max_txt_len}")
        if self.fusion == "soft_prompt":
            found += self._of_no_use(("gated_every",), "read with fusion: gated_cross_attention alone")
        takes = {"tokens": True, "prefix": self._takes_prefix}.get(self._fusion, self.connector_kind.attends)
        if not takes:
            return [
                *found,
                f"aux_fusion: connector {self.connector} has no cross-attention that {self._fusion} could enter; "
                "set tokens",
            ]
        if self._fusion == "queries" and self.num_aux_tokens not in (1, self.num_query_token):
            found.append(
                f"num_aux_tokens: expected 1 or {self.num_query_token}, num_query_token, with aux_fusion: queries; "
                f"got {self.num_aux_tokens}"
            )
        if self.aux_tokens:
            found += self._of_no_use(
                ("num_prefix_tokens", "prefix_gate", "prefix_sharing", "prefix_dropout", "prefix_source"),
                f"of a prefix, and connector {self.connector} takes the second encoder's features as tokens",
            )
        else:
            found += self._of_no_use(("num_aux_tokens",), "of tokens, and the features come as a prefix")
        return found

    def weight_files(self) -> List[WeightFile]:
        """As for all models, and the tokenizer of a Q-Former that reads questions."""
        return [*super().weight_files(), *([bert_files(self.bert_model)] if self.qformer_text_input else [])]

    def language_files(self) -> WeightFile:
        """The frozen language model's folder."""
        return language_model_weights(self.opt_model)


class ObjectiveSettings(Settings):
    """Stage 1's objectives, each with its weight in the loss; 0 turns one off."""

    itc: float = key(1.0, "image and text of a pair are alike, others are not (contrastive)", ge=0)
    itm: float = key(1.0, "pair or no pair, asked of hard negatives (matching); needs `itc` for its negatives", ge=0)
    itg: float = key(1.0, "the text, word by word, from the image (captioning)", ge=0)
    mlm: float = key(0.0, "masked words from the others and the image (ALBEF)", ge=0)

    def conflicts(self) -> List[str]:
        """All off, or matching without what chooses its negatives."""
        if not any((self.itc, self.itm, self.itg, self.mlm)):
            return ["itc: expected one of itc, itm, itg, mlm above 0, got none: nothing would be trained"]
        if self.itm and not self.itc:
            return [
                "itm: its negatives are chosen by the contrastive features, which itc: 0 does not train; set itc too"
            ]
        return []


class MomentumSettings(Settings):
    """ALBEF's momentum model, for the contrastive loss and the masked words."""

    queue: int = key(65536, "samples of the last batches kept as negatives, in all; any number", gt=0)
    rate: float = key(0.995, "how much of itself the momentum model keeps at each batch", ge=0, lt=1)
    alpha: float = key(0.4, "its share of the targets, reached over the first epoch", ge=0, le=1)


class Stage1Settings(ImageSideSettings):
    """The ``model:`` section for ``arch: blip2_kvmod``, and for the two that only score."""

    arch: str = key("blip2_kvmod", "the model; LAVIS reads it")
    max_txt_len: int = key(32, "most tokens of a text; what is longer is cut", gt=2)
    embed_dim: int = key(256, "width of the space in which images and texts are compared", gt=0)
    bert_model: str = key(
        "bert-base-uncased", "Hugging Face name, or a local folder: the tokenizer, and the weights for `from_bert`"
    )
    from_bert: bool = key(
        True,
        "where no checkpoint is named, start the Q-Former from BERT's weights, as BLIP-2 did; else from random ones",
    )
    objectives: Dict[str, Any] = key({}, "weights of `itc`, `itm`, `itg` (1 each) and `mlm` (0)", expected="a table")
    momentum: Optional[Dict[str, Any]] = key(
        None, "`{queue, rate, alpha}`: ALBEF's momentum model; `{}` takes 65536, 0.995, 0.4", expected="a table"
    )
    own_pairs_only: bool = key(
        False, "as LAVIS: equal texts, and other captions of the same image, count as negatives of each other"
    )

    tables: ClassVar[Dict[str, Type[Settings]]] = {"objectives": ObjectiveSettings, "momentum": MomentumSettings}

    def conflicts(self) -> List[str]:
        """As for all models, and what is wrong inside the tables."""
        found = super().conflicts()
        positions = self.qformer_geometry.get("max_position_embeddings", BERT_POSITIONS)
        if isinstance(positions, int) and self.max_txt_len > positions:
            found.append(f"max_txt_len: expected at most BERT's {positions} positions, got {self.max_txt_len}")
        weights = {"itc": 1, "mlm": 0, **(self.objectives or {})}
        if self.momentum is not None and not (weights["itc"] or weights["mlm"]):
            found.append("momentum: it softens the targets of itc and mlm, and both are 0; leave it out, or set one")
        return found

    def language_files(self) -> WeightFile:
        """BERT's folder, of which the tokenizer is needed always."""
        return bert_files(self.bert_model)


# Stage 1, and what stands for LAVIS's `blip2_feature_extractor` and `blip2_image_text_matching`, by two names each.
STAGE_1_ARCHS = (
    "blip2_kvmod",
    *("blip2_kvmod_feature_extractor", "blip2_feature_extractor_kvmod"),
    *("blip2_kvmod_image_text_matching", "blip2_image_text_matching_kvmod"),
)

# The archs of this package, and the keys of their model section.
SETTINGS: Dict[str, Type[ImageSideSettings]] = {ARCH: ModelSettings, **dict.fromkeys(STAGE_1_ARCHS, Stage1Settings)}


def settings_of(model: Mapping[str, Any]) -> Optional[Type[ImageSideSettings]]:
    """The keys of a model section by its ``arch``; None for a model of LAVIS's own."""
    return SETTINGS.get(str(model.get("arch")))


__all__ = [
    "ANSWER_LOSSES",
    "ARCH",
    "PREFIX_GATES",
    "SETTINGS",
    "STAGE_1_ARCHS",
    "ImageSideSettings",
    "ModelSettings",
    "MomentumSettings",
    "ObjectiveSettings",
    "SettingsError",
    "Stage1Settings",
    "settings_of",
]

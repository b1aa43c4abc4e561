"""Weights into a built model: a checkpoint of LAVIS's, Hugging Face's or our own, with every key accounted for."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

from lavis_kvmod.models.settings import ImageSideSettings
from lavis_kvmod.models.vision.encoders import interpolate_positions
from lavis_kvmod.weights import files, reading
from lavis_kvmod.weights.files import StateDict
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.reading import LoadReport

if TYPE_CHECKING:
    from lavis_kvmod.models.base import KVModBase

# What remembered features hang on.
_TOWERS = ("visual_encoder.", "ln_vision.", "aux_encoder.")

_NO_LN_VISION = (
    "What a run saves is what it has trained, and ln_vision is frozen: name this checkpoint as model.finetuned (with "
    "load_finetuned: true), and as model.pretrained the one that the run started from"
)

# What stage 1 of BLIP-2 trains beside the Q-Former's query side (lavis/models/blip2_models/blip2_qformer.py).
_STAGE_1_ONLY = re.compile(
    r"Qformer\.(cls|bert\.embeddings\.(word|position)_embeddings|bert\.encoder\.layer\.\d+\.(intermediate|output))\."
    r"|(vision_proj|text_proj|itm_head)\.|temp$"
)

# A connector, and what fits one alone.
_CONNECTOR = ("Qformer.", "query_tokens", "opt_proj.")


def load_checkpoint(model: "KVModBase", url_or_filename: str) -> LoadReport:
    """Load a BLIP-2 checkpoint: LAVIS's or ours (``.pth``, ``.safetensors``), or a Hugging Face folder.

    It must hold all that is trained here. What may be missing, each as a whole: a frozen tower (it comes from a file
    of its own), ``ln_vision`` once it was loaded, and the prefix (a stock BLIP-2 checkpoint has none). From a stage-1
    checkpoint (LAVIS's ``blip2_pretrained.pth``) the text side is left out and ``opt_proj`` stays new. A tower that
    it does hold, as a Hugging Face folder does, takes the place of the one from its own file. For another connector a
    Q-Former's checkpoint has ``ln_vision``, and nothing else.

    Raises:
        FileNotFoundError, CheckpointError: if it cannot be read, or listing the keys that do not fit.
    """
    file = WeightFile("checkpoint", str(url_or_filename), "the checkpoint argument").fetch()
    return load_state(model, reading.read_weights(file), file)


def load_named_checkpoint(model: "KVModBase", settings: ImageSideSettings) -> None:
    """Load ``finetuned`` or ``pretrained``; ours holds no ``ln_vision``, which then comes from ``pretrained``.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    checkpoint = settings.checkpoint()
    if checkpoint is None:
        logging.info("no checkpoint named: the Q-Former starts from random weights")
        return
    file = checkpoint.fetch()
    state = reading.read_weights(file)
    has_ln_vision = model.ln_vision_loaded or any(key.startswith("ln_vision.") for key in state)
    if settings.load_finetuned and settings.pretrained and not has_ln_vision:
        load_checkpoint(model, settings.pretrained)
    load_state(model, state, file)


def load_state(model: "KVModBase", state: StateDict, source: Union[str, Path]) -> LoadReport:
    """`load_checkpoint`, of what was read from ``source``."""
    state = _at_image_size(model, _within_vocabulary(model, state))
    groups = ["visual_encoder.", "aux_encoder.", "kv_", "aux_tokens.", "gated_layers.", "image_places."]
    groups += model.of_this_training
    groups += [f"{part}." for part, is_trained in model.behind_qformer.items() if not is_trained]
    if model.ln_vision_loaded:
        groups.append("ln_vision.")
    stage_2 = not hasattr(model, "itm_head")
    if stage_2 and "itm_head.weight" in state:  # stage 1's
        groups.append("opt_proj.")
        own = model.state_dict()  # with a text side, where its Q-Former reads questions
        state = {key: value for key, value in state.items() if key in own or not _STAGE_1_ONLY.match(key)}
    if _has_qformer(state) and not _has_qformer(model.state_dict()):
        logging.warning(
            "%s has a Q-Former, which this model's connector is not: its image encoder and norm are taken from there "
            "at most, and what is trained starts from random weights",
            source,
        )
        groups += _CONNECTOR
        state = {key: value for key, value in state.items() if not key.startswith((*_CONNECTOR, "kv_"))}
    _require_same_prefix(state, model.state_dict(), source)
    if getattr(model, "gated_layers", None) is not None:  # a soft prompt's projection has no place
        state = {key: value for key, value in state.items() if not key.startswith("opt_proj.")}
    absent = tuple(g for g in groups if not any(key.startswith(g) for key in state))
    may_lack = {key for key in model.state_dict() if key.startswith(absent)}
    may_lack |= {name for name, _ in model.named_buffers()}
    try:
        report = reading.load_weights(model, state, source=source, may_lack=may_lack)
    except files.CheckpointError as error:
        if model.ln_vision_loaded or any(key.startswith("ln_vision.") for key in state):
            raise
        raise files.CheckpointError(f"{error}\n{_NO_LN_VISION}") from error
    model.ln_vision_loaded = True
    if model.feature_cache is not None and any(key.startswith(_TOWERS) for key in state):  # not in what we save
        model.feature_cache.clear()
        if model.feature_cache.files is not None and not {"visual_encoder.", "ln_vision.", "aux_encoder."} <= set(
            absent
        ):
            model.open_feature_files()  # are they still these encoders'?
    model.after_loading(report)
    of = (
        ("of stage 2, with its opt_proj" if "opt_proj.weight" in state else "of stage 1; opt_proj is new")
        if stage_2
        else ""
    )
    logging.info("loaded checkpoint %s%s", source, f" ({of})" if of else "")
    return report


def text_side_problem(path: Path) -> Optional[str]:
    """What keeps a Q-Former that reads questions from starting from a file: that it has no text side. As
    `stage_problem` it leaves alone what cannot be looked into at once."""
    if path.is_dir() or not files.can_be_mapped(path):
        return None
    try:
        state = files.model_tensors(files.read(path, mmap=True), path)
    except files.CheckpointError:
        return None
    if not _has_qformer(state) or "Qformer.bert.embeddings.word_embeddings.weight" in state:
        return None
    return (
        f"{path} has a Q-Former without a text side, and qformer_text_input hands it questions; name a stage-1 "
        "checkpoint (blip2_pretrained.pth), or one that was trained with qformer_text_input"
    )


def _require_same_prefix(given: StateDict, own: StateDict, source: Union[str, Path]) -> None:
    """Told by its name, since the keys alone do not say what to change."""
    of_file, of_model = _kind_of_prefix(given), _kind_of_prefix(own)
    if of_file and of_model and of_file != of_model:
        raise files.CheckpointError(
            f"{source}: its prefix is of {of_file}, the model's of {of_model}; set model.prefix_source and "
            "model.aux_encoder to what they were in its training"
        )


def _kind_of_prefix(state: StateDict) -> str:
    """``prefix_source: grid, 2 auxiliary encoders``; empty without a prefix."""
    learned = [key for key in state if re.search(r"(^|\.)kv_prefix\..*(prefix_tokens|position_embeddings)$", key)]
    if not learned:
        return ""
    count = len([key for key in learned if key.partition("kv_prefix")[0] == learned[0].partition("kv_prefix")[0]])
    source = "pooled" if learned[0].endswith("prefix_tokens") else "grid"
    return f"prefix_source: {source}, {count} auxiliary encoder" + ("s" if count > 1 else "")


def stage_problem(path: Path) -> Optional[str]:
    """What keeps a stage-1 model from starting from a file, if it is of stage 2: that has no text side.

    Files that have to be read as a whole to be looked into, and folders, are left to the loading.
    """
    if path.is_dir() or not files.can_be_mapped(path):
        return None
    try:
        state = files.model_tensors(files.read(path, mmap=True), path)
    except files.CheckpointError:  # told when it is loaded
        return None
    if "itm_head.weight" in state or "opt_proj.weight" not in state:
        return None
    return (
        f"{path} is of stage 2 (it has opt_proj, and no itm_head or text side), and stage 1 cannot start from it; name "
        "a stage-1 checkpoint, or null to start from BERT"
    )


def _has_qformer(state: StateDict) -> bool:
    return any(key.startswith("Qformer.bert.") for key in state)


def _within_vocabulary(model: "KVModBase", state: StateDict) -> StateDict:
    """``state`` with OPT's embeddings cut to this model's rows: Hugging Face adds some, for an image token."""
    of_opt = ("opt_model.model.decoder.embed_tokens.weight", "opt_model.lm_head.weight")
    if not any(key in state for key in of_opt):
        return state
    rows = model.opt_model.get_input_embeddings().num_embeddings
    return {key: value[:rows] if key in of_opt else value for key, value in state.items()}


def _at_image_size(model: "KVModBase", state: StateDict) -> StateDict:
    """``state`` with the ViT's position embedding, if it holds one, brought to this model's image size."""
    prefix = "visual_encoder."
    vit = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    interpolate_positions(model.visual_encoder, vit)
    return {**state, **{f"{prefix}{key}": value for key, value in vit.items()}}

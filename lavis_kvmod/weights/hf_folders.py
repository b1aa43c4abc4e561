"""Hugging Face folders of BLIP-2 OPT: their weights, and the config that LAVIS's files do not have."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple, Union

import torch

from lavis_kvmod.weights import hf_names
from lavis_kvmod.weights.files import CheckpointError, quick_problem, weight_files
from lavis_kvmod.weights.tensors import LazyTensor, TensorFiles, Written, write_shards

Config = Dict[str, Any]

# What LAVIS's code has fixed. Its ln_vision computes with 1e-5, but Hugging Face has one epsilon for it and the blocks.
VISION_EPS, QFORMER_EPS = 1e-6, 1e-12
# Attention heads leave no trace in the weights. These are the published models': 1408 / 16, 768 / 12.
VIT_HEAD_WIDTH, QFORMER_HEAD_WIDTH = 88, 64
# Tokens of OPT's tokenizer; its embeddings have some rows more, of which Hugging Face gives the first to the image.
OPT_TOKENS = 50265

# What OPT's tokenizer is made of.
TOKENIZER_FILES = ("vocab.json", "merges.txt")

# Copied along where they are: what a folder has beside weights and config.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def read_config(folder: Path) -> Config:
    """The config of a BLIP-2 OPT folder.

    Raises:
        CheckpointError: if there is none, or it describes what LAVIS's BLIP-2 OPT is not.
    """
    config = _read_json(folder / "config.json")
    check_config(config, folder)
    return config


def check_config(config: Config, source: Union[str, Path]) -> None:
    """Raise `CheckpointError` if this is no BLIP-2 OPT; warn where LAVIS computes a little differently."""
    vision, qformer, text = (config.get(f"{part}_config") or {} for part in ("vision", "qformer", "text"))
    kinds = (config.get("model_type"), text.get("model_type", "opt"))
    if kinds != ("blip-2", "opt"):
        raise CheckpointError(f"{source}: expected a blip-2 config with an opt text_config, got {kinds[0]}, {kinds[1]}")
    for part, section in (("vision", vision), ("qformer", qformer)):
        if section.get("hidden_act", "gelu") != "gelu":
            raise CheckpointError(
                f"{source}: expected {part}_config.hidden_act gelu, as LAVIS has it, got {section['hidden_act']}"
            )
    for part, section, ours in (("vision", vision, VISION_EPS), ("qformer", qformer, QFORMER_EPS)):
        theirs = section.get("layer_norm_eps", ours)
        if theirs != ours:
            logging.warning(
                "%s: %s_config.layer_norm_eps is %g, but LAVIS computes with %g: results will differ a little",
                *(source, part, theirs, ours),
            )


def read_opt_config(folder: Path) -> Config:
    """The config of an OPT folder; raises `CheckpointError` if it is none."""
    config = _read_json(folder / "config.json")
    if config.get("model_type") != "opt":
        raise CheckpointError(f"{folder}: expected the folder of an OPT model, got {config.get('model_type')}")
    return config


def _read_json(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a Hugging Face folder: it has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a table, got {type(config).__name__}")
    return config


def positions(config: Config) -> int:
    """The text positions of the Q-Former."""
    return (config.get("qformer_config") or {}).get("max_position_embeddings", 512)


def open_lavis(files: TensorFiles, path: Path) -> Tuple[Dict[str, LazyTensor], Optional[Config]]:
    """The tensors of a file, or of a BLIP-2 OPT folder, under LAVIS's names, and Hugging Face's config if it has one.

    Raises:
        FileNotFoundError, CheckpointError: see `TensorFiles.add`, `TensorFiles.add_folder` and `check_config`; also for
            tensors that LAVIS's BLIP-2 OPT does not have under Hugging Face's names.
    """
    if path.is_dir():
        config = read_config(path)
        return hf_names.to_lavis(files.add_folder(path), path, positions(config)), config
    tensors = files.add(path)
    if hf_names.are_hf(tensors):
        tensors = hf_names.to_lavis(tensors, path)
    text = files.metadata[path].get("hf_config")
    if text is None:
        return tensors, None
    config = json.loads(text)
    check_config(config, path)
    return tensors, config


def folder_problem(folder: Path, language_model: bool) -> Optional[str]:
    """What would keep a folder from being loaded, as far as it can be seen without reading its tensors; or None.

    Args:
        language_model: the folder is to be an OPT's, with its tokenizer, rather than a BLIP-2 OPT's.
    """
    try:
        if language_model:
            read_opt_config(folder)
        else:
            read_config(folder)
        problems = [problem for file in weight_files(folder) for problem in [_file_problem(file)] if problem]
    except (CheckpointError, FileNotFoundError) as error:
        return str(error)
    if problems:
        return "; ".join(problems)
    if language_model and not all((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"{folder} has no tokenizer: expected {' and '.join(TOKENIZER_FILES)} in it"
    return None


def _file_problem(file: Path) -> Optional[str]:
    return quick_problem(file) if file.is_file() else f"no such checkpoint: {file}"


def new_config(
    tensors: hf_names.Tensors, opt_config: Mapping[str, Any], vit_heads: Optional[int], qformer_heads: Optional[int]
) -> Config:
    """The config of a model whose (LAVIS's) tensors are all there.

    Args:
        tensors: what sizes are read from.
        opt_config: the language model's.
        vit_heads, qformer_heads: how many attention heads; None takes the published models' width of a head.

    Raises:
        CheckpointError: if the heads are not given and cannot be the published ones, or cross-attention is not regular.
    """
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {
        "model_type": "blip-2",
        "architectures": ["Blip2ForConditionalGeneration"],
        "torch_dtype": str(dtype).replace("torch.", ""),
        "num_query_tokens": tensors["query_tokens"].shape[1],
        "image_token_index": OPT_TOKENS if tensors[hf_names.EMBEDDING].shape[0] > OPT_TOKENS else None,
        "vision_config": _vision_config(tensors, vit_heads),
        "qformer_config": _qformer_config(tensors, qformer_heads),
        # Left out: where it was on the machine that made it, and what only that machine's libraries say.
        "text_config": {
            key: value
            for key, value in opt_config.items()
            if key not in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
        },
    }


def _vision_config(tensors: hf_names.Tensors, heads: Optional[int]) -> Config:
    width = tensors["visual_encoder.cls_token"].shape[-1]
    patch = tensors["visual_encoder.patch_embed.proj.weight"].shape[-1]
    patches = tensors["visual_encoder.pos_embed"].shape[1] - 1
    return {
        "model_type": "blip_2_vision_model",
        "hidden_size": width,
        "intermediate_size": tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(hf_names.layers(tensors, "visual_encoder.blocks.")),
        "num_attention_heads": _heads("--vit-heads", "image encoder", width, VIT_HEAD_WIDTH, heads),
        "image_size": round(patches**0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": VISION_EPS,
        "attention_dropout": 0.0,
        "qkv_bias": True,
    }


def _qformer_config(tensors: hf_names.Tensors, heads: Optional[int]) -> Config:
    layer = "Qformer.bert.encoder.layer."
    cross = [n for n in hf_names.layers(tensors, layer) if f"{layer}{n}.crossattention.self.key.weight" in tensors]
    layers = len(hf_names.layers(tensors, layer))
    every = cross[1] if len(cross) > 1 else layers
    if cross != list(range(0, layers, every)):
        raise CheckpointError(
            f"expected cross-attention in every n-th of the Q-Former's {layers} layers, got it in {cross}"
        )
    width = tensors["query_tokens"].shape[-1]
    return {
        "model_type": "blip_2_qformer",
        "hidden_size": width,
        "intermediate_size": tensors[f"{layer}0.intermediate_query.dense.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": _heads("--qformer-heads", "Q-Former", width, QFORMER_HEAD_WIDTH, heads),
        "encoder_hidden_size": tensors["visual_encoder.cls_token"].shape[-1],
        "cross_attention_frequency": every,
        "max_position_embeddings": (
            tensors[hf_names.POSITION_IDS].shape[1] if hf_names.POSITION_IDS in tensors else positions({})
        ),
        "hidden_act": "gelu",
        "layer_norm_eps": QFORMER_EPS,
    }


def _heads(option: str, part: str, width: int, head_width: int, given: Optional[int]) -> int:
    heads = given or width // head_width
    if not heads or width % heads or (given is None and width % head_width):
        raise CheckpointError(
            f"{part}: expected {option} N, a divisor of its width {width}, got "
            f"{f'none, and heads are not {head_width} wide as the published ones' if given is None else given}"
        )
    return heads


def write(
    folder: Path,
    tensors: hf_names.Tensors,
    config: Config,
    *,
    side_files_of: Iterable[Path],
    shard_bytes: int,
    written: Written,
) -> None:
    """Write a folder as ``save_pretrained`` lays it out.

    Args:
        tensors: under Hugging Face's hf_names.
        config: see `new_config`; what the tensors themselves say goes before it.
        side_files_of: folders whose tokenizer and processor files are copied along, the later ones' before the
            earlier ones'.
        shard_bytes: see `lavis_kvmod.weights.tensors.write_shards`.

    Raises:
        CheckpointError: if the config is that of a model of another size.
    """
    _check_sizes(tensors, config)
    text = {
        **(config.get("text_config") or {}),
        "vocab_size": tensors["language_model.model.decoder.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "language_model.lm_head.weight" not in tensors,
    }
    config = {**config, "text_config": text}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for source in side_files_of:
        for name in SIDE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    write_shards(folder, tensors, shard_bytes, written)


def _check_sizes(tensors: hf_names.Tensors, config: Config) -> None:
    """Layers that a config promises and a folder lacks would be made up by transformers."""
    found = {
        ("vision_config", "hidden_size"): tensors["vision_model.embeddings.class_embedding"].shape[-1],
        ("vision_config", "num_hidden_layers"): len(hf_names.layers(tensors, "vision_model.encoder.layers.")),
        ("qformer_config", "hidden_size"): tensors["query_tokens"].shape[-1],
        ("qformer_config", "num_hidden_layers"): len(hf_names.layers(tensors, "qformer.encoder.layer.")),
        ("text_config", "hidden_size"): tensors["language_projection.bias"].shape[0],
        ("text_config", "num_hidden_layers"): len(hf_names.layers(tensors, "language_model.model.decoder.layers.")),
    }
    problems = [
        f"  - {section}.{key} is {config[section][key]}, but the weights have {size}"
        for (section, key), size in found.items()
        if (config.get(section) or {}).get(key, size) != size
    ]
    if problems:
        raise CheckpointError("config and weights are of different models:\n" + "\n".join(problems))

"""``lavis-kvmod convert SRC DST``: a BLIP-2 checkpoint from one layout to another, tensor by tensor."""

import argparse
import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Dict, Hashable, NamedTuple, Optional, Tuple

import torch
from tqdm import tqdm

from lavis_kvmod.system.paths import expanded
from lavis_kvmod.weights import hf_folders, hf_names
from lavis_kvmod.weights.files import CheckpointError, listing, whole_or_nothing
from lavis_kvmod.weights.finding import WeightFile
from lavis_kvmod.weights.tensors import LazyTensor, TensorFiles, write_pth, write_safetensors

SHARD_GB = 5.0

# Where a part that SRC lacks can come from.
_REMEDIES = {
    "visual_encoder": "--vit FILE (or --base)",
    "opt_model": "--opt FOLDER (or --base)",
    "ln_vision": "--base CHECKPOINT, what it was finetuned from",
    "Qformer": "--base CHECKPOINT, what it was finetuned from",
    "query_tokens": "--base CHECKPOINT, what it was finetuned from",
    "opt_proj": "--base CHECKPOINT, what it was finetuned from",
}
# LAVIS's EVA-CLIP-G file has 40 blocks, of which BLIP-2 leaves out the last.
_EVA_CLIP_G_WIDTH, _EVA_CLIP_G_BLOCKS = 1408, 39


class Checkpoint(NamedTuple):
    """What was opened.

    Attributes:
        tensors: under LAVIS's names.
        config: Hugging Face's, if it came with one.
        opt_config: the language model's, if only that came.
        side_folders: Hugging Face folders whose tokenizer and processor belong to it.
    """

    tensors: Dict[str, LazyTensor]
    config: Optional[hf_folders.Config] = None
    opt_config: Optional[hf_folders.Config] = None
    side_folders: Tuple[Path, ...] = ()


def convert(
    source: str,
    target: str,
    *,
    base: Optional[str] = None,
    vit: Optional[str] = None,
    opt: Optional[str] = None,
    drop_prefix: bool = False,
    vit_heads: Optional[int] = None,
    qformer_heads: Optional[int] = None,
    shard_bytes: int = int(SHARD_GB * 1e9),
) -> None:
    """Write the checkpoint ``source`` as ``target``; nothing is left of ``target`` if that fails.

    Numbers and dtypes stay as they are; only the rows that Hugging Face adds to OPT's embeddings, for an image token,
    are left out of a file, which LAVIS would not load with them. What is held in memory is about one tensor, the
    largest; a ``.pth`` file of PyTorch before 1.6 alone is read as a whole.

    Args:
        source: ``.pth`` (LAVIS's or ours), ``.safetensors``, or a Hugging Face folder; a path or URL, with
            ``#sha256=HEX`` behind it if it is to be checked, as the next three.
        target: path ending in ``.pth`` or ``.safetensors``, or of a folder.
        base: a checkpoint for the parts that ``source`` lacks.
        vit: a file for the image encoder, if that is lacking.
        opt: an OPT folder for the language model, if that is lacking, and for its config.
        drop_prefix: leave the KV prefix out.
        vit_heads, qformer_heads: see `lavis_kvmod.weights.hf_folders.new_config`.
        shard_bytes: most bytes in one file of a folder.

    Raises:
        FileNotFoundError: if a file is not there.
        CheckpointError: if one cannot be read, or ``source`` cannot be had in that layout.
        ValueError: if ``target`` is there already, or of no known kind.
    """
    path = expanded(target)
    kind = _kind(path)
    found = _gather(TensorFiles(), source, base, vit, opt)
    if drop_prefix:
        kept = {name: tensor for name, tensor in found.tensors.items() if not name.startswith(hf_names.PREFIX)}
        found = found._replace(tensors=kept)
    if kind == "folder":
        _write_folder(path, found, source, vit_heads, qformer_heads, shard_bytes)
    else:
        _write_file(path, found, kind)


def _write_folder(
    path: Path,
    found: Checkpoint,
    source: str,
    vit_heads: Optional[int],
    qformer_heads: Optional[int],
    shard_bytes: int,
) -> None:
    tensors, config = _whole_stock_model(found.tensors, source), found.config
    if config is None:
        if found.opt_config is None:
            raise CheckpointError(
                f"{source} does not say what its language model is; give --opt FOLDER, whose config.json does"
            )
        config = hf_folders.new_config(tensors, found.opt_config, vit_heads, qformer_heads)
    tensors = hf_names.to_hf(tensors, source)
    with whole_or_nothing(path) as temporary, _progress(tensors, path) as progress:
        hf_folders.write(
            temporary,
            tensors,
            config,
            side_files_of=found.side_folders,
            shard_bytes=shard_bytes,
            written=progress.update,
        )


def _write_file(path: Path, found: Checkpoint, kind: str) -> None:
    tensors = hf_names.within_vocabulary(found.tensors)
    # With the config in it, a file needs no options on the way back.
    extra = {"hf_config": json.dumps(found.config)} if found.config else {}
    with whole_or_nothing(path) as temporary, _progress(tensors, path) as progress:
        if kind == ".safetensors":
            write_safetensors(temporary, tensors, {"format": "pt", **extra}, progress.update)
        else:
            write_pth(temporary, {"model": tensors, **extra}, progress.update)


def _kind(path: Path) -> str:
    if path.suffix in (".bin", ".ckpt", ".h5", ".npz", ".zip", ".json"):
        raise ValueError(f"DST: expected a path ending in .pth or .safetensors, or that of a folder; got {path}")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"DST: {path} is there already; remove it, or give another path")
    return {".pth": ".pth", ".pt": ".pth", ".safetensors": ".safetensors"}.get(path.suffix, "folder")


def _gather(files: TensorFiles, source: str, base: Optional[str], vit: Optional[str], opt: Optional[str]) -> Checkpoint:
    """The source, with the parts that it lacks from the others."""
    found = _open(files, "SRC", source)
    if vit:
        found = found._replace(tensors=_filled_up(found.tensors, _image_encoder(files, vit)))
    if opt:
        folder = WeightFile("--opt", str(opt), "--opt", is_hf_folder=True).fetch()
        opt_config = hf_folders.read_opt_config(folder)
        tensors = _filled_up(found.tensors, _language_model(files, folder))
        found = found._replace(tensors=tensors, opt_config=opt_config, side_folders=(folder, *found.side_folders))
    if base:
        other = _open(files, "--base", base)
        tensors = _filled_up(found.tensors, other.tensors)
        found = found._replace(
            tensors=tensors,
            config=found.config or other.config,
            side_folders=(*other.side_folders, *found.side_folders),
        )
    return found


def _open(files: TensorFiles, option: str, source: str) -> Checkpoint:
    path = WeightFile(option, str(source), option).fetch()
    tensors, config = hf_folders.open_lavis(files, path)
    return Checkpoint(tensors, config, side_folders=(path,) if path.is_dir() else ())


def _image_encoder(files: TensorFiles, source: str) -> Dict[str, LazyTensor]:
    tensors = _open(files, "--vit", source).tensors
    if any(name.startswith("visual_encoder.") for name in tensors):
        return {n: tensor for n, tensor in tensors.items() if n.startswith(("visual_encoder.", "ln_vision."))}
    # A bare ViT, which may have a head, and one block more than BLIP-2 uses.
    if "cls_token" not in tensors:
        raise CheckpointError(f"--vit: {source} holds no image encoder of LAVIS's (no visual_encoder.* or cls_token)")
    is_eva = tensors["cls_token"].shape[-1] == _EVA_CLIP_G_WIDTH
    beyond = tuple(f"blocks.{i}." for i in hf_names.layers(tensors, "blocks.") if is_eva and i >= _EVA_CLIP_G_BLOCKS)
    used = ("cls_token", "pos_embed", "patch_embed.", "blocks.")
    return {f"visual_encoder.{n}": t for n, t in tensors.items() if n.startswith(used) and not n.startswith(beyond)}


def _language_model(files: TensorFiles, folder: Path) -> Dict[str, LazyTensor]:
    tensors = {}
    for name, tensor in files.add_folder(folder).items():
        # Meta's own folders hold the bare decoder.
        name = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        if name != "model.decoder.version":
            tensors[f"opt_model.{name}"] = tensor
    if hf_names.EMBEDDING in tensors:
        tensors.setdefault(hf_names.LM_HEAD, tensors[hf_names.EMBEDDING])
    return tensors


def _filled_up(tensors: Dict[str, LazyTensor], others: Dict[str, LazyTensor]) -> Dict[str, LazyTensor]:
    """``tensors``, and of ``others`` the parts of which it has nothing."""
    parts = {name.split(".")[0] for name in tensors}
    return {**tensors, **{name: tensor for name, tensor in others.items() if name.split(".")[0] not in parts}}


def _whole_stock_model(tensors: Dict[str, LazyTensor], source: str) -> Dict[str, LazyTensor]:
    """These tensors, checked to be a whole stock BLIP-2, with the output embedding tied where it is the input's."""
    prefix = sorted(name for name in tensors if name.startswith(hf_names.PREFIX))
    if prefix:
        raise CheckpointError(
            f"{source} has a KV prefix, and Hugging Face's BLIP-2 has no place for one; with --drop-prefix the rest "
            f"is written, a model that answers differently\n{listing('tensors', prefix)}"
        )
    if not _behind_qformer(tensors):
        raise CheckpointError(
            f"{source} has another connector than the Q-Former and its projection, and Hugging Face's BLIP-2 has a "
            "place for no other; a .pth or .safetensors holds it"
        )
    parts = {name.split(".")[0] for name in tensors}
    lacking = [f"  - {part}: give {remedy}" for part, remedy in _REMEDIES.items() if part not in parts]
    if lacking:
        raise CheckpointError(f"{source} lacks parts that a Hugging Face folder holds:\n" + "\n".join(lacking))
    missing = hf_names.missing(tensors)
    if missing:
        raise CheckpointError(f"{source} is not whole:\n{listing('missing', missing)}")
    head, embedding = tensors.get(hf_names.LM_HEAD), tensors[hf_names.EMBEDDING]
    if head is not None and head.data != embedding.data and _digest(head) == _digest(embedding):
        tensors = {**tensors, hf_names.LM_HEAD: embedding}
    return tensors


def _behind_qformer(tensors: Dict[str, LazyTensor]) -> bool:
    """Whether nothing in these tensors speaks of another connector (which `linear` does by its projection alone)."""
    connector = [name for name in tensors if name.startswith("Qformer.")]
    if any(name.startswith("gated_layers.") for name in tensors):
        return False
    if any(not name.startswith(("Qformer.bert.", "Qformer.cls.")) for name in connector):
        return False
    projection, queries = tensors.get("opt_proj.weight"), tensors.get("query_tokens")
    if projection is None:
        return True
    return bool(connector) if queries is None else projection.shape[1] == queries.shape[-1]


def _digest(tensor: LazyTensor) -> bytes:
    numbers = tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers.data).digest()


def _progress(tensors: Dict[str, LazyTensor], path: Path) -> tqdm:
    """A bar over the bytes to be written."""
    sizes: Dict[Hashable, int] = {tensor.data or name: tensor.nbytes for name, tensor in tensors.items()}
    total = sum(sizes.values())
    return tqdm(total=total, desc=path.name, unit="B", unit_scale=True, unit_divisor=1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.epilog = "Behind the path or URL of a file, #sha256=HEX has it checked."
    parser.add_argument("source", metavar="SRC", help=".pth (LAVIS's or ours), .safetensors, or a Hugging Face folder")
    parser.add_argument("target", metavar="DST", help="path of a .pth, a .safetensors, or of a folder to make")
    parser.add_argument("--base", metavar="CHECKPOINT", help="take the parts that SRC lacks from this one")
    parser.add_argument("--vit", metavar="FILE", help="take the image encoder from this file, if SRC has none")
    parser.add_argument(
        "--opt", metavar="FOLDER", help="take the language model, if SRC has none, and its config from this folder"
    )
    parser.add_argument("--drop-prefix", action="store_true", help="leave out the KV prefix")
    parser.add_argument("--vit-heads", type=int, metavar="N", help="attention heads (default: width / 88)")
    parser.add_argument("--qformer-heads", type=int, metavar="N", help="attention heads (default: width / 64)")
    parser.add_argument(
        "--shard-gb", type=float, default=SHARD_GB, metavar="X", help="most GB in a file of a folder (default: 5)"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command, and return its exit status."""
    # A process that is asked to end cleans up as one that is interrupted does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        convert(
            args.source,
            args.target,
            base=args.base,
            vit=args.vit,
            opt=args.opt,
            drop_prefix=args.drop_prefix,
            vit_heads=args.vit_heads,
            qformer_heads=args.qformer_heads,
            shard_bytes=int(args.shard_gb * 1e9),
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"wrote {args.target}")
    return 0

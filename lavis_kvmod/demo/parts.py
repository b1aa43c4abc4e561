"""The demo's frozen parts: built once on this machine, then read from the cache.

Each part is a folder ``<cache>/demo-<hash of the recipe>/<part>`` that appears only when complete: it is built beside
its place and moved there at the end, under a lock, so that neither an interruption nor a second process leaves
anything half-made.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from transformers import OPTConfig

from lavis_kvmod.demo.colour_vision import ColourVisionRecipe, train_colour_vision_encoder
from lavis_kvmod.demo.described_language import DescribedLanguageRecipe
from lavis_kvmod.demo.easy_language import train_easy_language_model
from lavis_kvmod.demo.language import LanguageRecipe, opt_config, train_language_model
from lavis_kvmod.demo.pages_language import train_pages_language_model
from lavis_kvmod.demo.vision import VisionRecipe, train_vision_encoder
from lavis_kvmod.demo.words import save_vocabulary, vocabulary
from lavis_kvmod.system.paths import cache_dir
from lavis_kvmod.system.randomness import own_randomness

__all__ = [
    "DEMO",
    "EASY",
    "LANGUAGE_MODELS",
    "PAGES",
    "EasyRecipe",
    "PagesRecipe",
    "Recipe",
    "build_parts",
    "built",
    "colour_vision_weights",
    "language_model",
    "language_model_config",
    "parts_dir",
    "vision_weights",
    "words",
]

_CODE_VERSION = 1  # raise it when the same recipe would give other weights
_MANIFEST = "manifest.json"
_VISION_FILE = "vision.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything the parts depend on: geometry, training, seeds."""

    vision: VisionRecipe = field(default_factory=VisionRecipe)
    language: LanguageRecipe = field(default_factory=LanguageRecipe)


DEMO = Recipe()


@dataclass(frozen=True)
class PagesRecipe:
    """What the language model for pages of digits depends on; it has a folder of its own."""

    language: DescribedLanguageRecipe = field(default_factory=DescribedLanguageRecipe)


PAGES = PagesRecipe()


@dataclass(frozen=True)
class EasyRecipe:
    """What the language model for easy-VQA depends on; it has a folder of its own.

    It reads descriptions of any length, so that connectors that write 8 vectors are not ahead of those that write 18.
    """

    language: DescribedLanguageRecipe = field(default_factory=lambda: DescribedLanguageRecipe(steps=1200, longest=20))
    about: str = "easy-VQA"


EASY = EasyRecipe()

LanguageRecipes = Union[Recipe, PagesRecipe, EasyRecipe]

# By the names that `model.opt_model` has for them.
LANGUAGE_MODELS: Dict[str, LanguageRecipes] = {"demo": DEMO, "demo-pages": PAGES, "demo-easy": EASY}


@dataclass(frozen=True)
class ColourRecipe:
    """What a ViT that is shown colours depends on; it has a folder of its own."""

    vision: ColourVisionRecipe = field(default_factory=ColourVisionRecipe)


AnyRecipe = Union[LanguageRecipes, ColourRecipe]


def build_parts(recipe: Recipe = DEMO, language_first: bool = False) -> Path:
    """Build what is not in the cache yet.

    Two processes that begin with different parts (``language_first``) build them side by side: each then waits for the
    other's.

    Returns:
        The folder that holds both parts.

    Raises:
        ImportError: without scikit-learn.
        OSError: if the cache cannot be written.
    """
    builds: List[Callable[[Recipe], Path]] = [vision_weights, language_model]
    for build in reversed(builds) if language_first else builds:
        build(recipe)
    return parts_dir(recipe)


def vision_weights(recipe: Recipe = DEMO) -> Path:
    """The file with ``visual_encoder.*`` and ``ln_vision.*``, built on first use. Raises as `build_parts`."""
    return _vision_file(recipe, lambda: train_vision_encoder(recipe.vision))


def colour_vision_weights(share: float) -> Path:
    """As `vision_weights`, of a ViT that has seen this share (0 … 1) of its pictures in colour."""
    recipe = ColourRecipe(ColourVisionRecipe(colour_share=share))
    return _vision_file(recipe, lambda: train_colour_vision_encoder(recipe.vision))


def _vision_file(
    recipe: Union[Recipe, ColourRecipe], train: Callable[[], Tuple[Dict[str, torch.Tensor], float]]
) -> Path:
    def build(folder: Path) -> Dict[str, float]:
        state, accuracy = train()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / _VISION_FILE)
        return {"val_digit_accuracy": accuracy}

    return _part("vision", recipe, recipe.vision.seed, build) / _VISION_FILE


def language_model(recipe: LanguageRecipes = DEMO) -> Path:
    """The Hugging Face folder of model and tokenizer, built on first use. Raises as `build_parts`."""

    def build(folder: Path) -> Dict[str, float]:
        return {"accuracy": _train_language_model(recipe, folder)}

    return _part("language", recipe, recipe.language.seed, build)


def _train_language_model(recipe: LanguageRecipes, folder: Path) -> float:
    if isinstance(recipe, PagesRecipe):
        return train_pages_language_model(recipe.language, folder)
    if isinstance(recipe, EasyRecipe):
        return train_easy_language_model(recipe.language, folder)
    return train_language_model(recipe.language, folder)


def words(recipe: Recipe = DEMO) -> Path:
    """The folder of the words of the Q-Former's text side, written on first use. Raises as `build_parts`."""

    def build(folder: Path) -> Dict[str, float]:
        save_vocabulary(folder)
        return {"words": float(len(vocabulary()))}

    return _part("words", recipe, recipe.language.seed, build)


def built(name: str, recipe: AnyRecipe = DEMO) -> Optional[Path]:
    """The folder of the ``vision`` or the ``language`` part if it is whole; None before it is first used."""
    folder = parts_dir(recipe) / name
    return folder if _damage(folder) is None else None


def language_model_config(recipe: LanguageRecipes = DEMO) -> OPTConfig:
    """The language model's geometry, built or not; its vocabulary is known once it is built, and at most this large."""
    folder = built("language", recipe)
    if folder is not None:
        return OPTConfig.from_pretrained(str(folder))
    return opt_config(recipe.language, recipe.language.vocab_size)


def parts_dir(recipe: AnyRecipe = DEMO) -> Path:
    """Where the parts of a recipe are cached. Another recipe, or other code, has another folder."""
    text = json.dumps([_CODE_VERSION, asdict(recipe)], sort_keys=True)
    return cache_dir() / f"demo-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _part(name: str, recipe: AnyRecipe, seed: int, build: Callable[[Path], Dict[str, float]]) -> Path:
    """The folder of one part; ``build`` fills an empty folder and returns what it measured."""
    folder = parts_dir(recipe) / name
    if _damage(folder) is None:  # before anything is written: a finished cache may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{name}.lock"), name):
            damage = _damage(folder)  # again: another process may have built it meanwhile
            if damage is None:
                return folder
            if folder.exists():
                logging.warning("the demo's %s part is damaged (%s): building it anew", name, damage)
            _remove_leftovers(folder)
            _build(folder, recipe, seed, build)
    except OSError as error:
        raise OSError(
            f"cannot build the demo's {name} part in {folder.parent} ({error}); "
            "set LAVIS_KVMOD_CACHE to a folder that can be written"
        ) from error
    return folder


def _build(folder: Path, recipe: AnyRecipe, seed: int, build: Callable[[Path], Dict[str, Any]]) -> None:
    # At this level so that it is seen after a mere `load_model` too: what follows takes a minute or two.
    logging.warning("demo: pre-training its %s part, once; it is kept in %s", folder.name, folder)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        with _seeded(seed), torch.enable_grad():
            measured = build(made)
        logging.info("demo: %s part built: %s", folder.name, measured)
        files = {file.name: _digest(file) for file in sorted(made.iterdir())}
        manifest = {"recipe": asdict(recipe), "measured": measured, "sha256": files}
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for entry in (made, *made.iterdir()):  # made for the owner alone, but a cache may be shared
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """What killed builds left. The caller holds the lock, so nobody is building there now."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _damage(folder: Path) -> Optional[str]:
    """What is wrong with a part's folder, or None."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        wrong: List[str] = [n for n, digest in expected.items() if _digest(folder / n) != digest]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return f"changed: {', '.join(wrong)}" if wrong else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logging.info("demo: another process builds the %s part; waiting for it", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for a build, and leave the caller's as they were."""
    with own_randomness():
        torch.manual_seed(seed)
        random.seed(seed)  # LAVIS's OPT draws from it, for its layer drop
        np.random.seed(seed)
        yield

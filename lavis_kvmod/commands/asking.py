"""A model loaded to be asked about pictures: for the commands that show answers."""

import argparse
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lavis_kvmod.commands.launch import ready
from lavis_kvmod.models.language.soft_prompt import ScoredAnswer
from lavis_kvmod.models.language.text import QUESTION
from lavis_kvmod.system.paths import expanded

__all__ = ["TOLD", "Asked", "add_model_arguments", "load_model"]

# BLIP-2's prompt for VQA (arXiv 2301.12597, appendix), for a checkpoint that says no other.
DEFAULT_PROMPT = "Question: {} Short answer:"

# What the user can mend (missing weights are a FileNotFoundError, faulty settings and bad images a ValueError).
TOLD = (ValueError, FileNotFoundError, ImportError)


class Asked(NamedTuple):
    """A model in evaluation mode with what its pictures and questions go through.

    Attributes:
        model: a `lavis_kvmod.models.blip2_opt_kvmod.Blip2OPTKVMod`.
        see: a picture to pixels (3, H, H).
        read: a question as in training.
        prompt: the frame of a question.
        name: model type, and checkpoint if any.
    """

    model: Any
    see: Callable[[Image.Image], torch.Tensor]
    read: Callable[[str], str]
    prompt: str
    name: str

    def samples(self, image: Image.Image, question: str = "") -> Dict[str, Any]:
        """A batch of one picture with its question, or with none for a caption."""
        batch: Dict[str, Any] = {"image": self.see(image).unsqueeze(0).to(self.model.device)}
        if question.strip():
            batch.update(text_input=[self.read(question)], prompt=self.prompt)
        return batch

    def answer(self, samples: Dict[str, Any], **search: Any) -> ScoredAnswer:
        """The answer, or the caption where there is no question; ``search`` as in ``generate``."""
        if "text_input" in samples:
            return self.model.predict_answers(samples, return_scores=True, **search)[0]
        return self.model.generate(samples, return_scores=True, **search)[0]

    def without_prefix(self, samples: Dict[str, Any]) -> Dict[str, Any]:
        """The batch with the soft prompt that the same weights write when the prefix is taken away."""
        with torch.no_grad():
            return {**samples, "soft_prompt": self.model.encode(samples, with_prefix=False).soft_prompt}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model-type``, ``--checkpoint`` and ``--device``."""
    parser.add_argument("--model-type", default=None, help="of blip2_opt_kvmod; default: the checkpoint's, else demo")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights, e.g. output/…/checkpoint_best.pth of a run")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")


def load_model(model_type: Optional[str] = None, checkpoint: Optional[str] = None, device: str = "cpu") -> Asked:
    """The model of a type, of a checkpoint, or of both.

    A checkpoint in the folder of a run is built as the run's ``config.yaml`` says, unless a model type is given.

    Raises:
        ValueError: for an unknown model type, settings or keys that do not fit, or a device that is not there.
        FileNotFoundError: for a checkpoint or weights that are not there.
    """
    from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod

    _check_device(device)
    run = _config_of_run(checkpoint) if model_type is None else None
    cfg: Any = run or OmegaConf.load(Blip2OPTKVMod.default_config_path(model_type or "demo"))
    section: Any = OmegaConf.merge(cfg.model, {"cache_frozen_features": False})
    if checkpoint:
        section = OmegaConf.merge(section, {"load_finetuned": True, "finetuned": checkpoint})
    if section.get("arch", "blip2_opt_kvmod") != "blip2_opt_kvmod":
        raise ValueError(f"{checkpoint} is of a {section.arch}; only blip2_opt_kvmod answers questions")
    model = ready(Blip2OPTKVMod.from_config(section), device)
    see, read = _processors(cfg)
    prompt = str(OmegaConf.select(cfg, "run.prompt") or DEFAULT_PROMPT)
    named = model_type or section.get("model_type") or "demo"
    name = f"{named}, {checkpoint}" if checkpoint else str(named)
    return Asked(model, see, read, prompt if QUESTION in prompt else DEFAULT_PROMPT, name)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda or cuda:0, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no CUDA GPU here; use --device cpu")


def _config_of_run(checkpoint: Optional[str]) -> Optional[DictConfig]:
    """What the run that wrote a checkpoint was made by, where its folder says so."""
    path = expanded(checkpoint).parent / "config.yaml" if checkpoint else None
    if path is None or not path.is_file():
        return None
    cfg = OmegaConf.load(path)
    return cfg if isinstance(cfg, DictConfig) and "model" in cfg else None


def _processors(cfg: Any) -> List[Callable[..., Any]]:
    """The processors of an evaluation: of the run's first data set, else the model type's."""
    import lavis.processors  # noqa: F401  (fills the registry)
    from lavis.common.registry import registry

    sections = [section for section in (*(cfg.get("datasets") or {}).values(), cfg.get("preprocess")) if section]
    found = []
    for kind in ("vis_processor", "text_processor"):
        own = [OmegaConf.select(s, f"{kind}.eval") for s in sections if OmegaConf.select(s, f"{kind}.eval.name")]
        found.append(registry.get_processor_class(own[0].name).from_config(own[0]))
    return found

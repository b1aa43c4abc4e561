"""A model card in Hugging Face's form, filled from a run's folder: data, parts with hashes, metrics, settings.

What nobody but its author knows stands between ``<!-- yours: NAME -->`` and ``<!-- end -->``, and is kept when the card
is written again.
"""

import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple
from urllib.parse import urlsplit

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lavis_kvmod._version import __version__
from lavis_kvmod.demo.parts import LANGUAGE_MODELS
from lavis_kvmod.models.settings import ARCH, settings_of
from lavis_kvmod.reports.markdown import escape, table
from lavis_kvmod.reports.run_files import Run
from lavis_kvmod.reports.run_page import calibration
from lavis_kvmod.weights.files import sha256, whole_or_nothing
from lavis_kvmod.weights.finding import WeightFile

__all__ = ["CARD", "card", "write_card"]

CARD = "README.md"
CHECKPOINTS = ("checkpoint_best.pth", "checkpoint_last.pth")
WEIGHT_ENDINGS = (".pth", ".bin", ".safetensors")
_YOURS = re.compile(r"<!-- yours: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)

# What stands in the author's places until something is written there.
_UNSAID = {
    "use": "Not said by whoever trained it.",
    "limits": "Known faults, and people who may be concerned by them: not said by whoever trained it.",
    "data": "Where the data are from, their licence, and who is in them: not said by whoever trained it.",
}
_PIPELINES = {
    "kvmod_vqa": "visual-question-answering",
    "kvmod_captioning": "image-to-text",
    "kvmod_pretrain": "image-to-text",
}
# Of the metrics, those that a model index names, by Hugging Face's types.
_INDEXED = {
    "overall": "accuracy",
    "CIDEr": "cider",
    "Bleu_4": "bleu",
    "ROUGE_L": "rouge",
    "METEOR": "meteor",
    "txt_r1": "recall",
    "img_r1": "recall",
}
_NO_METRIC = ("agg_metrics", "epoch", "best_epoch")


def write_card(run: Run, path: Path, name: Optional[str] = None, licence: str = "unknown") -> Path:
    """Write a run's card; what the author wrote into an earlier one at ``path`` stays. Raises as `card`."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    text = card(run, name=name, licence=licence, yours=dict(_YOURS.findall(before)))
    with whole_or_nothing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def card(run: Run, name: Optional[str] = None, licence: str = "unknown", yours: Optional[Dict[str, str]] = None) -> str:
    """The card's text.

    Args:
        yours: what the author wrote, by the place's name.

    Raises:
        FileNotFoundError: if the run has no checkpoint, or no config.
        SettingsError: if its model section is not one of this version of the package.
    """
    found = [run.folder / file for file in CHECKPOINTS if (run.folder / file).is_file()]
    if not found or "model" not in run.config:
        lacking = "config.yaml" if found else f"{' or '.join(CHECKPOINTS)}"
        raise FileNotFoundError(f"{run.folder}: expected the folder of a training, with its {lacking}; there is none")
    environment = Environment(
        loader=PackageLoader("lavis_kvmod", "reports"),
        autoescape=False,  # what could be somebody's text goes through `escape`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    title = name or run.name
    written = {
        place: f"<!-- yours: {place} -->\n{(yours or {}).get(place, text + chr(10))}<!-- end -->"
        for place, text in _UNSAID.items()
    }
    return environment.get_template("model_card.md").render(
        front=yaml.safe_dump(_front_matter(run, title, licence), sort_keys=False, allow_unicode=True),
        name=escape(title),
        about=_about(run),
        yours=written,
        results=[_result(run, split) for split in _splits(run)],
        calibration=_calibration(run),
        shows_not=_shows_not(run, licence),
        version=run.environment.get("versions", {}).get("lavis-kvmod", __version__),
        loading=_loading(run, found[0].name),
        parts=_parts(run),
        files=_files(run, found[0]),
        data=_data(run),
        training=_training(run),
        config=run.config_text.strip(),
    )


# ------------------------------------------------------------ what the run's files tell


def _section(run: Run, name: str) -> Mapping[str, Any]:
    return run.config.get(name) or {}


def _splits(run: Run) -> List[str]:
    return [split for split in run.facts if split != "train"]


def _metrics(run: Run, split: str) -> Dict[str, float]:
    """Of the best epoch where the log tells which that is, else the last."""
    lines = run.facts[split]
    best = lines[-1].get("best_epoch")
    return next((line for line in lines if best is not None and line.get("epoch") == best), lines[-1])


def _front_matter(run: Run, name: str, licence: str) -> Dict[str, Any]:
    model, task = _section(run, "model"), str(_section(run, "run").get("task"))
    language_model = str(model.get("opt_model") or "")
    pipeline = _PIPELINES.get(task, "feature-extraction")
    results: List[Dict[str, Any]] = [
        {
            "task": {"type": pipeline},
            "dataset": {"name": ", ".join(_section(run, "datasets")), "type": "custom", "split": split},
            "metrics": [
                {"type": _INDEXED[key], "name": key, "value": round(value, 4)}
                for key, value in _metrics(run, split).items()
                if key in _INDEXED
            ],
        }
        for split in _splits(run)
    ]
    front = {
        "license": licence,
        "library_name": "lavis-kvmod",
        "pipeline_tag": pipeline,
        "tags": ["blip-2", "lavis", *(["kv-prefix"] if _has_prefix(run) else [])],
        "datasets": list(_section(run, "datasets")),
        "metrics": sorted({metric["type"] for result in results for metric in result["metrics"]}),
        "model-index": [{"name": name, "results": [result for result in results if result["metrics"]]}],
    }
    if re.fullmatch(r"[\w-]+/[\w.-]+", language_model) and not Path(language_model).exists():
        front["base_model"] = language_model
    return front


def _about(run: Run) -> str:
    model, task = _section(run, "model"), _section(run, "run").get("task")
    encoder = f"a second frozen encoder, `{model.get('aux_encoder')}`"
    if not model.get("kv_modulation", True):
        what = "BLIP-2 without a second encoder"
    elif _has_prefix(run):
        what = f"BLIP-2 with Key/Value prefixes made from the features of {encoder}"
    else:
        what = f"BLIP-2 with {encoder}, whose features come in as tokens of their own"
    return (
        f"{what}. Model `{model.get('arch')}`, type `{model.get('model_type')}`, connector "
        f"`{model.get('connector', 'qformer')}`; trained by the task `{task}` with lavis-kvmod, a plugin for LAVIS. "
        "This card was made from the run's own files by `lavis-kvmod card`."
    )


def _has_prefix(run: Run) -> bool:
    return any(part.get("part") == "kv_prefix" for part in run.parts)


def _result(run: Run, split: str) -> Dict[str, str]:
    metrics = _metrics(run, split)
    rows = [(escape(key), f"{value:.4g}") for key, value in metrics.items() if key not in _NO_METRIC]
    chosen = split in (_section(run, "run").get("valid_splits") or [])
    note = " (the epoch was chosen by it, so its figures are a little too good)" if chosen else ""
    return {"split": escape(split), "note": note, "table": table(["metric", "value"], rows, right=[1])}


def _calibration(run: Run) -> Optional[Dict[str, str]]:
    for split in reversed(list(run.predictions)):
        found = calibration(run.predictions[split])
        if found is not None:
            return {"split": split, "error": f"{found.error:.3f}"}
    return None


def _shows_not(run: Run, licence: str) -> List[str]:
    model, section = _section(run, "model"), _section(run, "run")
    data = ", ".join(_section(run, "datasets"))
    said = [
        f"How it does on anything but the splits above of {escape(data)}.",
        f"How much of it is luck: it is one run, of seed {section.get('seed')} (`lavis-kvmod ablate` trains several).",
        "What its frozen parts have learned from the data of others: their faults are in it, too.",
    ]
    if model.get("kv_modulation", True):
        said.append("Whether the second encoder helps: that takes the same run without it (`lavis-kvmod ablate`).")
    if model.get("opt_model") in LANGUAGE_MODELS:
        said.append("Language: its language model has read about colours and digits or shapes, and nothing else.")
    if not any(_metrics(run, split) for split in _splits(run)):
        said.append("Any result: the run had no evaluation.")
    if licence == "unknown":
        said.append("What you may do with it: no licence was given for the weights.")
    return said


def _loading(run: Run, checkpoint: str) -> str:
    model = _section(run, "model")
    if model.get("arch") == ARCH:
        return (
            "from PIL import Image\n"
            "from lavis_kvmod.commands.asking import load_model\n\n"
            f'asked = load_model(checkpoint="{checkpoint}")  # built as config.yaml, beside it, says\n'
            'image = Image.open("picture.jpg").convert("RGB")\n'
            'print(asked.answer(asked.samples(image, "what is it?")).answer)'
        )
    return (
        "from lavis.common.registry import registry\nfrom omegaconf import OmegaConf\n\n"
        'cfg = OmegaConf.load("config.yaml").model\n'
        f'cfg.update(load_finetuned=True, finetuned="{checkpoint}")\n'
        f'model = registry.get_model_class("{model.get("arch")}").from_config(cfg)'
    )


# ------------------------------------------------------------ parts, files, data, training


def _parts(run: Run) -> str:
    rows = [
        (f"`{part['part']}`", f"{part['parameters']:,}", "trained" if part["trained"] else "frozen", part["dtype"])
        for part in run.parts
    ]
    return table(["part", "parameters", "", "stored as"], rows, right=[1]) if rows else "Not recorded by this run."


def _files(run: Run, checkpoint: Path) -> str:
    rows = [("what was trained", f"`{checkpoint.name}`", f"`{sha256(checkpoint)}`")]
    settings = settings_of(_section(run, "model"))
    for file in settings.from_config(_section(run, "model")).weight_files() if settings is not None else []:
        rows += [(escape(file.part), f"`{name}`", digest) for name, digest in _digests(file)]
    return table(["", "file", "SHA-256"], rows)


def _digests(file: WeightFile) -> List[Tuple[str, str]]:
    """Name and hash of each file of weights of a part, without the folders of this machine."""
    source = str(file.source or "")
    named = source if urlsplit(source).scheme or not Path(source).exists() else Path(source).name
    path = file.build() if file.build is not None else file.local_path()
    if path is None:
        return [(named, "not on the machine that wrote this card")]
    if path.is_file():
        return [(named if urlsplit(source).scheme else path.name, f"`{sha256(path)}`")]
    inside = sorted(found for found in path.iterdir() if found.suffix in WEIGHT_ENDINGS)
    return [(f"{named or path.name}: {found.name}", f"`{sha256(found)}`") for found in inside]


def _data(run: Run) -> str:
    trained = ", ".join(_section(run, "run").get("train_splits") or [])
    rows = [(f"`{escape(name)}`", trained) for name in _section(run, "datasets")]
    counted = [f"{split}: {len(rows_of):,} predictions" for split, rows_of in run.predictions.items()]
    text = table(["data set (its LAVIS builder)", "trained on"], rows)
    return f"{text}\n\n{'; '.join(counted)}." if counted else text


def _training(run: Run) -> str:
    section, about = _section(run, "run"), run.environment
    keys = (
        "max_epoch",
        "max_iters",
        "batch_size_train",
        "accum_grad_iters",
        "init_lr",
        "lr_sched",
        "weight_decay",
        "amp",
    )
    rows = [(f"`{key}`", escape(section[key])) for key in (*keys, "seed") if section.get(key) is not None]
    rows += [("processes", str(about.get("processes", 1))), ("device", escape(about.get("device", "not recorded")))]
    rows += [(escape(name), escape(value)) for name, value in about.get("versions", {}).items() if value]
    git = (about.get("git") or {}).get("lavis-kvmod")
    return table(["", ""], rows + ([("revision of lavis-kvmod", f"`{git}`")] if git else []))

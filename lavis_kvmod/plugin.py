"""All that reaches into LAVIS from outside, in one place.

:func:`activate` is called by the post-import hook (``_hook.py``) once LAVIS has been imported. It
adds our classes to LAVIS's registry and mends the three places that would not see them otherwise.
"""

import functools
import os
import sys
from importlib import import_module
from typing import Any, Callable

from lavis_kvmod.system.lavis_paths import lavis_registry, set_registry_path
from lavis_kvmod.system.paths import absolute

_CACHE_ROOT = "LAVIS_CACHE_ROOT"

# What is registered: (kind in LAVIS's registry, name in a YAML file, module, class).
_REGISTERED = (
    ("model", "blip2_opt_kvmod", "lavis_kvmod.models.blip2_opt_kvmod", "Blip2OPTKVMod"),
    ("model", "blip2_kvmod", "lavis_kvmod.models.blip2_kvmod", "Blip2KVMod"),
    ("model", "blip2_kvmod_feature_extractor", "lavis_kvmod.models.blip2_kvmod", "Blip2KVMod"),
    ("model", "blip2_feature_extractor_kvmod", "lavis_kvmod.models.blip2_kvmod", "Blip2KVMod"),
    ("model", "blip2_kvmod_image_text_matching", "lavis_kvmod.models.blip2_kvmod", "Blip2KVModITM"),
    ("model", "blip2_image_text_matching_kvmod", "lavis_kvmod.models.blip2_kvmod", "Blip2KVModITM"),
    ("runner", "runner_kvmod", "lavis_kvmod.runners.runner_kvmod", "RunnerKVMod"),
    ("task", "kvmod_vqa", "lavis_kvmod.tasks.vqa", "KVModVQATask"),
    ("task", "kvmod_captioning", "lavis_kvmod.tasks.captioning", "KVModCaptionTask"),
    ("task", "kvmod_pretrain", "lavis_kvmod.tasks.pretraining", "KVModPretrainTask"),
    ("task", "kvmod_retrieval", "lavis_kvmod.tasks.retrieval", "KVModRetrievalTask"),
    ("builder", "digits_vqa", "lavis_kvmod.datasets.digits", "DigitsVQABuilder"),
    ("builder", "digits_caption", "lavis_kvmod.datasets.digits", "DigitsCaptionBuilder"),
    ("builder", "easy_vqa", "lavis_kvmod.datasets.easy_vqa", "EasyVQABuilder"),
    ("builder", "digits_retrieval", "lavis_kvmod.datasets.digits", "DigitsRetrievalBuilder"),
    ("builder", "digits_pages", "lavis_kvmod.datasets.digits_pages", "DigitsPagesBuilder"),
    ("builder", "wds_vqa", "lavis_kvmod.datasets.shards.builders", "WdsVQABuilder"),
    ("builder", "wds_caption", "lavis_kvmod.datasets.shards.builders", "WdsCaptionBuilder"),
    ("builder", "custom_vqa", "lavis_kvmod.datasets.custom", "CustomVQABuilder"),
    ("builder", "custom_caption", "lavis_kvmod.datasets.custom", "CustomCaptionBuilder"),
    ("builder", "custom_instruct", "lavis_kvmod.datasets.instruct", "CustomInstructBuilder"),
    ("builder", "custom_retrieval", "lavis_kvmod.datasets.retrieval", "CustomRetrievalBuilder"),
    ("builder", "artquest", "lavis_kvmod.datasets.artquest", "ArtQuestBuilder"),
    ("builder", "vqav2", "lavis_kvmod.datasets.vqav2", "VQAv2Builder"),
    ("builder", "textvqa", "lavis_kvmod.datasets.textvqa", "TextVQABuilder"),
)


def activate() -> None:
    """Make LAVIS know our classes. Calling it again changes nothing.

    All classes are imported, and all names found free, before the first is registered: a failure
    leaves LAVIS as it was.

    Raises:
        KeyError: a name is taken by another class.
    """
    classes = [(kind, name, getattr(import_module(module), cls)) for kind, name, module, cls in _REGISTERED]
    for kind, name, cls in [row for row in classes if not _is_registered(*row)]:
        getattr(lavis_registry(), f"register_{kind}")(name)(cls)
    _refresh_zoos()
    _wrap_loaders()
    if os.environ.get(_CACHE_ROOT):
        set_registry_path("cache_root", absolute(os.environ[_CACHE_ROOT]))


def _is_registered(kind: str, name: str, cls: type) -> bool:
    known = lavis_registry().mapping[f"{kind}_name_mapping"].get(name)
    if known not in (None, cls):
        raise KeyError(
            f"expected the {kind} name {name!r} to be free for {_full_name(cls)}, got one that "
            f"{_full_name(known)} has taken; register that class under another name"
        )
    return known is cls


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refresh_zoos() -> None:
    """Have LAVIS list its models and data sets anew: it did so once, before ours were there."""
    from lavis.datasets.builders import dataset_zoo
    from lavis.models import model_zoo

    for zoo in (model_zoo, dataset_zoo):
        zoo.__init__()  # in place, because others hold the same object


def _wrap_loaders() -> None:
    """Let `model_type` be left out where a model class has a default, and name unknown models."""
    import lavis.models

    for name in ("load_model", "load_model_and_preprocess"):
        load = getattr(lavis.models, name)
        if hasattr(load, "_wrapped_by_kvmod"):
            continue
        wrapper = _with_default_model_type(load)
        for module_name, module in list(sys.modules.items()):
            # `from lavis.models import *` has left copies elsewhere in LAVIS.
            if module_name.split(".")[0] == "lavis" and getattr(module, name, None) is load:
                setattr(module, name, wrapper)


def _with_default_model_type(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapper(name: str, *args: Any, **kwargs: Any) -> Any:
        default = getattr(_model_class(name), "default_model_type", None)
        if default is not None and not args and kwargs.get("model_type") is None:
            kwargs["model_type"] = default
        return load(name, *args, **kwargs)

    wrapper._wrapped_by_kvmod = True  # type: ignore[attr-defined]
    return wrapper


def _model_class(name: str) -> type:
    cls = lavis_registry().get_model_class(name)
    if cls is None:
        known = ", ".join(lavis_registry().list_models())
        raise ValueError(f"expected the name of a model, one of {known}; got {name!r}")
    return cls

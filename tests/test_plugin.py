"""What activation changes in LAVIS, seen in this process, where the hook has done it already."""

import copy
import inspect

import lavis
import lavis.models
import pytest
from lavis.common.registry import registry
from lavis.datasets.builders import dataset_zoo
from lavis.models import BaseModel, model_zoo

import lavis_kvmod
from lavis_kvmod import plugin
from lavis_kvmod.system import lavis_paths

NAMES = [row[:2] for row in plugin._REGISTERED]


@pytest.fixture
def mapping(monkeypatch):
    """LAVIS's registry as copies, so that a test may change it."""
    for kind, names in registry.mapping.items():
        monkeypatch.setitem(registry.mapping, kind, copy.copy(names))
    return registry.mapping


@pytest.fixture
def recorder(mapping):
    """A registered model class that records the model type it is asked for."""

    class Recorder(BaseModel):
        default_model_type = "usual"

        @classmethod
        def from_pretrained(cls, model_type):
            raise RecordedError(model_type)

    mapping["model_name_mapping"]["recorder"] = Recorder
    return Recorder


class RecordedError(Exception):
    """Carries the model type out of `load_model`, before there is a model."""


def _get(kind, name):
    return getattr(registry, f"get_{kind}_class")(name)


@pytest.mark.parametrize("kind, name", NAMES)
def test_every_class_is_registered(kind, name):
    ((module, cls),) = [row[2:] for row in plugin._REGISTERED if row[:2] == (kind, name)]
    registered = _get(kind, name)
    assert (registered.__module__, registered.__qualname__) == (module, cls)


def test_the_promised_names_are_in_the_table():
    assert {
        ("model", "blip2_opt_kvmod"),
        ("model", "blip2_kvmod"),
        ("model", "blip2_feature_extractor_kvmod"),
        ("model", "blip2_image_text_matching_kvmod"),
        ("runner", "runner_kvmod"),
        ("task", "kvmod_vqa"),
        ("task", "kvmod_captioning"),
        ("builder", "digits_vqa"),
        ("builder", "digits_caption"),
        ("builder", "easy_vqa"),
        ("builder", "vqav2"),
        ("builder", "textvqa"),
    } <= set(NAMES)


def test_the_zoos_list_what_is_registered():
    model_types = dict(model_zoo)["blip2_opt_kvmod"]
    assert {"pretrain_opt2.7b", "caption_coco_opt6.7b", "demo"} <= set(model_types)
    assert "blip2_opt" in dict(model_zoo)
    assert {"digits_vqa", "coco_vqa"} <= set(dataset_zoo.get_names())


def test_activating_again_changes_nothing():
    before = {kind: dict(names) for kind, names in registry.mapping.items()}
    loaders = lavis.models.load_model, lavis.models.load_model_and_preprocess
    plugin.activate()
    assert registry.mapping == before
    assert (lavis.models.load_model, lavis.models.load_model_and_preprocess) == loaders


def test_a_name_taken_by_another_class_is_refused_and_nothing_is_registered(mapping):
    for kind, name in NAMES:
        del mapping[f"{kind}_name_mapping"][name]
    kind, name = NAMES[-1]
    mapping[f"{kind}_name_mapping"][name] = BaseModel
    with pytest.raises(KeyError) as caught:
        plugin.activate()
    assert "lavis.models.base_model.BaseModel" in str(caught.value)
    assert ".".join(plugin._REGISTERED[-1][2:]) in str(caught.value)
    assert [_get(*row) for row in NAMES[:-1]] == [None] * (len(NAMES) - 1)


@pytest.mark.parametrize("load", ["load_model", "load_model_and_preprocess"])
@pytest.mark.parametrize(
    "args, kwargs, expected",
    [
        (("recorder",), {}, "usual"),
        (("recorder",), {"is_eval": True, "device": "cpu"}, "usual"),
        ((), {"name": "recorder", "model_type": None}, "usual"),
        (("recorder", "other"), {}, "other"),
        (("recorder", "other", True, "cpu"), {}, "other"),
        ((), {"name": "recorder", "model_type": "other"}, "other"),
    ],
)
def test_a_default_model_type_is_used_where_none_is_given(recorder, load, args, kwargs, expected):
    with pytest.raises(RecordedError, match=f"^{expected}$"):
        getattr(lavis.models, load)(*args, **kwargs)


@pytest.mark.parametrize("load", ["load_model", "load_model_and_preprocess"])
def test_stock_models_still_demand_their_type(load):
    with pytest.raises(TypeError, match="model_type"):
        getattr(lavis.models, load)("blip2_opt")


@pytest.mark.parametrize("load", ["load_model", "load_model_and_preprocess"])
def test_an_unknown_model_names_the_known_ones(load):
    with pytest.raises(ValueError, match="blip2_opt, blip2_opt_kvmod.*got 'blip2_otp'"):
        getattr(lavis.models, load)("blip2_otp")


def test_the_loaders_look_as_before_wherever_lavis_keeps_them():
    assert lavis.load_model is lavis.models.load_model
    parameters = list(inspect.signature(lavis.models.load_model_and_preprocess).parameters)
    assert parameters == ["name", "model_type", "is_eval", "device"]
    assert lavis.models.load_model.__name__ == "load_model"


def test_a_registry_path_can_be_set_again(mapping):
    for value in ("/first", "/second"):
        lavis_paths.set_registry_path("result_dir", value)
        assert registry.get_path("result_dir") == value


def test_the_environment_says_where_data_lies(mapping, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIS_CACHE_ROOT", "data")
    plugin.activate()
    assert registry.get_path("cache_root") == str(tmp_path / "data")
    lavis_paths.use_cache_root("elsewhere")  # a run file's word goes before it, for that run
    assert registry.get_path("cache_root") == str(tmp_path / "elsewhere")
    lavis_paths.use_cache_root()
    assert registry.get_path("cache_root") == str(tmp_path / "data")


def test_the_public_names_are_there():
    for name in lavis_kvmod.__all__:
        assert name in dir(lavis_kvmod)
        assert getattr(lavis_kvmod, name) is not None
    assert lavis_kvmod.Blip2OPTKVMod is registry.get_model_class("blip2_opt_kvmod")
    with pytest.raises(AttributeError, match="Blip3"):
        _ = lavis_kvmod.Blip3

"""Where shipped, named and cached files are looked for."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lavis_kvmod.commands import demo
from lavis_kvmod.commands.convert import convert
from lavis_kvmod.commands.pack import pack
from lavis_kvmod.datasets.answer_list import answer_list_problem
from lavis_kvmod.datasets.image_folders import ImageFolders
from lavis_kvmod.runners.parts import RunParts
from lavis_kvmod.system import paths
from lavis_kvmod.weights.finding import WeightFile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as a wheel installs it: its files inside, and a stranger's `projects` beside it."""
    package = tmp_path / "site-packages" / "lavis_kvmod"
    for file in (package / "projects/kvmod/own.yaml", package.parent / "projects/stranger.yaml"):
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(paths, "_PACKAGE", package)
    return package


def test_a_checkout_finds_its_files_at_the_root():
    assert paths.resource("projects/kvmod") == ROOT / "projects" / "kvmod"
    assert paths.resource("configs/models").is_absolute()


def test_an_installed_package_finds_its_files_inside(installed):
    found = paths.resource("projects/kvmod/own.yaml")
    assert found == installed / "projects/kvmod/own.yaml"


def test_what_lies_beside_an_installed_package_is_not_ours(installed):
    with pytest.raises(FileNotFoundError, match="stranger.yaml.*looked for it at"):
        paths.resource("projects/stranger.yaml")


def test_a_missing_resource_says_where_it_looked():
    with pytest.raises(FileNotFoundError) as caught:
        paths.resource("configs/nowhere.yaml")
    assert str(ROOT / "configs/nowhere.yaml") in str(caught.value)


def test_a_config_where_the_user_stands_comes_first(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "projects/kvmod/own.yaml"
    here.parent.mkdir(parents=True)
    here.touch()
    assert paths.resolve_config("projects/kvmod/own.yaml").resolve() == here
    here.unlink()
    found = paths.resolve_config("projects/kvmod/own.yaml")
    assert found == installed / "projects/kvmod/own.yaml"


def test_an_absolute_config_is_taken_as_given(tmp_path):
    file = tmp_path / "any.yaml"
    file.touch()
    assert paths.resolve_config(str(file)) == file


@pytest.mark.parametrize("prefix", ["", "lavis/"])
def test_run_files_of_lavis_are_found_too(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    name = "projects/blip2/train/caption_coco_ft.yaml"
    found = paths.resolve_config(prefix + name)
    assert found.is_file()
    assert found.parts[-5:] == ("lavis", *Path(name).parts)


def test_a_missing_config_lists_the_shipped_ones(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        paths.resolve_config("projects/kvmod/misspelt.yaml")
    message = str(caught.value)
    assert "projects/kvmod/misspelt.yaml" in message
    assert str(tmp_path) in message
    assert "shipped are projects/kvmod/own.yaml" in message


def test_the_cache_folder_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.delenv("LAVIS_KVMOD_CACHE", raising=False)
    assert paths.cache_dir() == Path.home() / ".cache" / "lavis_kvmod"
    monkeypatch.setenv("LAVIS_KVMOD_CACHE", str(tmp_path / "elsewhere"))
    assert paths.cache_dir() == tmp_path / "elsewhere"
    assert not paths.cache_dir().exists()


def test_without_a_home_folder_each_path_with_a_tilde_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.os.path, "expanduser", lambda path: path)  # as it is for a user id without a name
    monkeypatch.chdir(tmp_path)
    asked = [
        lambda: WeightFile("checkpoint", "~/a.pth", "model.pretrained").fetch(),
        lambda: convert("a.pth", "~/b.pth"),
        lambda: pack("projects/kvmod/demo_vqa.yaml", "~/shards"),
        lambda: RunParts.open_folder(SimpleNamespace(output_dir="~/out", get=lambda key, default: None)),
        lambda: ImageFolders("~/photos"),
        lambda: demo.main(SimpleNamespace(output_dir="~/demo")),
    ]
    for ask in asked:
        with pytest.raises(FileNotFoundError, match="~/.*: no home folder is known .*: set HOME to a folder of yours"):
            ask()
    assert "model.pretrained to a path without ~" in WeightFile("checkpoint", "~/a.pth", "model.pretrained").problem()
    assert "~/rows.csv (no home folder is known" in answer_list_problem("~/rows.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_of_nobody(monkeypatch):
    with pytest.raises(FileNotFoundError, match="~no-such-user/a: no user of that name has a home folder here"):
        paths.absolute("~no-such-user/a")

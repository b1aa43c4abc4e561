"""Images found by the names that annotation files give them."""

import os
import unicodedata

import pytest

from lavis_kvmod.datasets.image_folders import ImageFolders, MissingImageError, OutsideImageError
from lavis_kvmod.datasets.images import BadImageError


@pytest.fixture()
def tree(tmp_path):
    """A function: makes (empty) files below a folder, and returns that folder."""

    def make(*names, root="images"):
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / root

    return make


def test_by_path_by_name_and_without_extension(tree):
    root = tree("top.jpg", "a/deep/cat.PNG", "a/photo.17.webp")
    folders = ImageFolders(root)
    assert len(folders) == 3
    for name, path in {
        "top.jpg": "top.jpg",
        "./top.jpg": "top.jpg",
        "top": "top.jpg",
        " top.jpg ": "top.jpg",
        "a/deep/cat.PNG": "a/deep/cat.PNG",
        "deep/cat.PNG": "a/deep/cat.PNG",
        "a\\deep\\cat.PNG": "a/deep/cat.PNG",
        "cat.PNG": "a/deep/cat.PNG",
        "deep/cat": "a/deep/cat.PNG",
        "photo.17": "a/photo.17.webp",
        str(root / "top.jpg"): "top.jpg",
    }.items():
        assert folders.find(name) == str(root / path), name


@pytest.mark.parametrize("name", ["dog.jpg", "eep/cat.PNG", "b/top.jpg", "cat.jpg", "notes", "a", "", ".", "../x"])
def test_what_is_not_there_is_named_with_the_folder(tree, name):
    root = tree("top.jpg", "a/deep/cat.PNG", "notes.txt")
    with pytest.raises(MissingImageError, match="no such image below .*images"):
        ImageFolders(root).find(name)


def test_a_missing_absolute_path(tree):
    with pytest.raises(MissingImageError, match="/nowhere/a.jpg: no such file"):
        ImageFolders(tree("a.jpg")).find("/nowhere/a.jpg")


def test_a_bare_name_that_two_files_have_names_both(tree):
    root = tree("2019/img1.jpg", "2020/img1.jpg", "2020/x.png", "x.jpg")
    folders = ImageFolders(root)
    with pytest.raises(BadImageError, match="2 files fit, such as .*2019/img1.jpg and .*2020/img1.jpg; write the path"):
        folders.find("img1.jpg")
    assert folders.find("2019/img1") == str(root / "2019/img1.jpg")
    assert folders.find("x") == str(root / "x.jpg")  # straight below goes before deeper down
    tree("y.jpg", "y.png")
    with pytest.raises(BadImageError, match="y: 2 files fit"):
        ImageFolders(root).find("y")


@pytest.mark.parametrize("here, there", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_within_their_letters_or_apart(tree, here, there):
    """A Mac's archive has them apart: the same name to whoever reads it."""
    name = "Größe/café-1.jpg"
    root = tree(unicodedata.normalize(there, name))
    folders = ImageFolders(root)
    for written in (name, "café-1.jpg", "café-1", "Größe/café-1"):
        path = folders.find(unicodedata.normalize(here, written))
        assert os.path.isfile(path) and folders.name_of(path) == unicodedata.normalize("NFC", name)


def test_two_files_that_only_their_normal_form_tells_apart(tree):
    both = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    folders = ImageFolders(tree(*both))
    assert [os.path.basename(folders.find(name)) for name in both] == both


@pytest.mark.parametrize(
    "name, hint",
    [
        ("a/deep/CAT.png", "; is a/deep/cat.PNG meant?"),
        ("Cat", "; is a/deep/cat.PNG meant?"),
        ("cat.jpeg", "; is a/deep/cat.PNG meant?"),
        ("images/top.jpg", "; is top.jpg meant?"),
        ("C:\\photos\\top.jpg", "; is top.jpg meant?"),
        (
            "https://example.org/x/top.jpg?size=2",
            "; images are read from folders, not from the net; is top.jpg meant?",
        ),
        ("images/TWICE.jpg", "; is one of 2 files meant, such as b/twice.jpg?"),
        ("dog.jpg", ""),
    ],
)
def test_a_name_that_nearly_fits_says_which_file_it_may_be(tree, name, hint):
    root = tree("top.jpg", "a/deep/cat.PNG", "b/twice.jpg", "c/twice.jpg")
    with pytest.raises(MissingImageError) as told:
        ImageFolders(root).find(name)
    assert str(told.value) == f"{name}: no such image below {root}{hint}"


def test_a_name_without_end_is_shown_without_its_middle(tree):
    folders = ImageFolders(tree("a.jpg"))
    for name in ("x" * 50_000, "/" + "x" * 50_000):
        with pytest.raises(MissingImageError) as told:
            folders.find(name)
        assert len(str(told.value)) < 400


def test_a_name_does_not_lead_out_of_the_folder(tree):
    root = tree("a.jpg")
    tree("s.png", root="secret")
    os.symlink(root.parent / "secret", root / "linked")
    for name in ("../secret/s.png", "x/../../secret/s.png", "..\\secret\\s.png"):
        with pytest.raises(OutsideImageError, match="s.png: leads out of .*build_info.images.allow_outside: true"):
            ImageFolders(root).find(name)
        assert os.path.samefile(ImageFolders(root, allow_outside=True).find(name), root.parent / "secret/s.png")
    assert ImageFolders(root).find("x/../a.jpg") == str(root / "a.jpg")
    assert ImageFolders(root).find("linked/s.png") == str(root / "linked/s.png")  # a link was put there on purpose


def test_several_folders(tree, tmp_path):
    first, second = tree("a.jpg", root="set/one"), tree("b.jpg", "a/c.jpg", root="set/two")
    folders = ImageFolders([first, second])
    assert folders.find("c.jpg") == str(second / "a/c.jpg")
    assert folders.name_of(folders.find("a")) == "one/a.jpg"
    assert folders.name_of("/elsewhere/a.jpg") == "/elsewhere/a.jpg"
    tree("a.jpg", root="set/two")
    with pytest.raises(BadImageError, match="one/a.jpg and .*two/a.jpg"):
        ImageFolders([first, second]).find("a.jpg")
    assert ImageFolders(tmp_path / "set").name_of(str(first / "a.jpg")) == "one/a.jpg"


def test_a_folder_within_a_folder_gives_no_file_twice(tree):
    root = tree("in/x/a.jpg")
    assert ImageFolders([root, root / "in", root]).find("a.jpg") == str(root / "in/x/a.jpg")


def test_hidden_files_do_not_fit_by_chance(tree):
    """macOS writes ._photo.jpg beside photo.jpg."""
    root = tree("photo.jpg", "._photo.jpg", ".thumbnails/photo.jpg", "__x/._photo.jpg")
    folders = ImageFolders(root)
    assert folders.find("photo.jpg") == str(root / "photo.jpg")
    assert folders.find("._photo.jpg") == str(root / "._photo.jpg")  # unless they are meant


def test_links_are_followed_once(tree):
    root = tree("a/cat.jpg")
    os.symlink(root, root / "a" / "loop")
    assert ImageFolders(root).find("cat.jpg") == str(root / "a/cat.jpg")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*/gone"):
        ImageFolders(tmp_path / "gone")

"""Which rows a report shows, and their pictures, from files and from what the model saw."""

from types import SimpleNamespace

import numpy as np
import pytest
from lavis.processors.blip_processors import BlipImageEvalProcessor
from PIL import Image
from skimage import data

from lavis_kvmod.reports.examples import choose, thumbnail
from lavis_kvmod.tasks.evaluation import Evaluated


def rows(scores, images=None):
    images = images or [f"{i}.jpg" for i in range(len(scores))]
    return [
        {"instance_id": str(i), "image": image, "accuracy": score, "confidence": 0.5 + i / 100}
        for i, (score, image) in enumerate(zip(scores, images))
    ]


def chosen(found, key="instance_id"):
    return {group.title: [row[key] for row in group.rows] for group in found}


def test_worst_best_and_between_the_surest_first():
    found = chosen(choose(rows([1.0, 0.3, 0.0, 1.0, 0.0, 0.6, 0.9, 0.1]), ["accuracy"], 2))
    assert found == {
        "Lowest accuracy": ["4", "2"],
        "Highest accuracy": ["3", "0"],
        "From lowest to highest accuracy": ["7", "3"],  # of 4 2 7 1 5 6 3 0
    }


def test_an_image_once_in_a_group_as_far_as_there_are_others():
    some = rows([0.0, 0.0, 0.0, 1.0], ["b", "a", "a", "b"])
    assert chosen(choose(some, ["accuracy"], 2))["Lowest accuracy"] == ["2", "0"]
    assert chosen(choose(some, ["accuracy"], 3))["Lowest accuracy"] == ["2", "0", "1"]


@pytest.mark.parametrize("goodness", [(), ("CIDEr",)])
def test_without_scores_rows_from_all_over(goodness):
    (group,) = choose(rows([None] * 100), goodness, 4)
    assert (group.title, [row["instance_id"] for row in group.rows]) == ("Examples", ["12", "37", "62", "87"])
    assert choose([], ["accuracy"])[0].rows == []


def test_rows_that_were_not_scored_are_no_examples_of_good_or_bad():
    found = chosen(choose(rows([None, float("nan"), 0.5]), ["accuracy"], 2))
    assert set(map(tuple, found.values())) == {("2",)}


class FromArrays:
    """A LAVIS-like data set without files."""

    vis_processor = BlipImageEvalProcessor(64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    annotation = [{"instance_id": "0", "image": "x"}, {"instance_id": "7", "image": "coffee"}]

    def __getitem__(self, index):
        assert index == 1
        return {"image": self.vis_processor(Image.fromarray(data.coffee()))}


def colour(image):
    return np.asarray(image).reshape(-1, 3).mean(0)


def test_a_picture_from_its_file(tmp_path):
    Image.fromarray(data.coffee()).save(tmp_path / "coffee.png")
    evaluated = Evaluated([], SimpleNamespace(vis_root=str(tmp_path)), {}, ())
    for name in ("coffee.png", str(tmp_path / "coffee.png")):
        image = thumbnail({"instance_id": "7", "image": name}, evaluated)
        assert image.size == (256, 171) and np.abs(colour(image) - colour(data.coffee())).max() < 3


def test_a_picture_from_what_the_model_sees_with_the_processors_own_normalisation():
    evaluated = Evaluated([], FromArrays(), {}, ())
    image = thumbnail({"instance_id": "7", "image": "coffee"}, evaluated)
    assert image.size == (256, 256)  # 64 pixels, each enlarged to 4
    assert np.abs(colour(image) - colour(data.coffee())).max() < 3


def test_a_streamed_picture():
    pixels = FromArrays()[1]["image"].half()
    evaluated = Evaluated([], SimpleNamespace(vis_processor=FromArrays.vis_processor), {"s": pixels}, ())
    image = thumbnail({"instance_id": "s", "image": "in a shard"}, evaluated)
    assert np.abs(colour(image) - colour(data.coffee())).max() < 3
    assert thumbnail({"instance_id": "other", "image": "in a shard"}, evaluated) is None


def test_a_picture_that_cannot_be_read_is_told(tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    evaluated = Evaluated([], SimpleNamespace(vis_root=str(tmp_path)), {}, ())
    assert thumbnail({"instance_id": "0", "image": "broken.png"}, evaluated) is None
    assert "no picture of broken.png" in caplog.text

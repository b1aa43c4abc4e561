"""Rows of several images: several columns, or a list in a cell."""

import json
import random

import pytest
import torch
from omegaconf import OmegaConf

from lavis_kvmod.commands.train import train
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.custom import CustomCaptionBuilder, CustomVQABuilder
from lavis_kvmod.datasets.retrieval import CustomRetrievalBuilder
from lavis_kvmod.datasets.splits import split_by_image
from lavis_kvmod.system.paths import resource
from lavis_kvmod.system.schema import ConfigurationError

ROWS = [
    {"left": "astronaut.png", "right": "chelsea.png", "question": "Which is a cat?", "answer": "right"},
    {"left": "coffee.png", "right": "camera", "question": "Which is coffee?", "answer": "left"},
    {"left": "rocket", "right": "", "question": "What is it?", "answer": "a rocket"},
    {"left": "camera", "right": "more/retina.jpg", "question": "Which is an eye?", "answer": "right"},
]
COLUMNS = {"image": ["left", "right"]}


@pytest.fixture()
def section(photos, section_of):
    def make(path, builder=CustomVQABuilder, **overrides):
        info = {"images": {"storage": str(photos)}, "annotations": {"train": {"storage": str(path)}}}
        return section_of(builder, build_info=info, **overrides)

    return make


def test_two_columns_or_a_list_in_a_cell_are_the_same_rows(section, write_csv):
    lists = [{**row, "image": json.dumps([name for name in (row["left"], row["right"]) if name])} for row in ROWS]
    written = [section(write_csv("two.csv", ROWS), columns=COLUMNS), section(write_csv("lists.csv", lists))]
    ways = [CustomVQABuilder(one).build_datasets()["train"] for one in written]
    batches = [way.collater([way[i] for i in range(4)]) for way in ways]
    assert torch.is_tensor(batches[0]["image"]) and batches[0]["image"].shape == (4, 2, 3, 28, 28)
    assert batches[0]["image_mask"].tolist() == [[True, True], [True, True], [True, False], [True, True]]
    names = [row["image_id"] for row in ways[1].annotation]
    assert names[0] == "astronaut.png + chelsea.png" and " + " not in names[2]
    assert ways[0].annotation[2]["image"] == ways[1].annotation[2]["image"]
    assert [row["image"] for row in ways[0].annotation] == [row["image"] for row in ways[1].annotation]


def test_an_eval_processor_gives_each_image_its_key(section, write_csv):
    from lavis_kvmod.datasets.annotated import VQAEvalData

    built = CustomVQABuilder(section(write_csv("two.csv", ROWS), columns=COLUMNS))
    built.build_processors()
    rows = built.prepare()["train"]
    data = VQAEvalData(built.vis_processors["eval"], built.text_processors["eval"], rows)
    keys = data.collater([data[0], data[2], data[3]])["image_key"]
    assert [len(each) for each in keys] == [2, 1, 2]
    assert keys[0][1].endswith("chelsea.png")


def test_captions_of_several_images(section, write_csv):
    rows = [{"left": row["left"], "right": row["right"], "caption": row["answer"]} for row in ROWS]
    one = section(write_csv("captions.csv", rows), CustomCaptionBuilder, columns=COLUMNS)
    data = CustomCaptionBuilder(one).build_datasets()["train"]
    assert data[0]["image"].shape == (2, 3, 28, 28)
    of_retrieval = section(write_csv("captions.csv", rows), CustomRetrievalBuilder, columns=COLUMNS)
    (told,) = CustomRetrievalBuilder.config_problems(of_retrieval)
    assert "captions.csv, row 2: expected one image, got 2: astronaut.png + chelsea.png" in told


def test_an_image_that_is_not_there_is_told_with_its_row(section, write_csv):
    rows = [{**ROWS[0], "right": "nowhere.png"}, *ROWS[1:]]
    (told,) = CustomVQABuilder.config_problems(section(write_csv("two.csv", rows), columns=COLUMNS))
    assert "two.csv, row 2: nowhere.png: no such image" in told


def test_no_image_is_in_two_splits():
    rows = [
        {"image": ("a", "b"), "image_name": "a + b"},
        {"image": ("c", "b"), "image_name": "c + b"},
        *({"image": (f"{i}", f"{i}'"), "image_name": f"{i} + {i}'"} for i in range(30)),
        {"image": ("c",), "image_name": "c"},
    ]
    for seed in range(5):
        divided = split_by_image(rows, {"val": 0.3}, seed)
        shown = [{path for row in split for path in row["image"]} for split in divided.values()]
        assert all(shown) and not shown[0] & shown[1]


@pytest.fixture()
def run_of_pairs(run_file, write_csv):
    def write(max_images, **run):
        name = write_csv("two.csv", ROWS)
        files = {"annotations": {split: {"storage": str(name)} for split in ("train", "val")}}
        path = run_file("custom_vqa", {"build_info": files, "columns": COLUMNS}, test_splits=[], **run)
        return path, [f"model.max_images={max_images}"]

    return write


def test_more_images_than_the_model_takes_are_told_before_it_is_built(run_of_pairs):
    path, options = run_of_pairs(1)
    with pytest.raises(ConfigurationError, match=r"model.max_images: expected at least 2, .* in two.csv, row 2; got 1"):
        load_config(path, options)


def test_a_run_of_pairs_is_trained_scored_and_reported(run_of_pairs, tmp_path):
    path, options = run_of_pairs(2)
    train(path, [*options, "model.cache_frozen_features=true"])
    (found,) = tmp_path.glob("output/*/result/val*.json")
    rows = json.loads(found.read_text())
    assert [row["image"].count(" + ") for row in rows] == [1, 1, 0, 1]


def pairs_of_scans(scans, count):
    """Rows about two scans of different digits, one of them in red, which stands on either side."""
    from lavis_kvmod.demo import digits

    rng, rows = random.Random(0), []
    red, other = ([scan for scan in scans if (scan.ink == "red") == is_red] for is_red in (True, False))
    while len(rows) < count:
        pair = [rng.choice(red), rng.choice(other)]
        if pair[0].digit == pair[1].digit:
            continue
        shown = rng.sample(pair, 2)
        names = {"left": f"{shown[0].index}.png", "right": f"{shown[1].index}.png"}
        rows.append({**names, "question": "Which of the two is red?", "answer": digits.DIGIT_WORDS[pair[0].digit]})
        rows.append({**names, "question": "Which digit is on the left?", "answer": digits.DIGIT_WORDS[shown[0].digit]})
    return rows


def sequences_with_a_seven(scans, count):
    """Rows about three scans of different digits, one a seven, which is not the last."""
    from lavis_kvmod.demo import digits

    rng, rows = random.Random(0), []
    sevens, others = ([scan for scan in scans if (scan.digit == 7) == is_seven] for is_seven in (True, False))
    while len(rows) < count:
        shown = rng.sample(others, 2)
        if shown[0].digit == shown[1].digit:
            continue
        place = rng.randrange(2)
        shown.insert(place, rng.choice(sevens))
        names = {column: f"{scan.index}.png" for column, scan in zip(("first", "second", "third"), shown)}
        after, first = (digits.DIGIT_WORDS[scan.digit] for scan in (shown[place + 1], shown[0]))
        rows.append({**names, "question": "What comes after the seven?", "answer": after})
        rows.append({**names, "question": "Which digit comes first?", "answer": first})
    return rows


@pytest.fixture()
def trained_on(tmp_path, monkeypatch, write_csv):
    """A function: the share of right answers by question, of the demo's model trained on rows that ``draw(scans,
    count)`` makes of the training scans, asked about 400 such rows of held-out scans."""
    from lavis_kvmod.demo import digits

    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()

    def train_and_ask(draw, columns, epochs):
        files = {}
        for split, count in (("train", 3000), ("test", 400)):
            scans = digits.load_scans(split)
            for scan in scans:
                digits.render(scan).save(tmp_path / "scans" / f"{scan.index}.png")
            files[split] = {"storage": str(write_csv(f"{split}.csv", draw(scans, count)))}
        size = {"name": "blip_image_eval", "image_size": 56}
        section = {
            "build_info": {"images": {"storage": "scans"}, "annotations": files},
            "columns": {"image": columns},
            "vis_processor": {"train": size, "eval": size},
        }
        cfg = OmegaConf.load(resource("projects/kvmod/demo_vqa.yaml"))
        cfg.datasets = {"custom_vqa": section}
        cfg.model.update(max_images=len(columns), cache_frozen_features=True, aux_image_size=56)
        cfg.run.update(max_epoch=epochs, batch_size_train=64, valid_splits=[], kv_lr_scale=3)
        OmegaConf.save(cfg, tmp_path / "run.yaml")
        train("run.yaml")
        (path,) = tmp_path.glob("output/*/*/result/test*.json")
        right = {}
        for row in json.loads(path.read_text()):
            right.setdefault(row["question"], []).append(row["accuracy"])
        assert {len(of_question) for of_question in right.values()} == {200}
        return {question: sum(of_question) / 200 for question, of_question in right.items()}

    return train_and_ask


@pytest.mark.slow
def test_which_of_the_two_is_red_and_which_is_on_the_left(trained_on):
    """Of one of the questions, who sees the first image alone (red), or both and not their places (left), is right
    about half the time. Seen: 0.74 and 0.87."""
    right = trained_on(pairs_of_scans, COLUMNS["image"], epochs=5)
    assert right["Which of the two is red?"] > 0.65 and right["Which digit is on the left?"] > 0.75


@pytest.mark.slow
def test_what_comes_after_the_seven(trained_on):
    """Who sees all three and not their order is right half the time, of either question. Seen: 0.93 and 0.75; after 5
    epochs 0.72 and 0.58."""
    right = trained_on(sequences_with_a_seven, ["first", "second", "third"], epochs=8)
    assert right["What comes after the seven?"] > 0.75 and right["Which digit comes first?"] > 0.6

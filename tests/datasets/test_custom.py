"""`custom_vqa` and `custom_caption`: one's own files, from YAML alone."""

import json
import shutil

import pandas as pd
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.custom import CustomCaptionBuilder, CustomVQABuilder

ROWS = [
    {"image": "astronaut.png", "question": "Who is it?", "answer": "an astronaut", "question_id": "q1"},
    {"image": "camera", "question": "What does he look through?", "answer": "a camera", "question_id": "q2"},
    {"image": "chelsea.png", "question": "Which animal is it?", "answer": "a cat", "question_id": "q3"},
    {"image": "more/coffee.png", "question": "What is in the cup?", "answer": "coffee", "question_id": "q4"},
    {"image": "coffee.png", "question": "Is there a spoon?", "answer": "yes", "question_id": "q5"},
]
CAPTIONS = [
    {"image": "chelsea.png", "caption": "a ginger cat"},
    {"image": "coffee.png", "caption": "a cup of coffee on a table"},
    {"image": "chelsea", "caption": "the face of a cat"},
]


@pytest.fixture()
def vqa(photos, section_of):
    """A function: the section of a `custom_vqa` set with a train file, and overrides."""

    def make(train=None, *, val=None, test=None, images=photos, **overrides):
        files = {"train": train, "val": val, "test": test}
        annotations = {split: {"storage": str(path)} for split, path in files.items() if path is not None}
        info = {"images": {"storage": images if isinstance(images, list) else str(images)}, "annotations": annotations}
        return section_of(CustomVQABuilder, build_info=info, **overrides)

    return make


@pytest.fixture()
def caption(vqa):
    def make(*args, **overrides):
        section = vqa(*args, **overrides)
        for key in ("answer_separator", "answer_list"):
            del section[key]
        return section

    return make


def build(section, builder=CustomVQABuilder):
    return builder(section).build_datasets()


def problems(section, builder=CustomVQABuilder):
    found = builder.config_problems(section)
    assert found
    return "\n".join(found)


def batch(dataset, size=8, num_workers=0):
    return next(iter(DataLoader(dataset, batch_size=size, collate_fn=dataset.collater, num_workers=num_workers)))


def test_lavis_knows_the_builders():
    assert registry.get_builder_class("custom_vqa") is CustomVQABuilder
    assert registry.get_builder_class("custom_caption") is CustomCaptionBuilder


# ------------------------------------------------------------ questions


def as_json(tmp_path, rows, content=lambda rows: rows):
    path = tmp_path / "qa.json"
    path.write_text(json.dumps(content(rows)), encoding="utf-8")
    return path


def as_parquet(tmp_path, rows):
    pd.DataFrame(rows).to_parquet(tmp_path / "qa.parquet")
    return tmp_path / "qa.parquet"


@pytest.mark.parametrize("layout", ["csv", "tsv", "jsonl", "json", "annotations", "data", "parquet"])
def test_all_layouts_say_the_same(vqa, write_csv, write_jsonl, tmp_path, layout):
    path = {
        "csv": lambda: write_csv("qa.csv", ROWS),
        "tsv": lambda: write_csv("qa.tsv", ROWS, "\t"),
        "jsonl": lambda: write_jsonl("qa.jsonl", ROWS),
        "json": lambda: as_json(tmp_path, ROWS),
        "parquet": lambda: as_parquet(tmp_path, ROWS),
    }.get(layout, lambda: as_json(tmp_path, ROWS, lambda rows: {layout: rows}))()
    train = build(vqa(path))["train"]
    assert [row["question"] for row in train.annotation] == [row["question"] for row in ROWS]
    assert [row["answer"] for row in train.annotation] == [[row["answer"]] for row in ROWS]
    assert [row["question_id"] for row in train.annotation] == ["q1", "q2", "q3", "q4", "q5"]
    assert [row["image_id"] for row in train.annotation][1:] == [
        "more/camera.png",
        "chelsea.png",
        "more/coffee.png",
        "more/coffee.png",
    ]
    assert train.annotation[4]["source"].startswith("qa.") and train.annotation[4]["instance_id"] == "4"


def test_a_training_batch_is_lavis_vqa_batch(vqa, write_csv):
    got = batch(build(vqa(write_csv("qa.csv", ROWS)))["train"], 3, num_workers=1)
    assert set(got) == {"image", "text_input", "answer", "weight", "n_answers"}
    assert got["image"].shape == (3, 3, 28, 28) and got["image"].dtype == torch.float32
    assert got["text_input"] == ["who is it?", "what does he look through?", "which animal is it?"]
    assert got["answer"] == ["an astronaut", "a camera", "a cat"]
    assert got["weight"].tolist() == [1.0] * 3 and got["n_answers"].tolist() == [1] * 3


def test_an_evaluation_batch_has_ids_and_targets(vqa, write_csv):
    path = write_csv("qa.csv", ROWS)
    datasets = build(vqa(path, val=path, test=write_csv("test.csv", [{"image": "rocket", "question": "What flies?"}])))
    got = batch(datasets["val"], 2)
    assert got["question_id"] == ["q1", "q2"] and got["instance_id"] == ["0", "1"]
    assert got["image_id"] == ["astronaut.png", "more/camera.png"]
    assert got["answer"] == ["an astronaut", "a camera"] and got["n_answers"].tolist() == [1, 1]
    assert {key.split(":")[1] for key in got["image_key"]} == {row["image"] for row in datasets["val"].annotation[:2]}
    got = batch(datasets["test"], 2)
    assert set(got) == {"image", "image_key", "image_id", "question_id", "instance_id", "text_input"}
    assert "answer" not in datasets["test"].annotation[0]


def test_equal_image_keys_mean_equal_pixels(vqa, write_csv):
    section = vqa(write_csv("qa.csv", ROWS), val=write_csv("qa.csv", ROWS))
    assert "image_key" not in build(section)["train"][0]  # random crops
    section.vis_processor.train.name = "blip_image_eval"
    datasets = build(section)
    a, b, c = datasets["train"][3], datasets["train"][4], datasets["val"][3]
    assert a["image_key"] == b["image_key"] == c["image_key"] and torch.equal(a["image"], c["image"])
    section.vis_processor.train.image_size = 14
    assert build(section)["train"][3]["image_key"] != a["image_key"]


ANNOTATORS = ["cat", "cat", "a cat", "cat"]


IN_ONE_CELL = {"answer": json.dumps(ANNOTATORS)}
WITH_BARS = {"answer": "cat|cat| a cat |cat|"}
IN_COLUMNS = {"a1": "cat", "a2": "cat", "a3": "a cat", "a4": "cat"}


@pytest.mark.parametrize(
    "kind, row, overrides",
    [
        ("jsonl", {"answer": ANNOTATORS}, {}),
        *((kind, IN_ONE_CELL, {}) for kind in ("csv", "jsonl")),
        *((kind, WITH_BARS, {"answer_separator": "|"}) for kind in ("csv", "jsonl")),
        *((kind, IN_COLUMNS, {"columns": {"answer": list(IN_COLUMNS)}}) for kind in ("csv", "jsonl")),
    ],
)
def test_many_answers_a_row(vqa, write_csv, write_jsonl, kind, row, overrides):
    rows = [{"image": "chelsea.png", "question": "What is it?", **row}]
    path = write_csv("qa.csv", rows) if kind == "csv" else write_jsonl("qa.jsonl", rows)
    train = build(vqa(path, **overrides))["train"]
    assert train.annotation[0]["answer"] == ANNOTATORS
    assert train[0]["answers"] == ["cat", "a cat"] and train[0]["weights"] == [0.75, 0.25]
    assert train.answer_list == ["cat", "a cat"]


def test_one_answer_in_brackets_or_with_a_comma_stays_one(vqa, write_csv):
    rows = [{"image": "chelsea", "question": "What?", "answer": answer} for answer in ("[sic]", "1,000", "a; b")]
    train = build(vqa(write_csv("qa.csv", rows)))["train"]
    assert [row["answer"] for row in train.annotation] == [["[sic]"], ["1,000"], ["a; b"]]


def test_answers_and_weights_in_columns_stay_pairs(vqa, write_csv):
    """Whoever gave no answer has a weight that belongs to nothing."""
    row = {"image": "chelsea", "question": "What?", "a1": "cat", "a2": "", "a3": "pet", "w1": 0.5, "w2": 0.3, "w3": 0.2}
    columns = {"answer": ["a1", "a2", "a3"], "weight": ["w1", "w2", "w3"]}
    sample = build(vqa(write_csv("qa.csv", [row]), columns=columns))["train"][0]
    assert sample["answers"] == ["cat", "pet"] and sample["weights"] == pytest.approx([0.5, 0.2])
    assert "1 weights for 2 answers" in problems(vqa(write_csv("qa.csv", [{**row, "w3": ""}]), columns=columns))


def test_a_line_break_in_an_answer_is_a_space(vqa, write_csv, write_jsonl):
    """A model's answer ends at a line break: one inside could be learnt, but never be said."""
    rows = [{**ROWS[2], "answer": "a\ncat"}, {**ROWS[3], "answer": " hot \r\n coffee", "question": "What\nis it?"}]
    for path in (write_csv("qa.csv", rows), write_jsonl("qa.jsonl", rows)):
        train = build(vqa(path))["train"]
        assert [row["answer"] for row in train.annotation] == [["a cat"], ["hot coffee"]]
        assert train.annotation[1]["question"] == "What is it?" and train.answer_list == ["a cat", "hot coffee"]


def test_lists_and_weights_as_pandas_writes_them(vqa, write_csv):
    row = {"image": "chelsea.png", "question": "What is it?", "answer": "['cat' 'a cat']", "weight": "[0.75 0.25]"}
    train = build(vqa(write_csv("qa.csv", [row])))["train"]
    assert train[0]["answers"] == ["cat", "a cat"] and train[0]["weights"] == [0.75, 0.25]
    found = problems(vqa(write_csv("qa.csv", [{**row, "answer": "['cat', 'a cat"}, {**row, "answer": "['a cat's]"}])))
    assert "qa.csv, row 3: answer: it begins as a list does" in found


def test_what_may_be_a_list_is_told(vqa, write_csv, caplog):
    rows = [{"image": "chelsea", "question": "What?", "answer": answer} for answer in ("[cat, pet]", "[a, b]", "[sic]")]
    assert len(build(vqa(write_csv("qa.csv", rows)))["train"]) == 3
    assert "qa.csv: 2 answers look like lists, and are taken as one text each, such as [cat, pet]; " in caplog.text


def test_answers_as_in_vqas_own_files(vqa, write_jsonl):
    answers = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    rows = [{"image": "chelsea", "question": "What?", "answer": answers}]
    assert build(vqa(write_jsonl("qa.jsonl", rows)))["train"].annotation[0]["answer"] == ["cat"] * 10


def test_weights_may_be_given(vqa, write_jsonl):
    rows = [{"image": "chelsea", "question": "What?", "answer": ["cat", "pet", "cat"], "weight": [0.5, 0.2, 0.1]}]
    sample = build(vqa(write_jsonl("qa.jsonl", rows)))["train"][0]
    assert sample["answers"] == ["cat", "pet"] and sample["weights"] == pytest.approx([0.6, 0.2])


def test_ids_of_any_type(vqa, write_jsonl):
    ids = [7, "7", "x-7", 2.5, None, "", 10**30]
    rows = [{**ROWS[0], "question_id": id, "image_id": id if id != "" else None} for id in ids]
    section = vqa(write_jsonl("qa.jsonl", rows), val=write_jsonl("val.jsonl", rows))
    val = build(section)["val"]
    assert [row["question_id"] for row in val.annotation] == [7, "7", "x-7", 2.5, "val-5", "val-6", 10**30]
    assert [row["image_id"] for row in val.annotation] == [7, "7", "x-7", 2.5, "astronaut.png", "astronaut.png", 10**30]
    assert batch(val)["question_id"] == [7, "7", "x-7", 2.5, "val-5", "val-6", 10**30]


def test_whole_numbers_are_collated_as_lavis_tasks_want_them(vqa, write_jsonl):
    rows = [{**row, "question_id": i, "image_id": 100 + i} for i, row in enumerate(ROWS[:3])]
    got = batch(build(vqa(write_jsonl("qa.jsonl", rows), val=write_jsonl("qa.jsonl", rows)))["val"])
    assert torch.equal(got["question_id"], torch.tensor([0, 1, 2]))
    assert got["image_id"].tolist() == [100, 101, 102]


def test_columns_of_other_names(vqa, write_csv):
    rows = [{"Datei": "chelsea", "Frage": "Was?", "Antwort": "Katze", "Art": "Tier", "question": "no"}]
    columns = {"image": "Datei", "question": "Frage", "answer": "Antwort", "question_type": "Art"}
    (row,) = build(vqa(write_csv("qa.csv", rows), columns=columns))["train"].annotation
    assert (row["question"], row["answer"], row["question_type"]) == ("Was?", ["Katze"], "Tier")


def test_several_files_and_folders(vqa, write_csv, photos, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.move(str(photos / "chelsea.png"), str(tmp_path / "other"))
    section = vqa("x", images=[str(photos), str(tmp_path / "other")])
    section.build_info.annotations.train.storage = [
        str(write_csv("one.csv", ROWS[:2])),
        str(write_csv("two.csv", ROWS[2:], ";")),
    ]
    train = build(section)["train"]
    assert [row["source"] for row in train.annotation[1:3]] == ["one.csv, row 3", "two.csv, row 2"]
    assert train[2]["image"].shape == (3, 28, 28)


def test_files_of_the_same_name_are_told_apart(vqa, write_csv, tmp_path):
    section = vqa("x")
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        write_csv(f"{folder}/qa.csv", [{**ROWS[0], "question_id": folder}])
    section.build_info.annotations.train.storage = [str(tmp_path / folder / "qa.csv") for folder in ("old", "new")]
    sources = [row["source"] for row in build(section)["train"].annotation]
    assert sources == [f"{tmp_path}/{folder}/qa.csv, row 2" for folder in ("old", "new")]


def test_paths_from_where_one_stands_then_from_the_cache_root(vqa, write_csv, photos, tmp_path, monkeypatch):
    write_csv("qa.csv", ROWS)
    section = vqa("qa.csv", images="photos")
    monkeypatch.chdir(tmp_path)
    assert len(build(section)["train"]) == 5
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "no file" in problems(section) and "no folder" in problems(section)
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    assert len(build(section)["train"]) == 5


def test_the_answers_to_rank_come_from_train_or_are_given(vqa, write_csv, tmp_path):
    path = write_csv("qa.csv", [*ROWS, {**ROWS[4], "question_id": "q6"}])
    val = write_csv("val.csv", [{**ROWS[0], "answer": "a secret"}])
    ours = ["yes", "a camera", "a cat", "an astronaut", "coffee"]  # most frequent first
    datasets = build(vqa(path, val=val))
    assert datasets["train"].answer_list == datasets["val"].answer_list == ours
    assert build(vqa(val=val))["val"].answer_list is None
    assert build(vqa(path, answer_list=["yes", "no", "yes"]))["train"].answer_list == ["yes", "no"]
    (tmp_path / "answers.txt").write_text("yes\n\nno\n")
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    for name in ("answers.txt", "answers.json"):
        assert build(vqa(path, answer_list=str(tmp_path / name)))["train"].answer_list == ["yes", "no"]


def test_what_is_no_answer_list(vqa, write_csv, tmp_path):
    path = write_csv("qa.csv", ROWS)
    (tmp_path / "answers.json").write_text('{"yes": 1}')
    for given, message in (
        ([True, False], "expected texts, got .True, False.; YAML wants yes, no and numbers in quotes"),
        ([], "the list holds no answers"),
        ("gone.txt", "no file .*gone.txt nor "),
        (str(tmp_path / "answers.json"), "expected a list of strings"),
    ):
        with pytest.raises(BadDataError, match=f"answer_list: .*{message}"):
            build(vqa(path, answer_list=given))


# ------------------------------------------------------------ captions


def test_captions_for_training_are_one_a_sample(caption, write_csv):
    train = build(caption(write_csv("c.csv", CAPTIONS)), CustomCaptionBuilder)["train"]
    got = batch(train)
    assert set(got) == {"image", "text_input", "image_id"}
    assert got["text_input"] == ["a ginger cat", "a cup of coffee on a table", "the face of a cat"]
    assert got["image_id"] == ["chelsea.png", "more/coffee.png", "chelsea.png"]


@pytest.mark.parametrize("several", ["rows", "list", "separator", "columns"])
def test_captions_for_evaluation_are_one_an_image(caption, write_csv, write_jsonl, several):
    both = [CAPTIONS[0]["caption"], CAPTIONS[2]["caption"]]
    other = {"image": "coffee.png"}
    path, overrides = {
        "rows": lambda: (write_csv("c.csv", CAPTIONS), {}),
        "list": lambda: (
            write_jsonl("c.jsonl", [{"image": "chelsea", "caption": both}, {**other, "caption": "a cup"}]),
            {},
        ),
        "separator": lambda: (
            write_csv("c.csv", [{"image": "chelsea", "caption": "#".join(both)}, {**other, "caption": "a cup"}]),
            {"caption_separator": "#"},
        ),
        "columns": lambda: (
            write_csv("c.csv", [{"image": "chelsea", "c1": both[0], "c2": both[1]}, {**other, "c1": "a cup"}]),
            {"columns": {"caption": ["c1", "c2"]}},
        ),
    }[several]()
    datasets = build(caption(path, val=path, **overrides), CustomCaptionBuilder)
    assert [row["caption"] for row in datasets["val"].annotation][0] == both
    got = batch(datasets["val"])
    assert got["image_id"] == ["chelsea.png", "more/coffee.png"] and got["instance_id"] == ["0", "1"]
    assert got["text_input"][0] == "a ginger cat"
    assert [row["caption"] for row in datasets["train"].annotation].count([both[1]]) == 1


def test_a_line_break_in_a_caption_is_a_space(caption, write_csv):
    path = write_csv("c.csv", [{"image": "chelsea", "caption": "a ginger\ncat"}])
    datasets = build(caption(path, val=path), CustomCaptionBuilder)
    assert [datasets[split].annotation[0]["caption"] for split in ("train", "val")] == [["a ginger cat"]] * 2


def test_images_to_caption_need_no_captions(caption, write_csv):
    test = build(caption(test=write_csv("c.csv", [{"image": "chelsea"}])), CustomCaptionBuilder)["test"]
    assert set(batch(test)) == {"image", "image_key", "image_id", "instance_id"}


# ------------------------------------------------------------ splits


def test_one_file_is_split_by_image(vqa, write_csv):
    rows = [{**row, "question_id": f"{row['question_id']}-{i}"} for i in range(3) for row in ROWS]
    rows += [{"image": name, "question": "What?", "answer": "it", "question_id": name} for name in ("rocket", "retina")]
    split = {"val": 0.2, "test": 0.2}

    def images(seed, rows):
        datasets = build(vqa(write_csv("qa.csv", rows), split={**split, "seed": seed}))
        assert sum(map(len, datasets.values())) == len(rows)
        return {name: {row["image_id"] for row in dataset.annotation} for name, dataset in datasets.items()}

    first = images(1, rows)
    assert {name: len(found) for name, found in first.items()} == {"train": 4, "val": 1, "test": 1}
    assert not first["train"] & first["val"] and not first["val"] & first["test"] and not first["train"] & first["test"]
    assert images(1, rows[::-1]) == first  # whatever the order
    assert any(images(seed, rows) != first for seed in range(2, 6))


def test_rows_without_an_image_draw_no_lot(vqa, write_csv):
    """Else a split of one image might get the one that is not there, and be empty."""
    bad = [{**ROWS[0], "image": name, "question_id": f"bad {name}"} for name in ("gone", "")]
    for seed in range(6):
        section = vqa(write_csv("qa.csv", [*ROWS, *bad]), split={"val": 0.1, "seed": seed}, on_bad_sample="skip")
        section.max_bad_share = 0.5
        datasets = build(section)
        clean = build(vqa(write_csv("qa.csv", ROWS), split={"val": 0.1, "seed": seed}))
        for split in ("train", "val"):
            assert [row["question_id"] for row in datasets[split].annotation] == [
                row["question_id"] for row in clean[split].annotation
            ]


def test_a_split_may_be_taken_from_train_beside_a_test_file(vqa, write_csv):
    path = write_csv("qa.csv", ROWS)
    datasets = build(vqa(path, test=path, split={"val": 0.01}))  # never less than one image
    assert {name: len(dataset) for name, dataset in datasets.items()}["test"] == 5
    assert len(datasets["train"]) + len(datasets["val"]) == 5 and len(datasets["val"]) > 0


def test_which_splits_a_run_reads(vqa, write_csv):
    path = write_csv("qa.csv", ROWS)
    split = vqa(path, split={"val": 0.25, "seed": 3})
    assert CustomVQABuilder.splits_given(split) == ["train", "val"]
    assert CustomVQABuilder.splits_read(split, {"val"}) == {"train", "val"}
    files = vqa(path, val=path, test=path)
    assert CustomVQABuilder.splits_given(files) == ["train", "val", "test"]
    assert CustomVQABuilder.splits_read(files, {"val"}) == {"val"}
    assert CustomVQABuilder.splits_read(files, {"val"}, ranks=True) == {"train", "val"}
    assert CustomVQABuilder.splits_read(vqa(path, val=path, answer_list=["a"]), {"val"}, ranks=True) == {"val"}
    assert CustomVQABuilder.splits_read(vqa("gone.csv", val=path), {"val"}, ranks=True) == {"val"}
    assert CustomCaptionBuilder.splits_read(files, {"val"}) == {"val"}
    assert CustomCaptionBuilder.splits_read(split, {"val"}) == {"train", "val"}


@pytest.mark.parametrize(
    "split, message",
    [
        ({"val": 1.5}, "split.val: expected a share of the images between 0 and 1, got 1.5"),
        ({"val": 0.5, "test": 0.5}, "split: expected shares that sum to less than 1, got 1"),
        ({"val": 0.1, "seed": "x"}, "split.seed: expected a whole number, got 'x'"),
        ({"train": 0.8}, "split.train: train is what the others leave"),
        ({"test": 0.1}, "split.test: test has a file of its own"),
        ({"val": 0.99}, "split: 4 images are too few"),
        ("random", "split: expected keys with values, got 'random'"),
    ],
)
def test_what_is_no_split(vqa, write_csv, split, message):
    path = write_csv("qa.csv", ROWS)
    section = vqa(path, test=path if "file of its own" in message else None)
    section.split = split
    assert message in problems(section)


@pytest.mark.parametrize("image", ["photos/{}", "https://example.org/{}", "C:\\photos\\{}"])
def test_a_fault_of_all_rows_is_not_hidden_by_the_split(vqa, write_csv, image):
    rows = [{**row, "image": image.format(row["image"].split("/")[-1])} for row in ROWS]
    found = problems(vqa(write_csv("qa.csv", rows), split={"val": 0.2, "test": 0.2}))
    assert "5 of 5 rows of train (5 × image not found) cannot be used" in found and "too few" not in found


# ------------------------------------------------------------ what is wrong is told, all of it


def test_all_that_is_wrong_with_a_section_is_told_at_once(vqa, tmp_path):
    section = vqa(tmp_path / "gone.csv", val=tmp_path / "away.csv", images=tmp_path / "nowhere", on_bad_sample="drop")
    section.colums = {"image": "x"}
    section.columns = {"imge": "x", "question": ["a", "b"]}
    found = problems(section)
    for part in (
        f"no file {tmp_path / 'gone.csv'} (annotations of train); set build_info.annotations.train.storage to yours",
        f"no file {tmp_path / 'away.csv'} (annotations of val)",
        f"no folder {tmp_path / 'nowhere'} (images); set build_info.images.storage to yours",
        "on_bad_sample: expected raise or skip, got 'drop'",
        "colums: unknown key; did you mean columns?",
        "columns.imge: unknown key; did you mean image?",
        "columns.question: expected the name of one column, got ['a', 'b']",
    ):
        assert part in found, part


def test_a_bare_section_says_what_to_set(section_of):
    found = problems(section_of(CustomVQABuilder))
    assert "build_info.images.storage: not set; set it to the folder of the images" in found
    assert "build_info.annotations: names no file; set build_info.annotations.train.storage" in found


def test_wrong_columns_are_told_for_all_files(vqa, write_csv):
    train = write_csv("train.csv", [{"img": "a", "questions": "b", "answer": "c"}])
    val = write_csv("val.csv", [{"image": "chelsea", "question": "b", "answers": "c"}])
    found = problems(vqa(train, val=val, columns={"question_type": "kind"}))
    for part in (
        "expected a column 'image' (did you mean 'img'?) for columns.image; got 'img', 'questions', 'answer'",
        "train.csv: expected a column 'question' (did you mean 'questions'?) for columns.question",
        "train.csv: expected a column 'kind' for columns.question_type",
        "val.csv: expected a column 'answer' (did you mean 'answers'?) for columns.answer",
        "val.csv: expected a column 'kind'",
    ):
        assert part in found, part


def test_missing_images_are_counted_before_training(vqa, write_csv):
    rows = ROWS + [{**ROWS[0], "image": f"gone{i % 20}.jpg", "question_id": f"g{i}"} for i in range(40)]
    found = problems(vqa(write_csv("qa.csv", rows)))
    assert "40 of 45 rows of train (40 × image not found) cannot be used" in found
    assert "qa.csv, row 7: gone0.jpg: no such image below" in found
    assert "gone11.jpg" in found and "gone12.jpg" not in found and "… and 28 more" in found


def test_names_of_50_kb_are_not_printed(vqa, write_csv):
    found = problems(vqa(write_csv("qa.csv", [{**row, "image": "x" * 50_000} for row in ROWS])))
    assert "5 × image not found" in found and len(found) < 5_000


def test_a_path_out_of_the_folder_takes_a_key(vqa, write_csv, photos):
    (photos.parent / "secret").mkdir()
    shutil.copy(photos / "chelsea.png", photos.parent / "secret" / "s.png")
    path = write_csv("qa.csv", [{**ROWS[0], "image": "../secret/s.png"}])
    found = problems(vqa(path))
    assert "(1 × image outside its folder)" in found and "set build_info.images.allow_outside: true" in found
    section = vqa(path)
    section.build_info.images.allow_outside = True
    assert len(build(section)["train"]) == 1
    section.build_info.images.allow_outside = "yes"
    assert "build_info.images.allow_outside: expected true or false, got 'yes'" in problems(section)


BAD = {
    "empty question": {"question": "  "},
    "question without a word": {"question": "?!"},
    "no answer": {"answer": ""},
    "duplicate id": {"question_id": "q1"},
    "no image named": {"image": ""},
    "missing image": {"image": "gone.jpg"},
}
SAID = {
    "empty question": "expected a question, got ''",
    "question without a word": "expected a question, got '?!'",
    "no answer": "it has no answer, where other rows have",
    "duplicate id": "question_id 'q1' has been used in qa.csv, row 2",
    "no image named": "it names no image",
    "missing image": "gone.jpg: no such image below",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named(vqa, write_csv, kind):
    rows = [*ROWS[:3], {**ROWS[3], **BAD[kind]}, ROWS[4]]
    section = vqa(write_csv("qa.csv", rows))
    with pytest.raises(BadDataError) as caught:
        build(section)
    assert "1 of 5 rows of train" in str(caught.value) and f"qa.csv, row 5: {SAID[kind]}" in str(caught.value)
    assert "on_bad_sample: skip" in str(caught.value)


def test_bad_rows_are_told_together_for_all_splits(vqa, write_csv):
    bad = [*ROWS[:2], *({**ROWS[0], "question_id": kind, **change} for kind, change in BAD.items())]
    found = problems(vqa(write_csv("qa.csv", bad), val=write_csv("val.csv", bad)))
    for split, file in (("train", "qa.csv"), ("val", "val.csv")):
        assert f"6 of 8 rows of {split} (2 × empty question, " in found
        assert f"{file}, row 9: gone.jpg: no such image" in found


def test_skip_leaves_bad_rows_out_and_counts_them(vqa, write_csv, caplog):
    bad = [*ROWS, *({**ROWS[0], "question_id": kind, **change} for kind, change in BAD.items())]
    path = write_csv("qa.csv", bad)
    datasets = build(vqa(path, on_bad_sample="skip", max_bad_share=0.6))
    assert [row["question_id"] for row in datasets["train"].annotation] == ["q1", "q2", "q3", "q4", "q5"]
    assert "6 of 11 rows of train (2 × empty question, 1 × no answer, " in caplog.text
    assert "are left out" in caplog.text and "qa.csv, row 12: gone.jpg" in caplog.text
    with pytest.raises(BadDataError, match="6 of 11 rows of train .*more than max_bad_share: 0.5"):
        build(vqa(path, on_bad_sample="skip", max_bad_share=0.5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": {"text": "what?"}}, 'question: expected a text, got {"text": "what?"}'),
        ({"answer": True}, "answer: expected a text, got true"),
        ({"answer": ["cat", ""]}, "one of its answers is empty: ['cat', '']"),
        ({"answer": []}, "it has no answer, where other rows have"),
        ({"answer": [["cat"]]}, 'answer: expected a text, got ["cat"]'),
        ({"question_id": [1]}, "question_id: expected a number or a text, got [1]"),
        ({"weight": [1, 2]}, "2 weights for 1 answers"),
        ({"weight": "much"}, "weight: expected a number of 0 or more, got 'much'"),
        ({"weight": -1}, "weight: expected a number of 0 or more, got '-1'"),
        ({"image": 5}, "5: no such image below"),
    ],
)
def test_values_that_make_no_sense(vqa, write_jsonl, change, message):
    found = problems(vqa(write_jsonl("qa.jsonl", [ROWS[0], {**ROWS[1], **change}])))
    assert f"qa.jsonl, line 2: {message}" in found


def test_numbers_are_texts(vqa, write_jsonl):
    (row,) = build(vqa(write_jsonl("qa.jsonl", [{**ROWS[0], "answer": [3, 3, 2.5]}])))["train"].annotation
    assert row["answer"] == ["3", "3", "2.5"]


def test_one_broken_line_is_one_bad_row(vqa, write_jsonl):
    path = write_jsonl("qa.jsonl", ROWS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    assert "1 of 5 rows of train (1 × broken row)" in problems(vqa(path))
    assert "qa.jsonl, line 2: not valid JSON" in problems(vqa(path))
    assert len(build(vqa(path, on_bad_sample="skip", max_bad_share=0.2))["train"]) == 4


def test_an_unquoted_comma_is_one_bad_row(vqa, write_csv):
    path = write_csv("qa.csv", ROWS)
    path.write_text(path.read_text().replace("Is there a spoon?", "Is there a spoon, or not?"))
    assert "qa.csv, row 6: expected 4 fields, got 5" in problems(vqa(path))


def test_an_ambiguous_image_names_both(vqa, write_csv, photos):
    shutil.copy(photos / "chelsea.png", photos / "more" / "camera.jpg")
    found = problems(vqa(write_csv("qa.csv", ROWS)))
    assert "(1 × image name not unique)" in found
    assert "camera: 2 files fit, such as" in found and "more/camera.jpg and" in found and "more/camera.png" in found


def test_an_image_id_for_two_images(caption, write_csv):
    rows = [{"image": name, "image_id": "7", "caption": "it"} for name in ("chelsea", "coffee")]
    found = problems(caption(write_csv("c.csv", rows)), CustomCaptionBuilder)
    assert "c.csv, row 3: image_id '7' has been used for" in found and "chelsea.png in c.csv, row 2" in found


def test_empty_captions(caption, write_jsonl):
    rows = [CAPTIONS[0], {**CAPTIONS[1], "caption": " "}, {**CAPTIONS[1], "caption": ["a cup", "..."]}]
    found = problems(caption(write_jsonl("c.jsonl", rows)), CustomCaptionBuilder)
    assert "c.jsonl, line 2: it has no caption, where other rows have" in found
    assert "c.jsonl, line 3: one of its captions is empty: ['a cup', '...']" in found


def test_nothing_to_learn_from(vqa, write_csv):
    assert "train: none of 1 rows has an entry under 'answer'" in problems(
        vqa(write_csv("qa.csv", [{**ROWS[0], "answer": ""}]))
    )
    empty = write_csv("qa.csv", ROWS[:1])
    empty.write_text(empty.read_text().splitlines()[0] + "\n")
    assert "train: no rows" in problems(vqa(empty))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"answer": True}, "answer: expected a text, got true; write yes and no"),
        ({"answer": [{"text": "red"}]}, 'answer: expected a text, got {"text": "red"}'),
        ({"image": [["chelsea.png"]]}, 'image: expected a text, got ["chelsea.png"]'),
    ],
)
def test_where_every_row_is_broken_the_rows_own_faults_are_told(vqa, write_jsonl, change, told):
    rows = [{**row, **change} for row in ROWS]
    found = problems(vqa(write_jsonl("qa.jsonl", rows)))
    assert "5 of 5 rows of train (5 × broken row) cannot be used" in found and f"qa.jsonl, line 1: {told}" in found
    assert "has an entry under" not in found


def test_a_run_whose_every_row_is_bad_is_not_started(vqa, write_csv):
    path = write_csv("qa.csv", [{**ROWS[0], "image": "gone"}])
    found = problems(vqa(path, on_bad_sample="skip", max_bad_share=1.0))
    assert "train: none of 1 rows can be used" in found


def test_what_has_been_checked_is_not_read_again(vqa, write_csv, monkeypatch):
    section = vqa(write_csv("qa.csv", ROWS))
    assert CustomVQABuilder.config_problems(section) == []
    monkeypatch.setattr(CustomVQABuilder, "annotations", lambda self: pytest.fail("read twice"))
    assert len(build(section)["train"]) == 5
    monkeypatch.undo()
    other = OmegaConf.merge(section, {"on_bad_sample": "skip"})
    assert CustomVQABuilder.config_problems(section) == []
    assert build(other)["train"].on_bad_sample == "skip"


def test_photographs_that_are_hard_to_read_are_read(vqa, write_csv, photos):
    """Rows whose images are CMYK, palette, 16 bit, animated, turned, or a single pixel are rows like any other."""
    cat = Image.open(photos / "chelsea.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.convert("CMYK").save(photos / "cmyk.jpg")
    cat.quantize(16).save(photos / "palette.png")
    Image.new("I;16", (9, 5), 40000).save(photos / "deep.png")
    cat.save(photos / "moving.gif", save_all=True, append_images=[cat.rotate(90)])
    cat.save(photos / "turned.jpg", exif=exif)
    cat.crop((0, 0, 1, 1)).save(photos / "dot.png")
    names = ["cmyk", "palette", "deep", "moving", "turned", "dot"]
    rows = [{"image": name, "question": "What?", "answer": "a cat"} for name in names]
    assert batch(build(vqa(write_csv("qa.csv", rows)))["train"])["image"].shape == (6, 3, 28, 28)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("build_info.image", {"storage": "x"}, "build_info.image: unknown key; did you mean images?"),
        ("build_info.images.storge", "x", "build_info.images.storge: unknown key; did you mean storage?"),
        ("build_info.annotations.train.stored", "x", "build_info.annotations.train.stored: unknown key; did you mean"),
        ("vis_processor.test", {"name": "x"}, "vis_processor.test: unknown key; known: eval, train"),
        ("columns.image", None, "columns.image: expected the name of a column, or a list of names; got None"),
        ("encoding", 8, "encoding: expected text, got 8"),
        ("max_bad_share", 5, "max_bad_share: expected a number from 0 to 1, got 5"),
    ],
)
def test_every_key_of_a_section_is_checked(vqa, write_csv, key, value, told):
    section = vqa(write_csv("qa.csv", ROWS))
    OmegaConf.update(section, key, value, force_add=True)
    assert told in problems(section)

"""``vqav2`` on files in visualqa.org's layout."""

import json
import shutil
from pathlib import Path

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_kvmod.datasets.bad_samples import BadDataError
from lavis_kvmod.datasets.vqav2 import VQAv2Builder

ANNOTATIONS = "coco/annotations"


@pytest.fixture()
def root(benchmark_root, tmp_path, monkeypatch):
    """A cache root of one's own, so that files may be changed."""
    shutil.copytree(benchmark_root / "coco", tmp_path / "cache/coco")
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def section(*overrides, splits=("train", "val", "test-dev", "test")):
    """The builder's defaults with overrides, and only those splits."""
    cfg = OmegaConf.load(VQAv2Builder.default_config_path()).datasets.vqav2
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    for split in [split for split in cfg.build_info.annotations if split not in splits]:
        del cfg.build_info.annotations[split]
    return cfg


def build(*overrides, **kwargs):
    return VQAv2Builder(section(*overrides, **kwargs)).build_datasets()


def problems(*overrides, **kwargs):
    with pytest.raises(BadDataError) as caught:
        build(*overrides, **kwargs)
    assert VQAv2Builder.config_problems(section(*overrides, **kwargs)) == caught.value.problems
    return "\n".join(caught.value.problems)


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_train_is_train_alone(root):
    datasets = build()
    assert {split: len(data) for split, data in datasets.items()} == {"train": 4, "val": 4, "test-dev": 4, "test": 4}
    assert all("train2014" in row["image"] for row in datasets["train"].annotation)
    assert {row["question_id"] for row in datasets["train"].annotation} == {10, 11, 12, 13}
    sample = datasets["train"][0]
    assert sample["answers"] == ["astronaut", "photo", "yes"]
    assert sample["weights"] == pytest.approx([0.7, 0.2, 0.1])
    assert sample["text_input"] == "what is she?"


def test_trainval_is_asked_for_and_leaves_no_val(root):
    datasets = build("train_on=trainval")
    assert list(datasets) == ["train", "test-dev", "test"]
    ids = {row["question_id"] for row in datasets["train"].annotation}
    assert ids == {10, 11, 12, 13, 20, 21, 22, 23}
    assert VQAv2Builder.splits_given(section("train_on=trainval")) == ["train", "test-dev", "test"]
    assert VQAv2Builder.splits_read(section("train_on=trainval"), {"train"}) == {"train", "val"}
    assert "expected one of train, trainval; got 'both'" in problems("train_on=both")


def test_evaluation_knows_the_question_its_types_and_all_ten_answers(root):
    val = build()["val"]
    row = val.annotation[1]
    assert (row["question_id"], row["image_id"], row["question_type"]) == (21, 12, "what is")
    assert row["answer_type"] == "other" and row["answer"] == ["cat"] * 7 + ["photo"] * 2 + ["yes"]
    batch = val.collater([val[0], val[1]])
    assert batch["question_id"].tolist() == [20, 21] and batch["image_id"].tolist() == [11, 12]
    assert batch["answer"] == ["astronaut", "photo", "yes", "cat", "photo", "yes"]
    assert batch["n_answers"].tolist() == [3, 3]


def test_a_test_split_has_no_answers_and_writes_what_the_server_takes(root, tmp_path, caplog):
    test = build()["test-dev"]
    assert "answer" not in test.annotation[0] and "answer" not in test.collater([test[0]])
    rows = [{"question_id": row["question_id"], "answer": f"a{i}"} for i, row in enumerate(test.annotation)]
    path = test.write_leaderboard(rows[::-1], tmp_path)
    assert path == tmp_path / "vqav2_test-dev_leaderboard.json"
    assert json.loads(path.read_text()) == rows  # in the order of the questions
    assert "wants all" not in caplog.text
    test.write_leaderboard(rows[1:], tmp_path)
    assert "answers 3 of 4 questions: the evaluation server wants all" in caplog.text


def test_the_official_code_reads_the_leaderboards_file(root, tmp_path):
    from lavis.common.vqa_tools.vqa import VQA
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    val = build()["val"]
    answers = ["astronaut", "photo", "nothing", "rocket"]
    rows = [{"question_id": row["question_id"], "answer": a} for row, a in zip(val.annotation, answers)]
    files = [root / ANNOTATIONS / name for name in ("v2_mscoco_val2014_annotations.json",)]
    questions = root / ANNOTATIONS / "v2_OpenEnded_mscoco_val2014_questions.json"
    official = VQA(str(files[0]), str(questions))
    evaluation = VQAEval(official, official.loadRes(str(val.write_leaderboard(rows, tmp_path)), str(questions)), n=2)
    evaluation.evaluate()
    assert evaluation.accuracy["overall"] == 65.0  # 1, 0.6, 0, 1


def test_missing_files_are_told_together_with_where_to_get_them(root):
    for name in ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_val2014_annotations.json"):
        (root / ANNOTATIONS / name).unlink()
    shutil.rmtree(root / "coco/images/test2015")
    found = problems()
    for expected in (
        f"train, questions: no file {Path.cwd()}/{ANNOTATIONS}/v2_OpenEnded_mscoco_train2014_questions.json nor "
        f"{root}/{ANNOTATIONS}/v2_OpenEnded_mscoco_train2014_questions.json; get "
        "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Train_mscoco.zip and unpack it there, or set "
        "build_info.annotations.train.questions.storage to yours",
        "v2_Annotations_Val_mscoco.zip",
        f"test: no folder {root}/coco/images/test2015 (images); get http://images.cocodataset.org/zips/test2015.zip",
    ):
        assert expected in found, found
    assert "val" not in {line.split(",")[0] for line in problems(splits=["train"]).splitlines()}


def test_files_that_do_not_belong_together_are_an_error_with_counts(root):
    train = root / ANNOTATIONS / "v2_mscoco_train2014_annotations.json"
    change(train, lambda content: content["annotations"].pop())
    assert "1 of 4 questions have no annotation, such as 13" in problems()
    shutil.copy(root / ANNOTATIONS / "v2_mscoco_val2014_annotations.json", train)
    found = problems()
    assert "are not of the same split: 4 of 4 questions have no annotation, such as 10, 11, 12, 13; " in found
    assert "4 of 4 annotations have no question, such as 20, 21, 22, 23" in found


def test_one_question_about_two_images(root):
    path = root / ANNOTATIONS / "v2_mscoco_val2014_annotations.json"
    change(path, lambda content: content["annotations"][0].update(image_id=3))
    assert "1 questions are about another image there, such as 20" in problems()


def test_ids_used_twice(root):
    path = root / ANNOTATIONS / "v2_OpenEnded_mscoco_test2015_questions.json"
    change(path, lambda content: content["questions"][1].update(question_id=30))
    assert f"{path}: 1 question ids are used more than once, such as 30" in problems()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[]", 'expected the official layout, {"questions": [{…}, …]}; got a list'),
        ('{"annotations": []}', "got an object with 'annotations'"),
        ('{"questions": [{"image_id": 1, "question": "?"}]}', "entry 0 of 'questions' has no question_id"),
        ('{"questions": [', "not readable as JSON"),
    ],
)
def test_another_layout_is_named(root, text, expected):
    path = root / ANNOTATIONS / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(text)
    found = problems()
    assert f"val: {path}: " in found and expected in found


def test_answers_of_another_form_are_named(root):
    path = root / ANNOTATIONS / "v2_mscoco_val2014_annotations.json"
    change(path, lambda content: content["annotations"][2].update(answers={"a": 1}))
    assert f"{path}: question 22: expected answers as [{{\"answer\": …}}, …], got {{'a': 1}}" in problems()


def test_missing_images_are_counted_before_training(root):
    for i in (1, 2):
        (root / f"coco/images/train2014/COCO_train2014_{i:012d}.jpg").unlink()
    found = problems()
    assert "2 of 4 rows of train" in found and "COCO_train2014_000000000001.jpg" in found
    assert "v2_OpenEnded_mscoco_train2014_questions.json, question 10" in found
    assert len(build("on_bad_sample=skip", "max_bad_share=0.5")["train"]) == 2


def test_an_annotator_who_said_nothing_is_not_trained_on_but_still_scored(root):
    for name in ("train2014", "val2014"):
        path = root / ANNOTATIONS / f"v2_mscoco_{name}_annotations.json"
        change(path, lambda content: content["annotations"][0]["answers"][0].update(answer=""))
    datasets = build()
    for split in ("train", "val"):
        sample = datasets[split][0]
        assert sample["answers"] == ["astronaut", "photo", "yes"]
        assert sample["weights"] == pytest.approx([0.6, 0.2, 0.1])
    assert datasets["val"].annotation[0]["answer"].count("") == 1


def test_candidates_for_ranking_come_from_a_file_or_from_train(root):
    assert build()["val"].answer_list == ["astronaut", "cat", "coffee", "rocket", "photo", "yes"]
    (root / ANNOTATIONS / "answer_list.json").unlink()
    assert build()["val"].answer_list is None  # nothing is there more than 8 times
    path = root / ANNOTATIONS / "v2_OpenEnded_mscoco_train2014_questions.json"

    def more(key):
        def edit(content):
            first = content[key][0]
            content[key] += [{**first, "question_id": 100 + i} for i in range(8)]

        return edit

    change(path, more("questions"))
    change(root / ANNOTATIONS / "v2_mscoco_train2014_annotations.json", more("annotations"))
    assert build()["val"].answer_list == ["astronaut"]


def test_other_sets_in_the_layout_are_read_by_naming_their_files(root, benchmark_root):
    okvqa = benchmark_root / "okvqa/annotations"
    overrides = [
        f"build_info.annotations.val.questions.storage={okvqa}/OpenEnded_mscoco_val2014_questions.json",
        f"build_info.annotations.val.annotations.storage={okvqa}/mscoco_val2014_annotations.json",
    ]
    assert len(build(*overrides, splits=["val"])["val"]) == 4
    wrong = "build_info.annotations.val.images.pattern='val2014/{name}.jpg'"
    assert "does not fit the images' pattern 'val2014/{name}.jpg'" in problems(wrong, splits=["val"])


def test_a_split_of_ones_own_needs_a_pattern_and_one_may_be_null(root):
    cfg = section(splits=["val"])
    cfg.build_info.annotations.mine = {"questions": cfg.build_info.annotations.val.questions}
    (problem,) = VQAv2Builder.config_problems(cfg)
    assert problem.startswith("mine: build_info.annotations.mine.images.pattern is not set; ")
    for wrong in ("questions.json", {"questions": "questions.json", "images": "val2014"}):
        cfg.build_info.annotations.mine = wrong
        assert VQAv2Builder.config_problems(cfg) == [problem]
    cfg.build_info.annotations.mine = None
    assert VQAv2Builder.splits_given(cfg) == ["val"]
    assert list(VQAv2Builder(cfg).build_datasets()) == ["val"]


def test_paths_are_relative_to_where_one_stands_too(root, tmp_path):
    (root / "coco").rename(tmp_path / "coco")
    assert len(build(splits=["val"])["val"]) == 4

"""LAVIS's benchmark builders, and ours, under our tasks: small photographs as the benchmarks' image files, their
annotations in their layouts, a small real model, whole runs."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.commands.launch import build_runner
from lavis_kvmod.commands.train import train
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.lavis_sets import builder_class
from lavis_kvmod.system.schema import ConfigurationError

IMAGE = {"name": "blip_image_eval", "image_size": 28}
BALANCED = {"type": "balanced_testdev"}
OFFICIAL_NOCAPS = {
    "build_info": {"annotations": {"val": {"storage": ["nocaps/annotations/nocaps_val_4500_captions.json"]}}}
}


@pytest.fixture()
def run_file(benchmarks, model_config, tmp_path):
    """A function: the path of a run file over data sets (name -> section), with a task and overrides of its run."""

    def write(datasets, task="kvmod_vqa", **run):
        text = "blip_caption" if task == "kvmod_captioning" else "blip_question"
        processors = {
            "vis_processor": {"train": IMAGE, "eval": IMAGE},
            "text_processor": {"train": {"name": text}, "eval": {"name": text}},
        }
        cfg = {
            "model": {**model_config(), "model_type": "pretrain_opt2.7b"},
            "datasets": {name: {**processors, **section} for name, section in datasets.items()},
            "run": {
                "task": task,
                "device": "cpu",
                "max_epoch": 1,
                "batch_size_train": 3,
                "batch_size_eval": 3,
                "num_workers": 0,
                "num_beams": 1,
                "max_len": 4,
                "train_splits": ["train"],
                "valid_splits": [],
                "test_splits": [],
                **run,
            },
        }
        OmegaConf.save(OmegaConf.create(cfg), tmp_path / "run.yaml")
        return str(tmp_path / "run.yaml")

    return write


def predictions(tmp_path, split):
    """What an evaluation has written."""
    (path,) = Path(tmp_path).glob(f"output/*/result/{split}_epochbest.json")
    return json.loads(path.read_text())


def test_karpathys_own_file_gives_the_splits_of_lavis_files(benchmarks, run_file):
    """One file with all images, their splits and captions, in place of LAVIS's three."""
    annotations = benchmarks / "coco/annotations"
    images = []
    for split, called in (("train", "restval"), ("val", "val"), ("test", "test")):
        by_image = {}
        for row in json.loads((annotations / f"coco_karpathy_{split}.json").read_text()):
            captions = [row["caption"]] if split == "train" else row["caption"]
            by_image.setdefault(row["image"], []).extend(captions)
        for name, captions in by_image.items():
            folder, _, file = name.rpartition("/")
            sentences = [{"raw": text, "tokens": text.split()} for text in captions]
            id_ = int(Path(file).stem.rpartition("_")[2])
            images.append(
                {"filepath": folder, "filename": file, "cocoid": id_, "sentences": sentences, "split": called}
            )
    images[0]["split"] = "train"
    (annotations / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    one_file = {
        "build_info": {
            "annotations": {s: {"storage": "coco/annotations/dataset_coco.json"} for s in ("train", "val", "test")}
        }
    }
    built = []
    for section in ({}, one_file):
        path = run_file({"coco_caption": section}, "kvmod_captioning", valid_splits=["val"], test_splits=["test"])
        built.append(builder_class("coco_caption")(load_config(path).datasets_cfg.coco_caption).build_datasets())
    for split in ("train", "val", "test"):
        rows = [[(a["image"], a["image_id"], a["caption"]) for a in sets[split].annotation] for sets in built]
        assert sorted(rows[0]) == sorted(rows[1]) and rows[0]
    images[1].pop("cocoid")
    (annotations / "dataset_coco.json").write_text(json.dumps({"images": images}))
    with pytest.raises(ConfigurationError, match="dataset_coco.json: entry 1 of 'images' has no cocoid"):
        load_config(path)


@pytest.mark.parametrize(
    "name, section, train_on, test_on",
    [
        ("vqav2", {}, "train", "val"),
        pytest.param("coco_vqa", {}, "train", "val", marks=pytest.mark.slow),
        pytest.param("ok_vqa", {}, "train", "test", marks=pytest.mark.slow),
        pytest.param("aok_vqa", {}, "train", "val", marks=pytest.mark.slow),
        pytest.param("gqa", BALANCED, "train", "val", marks=pytest.mark.slow),
        ("vg_vqa", {}, "train", None),
        pytest.param("textvqa", {}, None, "val", marks=pytest.mark.slow),
    ],
)
def test_questions_are_trained_on_and_scored(run_file, tmp_path, name, section, train_on, test_on):
    splits = {"train_splits": [train_on] if train_on else [], "test_splits": [test_on] if test_on else []}
    path = run_file({name: section}, evaluate=train_on is None, **splits)
    logs = train(path) if train_on else evaluate(path)
    if test_on is None:
        return
    assert 0 <= logs[test_on]["agg_metrics"] <= 100 and logs[test_on]["scored"] == 4
    assert logs[test_on]["loss"] > 0  # batches carry their answers
    rows = predictions(tmp_path, test_on)
    assert len(rows) == 4 and {row["question_id"] for row in rows} == {
        row["question_id"] for row in build_runner(load_config(path)).datasets[name][test_on].annotation
    }


@pytest.mark.parametrize(
    "name, section",
    [
        ("coco_caption", {}),
        pytest.param("vg_caption", {}, marks=pytest.mark.slow),
        pytest.param("nocaps", OFFICIAL_NOCAPS, marks=pytest.mark.slow),
    ],
)
def test_captions_are_trained_on_and_scored(run_file, tmp_path, name, section):
    test_on = {"coco_caption": ["test"], "nocaps": ["val"], "vg_caption": []}[name]
    splits = {"train_splits": [] if name == "nocaps" else ["train"], "test_splits": test_on}
    path = run_file({name: section}, "kvmod_captioning", caption_metrics=["Bleu"], **splits)  # METEOR starts a JVM
    logs = evaluate(path) if name == "nocaps" else train(path)
    for split in test_on:
        assert "agg_metrics" in logs[split] and logs[split]["scored"] == 4 and logs[split]["loss"] > 0
        expected = [1, 2, 3, 4] if name == "nocaps" else [11, 12, 13, 14]
        assert sorted(row["image_id"] for row in predictions(tmp_path, split)) == expected


def test_sets_are_trained_on_together_as_blip_does(run_file):
    """LAVIS's projects/blip/train/vqav2_ft.yaml adds Visual Genome."""
    path = run_file({"vqav2": {}, "vg_vqa": {}}, test_splits=["val"])
    cfg = load_config(path)
    assert set(cfg.datasets_cfg) == {"vqav2", "vg_vqa"}
    assert len(build_runner(cfg).train_loader.dataset) == 8
    assert "agg_metrics" in train(path)["val"]
    assert set(load_config(path, ["run.evaluate=true"]).datasets_cfg) == {"vqav2"}  # vg_vqa has train alone


# ---------------------------------------------------------------- what is mended


def built(name, section=(), split=None):
    """A data set as our tasks build it."""
    builder = builder_class(name)
    cfg = OmegaConf.load(builder_config(name, dict(section).get("type", "default"))).datasets[name]
    cfg = OmegaConf.merge(cfg, {"vis_processor": {"train": IMAGE, "eval": IMAGE}}, dict(section))
    for other in [other for other in cfg.build_info.annotations if split not in (None, other)]:
        del cfg.build_info.annotations[other]
    return builder(cfg).build_datasets()[split]


def builder_config(name, kind):
    from lavis.common.registry import registry

    return registry.get_builder_class(name).default_config_path(type=kind)


def test_answers_are_on_the_annotations_whatever_the_benchmark_calls_them(benchmarks):
    ten = ["cat"] * 7 + ["photo"] * 2 + ["yes"]
    for name, split in (("coco_vqa", "val"), ("ok_vqa", "test"), ("aok_vqa", "val")):
        row = built(name, split=split).annotation[1]
        assert row["answer"] == ten and row["image_id"] == 12, name
    assert built("ok_vqa", split="test").annotation[1]["question_type"] == "what is"
    for name, section, split in (("gqa", BALANCED, "val"), ("vg_vqa", {}, "train")):
        assert built(name, section, split).annotation[1]["answer"] == ["cat"]
    assert built("vg_vqa", split="train")[1]["weights"] == [0.2]


def test_evaluated_questions_come_with_what_a_loss_needs(benchmarks):
    for name, section, split in (("gqa", BALANCED, "val"), ("aok_vqa", {}, "val"), ("ok_vqa", {}, "test")):
        data = built(name, section, split)
        batch = data.collater([data[0], data[1]])
        assert len(batch["answer"]) == int(batch["n_answers"].sum()) == len(batch["weight"]), name


def test_a_set_of_lavis_without_image_processors_gets_them(run_file):
    path = run_file({"ok_vqa": {"vis_processor": None}}, test_splits=["test"])
    runner = build_runner(load_config(path))
    assert [runner.datasets["ok_vqa"][split][0]["image"].shape for split in ("train", "test")] == [(3, 28, 28)] * 2


def test_one_data_set_is_evaluated_at_a_time(run_file):
    with pytest.raises(ConfigurationError, match="vqav2 and coco_vqa each have a split 'val'") as caught:
        load_config(run_file({"vqav2": {}, "coco_vqa": {}}, test_splits=["val"]))
    assert "datasets.coco_vqa.build_info.annotations.val=null" in str(caught.value)
    without = {"build_info": {"annotations": {"val": None}}}
    cfg = load_config(run_file({"vqav2": {}, "coco_vqa": without}, test_splits=["val"]))
    assert list(cfg.datasets_cfg) == ["vqav2", "coco_vqa"]


@pytest.mark.parametrize("name, section", [("gqa", BALANCED), ("aok_vqa", {}), ("coco_vqa", {})])
def test_a_split_without_answers_is_answered_and_written_for_the_server(run_file, benchmarks, tmp_path, name, section):
    """LAVIS's GQA cannot collate one: default_collate meets None."""
    evaluate(run_file({name: section}, train_splits=[], test_splits=["test"]))
    answers = {row["question_id"]: row["prediction"] for row in predictions(tmp_path, "test")}
    (path,) = tmp_path.glob("output/*/result/*_leaderboard.json")
    expected = {
        "gqa": [{"questionId": f"05{i}", "prediction": answers.get(f"05{i}")} for i in (1, 2, 3, 4)],
        "aok_vqa": {f"22Mex{i}": {"direct_answer": answers.get(f"22Mex{i}"), "multiple_choice": ""} for i in range(4)},
        "coco_vqa": [{"question_id": 30 + i, "answer": answers.get(30 + i)} for i in range(4)],
    }
    names = {"gqa": "gqa_test", "aok_vqa": "aokvqa_test", "coco_vqa": "vqav2_test"}
    assert json.loads(path.read_text()) == expected[name]
    assert path.name == f"{names[name]}_leaderboard.json"


def test_from_trainval_to_the_test_server(run_file, tmp_path):
    train(run_file({"vqav2": {"train_on": "trainval"}}, test_splits=["test-dev", "test"]))
    (folder,) = tmp_path.glob("output/*/result")
    for split in ("test-dev", "test"):
        rows = json.loads((folder / f"vqav2_{split}_leaderboard.json").read_text())
        assert [row["question_id"] for row in rows] == [30, 31, 32, 33]
        assert all(set(row) == {"question_id", "answer"} and isinstance(row["answer"], str) for row in rows)


def test_gqa_is_read_from_the_official_files_too(benchmarks, tmp_path):
    official = {
        f"05{i}": {"imageId": f"n{i}", "question": "Is it?", "answer": "yes", "types": {"structural": "verify"}}
        for i in (1, 2)
    }
    (tmp_path / "official.json").write_text(json.dumps(official))
    section = {"build_info": {"annotations": {"val": {"storage": [str(tmp_path / "official.json")]}}}}
    rows = built("gqa", {**BALANCED, **section}, "val").annotation
    assert [(row["question_id"], row["answer"], row["question_type"]) for row in rows] == [
        ("051", ["yes"], "verify"),
        ("052", ["yes"], "verify"),
    ]
    assert rows[1]["image"] == str(benchmarks / "gqa/images/n2.jpg")


def test_image_ids_are_cocos_numbers_or_the_names_of_ones_own(benchmarks, tmp_path):
    """LAVIS makes "17.pn" of photo_17.png."""
    data = built("coco_caption", split="test")
    assert [row["image_id"] for row in data.annotation] == [11, 12, 13, 14]
    assert data.collater([data[0]])["image_id"].tolist() == [11]
    from PIL import Image

    Image.new("RGB", (30, 30)).save(tmp_path / "photo_17.png")
    (tmp_path / "own.json").write_text(json.dumps([{"image": "photo_17.png", "caption": "a photo"}]))
    own = {
        "build_info": {
            "images": {"storage": str(tmp_path)},
            "annotations": {"test": {"url": "unused", "storage": str(tmp_path / "own.json")}},
        }
    }
    (row,) = built("coco_caption", own, "test").annotation
    assert (row["image_id"], row["caption"]) == ("photo_17.png", ["a photo"])


def test_nocaps_takes_lavis_list_the_official_file_or_both(benchmarks):
    storages = ["nocaps/annotations/nocaps_val.json", "nocaps/annotations/nocaps_val_4500_captions.json"]
    for chosen, captions in ((storages[:1], 0), (storages[1:], 2), (storages, 2)):
        data = built("nocaps", {"build_info": {"annotations": {"val": {"storage": chosen, "url": []}}}}, "val")
        assert [row["image_id"] for row in data.annotation] == [1, 2, 3, 4]
        assert all(len(row["caption"]) == captions for row in data.annotation)
    assert {row["domain"] for row in data.annotation} == {"out-domain"}


def test_textvqa_is_compared_with_normalised_answers(benchmarks):
    row = built("textvqa", split="val").annotation[1]
    assert row["answer"] == ["cat"] * 9 + ["2"] and row["answer_as_given"][-1] == "Two"
    assert row["question_id"] == 34602 and row["image_id"] == "002f"


def test_lavis_own_tasks_get_lavis_own_builders(run_file):
    from lavis.common.registry import registry

    path = run_file({"ok_vqa": {}}, test_splits=["test"])
    cfg = load_config(path, ["run.task=vqa"])
    assert registry.get_task_class("vqa").setup_task(cfg=cfg).build_datasets(cfg)["ok_vqa"]["test"].coco_fmt_anno_file
    assert builder_class("ok_vqa") is not registry.get_builder_class("ok_vqa")
    assert builder_class("flickr30k") is registry.get_builder_class("flickr30k")


def test_training_on_what_is_evaluated_is_told(run_file, caplog):
    load_config(run_file({"coco_vqa": {}}, test_splits=["val"]))
    assert "4 of 4 questions of val are trained on as well" in caplog.text  # LAVIS's default
    caplog.clear()
    load_config(run_file({"ok_vqa": {}}, test_splits=["test"]))
    assert "trained on as well" not in caplog.text


# ---------------------------------------------------------------- files that are not there


def test_only_the_files_of_used_splits_are_asked_for(run_file, benchmarks):
    """The default of nearly every LAVIS set names train files, which an evaluation would download."""
    missing = {"build_info": {"annotations": {"train": {"url": ["/no.json"], "storage": ["/no.json"]}}}}
    load_config(run_file({"ok_vqa": missing}, test_splits=["test"]), ["run.evaluate=true"])
    with pytest.raises(
        ConfigurationError, match="datasets.ok_vqa: train: no file /no.json, and /no.json cannot be had; get it"
    ):
        load_config(run_file({"ok_vqa": missing}, test_splits=["test"]))


def test_a_split_that_no_data_set_has(run_file):
    with pytest.raises(
        ConfigurationError, match=r"run.valid_splits: no data set has a split 'val'; ok_vqa has train, t"
    ):
        load_config(run_file({"ok_vqa": {}}, valid_splits=["val"]))
    trainval = run_file({"vqav2": {"train_on": "trainval"}}, valid_splits=["val"])
    with pytest.raises(ConfigurationError, match="vqav2 has train, test-dev, test"):
        load_config(trainval)
    assert len(build_runner(load_config(trainval, ["run.valid_splits=[]"])).train_loader.dataset) == 8


def test_annotations_are_fetched_whole_to_where_they_belong(run_file, benchmarks, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_text((benchmarks / "okvqa/annotations/okvqa_train.json").read_text())
    belongs = tmp_path / "new/folder/train.json"
    storage = {"build_info": {"annotations": {"train": {"url": copy.as_uri(), "storage": str(belongs)}}}}
    data = built("ok_vqa", storage, "train")
    assert len(data) == 4 and belongs.read_text() == copy.read_text()
    assert [path.name for path in belongs.parent.iterdir()] == ["train.json"]


def test_missing_images_say_where_they_were_looked_for_and_how_to_get_them(run_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError) as caught:
        load_config(run_file({"gqa": BALANCED}), ["env.cache_root=empty"])
    text = "\n".join(caught.value.problems)
    assert f"no folder {tmp_path}/gqa/images nor {tmp_path}/empty/gqa/images (images); get http" in text
    assert f"no file {tmp_path}/gqa/annotations/" in text and f" nor {tmp_path}/empty/gqa/annotations/" in text
    assert "downloads.cs.stanford.edu/nlp/data/gqa/images.zip" in text
    assert "build_info.images.storage" in text

"""`custom_instruct`: conversations in LLaVA's and in Hugging Face's form, from the file to a score."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from lavis_kvmod.commands.train import train
from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.instruct import CustomInstructBuilder
from lavis_kvmod.system.paths import resource
from lavis_kvmod.system.schema import ConfigurationError


def llava(*turns):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def messages(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


ROWS = [
    {
        "id": "cat",
        "image": "chelsea.png",
        "conversations": llava("<image>\nWhich animal is it?", "A cat.", "What colour?", "Ginger."),
    },
    {"id": "man", "image": "camera", "conversations": llava("Who is it?", "a man")},
    {
        "id": "both",
        "image": ["chelsea", "more/coffee.png"],
        "conversations": llava("<image> or <image>: which can drink?", "the first one"),
    },
]
TURNS = [
    [("<image> Which animal is it?", "A cat."), ("What colour?", "Ginger.")],
    [("Who is it?", "a man")],
    [("<image> or <image>: which can drink?", "the first one")],
]


@pytest.fixture()
def instruct(tmp_path, photos, section_of):
    """A function: the section of a set of these rows, by split."""

    def make(train=None, **overrides):
        info = {"images": {"storage": str(photos)}, "annotations": {}}
        for split, rows in {"train": train, **overrides.pop("splits", {})}.items():
            if rows is not None:
                path = tmp_path / f"{split}.json"
                path.write_text(json.dumps(rows), encoding="utf-8")
                info["annotations"][split] = {"storage": str(path)}
        return section_of(CustomInstructBuilder, build_info=info, **overrides)

    return make


def test_conversations_are_learnt_whole_and_asked_answer_by_answer(instruct):
    built = CustomInstructBuilder(instruct(ROWS, splits={"val": ROWS})).build_datasets()
    learnt = built["train"].collater([built["train"][i] for i in range(3)])
    assert learnt["turns"] == TURNS and learnt["image_mask"].tolist() == [[True, False], [True, False], [True, True]]
    assert "text_input" not in learnt
    asked = built["val"].collater([built["val"][i] for i in range(len(built["val"]))])
    assert asked["question_id"] == ["cat-1", "cat-2", "man-1", "both-1"]
    assert asked["text_input"][:2] == ["<image> Which animal is it?", "What colour?"]
    assert asked["history"] == [[], TURNS[0][:1], [], []] and asked["answer"][1] == "Ginger."


def test_all_forms_say_the_same(instruct, tmp_path, write_jsonl):
    parts = [{"type": "image"}, {"type": "text", "text": "Which animal is it?"}]
    chat = [{**row, "messages": messages(*(turn["value"] for turn in row["conversations"]))} for row in ROWS]
    chat[0]["messages"][0]["content"] = parts
    named = [{"type": "image", "image": name} for name in ROWS[2]["image"]]
    asked = [named[0], {"type": "text", "text": "or"}, named[1], {"type": "text", "text": ": which can drink?"}]
    chat[2]["messages"][0]["content"] = asked
    del chat[2]["image"]
    for row in chat:
        del row["conversations"]
    as_text = [{**row, "conversations": json.dumps(row["conversations"])} for row in ROWS]
    pd.DataFrame(ROWS[:2]).to_parquet(tmp_path / "rows.parquet")
    layouts = (write_jsonl("rows.jsonl", chat), write_jsonl("text.jsonl", as_text), tmp_path / "rows.parquet")
    for path in layouts:
        section = instruct(ROWS)
        section.build_info.annotations.train.storage = str(path)
        rows = CustomInstructBuilder(section).build_datasets()["train"].annotation
        found = [[(turn[0].replace(" :", ":"), turn[1]) for turn in row["turns"]] for row in rows]
        assert found == TURNS[: len(rows)], path
    assert len(rows[0]["image"]) > 0


def test_what_a_system_message_says_begins_the_first_question(instruct):
    row = {
        "image": "camera",
        "messages": [{"role": "system", "content": "Be short."}, *messages("Who is it?", "a man")],
    }
    (read,) = CustomInstructBuilder(instruct([row])).build_datasets()["train"].annotation
    assert read["turns"] == [("Be short. Who is it?", "a man")]


def test_a_last_question_may_be_open_where_nothing_is_learnt(instruct):
    row = {"image": "camera", "conversations": llava("Who is it?", "a man", "Where?")}
    data = CustomInstructBuilder(instruct(ROWS, splits={"test": [row]})).build_datasets()["test"]
    assert data[1]["history"] == [("Who is it?", "a man")] and "answers" not in data[1] and data[0]["answers"]
    assert data.annotation[1]["question_id"] == "test-1-2"


@pytest.mark.parametrize(
    "row, told",
    [
        (llava("<image> <image> which?", "this"), "expected an image for each <image>; got 2 marks and 1 images"),
        (llava("Who?", "a man")[::-1], "expected turns of human and gpt by turns, the human's first; got gpt"),
        (llava("Who?") + llava("Where?"), "the human's first; got human, human"),
        (llava("Who?", "a man", "Where?"), "its last question has no answer: 'Where?'"),
        (llava("Who?", " "), "turn 1: its answer is empty"),
        (llava("<image>", "a man"), "turn 1: its question is empty"),
        (llava("Who?", "<image>"), "turn 1: its answer has <image>, where no image can stand"),
        (
            [{"from": "bard", "value": "Who?"}],
            "expected one of human, user, gpt, assistant, system to speak, got bard",
        ),
        ("Who?", "expected a list of turns, as JSON; got Who?"),
        (3, "expected a list of turns, got 3"),
        (["Who?"], "expected a turn with who says what, got Who?"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "expected parts of type text or image"),
        (None, "expected one conversation, under 'conversations' or 'messages'; got 0"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_row(instruct, row, told):
    rows = [*ROWS, {"image": "camera", "conversations": row}]
    (problem,) = CustomInstructBuilder.config_problems(instruct(rows))
    assert "train.json, entry 4" in problem and told in problem


def test_a_conversation_without_images_is_text_alone(instruct):
    """Each by itself: another text shares no image with it, nor a split."""
    said = [{"id": str(i), "conversations": llava("Which day is it?", "Monday.")} for i in range(8)]
    data = CustomInstructBuilder(instruct([*ROWS, *said], split={"val": 0.4})).build_datasets()
    alone = [row["conversation_id"] for row in data["val"].annotation if not row["image"]]
    assert 0 < len(alone) < len(said)
    texts = [i for i, row in enumerate(data["train"].annotation) if not row["image"]]
    assert len({data["train"].image_of(i) for i in texts}) == len(texts)
    batch = data["train"].collater([data["train"][i] for i in texts])
    assert batch["image"].shape[:2] == (len(texts), 0) and batch["image_mask"].shape == (len(texts), 0)
    mixed = data["train"].collater([data["train"][i] for i in range(len(data["train"]))])
    assert mixed["image_mask"].sum() == sum(
        len(row["image"]) if isinstance(row["image"], tuple) else 1 for row in data["train"].annotation
    )


def test_a_split_without_any_image_rather_lacks_their_column(instruct):
    """A misspelt column would else have everything learnt blind."""
    rows = [{"img": "camera", "conversations": llava("Who is it?", "a man")} for _ in range(3)]
    (problem,) = CustomInstructBuilder.config_problems(instruct(rows))
    assert problem.startswith("train: none of 3 conversations has an image: expected names under 'image'")
    assert CustomInstructBuilder.config_problems(instruct(rows, columns={"image": "img"})) == []


def small_run(run_file, tmp_path, rows, **options):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    section = {"build_info": {"annotations": {split: {"storage": str(path)} for split in ("train", "val", "test")}}}
    return run_file("custom_instruct", section, **options)


def test_from_a_file_to_a_score_and_the_answers(run_file, tmp_path):
    logs = train(small_run(run_file, tmp_path, ROWS, max_epoch=1, batch_size_train=2))
    assert 0 <= logs["test"]["agg_metrics"] <= 100
    (path,) = tmp_path.glob("output/*/result/test*.json")
    rows = json.loads(path.read_text())
    assert {row["question_id"] for row in rows} == {"cat-1", "cat-2", "man-1", "both-1"}
    assert {row["question"]: row["answers"] for row in rows}["What colour?"] == ["Ginger."]


def test_texts_alone_go_all_the_way(run_file, tmp_path):
    """Batches of one, so that some have no image at all; a report shows the others."""
    rows = [{"id": "day", "conversations": llava("Which day is it?", "Monday.", "And then?", "Tuesday.")}, *ROWS[:2]]
    train(small_run(run_file, tmp_path, rows, max_epoch=1, batch_size_train=1))
    (path,) = tmp_path.glob("output/*/result/test*.json")
    assert {row["question_id"] for row in json.loads(path.read_text())} >= {"day-1", "day-2", "man-1"}
    (report,) = tmp_path.glob("output/*/report.html")
    assert "What colour?" in report.read_text()


@pytest.mark.parametrize(
    "model, rows, told",
    [
        (
            {"qformer_text_input": True},
            ROWS,
            "model.qformer_text_input: the images of datasets.custom_instruct stand in",
        ),
        ({"tiles": {}}, ROWS, "model.tiles: the images of datasets.custom_instruct stand in the language model's text"),
        ({"connector": "mlp", "merge_visual_tokens": 9999}, ROWS, "merge_visual_tokens: expected .* got 9999"),
        (
            {},
            [*ROWS, {"image": "camera", "conversations": llava("Who? " * 130, "a man")}],
            r"chat.json, entry 4 has 1 images of 5 vectors and 132 words, 137 positions or more, and .* has 128",
        ),
    ],
)
def test_what_cannot_be_learnt_is_told_before_anything_is_loaded(run_file, tmp_path, model, rows, told):
    path = small_run(run_file, tmp_path, rows)
    cfg = OmegaConf.load(path)
    cfg.model.update(model)
    OmegaConf.save(cfg, path)
    with pytest.raises(ConfigurationError, match=told):
        load_config(path)


@pytest.mark.slow
def test_handwriting_is_talked_about(tmp_path, monkeypatch):
    """The demo's scans, two questions each, the second one behind the first with its answer: both are learnt."""
    from lavis_kvmod.demo import digits

    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    files = {}
    for split, count in (("train", 1293), ("test", 120)):
        rows = []
        for scan in digits.load_scans(split)[:count]:
            digits.render(scan).save(tmp_path / "scans" / f"{scan.index}.png")
            asked = digits.questions(scan)[:2]
            turns = llava(*(text for one in asked for text in (one.question, one.answer)))
            rows.append({"id": str(scan.index), "image": f"{scan.index}.png", "conversations": turns})
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(rows))
        files[split] = {"storage": str(path)}
    size = {"name": "blip_image_eval", "image_size": 56}
    section = {
        "build_info": {"images": {"storage": "scans"}, "annotations": files},
        "vis_processor": {"train": size, "eval": size},
    }
    cfg = OmegaConf.load(resource("projects/kvmod/demo_vqa.yaml"))
    cfg.datasets = {"custom_instruct": section}
    cfg.run.update(max_epoch=4, batch_size_train=64, valid_splits=[], kv_lr_scale=3)
    OmegaConf.save(cfg, tmp_path / "run.yaml")
    train("run.yaml")
    (path,) = tmp_path.glob("output/*/*/result/test*.json")
    right = {kind: [] for kind in digits.QUESTIONS.values()}
    for row in json.loads(path.read_text()):
        right[row["question"]].append(row["accuracy"])
    digit, ink = (sum(right[digits.QUESTIONS[kind]]) / 120 for kind in ("digit", "ink"))
    assert digit > 0.8 and ink > 0.8

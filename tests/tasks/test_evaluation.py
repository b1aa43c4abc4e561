"""Both tasks' evaluation of a small real model on photographs: predictions, loss, bad samples, files."""

import csv
import json
import logging

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipQuestionProcessor
from omegaconf import OmegaConf
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader

from lavis_kvmod.config.loading import load_config
from lavis_kvmod.datasets.annotated import CaptionEvalData, VQAEvalData
from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy
from lavis_kvmod.datasets.digits import DigitsVQABuilder
from lavis_kvmod.datasets.loading.images import first_with_same_image
from lavis_kvmod.datasets.loading.loader import Loader
from lavis_kvmod.datasets.loading.plans import SamplePlan
from lavis_kvmod.datasets.loading.samples import SampleSource
from lavis_kvmod.models.language.soft_prompt import ScoredAnswer, continue_texts
from lavis_kvmod.system.lavis_paths import set_registry_path
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.tasks import evaluation as evaluation_module
from lavis_kvmod.tasks.batches import steps
from lavis_kvmod.tasks.captioning import KVModCaptionTask
from lavis_kvmod.tasks.vqa import KVModVQATask

PHOTOS = {"astronaut": "a woman in an orange suit", "chelsea": "a cat", "coffee": "a cup on a table"}
VQA = dict(num_beams=1, max_len=3, min_len=1, evaluate=True, num_ans_candidates=3, inference_method="generate")
VQA["prompt"] = "Question: {} Short answer:"
CAPTIONING = dict(num_beams=1, max_len=6, min_len=1, evaluate=True, caption_metrics=["Bleu", "ROUGE_L", "CIDEr"])


@pytest.fixture()
def photos(tmp_path):
    for name in PHOTOS:
        Image.fromarray(getattr(data, name)()).resize((64, 48)).save(tmp_path / f"{name}.jpg")
    return tmp_path


@pytest.fixture()
def result_dir(tmp_path):
    before = registry.get_path("result_dir")
    (tmp_path / "result").mkdir()
    set_registry_path("result_dir", tmp_path / "result")
    yield tmp_path / "result"
    set_registry_path("result_dir", before)


@pytest.fixture()
def questions(photos):
    """A function: two questions on each photograph; given keys replace the rows'."""

    def make(dataset_cls=VQAEvalData, policy="raise", **changes):
        rows = []
        for name in PHOTOS:
            for kind, answers in {"what": [PHOTOS[name].split()[-1]], "how many": ["1"] * 6 + ["one"] * 4}.items():
                row = {"image": str(photos / f"{name}.jpg"), "image_id": f"{name}.jpg", "source": f"row {len(rows)}"}
                row.update(question=f"{kind} is it", question_id=f"{name}-{kind}")
                row.update(answer=answers, question_type=kind, answer_type="what")
                rows.append({**row, **changes})
        policy = BadSamplePolicy(policy, 0.5)
        return dataset_cls(BlipImageEvalProcessor(28), BlipQuestionProcessor(), rows, policy=policy)

    return make


@pytest.fixture()
def captions(photos):
    def make(**changes):
        rows = [
            {
                "image": str(photos / f"{name}.jpg"),
                "image_id": i,
                "source": name,
                "caption": [text, "a photo"],
                **changes,
            }
            for i, (name, text) in enumerate(PHOTOS.items())
        ]
        return CaptionEvalData(BlipImageEvalProcessor(28), BlipCaptionProcessor(), rows)

    return make


def evaluate(task, model, dataset, batch_size=2, epoch=0, loader=None):
    model.eval()
    task.before_evaluation(model=model, dataset=dataset)
    loader = loader or DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collater)
    results = task.evaluation(model, loader, cuda_enabled=False)
    return task.after_evaluation(val_result=results, split_name="val", epoch=epoch)


def whole_batch(dataset):
    return dataset.collater([dataset[i] for i in range(len(dataset))])


def rows_of(result_dir):
    return json.loads((result_dir / "val_epoch0.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- VQA


def test_vqa_writes_what_one_wants_to_know(build, questions, result_dir):
    metrics = evaluate(KVModVQATask(**VQA), build(), questions())
    assert set(metrics) == {
        *("overall", "exact_match", "vqa_accuracy", "agg_metrics", "scored", "loss"),
        *("question_type/what", "question_type/how many", "answer_type/what"),
    }
    assert metrics["scored"] == 6 and metrics["agg_metrics"] == metrics["overall"] == metrics["answer_type/what"]
    rows = rows_of(result_dir)
    assert [row["question_id"] for row in rows[:2]] == ["astronaut-what", "astronaut-how many"]
    assert rows[1]["answers"] == ["1"] * 6 + ["one"] * 4 and rows[1]["image"].endswith("astronaut.jpg")
    assert rows[0]["question"] == "what is it" and rows[0]["prediction"] == rows[0]["answer"]
    mean = 100 * sum(row["accuracy"] for row in rows) / 6
    assert metrics["overall"] == pytest.approx(mean)
    with open(result_dir / "val_epoch0.csv", encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["prediction"] for row in cells] == [row["prediction"] for row in rows]
    assert {"image", "question", "answers", "prediction", "confidence", "log_prob", "mean_log_prob"} <= set(cells[0])


def test_images_are_encoded_once_for_answers_and_loss(build, questions, captions, result_dir):
    """And once for all questions of an image, where the loader gives them together: six here, of three photos."""
    model, seen = build(), []
    model.visual_encoder.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    dataset = questions()
    apart = evaluate(KVModVQATask(**VQA), model, dataset, batch_size=6)
    assert seen == [6]
    plan = SamplePlan(len(dataset), 6, images=first_with_same_image(dataset))
    together = evaluate(KVModVQATask(**VQA), model, dataset, loader=Loader(SampleSource(dataset, plan)))
    assert seen == [6, 3]
    assert together.pop("loss") == pytest.approx(apart.pop("loss"), rel=1e-5) and together == apart
    assert "loss" in evaluate(KVModCaptionTask(**CAPTIONING), model, captions(), batch_size=3)
    assert seen == [6, 3, 3]


def test_confidence_is_the_models(build, questions, result_dir):
    model, dataset = build(), questions()
    evaluate(KVModVQATask(**VQA), model, dataset)
    scored = model.predict_answers(
        whole_batch(dataset), prompt=VQA["prompt"], num_beams=1, max_len=3, return_scores=True
    )
    for row, of_model in zip(rows_of(result_dir), scored):
        assert row["answer"] == of_model.answer and row["log_prob"] == pytest.approx(of_model.log_prob, abs=1e-4)
        assert 0 < row["confidence"] <= 1


def test_a_model_that_gives_no_confidence_is_taken(build, questions, result_dir):
    """As LAVIS's own: its predict_answers knows no return_scores."""
    model = build()
    ours = model.predict_answers
    model.predict_answers = lambda samples, prompt, num_beams, **kwargs: ours(
        samples, prompt=prompt, num_beams=num_beams
    )
    assert evaluate(KVModVQATask(**VQA), model, questions())["scored"] == 6
    assert "confidence" not in rows_of(result_dir)[0]


def test_ranking_takes_the_data_sets_answers_or_the_files(build, questions, result_dir):
    model, dataset = build(), questions()
    task = KVModVQATask(**{**VQA, "inference_method": "rank"})
    dataset.answer_list = ["cat", "suit", "table", "1"]
    evaluate(task, model, dataset)
    assert {row["answer"] for row in rows_of(result_dir)} <= set(dataset.answer_list)
    evaluate(KVModVQATask(**{**VQA, "inference_method": "rank"}, candidates=["red", "seven"]), model, dataset)
    assert {row["answer"] for row in rows_of(result_dir)} <= {"red", "seven"}


def test_ranking_without_candidates_is_told_before_the_model_is_loaded(monkeypatch, tmp_path):
    build = DigitsVQABuilder.build

    def without_answer_list(builder):
        splits = build(builder)
        for split in splits.values():
            split.answer_list = None
        return splits

    options = ["run.inference_method=rank", f"run.output_dir={tmp_path}"]
    cfg = load_config("projects/kvmod/demo_vqa.yaml", options)
    task = KVModVQATask.setup_task(cfg)
    assert set(task.build_datasets(cfg)["digits_vqa"]) == {"train", "val", "test"}
    monkeypatch.setattr(DigitsVQABuilder, "build", without_answer_list)
    with pytest.raises(ConfigurationError, match="digits_vqa's split 'val' has no answer_list; set run.answer_list"):
        task.build_datasets(cfg)
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    cfg = load_config("projects/kvmod/demo_vqa.yaml", [*options, f"run.answer_list={tmp_path / 'answers.txt'}"])
    task = KVModVQATask.setup_task(cfg)
    assert task.build_datasets(cfg) and task.candidates == ["yes", "no"]


def test_a_split_without_answers_is_written_and_not_scored(build, questions, result_dir, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(KVModVQATask(**VQA), build(), questions(answer=None))
    assert metrics == {"agg_metrics": 0.0, "scored": 0}
    assert "val: nothing was scored" in caplog.text
    rows = rows_of(result_dir)
    assert len(rows) == 6 and "accuracy" not in rows[0] and rows[0]["answers"] == []


def test_some_answers_missing(build, questions, result_dir, caplog):
    dataset = questions()
    dataset.annotation[2] = {**dataset.annotation[2], "answer": []}
    metrics = evaluate(KVModVQATask(**VQA), build(), dataset)
    assert metrics["scored"] == 5 and "1 of 6 questions have no answers and were not scored" in caplog.text


def test_answers_that_nothing_matches_are_told(build, questions, result_dir, caplog):
    evaluate(KVModVQATask(**VQA), build(), questions(answer=["The Cat"] * 10))
    assert "6 of 6 questions cannot be answered right" in caplog.text and "'The Cat'" in caplog.text


def test_the_leaderboards_file(build, questions, result_dir, caplog):
    class WithLeaderboard(VQAEvalData):
        def write_leaderboard(self, rows, folder):
            path = folder / "leaderboard.json"
            path.write_text(json.dumps([{"question_id": row["question_id"], "answer": row["answer"]} for row in rows]))
            return path

    with caplog.at_level(logging.INFO):
        evaluate(KVModVQATask(**VQA), build(), questions(WithLeaderboard, answer=None))
    assert len(json.loads((result_dir / "leaderboard.json").read_text())) == 6
    assert "leaderboard.json" in caplog.text


# ---------------------------------------------------------------- captions


def test_captions_are_scored_against_all_of_an_images_own(build, captions, result_dir):
    metrics = evaluate(KVModCaptionTask(**CAPTIONING), build(), captions())
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr", "exact_match", "tokeniser", "loss"} <= set(metrics)
    assert metrics["agg_metrics"] == metrics["CIDEr"] + metrics["Bleu_4"] and metrics["scored"] == 3
    rows = rows_of(result_dir)
    assert [row["image_id"] for row in rows] == [0, 1, 2]
    assert rows[1]["references"] == ["a cat", "a photo"] and rows[1]["prediction"] == rows[1]["caption"]
    assert metrics["CIDEr"] == pytest.approx(sum(row["CIDEr"] for row in rows) / 3)


class Saying(BaseModel):
    """A LAVIS model that knows its captions."""

    def __init__(self, texts):
        super().__init__()
        self.texts = iter(texts)

    def generate(self, samples, **kwargs):
        return [next(self.texts) for _ in samples["image"]]


def test_what_is_right_scores_full(captions, result_dir):
    task = KVModCaptionTask(**CAPTIONING, valid_loss=False)
    metrics = evaluate(task, Saying(["A woman  in an orange suit", "a photo", "something else"]), captions())
    assert metrics["exact_match"] == pytest.approx(200 / 3)
    rows = rows_of(result_dir)
    assert [row["exact_match"] for row in rows] == [True, True, False]
    assert rows[0]["ROUGE_L"] == rows[1]["ROUGE_L"] == 1.0 > rows[2]["ROUGE_L"]


def test_an_image_in_several_rows_is_scored_once_against_all_captions(captions, result_dir):
    """As in a file with one caption a row."""
    dataset = captions()
    texts = ["a cat", "a small cat", "a dog"]
    dataset.annotation = [
        {**dataset.annotation[i // 2], "caption": text, "instance_id": str(i)} for i, text in enumerate(texts)
    ]
    task = KVModCaptionTask(**CAPTIONING, valid_loss=False)
    metrics = evaluate(task, Saying(["a small cat", "never looked at", "a dog"]), dataset)
    assert metrics["scored"] == 2 and metrics["exact_match"] == 100
    rows = rows_of(result_dir)
    assert len(rows) == 3 and rows[0]["references"] == rows[1]["references"] == ["a cat", "a small cat"]
    assert "CIDEr" in rows[0] and "CIDEr" not in rows[1]


def test_report_metric_false_and_no_captions(build, captions, result_dir, caplog):
    assert evaluate(KVModCaptionTask(**CAPTIONING, report_metric=False, valid_loss=False), build(), captions()) == {
        "agg_metrics": 0.0,
        "scored": 0,
    }
    assert evaluate(KVModCaptionTask(**CAPTIONING), build(), captions(caption=None)) == {
        "agg_metrics": 0.0,
        "scored": 0,
    }
    assert len(rows_of(result_dir)) == 3


def test_what_is_left_out_is_said_once(captions, result_dir, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no java
    task = KVModCaptionTask(**{**CAPTIONING, "caption_metrics": ["ROUGE_L", "METEOR", "SPICE"]}, valid_loss=False)
    for epoch in range(2):
        metrics = evaluate(task, Saying(["a cat"] * 3), captions(), epoch=epoch)
    assert metrics["tokeniser"] == "simple" and set(metrics) & {"METEOR", "SPICE"} == set()
    assert caplog.text.count("left out METEOR and SPICE: there is no java on the PATH") == 1
    assert metrics["left_out"] == "METEOR and SPICE: there is no java on the PATH"
    assert metrics["agg_metrics"] == metrics["exact_match"] / 100  # neither CIDEr nor Bleu was asked for


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("kind", ["vqa", "captions"])
def test_loss_is_the_mean_over_the_splits_tokens(build, questions, captions, result_dir, kind):
    """Whatever the batches: equal to the loss of the whole split as one batch."""
    model = build().eval()
    if kind == "vqa":
        task, dataset = KVModVQATask(**VQA), questions()
        batch = {**whole_batch(dataset), "prompt": VQA["prompt"]}
    else:
        task, dataset = KVModCaptionTask(**CAPTIONING), captions()
        batch = whole_batch(dataset)
    with torch.no_grad():
        expected = model(batch)["loss"].item()
    assert evaluate(task, model, dataset, batch_size=2)["loss"] == pytest.approx(expected, rel=1e-5)
    assert not model.training


def test_loss_of_captions_is_behind_the_prompt_as_in_training(build, captions, result_dir):
    """Whether a text processor puts it there or not; captions are generated from it."""
    model, dataset = build(prompt="a photo of").eval(), captions()
    got = evaluate(KVModCaptionTask(**CAPTIONING), model, dataset)["loss"]
    processor = BlipCaptionProcessor(prompt="a photo of ")
    batch = {**whole_batch(dataset), "text_input": [processor(text) for text in PHOTOS.values()]}
    with torch.no_grad():
        assert got == pytest.approx(model(batch)["loss"].item(), rel=1e-5)
        assert got == pytest.approx(model(whole_batch(dataset))["loss"].item(), rel=1e-5)
        model.prompt = ""
        assert got != pytest.approx(model(whole_batch(dataset))["loss"].item(), rel=1e-2)


def test_loss_changes_no_random_number_and_can_be_left_out(build, questions, result_dir):
    model, dataset = build(), questions()
    forward = model.forward

    def drawing(samples):
        torch.rand(3)
        return forward(samples)

    model.forward = drawing
    torch.manual_seed(3)
    metrics = evaluate(KVModVQATask(**VQA), model, dataset)
    after = torch.random.get_rng_state()
    assert metrics["loss"] > 0
    torch.manual_seed(3)
    without = evaluate(KVModVQATask(**VQA, valid_loss=False), model, dataset)
    assert "loss" not in without and without["overall"] == metrics["overall"]
    assert torch.equal(torch.random.get_rng_state(), after)


def test_only_batches_with_all_their_answers_count_in_the_loss(build, questions, result_dir):
    model, dataset = build().eval(), questions()
    dataset.annotation[5] = {
        **dataset.annotation[5],
        "answer": [],
    }  # LAVIS's sets carry no answers in evaluation at all
    got = evaluate(KVModVQATask(**VQA), model, dataset, batch_size=2)["loss"]
    batch = dataset.collater([dataset[i] for i in range(4)])
    with torch.no_grad():
        assert got == pytest.approx(model({**batch, "prompt": VQA["prompt"]})["loss"].item(), rel=1e-5)


def test_a_caption_or_answer_without_words_has_no_loss(build, questions, captions, result_dir):
    """LAVIS's caption processor takes punctuation away; the model refuses what is empty."""
    model, dataset = build(), captions()
    dataset.annotation[1] = {**dataset.annotation[1], "caption": ["!!!", "a photo"]}
    assert "loss" not in evaluate(KVModCaptionTask(**CAPTIONING), model, dataset, batch_size=3)
    assert "loss" not in evaluate(KVModVQATask(**VQA), model, questions(answer=["", " "]))


# ---------------------------------------------------------------- bad samples, streams, ranks


def test_bad_samples_are_counted_and_reported(build, questions, result_dir, caplog):
    dataset = questions(policy="skip")
    broken = dataset.annotation[4]["image"] + ".gone"
    dataset.annotation[4] = {**dataset.annotation[4], "image": broken}
    metrics = evaluate(KVModVQATask(**VQA), build(), dataset)
    assert metrics["scored"] == 5 and len(rows_of(result_dir)) == 5
    assert "epoch 0: 1 of 6 samples could not be read and were skipped" in caplog.text and broken in caplog.text


def test_too_many_bad_samples_stop_the_evaluation(build, questions, result_dir):
    dataset = questions(policy="skip")
    for row in (1, 4):
        dataset.annotation[row] = {**dataset.annotation[row], "image": dataset.annotation[row]["image"] + ".gone"}
    dataset.max_bad_share = 0.2
    with pytest.raises(BadDataError, match="2 of 6 samples could not be read, more than max_bad_share: 0.2"):
        evaluate(KVModVQATask(**VQA), build(), dataset)
    assert list(result_dir.iterdir()) == []


class Streamed:
    """A data set that has no list of annotations and cannot be asked for a sample again: each brings its own."""

    def __init__(self, dataset):
        self._source, self.vis_processor = dataset, dataset.vis_processor

    def __len__(self):
        return len(self._source)

    def __iter__(self):
        order = [i for i in (4, 5, 2, 3, 0, 1) if i < len(self)]  # as another number of ranks may give them
        for start in range(0, len(order), 2):
            places = order[start : start + 2]
            batch = self._source.collater([self._source[i] for i in places])
            yield {**batch, "annotation": [self._source.annotation[i] for i in places]}


def without_confidence(row):
    """Other batches give it other last digits."""
    return {key: value for key, value in row.items() if key not in ("confidence", "log_prob", "mean_log_prob")}


@pytest.mark.parametrize("kind", ["vqa", "captions"])
def test_streamed_samples_bring_their_annotations(build, questions, captions, result_dir, kind):
    model = build().eval()
    task, dataset = (
        (KVModVQATask(**VQA), questions()) if kind == "vqa" else (KVModCaptionTask(**CAPTIONING), captions())
    )
    expected = evaluate(task, model, dataset)
    rows = rows_of(result_dir)
    stream = Streamed(dataset)
    task.evaluated = {}
    task.before_evaluation(model=model, dataset=stream)
    got = task.after_evaluation(
        val_result=task.evaluation(model, stream, cuda_enabled=False), split_name="val", epoch=0
    )
    assert got.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5) and got == expected
    assert list(map(without_confidence, rows_of(result_dir))) == list(map(without_confidence, rows))
    assert set(task.evaluated["val"].pictures) == {row["instance_id"] for row in rows}


def test_only_so_many_streamed_pictures_are_kept(build, questions, result_dir, monkeypatch):
    monkeypatch.setattr(evaluation_module, "PICTURES_KEPT", 3)
    task, stream = KVModVQATask(**VQA), Streamed(questions())
    task.evaluated = {}
    task.before_evaluation(model=build().eval(), dataset=stream)
    results = task.evaluation(build().eval(), stream, cuda_enabled=False)
    task.after_evaluation(val_result=results, split_name="val", epoch=0)
    assert set(task.evaluated["val"].pictures) == {"4", "5", "2"}  # the first three of the stream


def test_rows_come_in_the_data_sets_order_once_and_losses_add_up(build, questions, result_dir, monkeypatch):
    """As two ranks would give them, one sample twice."""
    model, dataset = build().eval(), questions()
    expected = evaluate(KVModVQATask(**VQA), model, dataset)
    rows = rows_of(result_dir)
    shares = []
    for places in ([1, 3, 5], [0, 2, 4]):
        task = KVModVQATask(**VQA)
        task.before_evaluation(model=model, dataset=dataset)
        results = task.evaluation(model, [dataset.collater([dataset[i] for i in places])], cuda_enabled=False)
        shares.append({"rows": results, "loss": task._loss, "bad": [], "pictures": {}})
    shares[1]["rows"].append(shares[0]["rows"][0])
    monkeypatch.setattr(evaluation_module, "gather", lambda share: shares)
    got = task.after_evaluation(val_result=shares[1]["rows"], split_name="val", epoch=0)
    assert got == pytest.approx(expected, rel=1e-5)
    assert [r["question_id"] for r in rows_of(result_dir)] == [r["question_id"] for r in rows]


def test_ranks_with_fewer_batches_keep_in_step_where_the_language_model_is_sharded(build, questions, monkeypatch):
    """This rank has one batch, another has three: it repeats its own twice, uncounted, and then both stop."""
    dataset = questions()
    loader = DataLoader(dataset, batch_size=6, collate_fn=dataset.collater)
    model = build()
    assert [step.counts for step in steps(loader, loader, model, lambda samples: True)] == [True]

    others = iter([True, True, True, True, True, False, False])  # has a batch, has targets, …
    monkeypatch.setattr("lavis_kvmod.tasks.batches.is_sharded", lambda opt: True)
    monkeypatch.setattr("lavis_kvmod.tasks.batches.gather", lambda mine: [*mine, next(others)])
    taken = list(steps(loader, loader, model, lambda samples: "answer" in samples))
    assert [(step.counts, step.all_have_targets) for step in taken] == [(True, True), (False, True), (False, False)]
    assert taken[2].samples["question_id"] == taken[0].samples["question_id"]

    others = iter([True, True, False])  # a rank without any batch
    (step,) = steps(loader, [], model, lambda samples: "answer" in samples)
    assert not step.counts and step.samples["question_id"] == ["astronaut-what"]


def test_lavis_own_settings_build_the_tasks():
    run = OmegaConf.create(
        {"num_beams": 2, "max_len": 7, "min_len": 2, "valid_loss": False, "caption_metrics": ["Bleu"]}
    )
    cfg = OmegaConf.create({"run_cfg": run, "model_cfg": {"prompt": "Q: {} A:"}})
    task = KVModVQATask.setup_task(cfg)
    assert (task.num_beams, task.max_len, task.prompt, task.valid_loss) == (2, 7, "Q: {} A:", False)
    assert KVModCaptionTask.setup_task(cfg).caption_metrics == ("Bleu",)


def test_decoding_keys_reach_the_model(build, questions, captions, result_dir, monkeypatch):
    """Each under its own name; what a run file does not set is left to the model."""
    keys = dict(length_penalty=2.0, repetition_penalty=1.5, use_nucleus_sampling=True, top_p=0.4, temperature=0.5)
    searches = []

    def spy(opt, tokenizer, soft_prompt, contexts, search, **kwargs):
        searches.append(search)
        return continue_texts(opt, tokenizer, soft_prompt, contexts, search, **kwargs)

    monkeypatch.setattr("lavis_kvmod.models.soft_prompts.continue_texts", spy)
    model, model_cfg = build().eval(), {"prompt": ""}
    for cls, dataset, run in (
        (KVModVQATask, questions(), {**keys, "max_len": 4, "min_len": 2}),
        (
            KVModCaptionTask,
            captions(),
            {**keys, "max_len": 4, "min_len": 2, "num_captions": 3, "caption_metrics": ["Bleu"]},
        ),
    ):
        evaluate(cls.setup_task(OmegaConf.create({"run_cfg": run, "model_cfg": model_cfg})), model, dataset)
        search = searches.pop()
        assert (search.length_penalty, search.repetition_penalty, search.top_p, search.temperature) == (
            2,
            1.5,
            0.4,
            0.5,
        )
        assert search.sample and search.min_new_tokens == 2 and search.max_new_tokens == 4
        assert search.num_return_sequences == run.get("num_captions", 1)
    assert len(rows_of(result_dir)) == 3
    assert KVModVQATask.setup_task(OmegaConf.create({"run_cfg": {}, "model_cfg": model_cfg})).decoding == {}


def test_of_several_captions_the_likeliest_is_scored(captions, result_dir):
    class Drawing(BaseModel):
        def generate(self, samples, num_captions=1, return_scores=False, **kwargs):
            of_image = [ScoredAnswer("a dog", -3.0, 3), ScoredAnswer("a cat", -1.0, 3), ScoredAnswer("a bird", -2.0, 3)]
            return of_image * len(samples["image"])

    task = KVModCaptionTask(**CAPTIONING, valid_loss=False, decoding={"num_captions": 3})
    evaluate(task, Drawing(), captions())
    assert [row["caption"] for row in rows_of(result_dir)] == ["a cat"] * 3

"""Our tasks on LAVIS's own evaluation data sets, with files in their layouts: their ids, keys and truths."""

import json

import pytest
from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa import VQA as OfficialFiles
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.datasets.datasets.aok_vqa_datasets import AOKVQAEvalDataset
from lavis.datasets.datasets.coco_caption_datasets import COCOCapEvalDataset, NoCapsEvalDataset
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQAEvalDataset
from lavis.datasets.datasets.gqa_datasets import GQAEvalDataset
from lavis.models.base_model import BaseModel
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipQuestionProcessor
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader

from lavis_kvmod.system.lavis_paths import set_registry_path
from lavis_kvmod.tasks.captioning import KVModCaptionTask
from lavis_kvmod.tasks.vqa import KVModVQATask

PHOTOS = ["astronaut", "chelsea", "coffee"]
HEAD = {"info": {}, "task_type": "", "data_type": "", "data_subtype": "", "license": {}}


class Saying(BaseModel):
    """A LAVIS model that gives one text after the other."""

    def __init__(self, texts):
        super().__init__()
        self.texts = iter(texts)

    def predict_answers(self, samples, **kwargs):
        return [next(self.texts) for _ in samples["image"]]

    generate = predict_answers


@pytest.fixture()
def folder(tmp_path):
    for name in PHOTOS:
        Image.fromarray(getattr(data, name)()).resize((40, 30)).save(tmp_path / f"COCO_val2014_{name}.png")
    before = registry.get_path("result_dir")
    set_registry_path("result_dir", tmp_path)
    yield tmp_path
    set_registry_path("result_dir", before)


def written(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def rows(**columns):
    return [
        {"image": f"COCO_val2014_{name}.png", "question": "what is it?", **{k: v[i] for k, v in columns.items()}}
        for i, name in enumerate(PHOTOS)
    ]


def evaluate(task, dataset, texts):
    model = Saying(texts)
    task.before_evaluation(model=model, dataset=dataset)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collater)
    results = task.evaluation(model, loader, cuda_enabled=False)
    return task.after_evaluation(val_result=results, split_name="val", epoch=0)


def vqa(dataset_cls, folder, files, texts):
    dataset = dataset_cls(BlipImageEvalProcessor(28), BlipQuestionProcessor(), str(folder), files)
    task = KVModVQATask(
        num_beams=1, max_len=3, min_len=1, evaluate=True, num_ans_candidates=3, inference_method="generate", prompt="{}"
    )
    return evaluate(task, dataset, texts)


def test_coco_vqa_with_the_truth_in_official_files_alone(folder):
    """As LAVIS's coco_vqa and ok_vqa have it; the score is the official evaluation's, from the file we wrote."""
    answers = [["a person"] * 4 + ["person"] * 6, ["cat"] * 2 + ["kitten"] * 8, ["cup"] * 10]
    kinds = ["what is", "what is", "how many"]
    questions = [{"image_id": i, "question": "what is it?", "question_id": 10 + i} for i in range(3)]
    truths = [
        {
            "question_id": 10 + i,
            "image_id": i,
            "question_type": kinds[i],
            "answer_type": "other",
            "answers": [{"answer": answer, "answer_id": k} for k, answer in enumerate(answers[i])],
        }
        for i in range(3)
    ]
    files = [
        written(folder, "val.json", rows(question_id=[10, 11, 12])),
        written(folder, "answer_list.json", []),
        written(folder, "q.json", {**HEAD, "questions": questions}),
        written(folder, "a.json", {**HEAD, "annotations": truths}),
    ]
    metrics = vqa(COCOVQAEvalDataset, folder, files, ["Person.", "cat", "mug"])

    official = OfficialFiles(files[3], files[2])
    scorer = VQAEval(official, official.loadRes(str(folder / "val_epoch0.json"), files[2]), n=12)
    scorer.evaluate()
    assert metrics["vqa_accuracy"] == pytest.approx(scorer.accuracy["overall"], abs=1e-9)
    for kind, value in scorer.accuracy["perQuestionType"].items():
        assert metrics[f"question_type/{kind}"] == pytest.approx(value, abs=1e-9)
    assert metrics["answer_type/other"] == pytest.approx(scorer.accuracy["perAnswerType"]["other"], abs=1e-9)
    assert "exact_match" not in metrics and metrics["scored"] == 3


def test_ok_vqa_with_its_answers_in_the_annotation(folder):
    answers = [["surf"] * 10, ["cat"] * 2 + ["pet"] * 8, ["cup"] * 10]
    files = [written(folder, "val.json", rows(question_id=[1, 2, 3], answer=answers)), str(folder / "none.json")]
    metrics = vqa(COCOVQAEvalDataset, folder, files, ["surf", "cat", "cup"])
    assert metrics["vqa_accuracy"] == pytest.approx(100 * (1 + 0.6 + 1) / 3)


def test_aok_vqa(folder):
    columns = dict(
        question_id=["2a", "2b", "2c"],
        direct_answers=[["suit"] * 10, ["cat"] * 10, ["tea"] * 10],
        choices=[["a", "b"]] * 3,
        correct_choice_idx=[0] * 3,
    )
    metrics = vqa(
        AOKVQAEvalDataset, folder, [written(folder, "val.json", rows(**columns)), "none"], ["suit", "dog", "tea"]
    )
    assert metrics["vqa_accuracy"] == metrics["overall"] == pytest.approx(200 / 3)


def test_gqa_by_exact_match(folder):
    columns = dict(question_id=["05515938", "2", "3"], answer=["woman", "cat", "cup"])
    metrics = vqa(GQAEvalDataset, folder, [written(folder, "val.json", rows(**columns))], ["A woman.", "dog", "cup"])
    assert metrics["exact_match"] == metrics["agg_metrics"] == pytest.approx(200 / 3)
    assert "vqa_accuracy" not in metrics and "loss" not in metrics


def captions(dataset_cls, folder, annotations, texts):
    files = [written(folder, "val.json", annotations)]
    dataset = dataset_cls(BlipImageEvalProcessor(28), BlipCaptionProcessor(), str(folder), files)
    metrics = ["Bleu", "ROUGE_L", "CIDEr"]
    task = KVModCaptionTask(num_beams=1, max_len=5, min_len=1, evaluate=True, caption_metrics=metrics)
    return evaluate(task, dataset, texts)


def test_coco_captions_by_file_not_by_lavis_id(folder):
    """LAVIS makes ids of file names' ends, and strips letters of ".jpg" from them: two files may share one."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "a/x_1.png")
    Image.new("RGB", (9, 9)).save(folder / "b/y_1.png")
    found = [{"image": "a/x_1.png", "caption": ["a cat"]}, {"image": "b/y_1.png", "caption": ["a dog", "one dog"]}]
    metrics = captions(COCOCapEvalDataset, folder, found, ["a cat", "one dog"])
    assert metrics["exact_match"] == 100 and metrics["scored"] == 2
    ids = [row["image_id"] for row in json.loads((folder / "val_epoch0.json").read_text())]
    assert ids[0] == ids[1]


def test_nocaps_has_no_captions(folder):
    found = [{"image": f"COCO_val2014_{name}.png", "img_id": i} for i, name in enumerate(PHOTOS)]
    assert captions(NoCapsEvalDataset, folder, found, ["x"] * 3) == {"agg_metrics": 0.0, "scored": 0}
    assert [row["image_id"] for row in json.loads((folder / "val_epoch0.json").read_text())] == [0, 1, 2]

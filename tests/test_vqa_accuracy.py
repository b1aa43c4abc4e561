import json
import random

import pytest
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_kvmod.tasks.vqa_accuracy import accuracy, accuracy_by_type

ANSWERS = ["yes", "no", "two", "a red car", "red car", "it's", "2", "blue, white", "dont know"]


def test_equal_to_the_official_evaluation(tmp_path):
    rng = random.Random(0)
    questions, annotations, results, ours = [], [], [], []
    for i in range(200):
        pool = rng.sample(ANSWERS, 3)
        answers = [rng.choice(pool) for _ in range(10)]
        kind = rng.choice(["what", "how many"])
        questions.append({"image_id": i, "question": "?", "question_id": i})
        annotations.append(
            {
                "image_id": i,
                "question_id": i,
                "question_type": kind,
                "answer_type": "other",
                "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(answers)],
            }
        )
        prediction = rng.choice([*pool, "The Red car.", "YES"])
        results.append({"question_id": i, "answer": prediction})
        ours.append((accuracy(prediction, answers), kind))
    head = {"info": {}, "task_type": "", "data_type": "", "data_subtype": "", "license": {}}
    for name, content in {
        "q": {**head, "questions": questions},
        "a": {**head, "annotations": annotations},
        "r": results,
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    official = VQA(str(tmp_path / "a"), str(tmp_path / "q"))
    scorer = VQAEval(official, official.loadRes(str(tmp_path / "r"), str(tmp_path / "q")), n=12)
    scorer.evaluate()
    got = accuracy_by_type(ours)
    assert got["overall"] == pytest.approx(scorer.accuracy["overall"], abs=1e-9)
    for kind, value in scorer.accuracy["perQuestionType"].items():
        assert got[kind] == pytest.approx(value, abs=1e-9)


def test_few_answers_are_matched_exactly():
    assert accuracy("Seven.", ["seven"]) == 1.0
    assert accuracy("one", ["seven"]) == 0.0
    assert accuracy("cat", ["dog", "the cat"]) == 1.0
    with pytest.raises(ValueError, match="at least one reference answer"):
        accuracy("x", [])

"""VQA's soft accuracy equals the official evaluation's, which LAVIS carries, on the same files."""

import json
import random

import pytest
from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval

from lavis_kvmod.tasks.ground_truth import read_official
from lavis_kvmod.tasks.vqa_accuracy import Scored, accuracy, cannot_be_matched, is_soft, summarise

ANSWERS = ["yes", "no", "two", "a red car", "red car", "it's", "2", "blue, white", "dont know", "Two", "1,000", "U.S."]
ANSWERS += ["new\nline", "half-open", "", "the", "3.5", "can't", "cant", "rock 'n' roll"]
QUESTION_TYPES = ["what", "how many", "none of the above", "other"]  # "other" is an answer type as well
ANSWER_TYPES = ["yes/no", "number", "other"]


def official_files(folder, num_questions=300, num_answers=10):
    """Files in the official layout, and results; returns what each holds."""
    rng = random.Random(0)
    questions, annotations, results = [], [], []
    for i in range(num_questions):
        pool = rng.sample(ANSWERS, rng.choice([1, 3]))
        answers = [rng.choice(pool) for _ in range(num_answers)]
        questions.append({"image_id": i, "question": "?", "question_id": i})
        annotations.append(
            {
                "image_id": i,
                "question_id": i,
                "question_type": rng.choice(QUESTION_TYPES),
                "answer_type": rng.choice(ANSWER_TYPES),
                "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(answers)],
            }
        )
        results.append({"question_id": i, "answer": rng.choice([*pool, "The Red car.", "YES", "1 000", "us"])})
    head = {"info": {}, "task_type": "", "data_type": "", "data_subtype": "", "license": {}}
    for name, content in {
        "q": {**head, "questions": questions},
        "a": {**head, "annotations": annotations},
        "r": results,
    }.items():
        (folder / name).write_text(json.dumps(content))
    return results


def test_equal_to_the_official_evaluation(tmp_path):
    results = official_files(tmp_path)
    official = VQA(str(tmp_path / "a"), str(tmp_path / "q"))
    scorer = VQAEval(official, official.loadRes(str(tmp_path / "r"), str(tmp_path / "q")), n=12)
    scorer.evaluate()

    truths = read_official(str(tmp_path / "a"))
    scored = []
    for row in results:
        truth = truths[str(row["question_id"])]
        value = accuracy(row["answer"], truth.answers)
        assert 100 * value == pytest.approx(scorer.evalQA[row["question_id"]], abs=1e-9)
        scored.append(Scored(value, is_soft(truth.answers), truth.question_type, truth.answer_type))
    got = summarise(scored)
    expected = {"overall": scorer.accuracy["overall"], "vqa_accuracy": scorer.accuracy["overall"]}
    expected.update({f"question_type/{k}": v for k, v in scorer.accuracy["perQuestionType"].items()})
    expected.update({f"answer_type/{k}": v for k, v in scorer.accuracy["perAnswerType"].items()})
    assert len(expected) == 2 + len(QUESTION_TYPES) + len(ANSWER_TYPES)
    assert got == pytest.approx(expected, abs=1e-9)
    assert 10 < got["overall"] < 90  # of values that could differ


def test_few_answers_are_matched_exactly():
    assert accuracy("Seven.", ["seven"]) == 1.0
    assert accuracy("one", ["seven"]) == 0.0
    assert accuracy("cat", ["dog", "the cat"]) == 1.0
    with pytest.raises(ValueError, match="at least one reference answer"):
        accuracy("x", [])


def test_what_was_measured_is_told_by_its_name():
    assert set(summarise([Scored(1.0, soft=False)])) == {"overall", "exact_match"}
    mixed = summarise([Scored(1.0, soft=False), Scored(0.0, soft=True)])
    assert mixed == {"overall": 50.0, "exact_match": 100.0, "vqa_accuracy": 0.0}


def test_answers_that_nothing_can_match():
    """The official rule does not normalise people's answers; told, since it would look like a bad model."""
    assert cannot_be_matched(["Two"] * 10) and accuracy("Two", ["Two"] * 10) == 0
    assert cannot_be_matched(["a dog"] * 10)
    assert not cannot_be_matched(["2"] * 10) and not cannot_be_matched(["A dog"] * 9 + ["dog"])
    assert not cannot_be_matched(["Two"])  # one answer: both sides are normalised

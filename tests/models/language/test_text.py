import pytest
import torch
from transformers import AutoTokenizer

from lavis_kvmod.models.language import text
from lavis_kvmod.models.language.text import (
    IGNORED,
    answer_batch,
    answer_ids,
    caption_batch,
    caption_contexts,
    check_prompt,
    prompt_batch,
    question_contexts,
)

PROMPT = "Question: {} Short answer:"


@pytest.fixture(scope="module")
def tokenizer(opt_folder):
    return AutoTokenizer.from_pretrained(str(opt_folder), use_fast=False)


def test_context_and_answer_are_what_the_whole_text_would_be(tokenizer):
    contexts = question_contexts(tokenizer, ["which digit is written"], PROMPT, 64)
    batch = answer_batch(tokenizer, contexts, ["seven"], "cpu")
    whole = tokenizer("Question: which digit is written Short answer: seven\n").input_ids
    assert batch.input_ids[0].tolist() == whole
    has_loss = batch.labels[0] != IGNORED
    assert tokenizer.decode(batch.input_ids[0][has_loss]) == " seven\n"
    assert torch.equal(batch.labels[0][has_loss], batch.input_ids[0][has_loss])


def test_a_long_question_loses_its_own_end_not_the_prompts(tokenizer):
    question = " ".join(["what"] * 200)
    (context,) = question_contexts(tokenizer, [question], PROMPT, 40)
    decoded = tokenizer.decode(context)
    assert len(context) <= 40
    assert decoded.startswith("</s>Question: what what") and decoded.endswith("what Short answer:")
    batch = answer_batch(tokenizer, [context], ["a very long answer " * 20], "cpu")
    assert tokenizer.decode(batch.input_ids[0]).endswith("a very long answer\n")  # never cut


def test_braces_in_a_question_are_text(tokenizer):
    (context,) = question_contexts(tokenizer, ["what is {x}"], PROMPT, 64)
    assert tokenizer.decode(context) == "</s>Question: what is {x} Short answer:"


@pytest.mark.parametrize("prompt", ["Q: {question} A:", "Q: {0} A:", "{", "} {}", ["ok {}", "{x}"]])
def test_braces_in_a_prompt_are_refused_but_for_the_questions_place(tokenizer, prompt):
    with pytest.raises(ValueError, match=r"prompt: expected no braces but \{\} \(the question's place\), got '"):
        question_contexts(tokenizer, ["what is it", "who is it"], prompt, 64)
    assert check_prompt("run.prompt", "Q: {question} A:")[0].startswith("run.prompt: expected no braces but {}")
    assert check_prompt("run.prompt", "Q: {} A:") == check_prompt("run.prompt", "") == []


@pytest.mark.parametrize(
    "question",
    [
        "这张照片里的纸是什么颜色的请用一个词回答",
        "ภาพนี้มีตัวเลขอะไรอยู่ตรงกลาง",
        "https://example.org/" + "q" * 60,
        "is " + "x" * 99,
    ],
)
def test_a_question_without_spaces_is_cut_not_emptied(tokenizer, question):
    (context,) = question_contexts(tokenizer, [question], PROMPT, 32)
    decoded = tokenizer.decode(context)
    start, end = "</s>Question: ", " Short answer:"
    kept = decoded[len(start) : -len(end)]
    assert len(context) <= 32 and decoded == f"{start}{kept}{end}"
    assert question.startswith(kept) and 0 < len(kept) < len(question)
    one_more = PROMPT.replace("{}", question[: len(kept) + 1])
    assert len(tokenizer(one_more).input_ids) > 32  # no room is left


def test_different_questions_stay_different(tokenizer):
    questions = ["这张照片里的纸是什么颜色的请用一个词回答", "图上写的是哪一个数字请用一个词回答"]
    first, second = question_contexts(tokenizer, questions, PROMPT, 32)
    assert first != second


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_txt_len: 5 leaves no room for the question 'what is it'; shorten"):
        question_contexts(tokenizer, ["what is it"], PROMPT, 5)


def test_a_shortened_question_is_told_once_and_many_are_counted(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(text, "_tell_shortened", text._Shortened())
    questions = [f"{i} " + "what " * 30 for i in range(120)]
    for _ in range(3):
        question_contexts(tokenizer, questions[:2], PROMPT, 32)
    assert len(caplog.records) == 2
    assert "max_txt_len: 32: of '0 what what" in caplog.text and "the model reads '0 what what" in caplog.text
    question_contexts(tokenizer, questions, PROMPT, 32)
    assert len(caplog.records) == 11 and "100 questions so far were shortened" in caplog.messages[-1]


def test_padding_sides(tokenizer):
    rows = [[2, 5, 6], [2, 7]]
    left = prompt_batch(tokenizer, rows, "cpu")
    assert left.input_ids.tolist() == [[2, 5, 6], [tokenizer.pad_token_id, 2, 7]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    right = answer_batch(tokenizer, rows, ["seven", "seven"], "cpu")
    assert right.attention_mask[1, -1] == 0 and right.labels[1, -1] == IGNORED
    assert right.labels[0, :3].tolist() == [IGNORED] * 3


def learned(tokenizer, batch):
    """What each row of a batch is, and which part of it has a loss."""
    rows = zip(batch.input_ids, batch.attention_mask.bool(), batch.labels)
    return [(tokenizer.decode(ids[seen]), tokenizer.decode(ids[labels != IGNORED])) for ids, seen, labels in rows]


def test_a_prompt_stands_in_front_of_every_caption_once_and_has_no_loss(tokenizer):
    """Whether the text processor put it there or not: captions are generated from it."""
    captions = ["a photo of a cat", "the mat on a cat", "A photo of  a cat", "a photo often", "a photo of"]
    batch = caption_batch(tokenizer, captions, "a photo of ", 32, "cpu")
    assert learned(tokenizer, batch) == [
        ("</s>a photo of a cat\n", " a cat\n"),
        ("</s>a photo of the mat on a cat\n", " the mat on a cat\n"),
        ("</s>a photo of a cat\n", " a cat\n"),
        ("</s>a photo of a photo often\n", " a photo often\n"),
        ("</s>a photo of\n", "\n"),
    ]
    (context,) = caption_contexts(tokenizer, "a photo of", 1)
    assert batch.input_ids[0].tolist()[: len(context)] == context  # what generation starts from
    without = caption_batch(tokenizer, ["a cat"], "", 32, "cpu")
    assert learned(tokenizer, without) == [("</s>a cat\n", "</s>a cat\n")]


def test_a_caption_is_cut_at_its_greatest_length(tokenizer):
    batch = caption_batch(tokenizer, ["a cat on a mat"], "a photo of", 6, "cpu")
    assert batch.input_ids.shape == (1, 6) and (batch.labels != IGNORED).sum() == 2


@pytest.mark.parametrize("between", ["\n", "\r\n", " \t ", "\u2028"])
def test_line_breaks_in_targets_are_spaces(tokenizer, between):
    """The newline is where generation stops: a target with one inside could never be said."""
    said = f"red{between}two\n"
    assert answer_ids(tokenizer, said) == answer_ids(tokenizer, "red two")
    of_caption = caption_batch(tokenizer, [f"a photo{between}of a cat{between}on a mat"], "a photo of", 32, "cpu")
    assert learned(tokenizer, of_caption) == [("</s>a photo of a cat on a mat\n", " a cat on a mat\n")]


def test_split_captions_give_a_random_part_and_learn_the_rest(tokenizer):
    captions = ["a red seven on yellow paper"] * 40
    whole = caption_batch(tokenizer, captions, "", 32, "cpu")
    torch.manual_seed(0)
    split = caption_batch(tokenizer, captions, "", 32, "cpu", split=True)
    assert torch.equal(split.input_ids, whole.input_ids)
    given = (split.targets == IGNORED).sum(1)
    assert given.min() == 1 and given.max() == split.input_ids.shape[1] - 1 and len(set(given.tolist())) > 3
    learnt = split.targets != IGNORED
    assert torch.equal(split.targets[learnt], split.input_ids[learnt])
    short = caption_batch(tokenizer, captions[:1], "", 1, "cpu", split=True)  # nothing to cut
    assert (short.targets != IGNORED).sum() == 1

import pytest
import torch
from transformers import AutoTokenizer

from lavis_kvmod.models.language.text import (
    IGNORED,
    answer_batch,
    answer_ids,
    caption_batch,
    caption_contexts,
    prompt_batch,
    question_contexts,
)

PROMPT = "Question: {} Short answer:"


@pytest.fixture(scope="module")
def tokenizer(opt_folder):
    return AutoTokenizer.from_pretrained(str(opt_folder), use_fast=False)


def test_context_and_answer_are_what_the_whole_text_would_be(tokenizer):
    contexts = question_contexts(tokenizer, ["which digit is written"], PROMPT, 64)
    text = answer_batch(tokenizer, contexts, ["seven"], "cpu")
    whole = tokenizer("Question: which digit is written Short answer: seven\n").input_ids
    assert text.input_ids[0].tolist() == whole
    has_loss = text.labels[0] != IGNORED
    assert tokenizer.decode(text.input_ids[0][has_loss]) == " seven\n"
    assert torch.equal(text.labels[0][has_loss], text.input_ids[0][has_loss])


def test_a_long_question_loses_its_own_end_not_the_prompts(tokenizer):
    question = " ".join(["what"] * 200)
    (context,) = question_contexts(tokenizer, [question], PROMPT, 40)
    decoded = tokenizer.decode(context)
    assert len(context) <= 40
    assert decoded.startswith("</s>Question: what what") and decoded.endswith("what Short answer:")
    text = answer_batch(tokenizer, [context], ["a very long answer " * 20], "cpu")
    assert tokenizer.decode(text.input_ids[0]).endswith("a very long answer\n")  # never cut


def test_braces_in_a_question_are_text(tokenizer):
    (context,) = question_contexts(tokenizer, ["what is {x}"], PROMPT, 64)
    assert tokenizer.decode(context) == "</s>Question: what is {x} Short answer:"


def test_padding_sides(tokenizer):
    rows = [[2, 5, 6], [2, 7]]
    left = prompt_batch(tokenizer, rows, "cpu")
    assert left.input_ids.tolist() == [[2, 5, 6], [tokenizer.pad_token_id, 2, 7]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    right = answer_batch(tokenizer, rows, ["seven", "seven"], "cpu")
    assert right.attention_mask[1, -1] == 0 and right.labels[1, -1] == IGNORED
    assert right.labels[0, :3].tolist() == [IGNORED] * 3


def learned(tokenizer, text):
    """What each row of a batch is, and which part of it has a loss."""
    rows = zip(text.input_ids, text.attention_mask.bool(), text.labels)
    return [(tokenizer.decode(ids[seen]), tokenizer.decode(ids[labels != IGNORED])) for ids, seen, labels in rows]


def test_a_prompt_stands_in_front_of_every_caption_once_and_has_no_loss(tokenizer):
    """Whether the text processor put it there or not: captions are generated from it."""
    captions = ["a photo of a cat", "the mat on a cat", "A photo of  a cat", "a photo often", "a photo of"]
    text = caption_batch(tokenizer, captions, "a photo of ", 32, "cpu")
    assert learned(tokenizer, text) == [
        ("</s>a photo of a cat\n", " a cat\n"),
        ("</s>a photo of the mat on a cat\n", " the mat on a cat\n"),
        ("</s>a photo of a cat\n", " a cat\n"),
        ("</s>a photo of a photo often\n", " a photo often\n"),
        ("</s>a photo of\n", "\n"),
    ]
    (context,) = caption_contexts(tokenizer, "a photo of", 1)
    assert text.input_ids[0].tolist()[: len(context)] == context  # what generation starts from
    without = caption_batch(tokenizer, ["a cat"], "", 32, "cpu")
    assert learned(tokenizer, without) == [("</s>a cat\n", "</s>a cat\n")]


def test_a_caption_is_cut_at_its_greatest_length(tokenizer):
    text = caption_batch(tokenizer, ["a cat on a mat"], "a photo of", 6, "cpu")
    assert text.input_ids.shape == (1, 6) and (text.labels != IGNORED).sum() == 2


@pytest.mark.parametrize("between", ["\n", "\r\n", " \t ", "\u2028"])
def test_line_breaks_in_targets_are_spaces(tokenizer, between):
    """The newline is where generation stops: a target with one inside could never be said."""
    said = f"red{between}two\n"
    assert answer_ids(tokenizer, said) == answer_ids(tokenizer, "red two")
    of_caption = caption_batch(tokenizer, [f"a photo{between}of a cat{between}on a mat"], "a photo of", 32, "cpu")
    assert learned(tokenizer, of_caption) == [("</s>a photo of a cat on a mat\n", " a cat on a mat\n")]

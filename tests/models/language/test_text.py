import pytest
import torch
from transformers import AutoTokenizer

from lavis_kvmod.models.language.text import IGNORED, answer_batch, caption_batch, prompt_batch, question_contexts

PROMPT = "Question: {} Short answer:"


@pytest.fixture(scope="module")
def tokenizer(opt_folder):
    return AutoTokenizer.from_pretrained(str(opt_folder), use_fast=False)


def test_context_and_answer_are_what_the_whole_text_would_be(tokenizer):
    contexts = question_contexts(tokenizer, ["which digit is written"], PROMPT, 64)
    text = answer_batch(tokenizer, contexts, ["seven"], "cpu")
    whole = tokenizer("Question: which digit is written Short answer: seven\n").input_ids
    assert text.input_ids[0].tolist() == whole
    learned = text.labels[0] != IGNORED
    assert tokenizer.decode(text.input_ids[0][learned]) == " seven\n"
    assert torch.equal(text.labels[0][learned], text.input_ids[0][learned])


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


def test_only_a_prompt_that_is_there_is_taken_out_of_the_loss(tokenizer):
    text = caption_batch(tokenizer, ["a photo of a cat", "the mat on a cat"], "a photo of", 32, "cpu")
    kept = [tokenizer.decode(i[lab != IGNORED]) for i, lab in zip(text.input_ids, text.labels)]
    assert kept == [" a cat\n", "</s>the mat on a cat\n"]

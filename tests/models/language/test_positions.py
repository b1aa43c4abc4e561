"""Sequences that are longer than the language model: told before, with the sum."""

import pytest
import torch

from lavis_kvmod.models.language.positions import known_positions, length_problems

LONG = "what colour is the ink of it " * 40
SIZES = dict(soft_prompt=32, max_txt_len=32)


def calls(model, image):
    """Ways to ask for more than the 128 positions of the tests' language model."""
    asked = {"image": image, "text_input": "is it even"}
    answered = {**asked, "text_input": ["is it even"], "weight": torch.ones(1), "n_answers": torch.ones(1).long()}
    return {
        "new tokens": lambda: model.generate({"image": image}, num_beams=2, max_length=200),
        "the prompt": lambda: model.generate({"image": image, "prompt": LONG}, num_beams=1),
        "an answer": lambda: model.predict_answers(asked, prompt="{}", max_len=200, num_beams=1),
        "a candidate": lambda: model.predict_answers(asked, inference_method="rank", answer_list=["no", LONG]),
        "a target": lambda: model({**answered, "answer": [LONG]}),
    }


@pytest.mark.parametrize("what", ["new tokens", "the prompt", "an answer", "a candidate", "a target"])
def test_too_long_is_refused_with_the_sum(build, images, what):
    with pytest.raises(ValueError, match=r"at most 128 positions.*; got 5 soft-prompt vectors \+ \d+ tokens.* = \d+: "):
        calls(build().eval(), images(1))[what]()


def test_as_long_as_there_are_positions(build, images):
    model = build().eval()
    limit = 128 - 5 - 1  # soft prompt, BOS
    (text,) = model.generate({"image": images(1)}, num_beams=1, max_length=limit, min_length=limit, return_scores=True)
    assert text.num_tokens == limit
    with pytest.raises(ValueError, match=r"5 soft-prompt vectors \+ 1 tokens of text \+ 123 new tokens = 129"):
        model.generate({"image": images(1)}, num_beams=1, max_length=limit + 1)


def test_positions_are_known_without_loading(opt_folder):
    assert known_positions(str(opt_folder)) == 128
    assert known_positions("facebook/opt-2.7b") == 2048
    assert known_positions("demo") == 128
    assert known_positions("somebody/unheard-of") is None


def test_a_run_that_is_too_long_is_told_before_it_starts(opt_folder):
    name = str(opt_folder)
    assert length_problems(opt_model=name, max_len=64, **SIZES) == []
    (problem,) = length_problems(opt_model=name, max_len=65, **SIZES)
    assert problem.startswith("run.max_len: model.num_query_token 32 + model.max_txt_len 32 + 65 = 129 positions, and")
    (problem,) = length_problems(opt_model=name, max_len=100, prompt="a photo of", **SIZES)
    assert "32 + the prompt 4 + 100 = 136 positions" in problem
    assert length_problems(opt_model=name, max_len=92, prompt="a photo of", **SIZES) == []
    problems = length_problems(opt_model="facebook/opt-2.7b", soft_prompt=32, max_txt_len=4096, max_len=10)
    assert [p.split(":")[0] for p in problems] == ["run.max_len", "model.max_txt_len"]
    assert length_problems(opt_model="somebody/unheard-of", max_len=9999, **SIZES) == []


def test_an_image_that_takes_all_positions_is_told():
    sizes = dict(soft_prompt=2502, max_txt_len=32, max_len=10, told_by="connector: linear")
    (problem,) = length_problems(opt_model="facebook/opt-2.7b", **sizes)
    assert problem == (
        "model.connector: linear gives 2502 vectors, and facebook/opt-2.7b has 2048 positions: no text fits behind"
    )

"""A batch that has an image once for several questions is computed as one that has it with each."""

import pytest
import torch

from lavis_kvmod.models import soft_prompts
from lavis_kvmod.models.language.packing import pack, packing_pays

INDEX = [0, 1, 0, 1, 0]


def batches(images):
    """Five questions about two images: with each image once, and with an image for each question."""
    texts = {
        "text_input": [f"what is number {n}" for n in range(5)],
        "answer": ["seven", "one", "nine", "red", "a cat", "two", "blue"],
        "weight": torch.tensor([0.6, 0.3, 0.1, 1.0, 1.0, 1.0, 0.5]),
        "n_answers": torch.tensor([3, 1, 1, 1, 1]),
        "prompt": "Question: {} Short answer:",
        "epoch": 0,
    }
    of_images = images(2)
    once = {**texts, "image": of_images, "image_index": torch.tensor(INDEX)}
    return once, {**texts, "image": of_images[INDEX]}


@pytest.fixture()
def model(build):
    return build().eval()  # without dropout, which is drawn for each image


def encoded_images(model):
    seen = []
    model.visual_encoder.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    return seen


@pytest.fixture(params=[False, True], ids=["a row each", "packed"])
def packed(request, monkeypatch):
    """Whether the texts of an image share a row of the language model, be it worth it or not."""
    monkeypatch.setattr(soft_prompts, "packing_pays", lambda image_of, *_: request.param and len(set(image_of)) < 5)
    return request.param


@pytest.mark.parametrize("answer_loss", ["sample", "all"])
def test_loss_and_gradients_are_those_of_an_image_for_each_question(build, images, packed, answer_loss):
    model = build(answer_loss=answer_loss, prefix_gate="tanh").train()
    model.Qformer.eval()  # without dropout
    gradients, losses, seen, rows = [], [], encoded_images(model), []
    model.opt_model.model.decoder.register_forward_pre_hook(
        lambda *args: rows.append(len(args[2]["inputs_embeds"])), with_kwargs=True
    )
    for batch in batches(images):
        model.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6, rtol=1e-4), name
    assert seen == [2, 5]
    of_texts = 5 if answer_loss == "sample" else 7
    assert rows == [2 if packed else of_texts, of_texts]


def test_captions_of_an_image_share_it_too(model, images, packed):
    captions = [f"a photo of {n} cats" for n in range(5)]
    once, each = ({**batch, "text_input": captions} for batch in batches(images))
    for batch in (once, each):
        del batch["answer"], batch["prompt"]
    assert model(once)["loss"].item() == pytest.approx(model(each)["loss"].item(), abs=1e-6)


@pytest.mark.parametrize("method", ["generate", "rank"])
def test_answers_are_those_of_an_image_for_each_question(model, images, method):
    once, each = batches(images)
    options = dict(inference_method=method, answer_list=["seven", "red", "a cat"], return_scores=True, num_beams=2)
    seen = encoded_images(model)
    got, expected = (model.predict_answers(batch, max_len=4, **options) for batch in (once, each))
    assert [answer.answer for answer in got] == [answer.answer for answer in expected]
    assert [a.log_prob for a in got] == pytest.approx([a.log_prob for a in expected], abs=1e-4)
    assert seen == [2, 5]


def test_a_batch_that_is_encoded_is_not_encoded_again(model, images):
    once, each = batches(images)
    for batch in (once, each):
        encoded = model.encoded(batch)
        seen = encoded_images(model)
        assert model(encoded)["loss"] == model(batch)["loss"]
        assert seen == [len(batch["image"])]
        assert model.predict_answers(encoded, num_beams=1) == model.predict_answers(batch, num_beams=1)


def test_as_many_questions_as_the_index_says(model, images):
    once, _ = batches(images)
    with pytest.raises(ValueError, match="4 images but 5 questions"):
        model({**once, "image_index": once["image_index"][:4]})


def test_texts_are_packed_where_the_language_model_has_less_to_do():
    def pays(images, each, length, num_soft=32, width=2560):
        return packing_pays([i for i in range(images) for _ in range(each)], [length] * images * each, num_soft, width)

    assert pays(16, 5, 15) and pays(1, 2, 15) and pays(64, 4, 14, num_soft=8, width=128)
    assert not pays(16, 1, 15)  # nothing is shared
    assert not pays(16, 5, 15, num_soft=0) and not pays(4, 5, 200, num_soft=8)  # it is little
    assert not pays(1, 100, 15, num_soft=1, width=128)  # attention over one long row costs more than it saves
    one_of_many = [0] * 20 + list(range(1, 17))  # all rows would be as long as one
    assert not packing_pays(one_of_many, [15] * 36, 32, 2560)


def test_a_row_may_be_longer_than_the_language_models_positions():
    packing = pack([0] * 30 + [1], [10] * 31, num_images=2, num_soft=4, columns=10, device=torch.device("cpu"))
    assert packing.position.shape == (2, 304) and packing.position.max() == 4 + 10 - 1

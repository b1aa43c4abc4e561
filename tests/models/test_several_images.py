"""Several images in a sample: what a sample comes to depends on its own images, their places, and nothing else."""

import pytest
import torch

from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.models.several_images import by_number
from lavis_kvmod.models.vision.token_pooling import pool_tokens

MASK = torch.tensor([[True, True, True], [True, False, False], [False, True, True]])
NUMBERS = [3, 1, 2]
CONNECTORS = {
    "qformer": {},
    "gated": dict(prefix_gate="tanh", prefix_sharing="per_layer"),
    "grid": dict(prefix_source="grid", prefix_grid=2),
    "stock": dict(kv_modulation=False),
    "perceiver": dict(connector="perceiver", connector_geometry=dict(depth=2, num_heads=4)),
    "visual_abstractor": dict(connector="visual_abstractor", connector_geometry=dict(depth=2, num_heads=4)),
}


def of_images(images):
    return images(9).unflatten(0, (3, 3))


def batch(images):
    """Three questions, about three images, one and two."""
    return {
        "image": of_images(images),
        "image_mask": MASK,
        "text_input": ["which is red", "what is it", "are they alike"],
        "answer": ["the left one", "a cat", "yes", "no"],
        "weight": torch.tensor([1.0, 1.0, 0.7, 0.3]),
        "n_answers": torch.tensor([1, 1, 2]),
        "prompt": "Question: {} Short answer:",
    }


def unlike_places(model):
    """The model, with places that say something."""
    with torch.no_grad():
        for parameter in model.image_places.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        if model.kv_gate is not None:
            model.kv_gate.fill_(0.5)
    return model.eval()


def test_one_image_a_sample_is_what_it_was(build, images):
    one, several = build().eval(), build(max_images=3).eval()
    assert not [key for key in one.state_dict() if key.startswith("image_places")]
    extra = set(several.state_dict()) - set(one.state_dict())
    assert extra == {"image_places.visual", "image_places.prefix"}
    image = images(2)
    expected = one.encode({"image": image}).soft_prompt
    assert torch.equal(several.encode({"image": image}).soft_prompt, expected)
    assert torch.equal(one.encode({"image": image.unsqueeze(1)}).soft_prompt, expected)


@pytest.mark.parametrize("more", CONNECTORS.values(), ids=CONNECTORS)
def test_a_sample_comes_to_what_it_comes_to_alone(build, images, more):
    if "connector" in more:
        more = {**more, "load_pretrained": True, "pretrained": None}
    model, samples = unlike_places(build(max_images=3, **more)), batch(images)
    together = model.encode(samples).soft_prompt
    for row, (image, mask) in enumerate(zip(samples["image"], MASK)):
        alone = model.encode({"image": image[mask].unsqueeze(0)}).soft_prompt[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)
    swapped = {**samples, "image": samples["image"].flip(1), "image_mask": MASK.flip(1)}
    changes = (model.encode(swapped).soft_prompt - together).abs().amax((1, 2))
    assert changes[0] > 1e-3 and changes[2] > 1e-3  # their order counts
    torch.testing.assert_close(model.encode(swapped).soft_prompt[1], together[1], atol=1e-5, rtol=1e-4)


def test_the_prefixes_of_all_images_stand_in_front_of_the_tokens_of_all(build, images):
    model = build(max_images=3).eval()
    maps = model.encode({"image": of_images(images)}, output_attentions=True).query_output.cross_attentions
    prefix, visual = model.kv_prefix.num_positions, model.visual_encoder(images(1)).shape[1]
    assert maps[0].shape[-1] == 3 * prefix + 3 * visual
    share = model.prefix_attention_share(batch(images))
    each = [model.prefix_attention_share({"image": i[m].unsqueeze(0)}) for i, m in zip(of_images(images), MASK)]
    assert share == pytest.approx(sum(each) / 3, abs=1e-5)


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_another_images_prefix_is_that_of_another_sample(build, images, control):
    """Of all its images: the next tile of the same page would not be another's."""
    model = build(max_images=2, prefix_control=control).eval()
    of_sample = images(6).view(3, 2, *images(1).shape[1:])
    own = build(max_images=2).eval().frozen_features({"image": of_sample}).pooled.unflatten(0, (3, 2))
    model.swap_prefix = control == "none"
    found = model.frozen_features({"image": of_sample}).pooled.unflatten(0, (3, 2))
    torch.testing.assert_close(found, own[[2, 0, 1]])


def test_training_answering_and_ranking(build, images):
    model, samples = build(max_images=3).train(), batch(images)
    loss = model(samples)["loss"]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.image_places.visual.grad.flatten(1).norm(dim=1).min() > 0
    unlike_places(model)
    answers = model.predict_answers(samples, num_beams=2)
    ranked = model.predict_answers(samples, inference_method="rank", answer_list=["yes", "no"])
    captions = model.generate({"image": samples["image"], "image_mask": MASK}, num_beams=2)
    for row in range(3):
        one = {"image": samples["image"][row][MASK[row]].unsqueeze(0), "prompt": samples["prompt"]}
        asked = {**one, "text_input": [samples["text_input"][row]]}
        assert model.predict_answers(asked, num_beams=2) == [answers[row]]
        assert model.predict_answers(asked, inference_method="rank", answer_list=["yes", "no"]) == [ranked[row]]
        assert model.generate({"image": one["image"]}, num_beams=2) == [captions[row]]


def test_questions_share_their_images(build, images):
    model, samples = unlike_places(build(max_images=3, answer_loss="all")), batch(images)
    index = torch.tensor([0, 2, 2])
    shared = {**samples, "image": samples["image"][[0, 1, 2]], "image_index": index}
    apart = {**samples, "image": samples["image"][index], "image_mask": MASK[index]}
    assert model(shared)["loss"].item() == pytest.approx(model(apart)["loss"].item(), abs=1e-5)
    assert model.predict_answers(shared, num_beams=1) == model.predict_answers(apart, num_beams=1)


def test_each_image_is_remembered_by_its_own_key(build, images):
    model = unlike_places(build(max_images=3, cache_frozen_features=True))
    samples = {
        "image": of_images(images),
        "image_mask": MASK,
        "image_key": [["a", "b", "c"], ["d", "", ""], ["", "b", "c"]],
    }
    samples["image_key"] = [[k for k, there in zip(*row) if there] for row in zip(samples["image_key"], MASK.tolist())]
    samples["image"][2, 1:] = samples["image"][0, 1:]
    first = model.encode(samples).soft_prompt
    assert set(model.feature_cache.entries()) == {"a", "b", "c", "d"}
    model.visual_encoder.forward = None  # nothing is encoded again
    torch.testing.assert_close(model.encode(samples).soft_prompt, first)


@torch.no_grad()
def test_a_long_sequence_goes_through_in_windows(build, images):
    model = unlike_places(build(max_images=2))
    asked = {"text_input": ["what comes after"] * 2, "prompt": "Question: {} Answer:"}
    short = {"image": images(4).unflatten(0, (2, 2)), **asked}
    assert torch.equal(model.soft_prompts({**short, "window": 2}), model.soft_prompts(short))
    assert model.predict_answers({**short, "window": 2}) == model.predict_answers(short)
    long = {"image": images(10).unflatten(0, (2, 5)), "image_key": [list("abcde"), list("fghij")], **asked}
    prompts = model.soft_prompts({**long, "window": 2})  # 2, 2 and 1 of them
    assert prompts.shape[1] == 3 * model.num_soft_prompt
    last = model.soft_prompts({"image": long["image"][:, 4:]})
    torch.testing.assert_close(prompts[:, -model.num_soft_prompt :], last)
    swapped = {**long, "image": long["image"][:, [0, 1, 3, 2, 4]]}
    change = (model.soft_prompts({**swapped, "window": 2}) - prompts).abs().unflatten(1, (3, -1)).amax((0, 2, 3))
    assert change[1] > 1e-3 and change[0] == change[2] == 0
    assert model.soft_prompts({**long, "window": 2, "stride": 1}).shape[1] == 4 * model.num_soft_prompt
    assert len(model.generate({**long, "window": 2}, num_beams=2)) == 2
    answers = model.predict_answers({**long, "window": 2}, inference_method="rank", answer_list=["yes", "no"])
    assert set(answers) <= {"yes", "no"}
    learns = build(max_images=2).train()
    with torch.enable_grad():
        learns({"image": long["image"], "text_input": ["a photo of a cat"] * 2, "window": 2})["loss"].backward()
    assert learns.opt_proj.weight.grad.any()


def test_windows_that_do_not_fit_are_told(build, images):
    model = build(max_images=2).eval()
    has, each = model.opt_model.config.max_position_embeddings, model.num_soft_prompt
    number = -(-has // each)
    endless = images(1).unsqueeze(1).expand(1, number, -1, -1, -1)
    with pytest.raises(ValueError, match=f"{number} windows of {each} soft-prompt vectors are .* has {has} positions"):
        model.generate({"image": endless, "window": 1})
    for more, told in (
        (
            dict(window=2, stride=3),
            "window, stride: expected a stride of 1 to the window, so that each image is seen; got 2, 3",
        ),
        (dict(window=0), "got 0, 0"),
        (dict(window=2, image_mask=MASK), "as many in each sample and no tiles"),
        (dict(window=2, history=[[]] * 3), "gated layers and conversations have no windows; leave it out"),
    ):
        with pytest.raises(ValueError, match=told):
            model.generate({"image": of_images(images), **more})
    with pytest.raises(ValueError, match=r"at most 2 images a sample \(model.max_images\), got 3"):
        model.generate({"image": of_images(images), "window": 3})


def test_neighbouring_tokens_become_their_mean(build, images):
    tokens = torch.arange(17.0).view(1, 17, 1)
    assert pool_tokens(tokens, 2).flatten().tolist() == [0.0, 3.5, 5.5, 11.5, 13.5]
    assert pool_tokens(tokens[:, 1:], 2).flatten().tolist() == [3.5, 5.5, 11.5, 13.5]
    model = build(pool_visual_tokens=2).eval()
    maps = model.encode({"image": images(1)}, output_attentions=True).query_output.cross_attentions[0]
    before = build().eval().encode({"image": images(1)}, output_attentions=True).query_output.cross_attentions[0]
    assert before.shape[-1] - maps.shape[-1] == 3 * (before.shape[-1] - 1 - model.kv_prefix.num_positions) // 4
    with pytest.raises(ValueError, match="whose side 3 divides, got 17 tokens"):
        pool_tokens(tokens, 3)


def test_what_does_not_fit_is_told(build, images):
    with pytest.raises(ValueError, match=r"one image a sample, got 3; for several set model.max_images"):
        build().encode({"image": of_images(images)})
    with pytest.raises(ValueError, match=r"at most 2 images a sample \(model.max_images\), got 3"):
        build(max_images=2).encode({"image": of_images(images)})
    with pytest.raises(ValueError, match=r"image_mask: expected \(b, k\) = \(3, 3\).* got \(3,\)"):
        by_number({"image": of_images(images), "image_mask": MASK[0]})
    with pytest.raises(ValueError, match="sample 1 of the batch has none"):
        by_number({"image": of_images(images), "image_mask": MASK & torch.tensor([[True], [False], [True]])})


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(connector="linear"), "connector linear has no attention to any number of visual tokens; take one of"),
        (dict(fusion="gated_cross_attention"), "fusion: gated_cross_attention takes one image a sample"),
        (dict(aux_fusion="queries"), "aux_fusion: queries takes one image a sample; set prefix"),
    ],
)
def test_what_takes_one_image_is_told_before_anything_is_built(more, told):
    with pytest.raises(SettingsError, match=f"max_images: {told}"):
        ModelSettings.from_config(dict(load_finetuned=False, max_images=2, **more))

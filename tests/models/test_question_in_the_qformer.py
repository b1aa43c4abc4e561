"""`qformer_text_input`: the Q-Former reads each question beside its queries, from stage-1 weights."""

import pytest
import torch
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from stage_1 import make_stock, make_tokenizer

from lavis_kvmod.config.checking import model_problems
from lavis_kvmod.models.settings import ModelSettings, SettingsError

INDEX = [0, 1, 0]
QUESTIONS = ["a red seven on paper", "blue", "nine on white"]  # in the words of the demo's vocabulary


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """LAVIS's stage-1 model at small geometry, its checkpoint, and a folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("stage1")
    stock = make_stock(Blip2Qformer, make_tokenizer(folder)).eval()
    torch.save({"model": stock.state_dict()}, folder / "stage1.pth")
    return stock, {"qformer_text_input": True, "bert_model": str(folder), "pretrained": str(folder / "stage1.pth")}


def asked(images):
    """Three questions about two images: with each image once, and with an image for each question."""
    texts = {
        "text_input": QUESTIONS,
        "answer": ["seven", "red", "no"],
        "weight": torch.ones(3),
        "n_answers": torch.ones(3, dtype=torch.long),
        "prompt": "Question: {} Short answer:",
    }
    of_images = images(2)
    once = {**texts, "image": of_images, "image_index": torch.tensor(INDEX), "image_key": ["a", "b"]}
    return once, {**texts, "image": of_images[INDEX]}


def test_the_q_former_computes_what_lavis_does_with_text_beside_the_queries(build, images, stage_1):
    stock, keys = stage_1
    model = build(kv_modulation=False, **keys).eval()
    batch = asked(images)[1]
    tokens = stock.tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        visual = stock.ln_vision(stock.visual_encoder(batch["image"]))
        seen = torch.cat([torch.ones(3, 5), tokens.attention_mask], dim=1)
        queries = stock.query_tokens.expand(3, -1, -1)
        expected = stock.Qformer.bert(
            tokens.input_ids,
            query_embeds=queries,
            attention_mask=seen,
            encoder_hidden_states=visual,
            encoder_attention_mask=torch.ones(visual.shape[:2]),
            return_dict=True,
        ).last_hidden_state[:, :5]
        ours = model.encode(batch)
    assert torch.allclose(ours.query_output.last_hidden_state, expected, atol=1e-5)
    assert torch.allclose(ours.soft_prompt, model.opt_proj(expected), atol=1e-5)
    own = {key for key in model.state_dict() if key.startswith("Qformer.")}
    assert own == {key for key in stock.state_dict() if key.startswith("Qformer.") and ".cls." not in key}


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_is_encoded_once_and_read_with_each_of_its_questions(build, images, stage_1, cached):
    model = build(**stage_1[1], cache_frozen_features=cached, prefix_gate="tanh").eval()
    torch.nn.init.constant_(model.kv_gate, 0.3)
    seen = []
    model.visual_encoder.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    once, each = asked(images)
    prompts = model.soft_prompts(once)
    assert torch.allclose(prompts, model.soft_prompts(each), atol=1e-5) and seen == [16 if cached else 2, 3]
    assert not torch.allclose(prompts[0], prompts[2], atol=1e-3)  # one image, two questions
    assert model(once)["loss"].item() == pytest.approx(model(each)["loss"].item(), abs=1e-5)
    asking = dict(num_beams=2, max_len=3, min_len=1)
    assert model.predict_answers(once, **asking) == model.predict_answers(each, **asking)
    ranking = dict(inference_method="rank", answer_list=["seven", "red", "no"])
    assert model.predict_answers(once, **ranking) == model.predict_answers(each, **ranking)
    both = model.encoded(once)  # for answers and a loss
    assert model(both)["loss"].item() == pytest.approx(model(once)["loss"].item(), abs=1e-6)
    assert model.predict_answers(both, **asking) == model.predict_answers(once, **asking)
    maps = model.attention_maps(once)
    assert len(maps.answers) == 3 and maps.soft_prompt.text.min() > 0
    total = sum(part if part.ndim == 2 else part.sum(-1) for part in maps.soft_prompt)
    assert torch.allclose(total, torch.ones(3, 5), atol=1e-5)


def test_a_caption_is_not_shown_to_it(build, images, stage_1):
    model = build(**stage_1[1]).eval()
    batch = {"image": images(2), "prompt": "a photo of"}
    told = model.soft_prompts({**batch, "text_input": ["a photo of a red seven", "a photo of nine"]})
    assert torch.equal(told, model.soft_prompts(batch)) and len(model.generate(batch, max_length=3)) == 2
    assert not torch.allclose(told, model.soft_prompts({**batch, "text_input": "nine on paper"}, asked=True), atol=1e-3)


def test_what_it_lacks_is_told_before_anything_is_loaded(model_config, files, stage_1, tmp_path):
    keys = stage_1[1]
    assert model_problems(model_config(**keys)) == []
    state = {k: v for k, v in torch.load(files.blip2)["model"].items() if "embeddings.word" not in k}
    torch.save({"model": state}, tmp_path / "stage2.pth")
    (told,) = model_problems(model_config(**{**keys, "pretrained": str(tmp_path / "stage2.pth")}))
    assert told.startswith("model.pretrained: ") and "without a text side, and qformer_text_input hands it ques" in told
    (told,) = model_problems(model_config(**{**keys, "bert_model": str(tmp_path / "bert")}))
    assert told.startswith(f"BERT: no such folder {tmp_path / 'bert'}; set model.bert_model to a local folder")
    (told,) = model_problems(model_config(**{**keys, "bert_model": str(files.opt)}))
    assert told.startswith("model.bert_model: expected BERT's vocab.txt or tokenizer.json in ")
    with pytest.raises(SettingsError, match="qformer_text_input: connector perceiver reads no text"):
        ModelSettings.from_config(model_config(connector="perceiver", **keys))

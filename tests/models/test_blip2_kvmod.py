"""Stage 1 against LAVIS's own Blip2Qformer and Blip2ITM, the real classes, on the same weights and random numbers."""

import pytest
import torch
from lavis.models import base_model
from lavis.models.blip2_models import blip2_qformer
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from small_vit import SIZE
from stage_1 import QFORMER, QUERIES, SAMPLES, TEXTS, make_stock, make_tokenizer, ours_like
from transformers import BertConfig, BertForPreTraining

from lavis_kvmod.demo.words import save_vocabulary, vocabulary
from lavis_kvmod.models.blip2_kvmod import Blip2KVModITM
from lavis_kvmod.models.connectors.qformer import QFormer
from lavis_kvmod.models.language.bert import load_bert_tokenizer, start_from_bert
from lavis_kvmod.models.momentum import FeatureQueue
from lavis_kvmod.models.objectives import Identity
from lavis_kvmod.weights.files import CheckpointError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture()
def stock(tokenizer, monkeypatch):
    """LAVIS's stage-1 model, as one process without a process group (which it takes for granted)."""
    monkeypatch.setattr(blip2_qformer.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(blip2_qformer, "all_gather_with_grad", lambda tensor: tensor)
    assert base_model.is_dist_avail_and_initialized() is False
    return make_stock(Blip2Qformer, tokenizer)


@pytest.fixture()
def samples():
    image = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    return {"image": image, "text_input": TEXTS}


LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm")


def run(model, samples):
    """Losses and gradients of all that is trained by both."""
    model.eval()  # no dropout; masks and negatives are drawn as in training
    model.zero_grad()
    torch.manual_seed(11)
    output = model(dict(samples))
    output["loss"].backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gate", [None, "tanh"], ids=["no prefix", "closed gate"])
def test_losses_and_gradients_are_lavis(stock, samples, gate):
    ours = ours_like(stock, own_pairs_only=True, **({"prefix": True, "prefix_gate": gate} if gate else {}))
    expected, wanted = run(stock, samples)
    got, found = run(ours, samples)
    for name in LOSSES:
        assert abs(got[name] - expected[name]) <= 1e-5, name
    checked = 0
    for name, gradient in wanted.items():
        if name.startswith(("visual_encoder.", "ln_vision.")) or name.endswith("self.key.bias"):
            continue  # frozen here; a bias that softmax does not see
        if name == "Qformer.cls.predictions.decoder.weight":
            continue  # the word embeddings, under another name
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error <= 1e-4, name
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("off", ["itc", "itm", "itg"])
def test_each_objective_can_be_turned_off(stock, samples, off):
    ours = ours_like(stock, own_pairs_only=True, objectives={off: 0.0})
    output, _ = run(ours, samples)
    expected, _ = run(stock, samples)
    name = {"itc": "loss_itc", "itm": "loss_itm", "itg": "loss_lm"}[off]
    assert getattr(output, name) is None
    assert not [n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None and "key.bias" not in n]
    assert output["loss"].item() == pytest.approx((expected["loss"] - expected[name]).item(), abs=1e-5)


def test_an_open_prefix_is_seen_by_every_objective(stock, samples):
    plain, _ = run(ours_like(stock), samples)
    output, gradients = run(ours_like(stock, prefix=True), samples)
    for name in LOSSES:
        assert abs(output[name] - plain[name]) > 1e-4, name
    assert all(
        gradients[f"kv_prefix.{name}"].abs().sum() > 0 for name in ("prefix_tokens", "k_proj.weight", "v_proj.bias")
    )


@pytest.mark.parametrize("mode", ["image", "text", "multimodal"])
def test_features_are_lavis(stock, samples, mode):
    ours = ours_like(stock).eval()
    stock.eval()
    expected = stock.extract_features(samples, mode=mode)
    got = ours.extract_features(samples, mode=mode)
    found = 0
    for name, value in expected.items():
        if value is not None:
            assert (got[name] - value).abs().max() <= 1e-5, name
            found += 1
    assert found == {"image": 2, "text": 2, "multimodal": 1}[mode]


def test_an_unknown_mode_and_missing_inputs_are_told(stock, samples):
    ours = ours_like(stock)
    with pytest.raises(ValueError, match="mode: expected one of multimodal, text, image; got 'both'"):
        ours.extract_features(samples, mode="both")
    with pytest.raises(ValueError, match="mode 'text' needs samples\\['text_input'\\]"):
        ours.extract_features({"image": samples["image"]}, mode="text")


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_matching_scores_are_lavis(tokenizer, samples, head):
    stock = make_stock(Blip2ITM, tokenizer).eval()
    # LAVIS does not pad here, so it takes texts of one length only.
    same_length = {**samples, "text_input": [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[0]]}
    with torch.no_grad():
        expected = stock(same_length, match_head=head)
        got = ours_like(stock, cls=Blip2KVModITM).eval()(same_length, match_head=head)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5


def test_what_belongs_together_is_no_negative(stock, samples):
    """Two captions of one image and two equal captions: nothing of them is drawn, and both count as right."""
    twins = {**samples, "text_input": [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2]], "image_id": torch.tensor([1, 2, 3, 2])}
    ours = ours_like(stock)
    drawn = []
    original = ours._match

    def spy(features, texts, similar, positives):
        drawn.append(positives)
        return original(features, texts, similar, positives)

    ours._match = spy
    output, _ = run(ours, twins)
    (positives,) = drawn
    assert positives.tolist() == [
        [True, False, True, False],
        [False, True, False, True],
        [True, False, True, False],
        [False, True, False, True],
    ]
    apart, _ = run(ours_like(stock, own_pairs_only=True), twins)
    assert abs(output["loss_itc"] - apart["loss_itc"]) > 1e-3


def test_a_batch_without_negatives_learns_from_its_pairs(stock, samples):
    one = {"image": samples["image"][:1], "text_input": TEXTS[:1]}
    output, gradients = run(ours_like(stock), one)
    assert all(torch.isfinite(output[name]) for name in LOSSES)
    assert gradients["itm_head.weight"].abs().sum() > 0


def test_masked_words_are_learnt_from_image_and_text(stock, samples):
    ours = ours_like(stock, prefix=True, objectives={"itc": 0.0, "itm": 0.0, "itg": 0.0, "mlm": 1.0})
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], 3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = ours.train()(samples)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def momentum_model(stock, **options):
    return ours_like(stock, prefix=True, momentum_queue=8, momentum_rate=0.9, **options)


def test_a_momentum_model_follows_and_remembers(stock, samples):
    ours = momentum_model(stock).train()
    ours.momentum.copy_from(ours._followed())
    before = ours.momentum.vision_proj.weight.clone()
    with torch.no_grad():
        ours.vision_proj.weight.add_(1.0)
    ours({**samples, "epoch": 0, "iters": 0, "num_iters_per_epoch": 10})
    assert torch.allclose(ours.momentum.vision_proj.weight, before + 0.1, atol=1e-6)
    assert int(ours.queue.count) == SAMPLES and len(ours.queue.contents().text) == SAMPLES
    for _ in range(2):
        ours(samples)
    assert int(ours.queue.count) == 3 * SAMPLES and len(ours.queue.contents().text) == 8
    assert not any(p.requires_grad for p in ours.momentum.parameters())


def test_evaluation_leaves_momentum_and_queue_alone(stock, samples):
    ours = momentum_model(stock).eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours(samples)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_the_queue_makes_negatives_and_the_momentum_model_softens_targets(stock, samples):
    without = run(ours_like(stock, prefix=True), samples)[0]["loss_itc"]
    ours = momentum_model(stock)
    ours.momentum.copy_from(ours._followed())
    hard = run(ours, {**samples, "epoch": 0, "iters": 0})[0]["loss_itc"]  # no opinion yet, no smoothing either
    soft = run(ours, {**samples, "epoch": 1})[0]["loss_itc"]
    other = {"image": samples["image"].flip(0), "text_input": ["a purple six on yellow paper"] * SAMPLES}
    ours.train()(other)
    queued = run(ours, {**samples, "epoch": 0, "iters": 0})[0]["loss_itc"]
    assert len({round(value.item(), 4) for value in (without, hard, soft, queued)}) == 4


def test_the_momentum_model_softens_masked_words_too(stock, samples):
    ours = momentum_model(stock, objectives={"itc": 0.0, "itm": 0.0, "itg": 0.0, "mlm": 1.0})
    ours.momentum.copy_from(ours._followed())
    with torch.no_grad():  # what it will say is not what the model says
        for parameter in ours.momentum.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = ours.momentum.query_tokens.clone()
    hard = run(ours, {**samples, "epoch": 0, "iters": 0})[0]["loss_mlm"]
    soft = run(ours, {**samples, "epoch": 1})[0]["loss_mlm"]
    assert abs(hard - soft) > 1e-3
    ours.train()(samples)
    assert not torch.equal(ours.momentum.query_tokens, before)  # it follows without ITC, too


def test_a_queue_need_be_no_multiple_of_the_batch():
    queue = FeatureQueue(6, 1, 2)
    for batch in range(3):  # 12 samples into 6 places, 4 at a time
        numbers = torch.arange(4) + 4 * batch
        queue.push(
            numbers[:, None, None].expand(4, 1, 2).float(), numbers[:, None].expand(4, 2), Identity(numbers, numbers)
        )
    kept = queue.contents()
    assert sorted(kept.identity.text.tolist()) == [6, 7, 8, 9, 10, 11]
    assert torch.equal(kept.text[:, 0], kept.identity.text.float())
    queue.push(
        torch.zeros(9, 1, 2), torch.zeros(9, 2), Identity(torch.arange(9), torch.arange(9))
    )  # more than it holds
    assert sorted(queue.contents().identity.image.tolist()) == [3, 4, 5, 6, 7, 8]


def test_one_image_with_all_captions_has_no_negatives(stock, samples):
    output, gradients = run(ours_like(stock), {**samples, "image_id": torch.zeros(SAMPLES, dtype=torch.long)})
    assert all(torch.isfinite(output[name]) for name in LOSSES)
    assert gradients["itm_head.weight"].abs().sum() > 0


def test_a_text_longer_than_berts_positions_is_cut(stock):
    read = ours_like(stock).eval().extract_features({"text_input": [" ".join(["red"] * 600)]}, mode="text")
    assert read.text_embeds.shape[1] == 512


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small BERT as Hugging Face saves it, and its folder. Word kinds, which a Q-Former lacks, are 0."""
    folder = tmp_path_factory.mktemp("bert")
    save_vocabulary(folder)
    torch.manual_seed(7)
    model = BertForPreTraining(BertConfig(vocab_size=len(vocabulary()), max_position_embeddings=512, **QFORMER)).eval()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        model.cls.predictions.bias.normal_()
    model.save_pretrained(folder)
    return model, folder


def new_qformer(**sizes):
    words = len(load_bert_tokenizer("demo"))
    return QFormer(
        encoder_width=32, num_queries=QUERIES, vocab_size=words, word_head=True, **{**QFORMER, **sizes}
    ).eval()


def test_starting_from_bert_reads_texts_as_it_does(bert):
    model, folder = bert
    qformer = new_qformer()
    dec = qformer.bert.embeddings.word_embeddings.weight[-1].clone()
    start_from_bert(qformer, str(folder))
    ids = load_bert_tokenizer(str(folder))(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids, output_hidden_states=True)
        read = qformer(input_ids=ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
        words = qformer.cls(read)
    seen = ids.attention_mask.bool()
    assert (read - expected.hidden_states[-1])[seen].abs().max() <= 1e-5
    assert (words[..., :-1] - expected.prediction_logits)[seen].abs().max() <= 1e-5
    assert torch.equal(qformer.bert.embeddings.word_embeddings.weight[-1], dec)  # [DEC] is new
    layer = qformer.bert.encoder.layer[0]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)


def test_a_bert_of_another_size_is_told(bert):
    with pytest.raises(CheckpointError, match="expected the weights of a BERT of the Q-Former's size; .* are missing"):
        start_from_bert(new_qformer(num_hidden_layers=6), str(bert[1]))

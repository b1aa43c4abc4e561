"""Memory computed on fake tensors against memory counted on real ones, by two ways of counting."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.memory.estimate import estimate
from lavis_kvmod.memory.ledger import Ledger
from lavis_kvmod.models import base
from lavis_kvmod.models.language import opt
from lavis_kvmod.models.vision.auxiliary.folded import Folded

QUERIES = 5  # of the small models in conftest.py

CAPTION = "a photo of a cat on a mat"


def caption_tokens(model):
    return len(model.opt_tokenizer(CAPTION + "\n").input_ids)


def real_step(model, batch):
    """A real training step: bytes kept for the backward pass, by the ledger and by autograd's hooks, and the peak
    besides parameters and gradients."""
    weights = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    image = batch["image"]
    saved = {image.untyped_storage().data_ptr(): image.nbytes}  # the batch counts too

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ledger = Ledger("cpu")
    ledger.ignore(weights)
    with ledger, saved_tensors_hooks(keep, lambda tensor: tensor):
        image.add_(0)  # an operator's output: from here on the ledger knows it
        loss = model(batch)["loss"]
    kept = sum(ledger.live().values())
    with ledger:
        loss.backward()
    gradients = {ledger.number(p.grad) for p in model.parameters() if p.requires_grad}
    return kept, sum(saved.values()), ledger.peak(besides=gradients)


NO_PREFIX = {"kv_modulation": False}  # EfficientNet's forward pass would hold more than the backward pass
HALF = {"opt_precision": "bf16", "vit_precision": "bf16"}  # which a CPU without bf16 keeps in float32


@pytest.mark.parametrize(
    "overrides, has_bf16",
    [
        (NO_PREFIX, True),
        ({**NO_PREFIX, "opt_grad_checkpoint": True}, True),
        ({**NO_PREFIX, **HALF}, True),
        ({**NO_PREFIX, **HALF}, False),
        ({**NO_PREFIX, "vit_precision": "bf16"}, True),
        pytest.param({**NO_PREFIX, "freeze_vit": False, "use_grad_checkpoint": True}, True, marks=pytest.mark.slow),
        pytest.param({**NO_PREFIX, "freeze_vit": False}, True, marks=pytest.mark.slow),
        pytest.param({"prefix_gate": "tanh", "prefix_sharing": "per_layer"}, True, marks=pytest.mark.slow),
        pytest.param(HALF, True, marks=pytest.mark.slow),
        pytest.param(HALF, False, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_takes_what_was_computed(build, model_config, images, monkeypatch, overrides, has_bf16):
    monkeypatch.setattr(base, "cpu_has_bf16", lambda: has_bf16)
    # The folded copy is counted with the weights, and takes less while it runs than the network does.
    monkeypatch.setattr(Folded, "__call__", lambda self, network: network)
    model = build(**overrides).float().train()  # as LAVIS's loader has it on the CPU
    batch = {"image": images(80), "text_input": [CAPTION] * 80}  # enough for activations to outweigh AdamW
    kept, saved, peak = real_step(model, batch)
    found = estimate(model_config(**overrides), batch_size=80, text_length=caption_tokens(model), device="cpu")
    assert sum(found.activations.values()) == kept
    assert kept + found.workspace == peak > kept + found.gradients
    if not any(key.endswith("_grad_checkpoint") for key in overrides):
        assert kept == saved + 4  # the loss, which is not kept for a backward pass


@pytest.mark.parametrize("num_beams", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_generation_takes_what_was_computed(build, model_config, images, num_beams):
    """Nearly: beam search's own scores and hypotheses, small at any real size, are left out of the computation."""
    model = build(**NO_PREFIX).eval()
    prompt, new_tokens = "a photo of", 40
    tokens = len(model.opt_tokenizer(prompt).input_ids)
    ledger = Ledger("cpu")
    ledger.ignore([*model.parameters(), *model.buffers()])
    with ledger:
        batch = {"image": images(40), "prompt": prompt}
        model.generate(batch, num_beams=num_beams, max_length=new_tokens, min_length=tokens + new_tokens)
    generation = dict(train=False, text_length=tokens, num_beams=num_beams, new_tokens=new_tokens)
    found = estimate(model_config(**NO_PREFIX), batch_size=40, device="cpu", **generation)
    positions = QUERIES + tokens + new_tokens - 1
    assert found.kv_cache == 2 * 2 * 40 * num_beams * positions * 32 * 4  # K and V, layers, rows, positions, width
    assert 0.93 * ledger.peak() <= found.kv_cache + found.workspace <= 1.05 * ledger.peak()


def test_a_gpu_keeps_opts_norms_in_its_own_precision_and_no_attention_map(model_config, monkeypatch):
    """What one more layer of an OPT in bfloat16, which needs no autocast, keeps, counted by hand."""
    b, t, width, heads = 4, 7, 64, 4
    s = QUERIES + t

    def kept(layers):
        geometry = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
        monkeypatch.setitem(opt._OPT_GEOMETRY, "facebook/opt-125m", geometry)
        half = {"opt_model": "facebook/opt-125m", "opt_precision": "bf16", "vit_precision": "bf16"}
        found = estimate(model_config(**half, **NO_PREFIX), batch_size=b, text_length=t, amp="bf16")
        return found.activations["opt_model"]

    norm = b * s * width * 2 + 2 * b * s * 4  # input; mean and deviation, which are in float32
    # What came out, each row's log-sum-exp, the state of the generator; no map (s * s).
    attended = b * s * width * 2 + b * heads * s * 4 + 24
    feed_forward = b * s * 4 * width * 2  # where the ReLU let through
    assert not torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16  # left as it was
    assert kept(3) - kept(2) == 2 * norm + attended + 3 * b * s * width * 2 + feed_forward


@pytest.mark.slow
def test_a_gpu_keeps_no_attention_maps_of_the_qformer(model_config):
    """Maps among the queries grow with their square, all else with their number."""

    def kept(queries):
        cfg = model_config(num_query_token=queries, **NO_PREFIX)
        return estimate(cfg, batch_size=8, text_length=4, amp="bf16").activations["Qformer"]

    assert kept(24) - kept(16) == kept(16) - kept(8) > 0


@pytest.mark.slow
def test_weights_stored_in_another_half_than_the_run_computes_in_are_kept_twice(model_config):
    """Autocast's copies of OPT's weights stay for the backward pass: why a run stores what it computes in."""
    step = dict(batch_size=1, text_length=4, amp="bf16")
    same, other = (estimate(model_config(opt_precision=half, **NO_PREFIX), **step) for half in ("bf16", "fp16"))
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # OPT's two layers, without the biases
    assert other.activations["opt_model"] - same.activations["opt_model"] >= 2 * linear


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch, others", [("opt_grad_checkpoint", {}), ("use_grad_checkpoint", {"freeze_vit": False})]
)
def test_gradient_checkpointing_keeps_less(model_config, switch, others):
    step = dict(batch_size=16, text_length=8, amp="fp16")
    plain = estimate(model_config(**NO_PREFIX, **others), **step)
    recomputed = estimate(model_config(**NO_PREFIX, **{switch: True}, **others), **step)
    assert sum(recomputed.activations.values()) < 0.95 * sum(plain.activations.values())
    assert recomputed.weights == plain.weights


@pytest.mark.slow
def test_answers_beams_and_the_optimizer_count(model_config):
    step = dict(batch_size=2, text_length=8)
    cfg = model_config(**NO_PREFIX)
    one, two, three = (estimate(cfg, answers=n, **step).activations["opt_model"] for n in (1, 2, 3))
    assert three - two == two - one > 0
    alone = estimate(cfg, train=False, **step)
    in_training = estimate(cfg, train=False, optimizer=True, **step)
    trained = sum(p.numel() for p in Blip2OPTKVMod.without_weights(cfg).parameters() if p.requires_grad)
    assert in_training.total - alone.total == in_training.optimizer == 8 * trained
    assert alone.gradients == 0 and alone.activations == {}


@pytest.mark.slow
def test_a_sharded_language_model_takes_its_share_and_two_whole_layers(model_config):
    step = dict(batch_size=2, text_length=8)
    cfg = model_config(**NO_PREFIX)
    whole, half = estimate(cfg, **step), estimate(cfg, shards=2, **step)
    layer = (12 - 4) * 32 * 32 * 4 + (9 * 32 + 64) * 4  # 4 projections and a feed-forward of twice the width
    assert whole.weights["opt_model"] - half.weights["opt_model"] == layer  # one of its two layers
    assert half.workspace - whole.workspace == 2 * layer
    assert half.activations == whole.activations


SMALL = dict(connector_geometry=dict(depth=2, num_heads=4))
GRID = dict(prefix_source="grid", aux_encoder=["efficientnet-b0"] * 2, aux_checkpoint=None, prefix_gate="tanh")


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(dict(connector="linear", fusion="gated_cross_attention", gated_every=1), marks=pytest.mark.slow),
        pytest.param(dict(connector="perceiver", **SMALL), marks=pytest.mark.slow),
        pytest.param(dict(qformer_text_input=True), marks=pytest.mark.slow),
        dict(connector="mlp"),
        pytest.param(dict(connector="visual_abstractor", **SMALL), marks=pytest.mark.slow),
        pytest.param(dict(connector="c_abstractor", connector_geometry=dict(hidden_size=16)), marks=pytest.mark.slow),
        pytest.param(GRID, marks=pytest.mark.slow),
    ],
)
def test_every_member_can_be_computed(model_config, keys):
    config = model_config(**keys)
    trained = sum(row.bytes for row in Blip2OPTKVMod.without_weights(config).parts() if row.trained)
    step = estimate(config, batch_size=2, text_length=9, device="cpu")
    assert step.gradients == trained and step.activations["opt_model"] > 0
    told = estimate(config, batch_size=2, text_length=9, num_beams=2, train=False)
    assert told.total > sum(told.weights.values()) > trained > 0 and told.kv_cache > 0


def test_sizes_that_cannot_be(model_config):
    with pytest.raises(ValueError, match="batch_size: expected a whole number above 0, got 0"):
        estimate(model_config(), batch_size=0, text_length=4)
    with pytest.raises(ValueError, match="expected at most 128 positions, as the language model has, got 205: 5 of"):
        estimate(model_config(), batch_size=1, text_length=200)


@pytest.mark.slow
def test_the_copy_that_a_cpu_folds_counts_as_weights(build, model_config, images):
    model = build()
    model.aux_encoder(images(1))
    copy = model.aux_encoder._folded(model.aux_encoder.backbone)
    assert copy is not model.aux_encoder.backbone
    held = sum(tensor.nbytes for tensor in [*copy.parameters(), *copy.buffers()])
    on = {device: estimate(model_config(), batch_size=1, text_length=4, device=device) for device in ("cpu", "cuda")}
    assert on["cpu"].weights["aux_encoder, folded"] == held > 10 * 2**20
    assert "aux_encoder, folded" not in on["cuda"].weights

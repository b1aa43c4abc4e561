"""What `run.compile` and `run.cuda_graphs` come to; and, slow, that what is compiled computes the same."""

import logging

import pytest
import torch

from lavis_kvmod.runners import compiling
from lavis_kvmod.runners.compiling import GRAPHS, Plan, compile_parts, plan


def test_graphs_are_recorded_on_a_gpu_alone_and_only_if_asked_for():
    assert plan(False, False, "cuda") == Plan() == plan(False, "auto", "cpu")
    assert plan(True, False, "cuda") == plan(True, "auto", "cpu") == Plan("default")
    assert plan(False, True, "cuda") == plan(False, "auto", "cuda") == plan(True, True, "cuda") == Plan(GRAPHS)
    refused = plan(True, True, "cpu")
    assert refused.mode == "default" and "recorded on a GPU, and run.device is cpu" in refused.refused
    assert plan(False, "auto", "cuda", fsdp=True) == Plan()
    assert "no graph holds" in plan(False, True, "cuda", fsdp=True).refused
    assert plan(True, False, "cuda", fsdp=True) == Plan(None, plan(True, False, "cuda", fsdp=True).refused)


def test_where_nothing_can_be_compiled_the_model_stays_and_a_line_says_so(build, caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(compiling.torch, "compile", broken)
    model = build()
    assert compile_parts(model, Plan("default"), torch.device("cpu")) == []
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("run.compile: torch.compile does not work here (RuntimeError: InvalidCxxCompiler")
    assert "\n" not in line and model.Qformer._compiled_call_impl is None


def test_decoding_is_recorded_where_graphs_are(build, monkeypatch):
    """Not beside gated layers, which are put between OPT's for each pass."""
    monkeypatch.setattr(compiling, "_no_compiler", lambda device: None)
    gated = dict(connector="linear", fusion="gated_cross_attention", gated_every=1)
    for mode, overrides, recorded in ((GRAPHS, {}, True), ("default", {}, False), (GRAPHS, gated, False)):
        model = build(**overrides)
        compile_parts(model, Plan(mode), torch.device("cpu"))
        assert (model.opt_model.recordings is not None) is recorded


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_compiled_computes_the_same(build, images):
    index = [0, 1, 0, 1, 0]
    batch = {
        "image": images(2),
        "image_index": torch.tensor(index),
        "text_input": [f"what is number {n}" for n in range(5)],
        "answer": ["seven", "one", "nine", "red", "a cat"],
        "weight": torch.ones(5),
        "n_answers": torch.ones(5, dtype=torch.long),
    }
    found = []
    for compiled in (False, True):
        model = build(prefix_gate="tanh").train()
        model.Qformer.eval()  # without dropout, which compiled code draws otherwise
        if compiled:
            names = list(model.state_dict())
            parts = compile_parts(model, Plan("default"), torch.device("cpu"))
            assert parts == ["visual_encoder", "Qformer", "kv_prefix", "opt_model"]
            assert list(model.state_dict()) == names
        loss = model(batch)["loss"]
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3

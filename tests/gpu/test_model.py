"""The model on the device against the same model on the CPU."""

import copy

import pytest
import torch

from lavis_kvmod.models.language.recorded import Recordings

# How far the loss may be from that in float32, and a gradient's norm, both relative. Measured at full size on an H200
# against stock LAVIS on the same card: 9e-8 (fp32), 2e-5 (fp16), 6e-5 (bf16).
TOLERANCES = {None: (1e-5, 1e-3), torch.float16: (2e-3, 5e-2), torch.bfloat16: (2e-2, 2e-1)}


def loss_and_norm(model, batch, dtype=None):
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = model(batch)["loss"]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], float("inf"))
    return loss.item(), norm.item()


def moved(batch, device):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_loss_and_gradients_are_the_cpus(build, vqa_batch, on_device, dtype, gate):
    model = build(prefix_gate=gate, answer_loss="all").eval()  # no dropout, which differs from device to device

    def compare(device):
        loss, norm = loss_and_norm(copy.deepcopy(model), dict(vqa_batch))
        other_loss, other_norm = loss_and_norm(copy.deepcopy(model).to(device), moved(vqa_batch, device), dtype)
        of_loss, of_norm = TOLERANCES[dtype]
        assert other_loss == pytest.approx(loss, rel=of_loss)
        assert other_norm == pytest.approx(norm, rel=of_norm)

    on_device(compare)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_and_captions_are_the_cpus(build, vqa_batch, images, on_device, num_beams, recorded):
    """Step by step, and by CUDA graphs, whose memory is used twice."""
    model = build().eval()

    def compare(device):
        other = copy.deepcopy(model).to(device)
        recordings = None
        if recorded:  # on the CPU steps of one shape, as they are
            recordings = Recordings() if device.type == "cuda" else Recordings(record=lambda step: step)
        other.opt_model.recordings = recordings
        asked = {key: vqa_batch[key] for key in ("image", "text_input")}
        settings = dict(num_beams=num_beams, max_len=4, prompt="Question: {} Short answer:")
        answers = model.predict_answers(dict(asked), **settings)
        for _ in range(2):
            assert other.predict_answers(moved(asked, device), **settings) == answers
        captions = model.generate({"image": images(3)}, num_beams=num_beams, max_length=6)
        assert other.generate({"image": images(3).to(device)}, num_beams=num_beams, max_length=6) == captions
        assert other.opt_model.recordings is recordings  # else nothing could be recorded

    on_device(compare)

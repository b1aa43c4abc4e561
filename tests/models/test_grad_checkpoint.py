"""Gradient checkpointing changes memory, not results."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks


def step(model, batch):
    """Loss, gradients and the bytes kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model({**batch})["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, sum(kept.values())


@pytest.mark.parametrize(
    "switch, others",
    [
        ("opt_grad_checkpoint", {}),
        ("use_grad_checkpoint", {"freeze_vit": False, "drop_path_rate": 0.3}),
        ("use_grad_checkpoint", {}),  # of a frozen ViT: nothing to keep, nothing to recompute
    ],
)
def test_equal_in_result_smaller_in_memory(build, vqa_batch, switch, others):
    plain = step(build(**others).train(), vqa_batch)
    recomputed = step(build(**{switch: True}, **others).train(), vqa_batch)
    assert torch.equal(plain[0], recomputed[0])
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name
    if others or switch == "opt_grad_checkpoint":
        assert recomputed[2] < 0.9 * plain[2]


def test_generation_keeps_its_cache(build, images):
    plain, recomputed = build().eval(), build(opt_grad_checkpoint=True, use_grad_checkpoint=True).eval()
    batch = {"image": images(2)}
    assert recomputed.generate(batch, num_beams=2) == plain.generate(batch, num_beams=2)

"""What `lavis_kvmod.memory` computes against what a GPU allocates."""

import pytest
import torch

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.memory.estimate import estimate

CAPTION = "a photo of a cat on a mat"

# Large enough that the fixed workspaces of cuBLAS (tens of MiB for each thread), which the estimate leaves out, hardly
# count; with the sizes of OPT-1.3B, which are known without its files.
LARGE = {"kv_modulation": False, "opt_precision": "bf16", "vit_precision": "bf16", "opt_model": "facebook/opt-1.3b"}


def large_model(cfg, tokenizer, device):
    """The model of a section with random weights on a device, from no files."""
    model = Blip2OPTKVMod.without_weights(cfg).to_empty(device=device)
    model.opt_model.tie_weights()
    model.opt_tokenizer = tokenizer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.train()


@pytest.mark.parametrize("overrides", [{}, {"opt_grad_checkpoint": True}])
def test_a_gpu_allocates_what_was_computed(build, model_config, images, device, on_device, overrides):
    if device != "cuda":
        pytest.skip("counts a GPU's memory")
    cfg, tokenizer = model_config(**LARGE, **overrides), build().opt_tokenizer
    tokens = len(tokenizer(CAPTION + "\n").input_ids)
    found = estimate(cfg, batch_size=64, text_length=tokens, amp="bf16")
    assert found.total > 1e9

    def measure(device):
        before = torch.cuda.memory_allocated()
        model = large_model(cfg, tokenizer, device)
        batch = {"image": images(64).to(device), "text_input": [CAPTION] * 64}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.cuda.max_memory_allocated() - before == pytest.approx(found.total, rel=0.1)

    on_device(measure)

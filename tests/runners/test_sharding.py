"""`run.fsdp` on one gloo process: what is sharded, and when. Several ranks: test_processes.py."""

import copy
import os
import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lavis_kvmod.system.sharding import is_sharded, shard_language_model


def sharded_types(layer):
    return {type(parameter).__name__ for parameter in layer.parameters()}


def test_one_root_over_the_decoder_lets_go_of_each_layer(build, in_process):
    """Layers that are roots of their own gather nothing ahead, and in PyTorch 2.6 keep what they gathered."""
    opt = build().opt_model
    whole = copy.deepcopy(opt)
    embeds = torch.randn(2, 5, opt.config.hidden_size)
    attention_mask = torch.ones(2, 5, dtype=torch.long)

    def check():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            names = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ.update(names, RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo")
        model = nn.Module()
        model.opt_model = opt
        shard_language_model(model, "cpu")
        assert is_sharded(opt)
        decoder = opt.model.decoder
        leaf = embeds.clone().requires_grad_()
        logits = opt(inputs_embeds=leaf, attention_mask=attention_mask).logits
        assert torch.equal(logits, whole(inputs_embeds=embeds, attention_mask=attention_mask).logits)
        roots = [m for m in opt.modules() if isinstance(m, FSDPModule) and m._get_fsdp_state()._is_root]
        assert roots == [decoder]
        for _ in range(2):  # after a forward, and after a backward
            assert all(sharded_types(layer) == {"DTensor"} for layer in decoder.layers)
            assert sharded_types(decoder.embed_tokens) == sharded_types(opt.lm_head) == {"Parameter"}
            if leaf.grad is None:
                logits.sum().backward()
        assert torch.isfinite(leaf.grad).all()

    code, output = in_process(check)
    assert code == 0, output

"""Decoding with and without the Key/Value cache: our OPT against LAVIS's own, same weights, same tokens, same run.

Beam 5, 20 new tokens, an OPT of 12 layers of width 768, batch 8, behind 32 soft-prompt vectors.
"""

import statistics
import time

import torch
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM

from lavis_kvmod.models.language.opt import FrozenOPT

BATCH, BEAMS, NEW_TOKENS, QUERIES, RUNS = 8, 5, 20, 32, 3


def main():
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=5000, hidden_size=768, word_embed_proj_dim=768, num_hidden_layers=12, init_std=0.1)
    stock, ours = OPTForCausalLM(config).eval(), FrozenOPT(config)
    ours.load_state_dict(stock.state_dict())
    inputs = dict(
        input_ids=torch.full((BATCH, 1), 2),
        attention_mask=torch.ones(BATCH, QUERIES + 1, dtype=torch.long),
        query_embeds=torch.randn(BATCH, QUERIES, 768).repeat_interleave(BEAMS, dim=0),
        num_beams=BEAMS,
        max_new_tokens=NEW_TOKENS,
        min_length=NEW_TOKENS,
    )
    seconds, tokens = {}, {}
    for name, model, runs in (("stock LAVIS", stock, 1), ("with its cache", ours, RUNS)):
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            with torch.no_grad():
                tokens[name] = model.generate(**inputs)
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
        print(f"{name:<16} {seconds[name]:7.2f} s")
    same = torch.equal(*tokens.values())
    print(f"ratio            {seconds['stock LAVIS'] / seconds['with its cache']:7.1f}   same tokens: {same}")


if __name__ == "__main__":
    main()

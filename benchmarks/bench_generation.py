"""Beam search: our decoding against transformers' ``generate`` on LAVIS's own OPT, same weights, same tokens, same run.

Beam 5, 20 new tokens, an OPT of 12 layers of width 768, batch 8, behind 32 soft-prompt vectors.
"""

import statistics
import time

import torch
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM

from lavis_kvmod.models.language.decoding import Search, decode
from lavis_kvmod.models.language.opt import FrozenOPT

BATCH, BEAMS, NEW_TOKENS, QUERIES, RUNS = 8, 5, 20, 32, 3
BOS, PAD, STOP = 2, 1, 50118  # as OPT's tokenizer has them; the last is the newline


def main():
    torch.manual_seed(0)
    config = OPTConfig(hidden_size=768, word_embed_proj_dim=768, num_hidden_layers=12, init_std=0.1)
    stock, ours = OPTForCausalLM(config).eval(), FrozenOPT(config)
    ours.load_state_dict(stock.state_dict())
    text = torch.full((BATCH, 1), BOS)
    mask = torch.ones(BATCH, QUERIES + 1, dtype=torch.long)
    soft_prompt = torch.randn(BATCH, QUERIES, 768)

    def with_transformers():
        lengths = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        repeated = soft_prompt.repeat_interleave(BEAMS, dim=0)
        ends = dict(eos_token_id=STOP, pad_token_id=PAD)
        ids = stock.generate(
            input_ids=text, attention_mask=mask, query_embeds=repeated, num_beams=BEAMS, **lengths, **ends
        )
        return ids[:, 1:].tolist()

    def with_ours():
        beginning = torch.cat([soft_prompt, ours.get_input_embeddings()(text)], dim=1)
        search = Search(NEW_TOKENS, BEAMS, min_new_tokens=NEW_TOKENS)
        return [added.ids for added in decode(ours, beginning, mask, text, search, stop=STOP, pad=PAD)]

    seconds, tokens = {}, {}
    for name, generate, runs in (("stock LAVIS", with_transformers, 1), ("ours", with_ours, RUNS)):
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            with torch.no_grad():
                tokens[name] = generate()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
        print(f"{name:<16} {seconds[name]:7.2f} s")
    same = tokens["stock LAVIS"] == tokens["ours"]
    print(f"ratio            {seconds['stock LAVIS'] / seconds['ours']:7.1f}   same tokens: {same}")


if __name__ == "__main__":
    main()

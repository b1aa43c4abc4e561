"""One rank of a stage-1 step: ``python stage_1_rank.py RANK WORLD FOLDER``; writes loss and gradients, averaged over
ranks as DistributedDataParallel averages them."""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from small_vit import SIZE
from stage_1 import make_stock, make_tokenizer, ours_like

from lavis_kvmod.models import blip2_kvmod
from lavis_kvmod.models.objectives import IGNORED, MaskedWords, Negatives

TEXTS = ["a red seven on white paper", "a blue one on sky paper", "a green two on pink paper", "a grey nine"]
IMAGE_IDS = [0, 1, 2, 1]
OBJECTIVES = ("itc", "itm", "itg", "mlm")
CASES = {name: {"objectives": {**dict.fromkeys(OBJECTIVES, 0.0), name: 1.0}} for name in OBJECTIVES}
CASES["momentum"] = {"momentum_queue": 8}
CASES["momentum of words"] = {"momentum_queue": 8, **CASES["mlm"]}


def hardest(scores, positives):
    """The likeliest negative instead of a drawn one: the same on any number of ranks."""
    return Negatives(scores.masked_fill(positives, -torch.inf).argmax(dim=1), ~positives.all(dim=1))


def every_second(token_ids, special, *, mask_token_id, vocab_size):
    """Every second word is hidden, whatever the random numbers."""
    chosen = ~special & (token_ids % 2 == 0)
    return MaskedWords(token_ids.masked_fill(chosen, mask_token_id), token_ids.masked_fill(~chosen, IGNORED))


def main(rank, world, folder):
    """All objectives, each alone, and ITC with momentum."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    with mock.patch.multiple(blip2_kvmod, draw_hard_negatives=hardest, mask_words=every_second):
        results = {name: step(rank, world, folder, options) for name, options in CASES.items()}
    if rank == 0:
        torch.save(results, folder / f"of-{world}.pth")


def step(rank, world, folder, options):
    """The loss and all gradients of a batch."""
    words = folder / f"words-{rank}-{world}"
    words.mkdir(exist_ok=True)
    stock = make_stock(Blip2Qformer, make_tokenizer(words))
    images = torch.randn(len(TEXTS), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    mine = slice(rank * len(TEXTS) // world, (rank + 1) * len(TEXTS) // world)
    batch = {"image": images[mine], "text_input": TEXTS[mine], "image_id": torch.tensor(IMAGE_IDS[mine])}
    model = ours_like(stock, prefix=True, **options).double().eval()
    model.visual_encoder.float(), model.ln_vision.float()  # LAVIS's LayerNorm computes in float32
    if model.momentum is not None:
        model.momentum.copy_from(model._followed())
        without_dropout(model.train())
        model(batch)  # something in the queue
    model.zero_grad()
    loss = model(batch)["loss"]
    loss.backward()
    values = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    for value in values.values():
        if world > 1:
            dist.all_reduce(value)
            value /= world
    queue = {} if model.queue is None else {"queue": model.queue.text_features}
    return {name: value.clone() for name, value in {**values, **queue}.items()}


def without_dropout(model):
    """In training mode, where the momentum model follows, but with no random numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

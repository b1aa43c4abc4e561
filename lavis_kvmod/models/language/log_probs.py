"""How likely a model finds answers that are given to it: what a comparison of accuracies is too coarse for."""

from typing import Any, Dict

import torch
from torch import Tensor

from lavis_kvmod.models.language.answers import answers_of
from lavis_kvmod.models.language.text import answer_batch

__all__ = ["answer_log_probs"]


@torch.no_grad()
def answer_log_probs(model: Any, samples: Dict[str, Any]) -> Tensor:
    """The log-probability of each answer (k,) of a batch as `Blip2OPTKVMod.forward` takes it, its newline included."""
    contexts = model._question_contexts(samples)
    targets = answers_of(samples, draw=False)
    asked = [contexts[i] for i in targets.rows.tolist()]
    text = answer_batch(model.opt_tokenizer, asked, targets.answers, model.device)
    image_of = None if model.reads_questions else samples.get("image_index")
    image_of = targets.rows if image_of is None else image_of.cpu()[targets.rows]
    row, token_loss = model.token_losses(model._of_images(samples, asked=True), text, image_of)
    return token_loss.new_zeros(len(targets.answers)).index_add(0, row, -token_loss)

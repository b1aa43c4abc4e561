"""The objectives of BLIP-2's stage 1, as functions of what the Q-Former gives.

Contrastive (ITC), matching (ITM) and captioning (ITG) are BLIP-2's (arXiv 2301.12597, section 3.2; LAVIS's
``blip2_models/blip2_qformer.py``), masked words (MLM) and the distillation of the contrastive loss are ALBEF's (arXiv
2107.07651). None of them knows a model: they are told features, logits and who belongs to whom.

Legend: `b` this rank's batch, `B` the batch of all ranks, `q` queries, `e` width of the shared space, `t` text tokens,
`v` words of the vocabulary.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Of BLIP-2: the contrastive targets and BERT's words are both smoothed (blip2_qformer.py, Qformer.py:1076).
LABEL_SMOOTHING = 0.1
IGNORED = -100

# Added to the chance of being drawn as a negative, so that every other sample can be (blip2_qformer.py).
_LEAST_CHANCE = 1e-4


class Loss(NamedTuple):
    """A loss as a sum and what it is the sum over, so that ranks with more words or rows count for more."""

    total: Tensor
    terms: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss of this rank alone; 0 where there was nothing to learn from."""
        return self.total / self.terms.clamp(min=1)


class Similarities(NamedTuple):
    """How well images and texts fit, before the temperature: images to all texts (b, B), texts to all images (b, B)."""

    image_to_text: Tensor
    text_to_image: Tensor


def similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Image features (i, q, e), text features (j, e), both of unit length -> (i, j): the query that fits best."""
    return torch.einsum("iqe,je->ijq", image_features, text_features).max(dim=-1).values


def similarities(image: Tensor, text: Tensor, all_images: Tensor, all_texts: Tensor) -> Similarities:
    """Features of this rank (b, q, e), (b, e), and of all ranks (B, q, e), (B, e)."""
    return Similarities(similarity(image, all_texts), similarity(all_images, text).t())


class Identity(NamedTuple):
    """Which image and which text a sample is made of: equal numbers, equal things. (n,) integers each."""

    image: Tensor
    text: Tensor


def belonging(mine: Identity, others: Identity) -> Tensor:
    """Which of the others' samples are true of mine, too: those of the same image or the same text; (b, B) booleans."""
    return (mine.image[:, None] == others.image[None]) | (mine.text[:, None] == others.text[None])


def contrastive_loss(
    similar: Similarities,
    temperature: Tensor,
    positives: Tensor,
    soft_targets: Optional[Similarities] = None,
    alpha: float = 0.0,
) -> Loss:
    """ITC: the mean over both directions of the cross-entropy with all of an item's positives as targets.

    Args:
        similar: this rank's items against all ranks', (b, B) each (and a queue's behind them, where there is one).
        temperature: a number that similarities are divided by.
        positives: (b, B) booleans; a row's targets share its probability equally.
        soft_targets: a momentum model's probabilities, of the same shapes, which take ``alpha`` of the targets
            (ALBEF, equation 6). Hard targets are smoothed, soft ones are soft already.
    """
    hard = positives.float()
    hard = hard / hard.sum(dim=1, keepdim=True)
    total = hard.new_zeros(())
    for scores, soft in zip(similar, soft_targets or (None, None)):
        logits = scores / temperature
        if soft is None:
            total = total + F.cross_entropy(logits, hard, label_smoothing=LABEL_SMOOTHING, reduction="sum")
        else:
            total = total + F.cross_entropy(logits, alpha * soft + (1 - alpha) * hard, reduction="sum")
    return Loss(total / 2, hard.new_tensor(len(hard)))


class Negatives(NamedTuple):
    """For each item one of all ranks' that does not belong to it, and whether there is one; (b,) each."""

    chosen: Tensor
    exists: Tensor


@torch.no_grad()
def draw_hard_negatives(scores: Tensor, positives: Tensor) -> Negatives:
    """Draw a negative for each row by how well it fits: the more alike, the likelier (ALBEF, section 3.2).

    Args:
        scores: similarities divided by the temperature, (b, B).
        positives: (b, B) booleans, never drawn. A row that has nothing else gets one that does not count.
    """
    chances = (F.softmax(scores.float(), dim=1) + _LEAST_CHANCE).masked_fill(positives, 0)
    exists = ~positives.all(dim=1)
    chances = torch.where(exists[:, None], chances, torch.ones_like(chances))
    # Row by row, as LAVIS draws them: then the same random numbers give the same negatives.
    return Negatives(torch.cat([torch.multinomial(row, 1) for row in chances]), exists)


def matching_loss(logits: Tensor, counts: Tensor) -> Loss:
    """ITM: is it a pair? Pairs stand first, then the images with negatives.

    Args:
        logits: (3 b, 2): b pairs, b negative images for a text, b negative texts for an image.
        counts: (2 b,) whether a negative is one.
    """
    b = len(logits) // 3
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[:b] = 1
    weights = torch.cat([counts.new_ones(b), counts]).to(logits.dtype)
    return Loss((F.cross_entropy(logits, labels, reduction="none") * weights).sum(), weights.sum())


def captioning_loss(logits: Tensor, token_ids: Tensor, pad_token_id: int) -> Loss:
    """ITG: each word from those before it.

    Args:
        logits: (b, t, v) of a causal pass over ``token_ids``.
        token_ids: (b, t), the decoder's BOS first.
    """
    labels = token_ids.masked_fill(token_ids == pad_token_id, IGNORED)[:, 1:]
    predicted, told = logits[:, :-1].flatten(0, 1), labels.flatten()
    total = F.cross_entropy(predicted, told, ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING, reduction="sum")
    return Loss(total, (labels != IGNORED).sum())


class MaskedWords(NamedTuple):
    """Token ids with some words hidden, and what they were, (b, t) each; `IGNORED` where nothing is asked."""

    token_ids: Tensor
    labels: Tensor


def mask_words(
    token_ids: Tensor, special: Tensor, *, mask_token_id: int, vocab_size: int, share: float = 0.15
) -> MaskedWords:
    """BERT's masking: of the chosen words 80 % are hidden, 10 % exchanged and 10 % left (arXiv 1810.04805).

    Args:
        token_ids: (b, t).
        special: (b, t) booleans: padding, [CLS] and [SEP], which are never chosen.
        share: of the words that is chosen.
    """
    chosen = (torch.rand(token_ids.shape, device=token_ids.device) < share) & ~special
    labels = token_ids.masked_fill(~chosen, IGNORED)
    fate = torch.rand(token_ids.shape, device=token_ids.device)
    others = torch.randint(vocab_size, token_ids.shape, device=token_ids.device)
    hidden = token_ids.masked_fill(chosen & (fate < 0.8), mask_token_id)
    return MaskedWords(torch.where(chosen & (fate >= 0.9), others, hidden), labels)


def masked_words_loss(
    logits: Tensor, labels: Tensor, soft_targets: Optional[Tensor] = None, alpha: float = 0.0
) -> Loss:
    """MLM: logits (b, t, v) against the hidden words (b, t); 0 where none was hidden.

    ``soft_targets`` (b, t, v) are a momentum model's probabilities, which take ``alpha`` of the loss.
    """
    asked = labels != IGNORED
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    if soft_targets is not None:
        soft = -(soft_targets * F.log_softmax(logits, dim=-1)).sum(dim=-1)
        loss = (1 - alpha) * loss + alpha * (soft * asked).sum()
    return Loss(loss, asked.sum())

"""Which texts fit an image and which images a text, with no more than the best k of each kept.

A data set of 100,000 images has 10^10 pairs, and its visual tokens do not fit any memory. So similarities are computed
block by block and only the best are kept, and the images pass a second time to be re-ranked by the matching head.
"""

from typing import Iterable, List, NamedTuple, Sequence, Set

import torch
from torch import Tensor

from lavis_kvmod.models.objectives import similarity

# Texts compared with a batch of images at a time: 64 images with 32 queries then take 32 MiB.
_TEXTS_AT_ONCE = 4096


class Best(NamedTuple):
    """The best candidates of each row, best first: scores and the candidates' numbers, (n, k) each; -1 for none."""

    scores: Tensor
    numbers: Tensor

    @classmethod
    def none(cls, rows: int, k: int) -> "Best":
        """Of ``rows`` rows, before any candidate came."""
        return cls(torch.full((rows, k), -torch.inf), torch.full((rows, k), -1, dtype=torch.long))

    def with_more(self, scores: Tensor, numbers: Tensor) -> "Best":
        """After more candidates: scores (n, m) and numbers (n, m) or (m,). Of equals the first to come stays first."""
        all_scores = torch.cat([self.scores, scores.float().cpu()], dim=1)
        all_index = torch.cat([self.numbers, numbers.cpu().expand(len(scores), -1)], dim=1)
        order = all_scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        return Best(all_scores.gather(1, order), all_index.gather(1, order))


def compare(image_features: Tensor, text_features: Tensor) -> Iterable[Tensor]:
    """Similarities (b, t) of images (b, q, e) with one block of the texts (n, e) after the other."""
    for start in range(0, len(text_features), _TEXTS_AT_ONCE):
        yield similarity(image_features, text_features[start : start + _TEXTS_AT_ONCE])


class Pairs(NamedTuple):
    """Pairs to be scored: an image's place in its batch, and a text's number; (n,) each."""

    image: Tensor
    text: Tensor


def pairs_of_batch(images: Sequence[int], of_images: Best, of_texts: Best) -> Pairs:
    """All pairs of a batch that either side's best hold.

    Args:
        images: the images' numbers.
        of_images: each of these images' best texts, in the same order.
        of_texts: all texts' best images.
    """
    place = {image: i for i, image in enumerate(images)}
    wanted: Set[tuple] = {(i, int(text)) for i, row in enumerate(of_images.numbers) for text in row if text >= 0}
    mine = torch.isin(of_texts.numbers, torch.tensor(list(images)))
    for text, rank in mine.nonzero().tolist():
        wanted.add((place[int(of_texts.numbers[text, rank])], text))
    chosen = sorted(wanted)
    return Pairs(torch.tensor([i for i, _ in chosen]), torch.tensor([text for _, text in chosen]))


def recall(found: Best, right: Sequence[Set[int]], ks: Sequence[int] = (1, 5, 10)) -> List[float]:
    """The share of rows, in per cent, that have one of the right candidates among their best k; for each k.

    Rows without any right candidate are not asked.
    """
    asked = [(row, truth) for row, truth in zip(found.numbers.tolist(), right) if truth]
    return [100 * sum(bool(truth.intersection(row[:k])) for row, truth in asked) / max(len(asked), 1) for k in ks]

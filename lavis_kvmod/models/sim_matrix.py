"""All images' scores with all texts, as LAVIS's own retrieval task asks a model for them.

``kvmod_retrieval`` keeps the best of each alone; LAVIS's run files (``task: retrieval``) want matrices.
"""

from typing import Any, Callable, List, Tuple

import numpy as np
import torch
from torch import Tensor

from lavis_kvmod.models.objectives import similarity
from lavis_kvmod.models.vision.feature_cache import FrozenFeatures
from lavis_kvmod.system.distributed import all_reduce_tensor, get_rank, get_world_size

__all__ = ["compute_sim_matrix"]

# LAVIS's, for pairs that the matching head was not asked about.
_NOT_ASKED = -100.0
_TEXTS_A_BATCH = 256


@torch.no_grad()
def compute_sim_matrix(model: Any, data_loader: Any, k_test: int) -> Tuple[np.ndarray, np.ndarray]:
    """Scores of images with texts (n, t), and of texts with images (t, n); ``lavis/models/blip2_models/blip2.py`` has
    the same. For each row's ``k_test`` best the contrastive score and the matching head's logit together.

    Args:
        model: a stage-1 model.
        data_loader: over all images, on every rank, in order; its data set has the ``text`` to be found.
        k_test: as many are asked at most, where there are fewer (LAVIS's fails there).
    """
    texts = list(data_loader.dataset.text)
    blocks = [texts[start : start + _TEXTS_A_BATCH] for start in range(0, len(texts), _TEXTS_A_BATCH)]
    of_texts = torch.cat([model.text_features(model.tokenise(block)) for block in blocks])
    seen = [model.features({**samples, "image": samples["image"].to(model.device)}) for samples in data_loader]
    similar = similarity(torch.cat([model.image_features(features) for features in seen]), of_texts)
    tokens = torch.cat([features.visual_tokens.cpu() for features in seen])
    of_second = [features.pooled.cpu() for features in seen if features.pooled is not None]
    pooled = torch.cat(of_second) if of_second else None

    def fit(shown: List[int], read: List[int]) -> Tensor:
        of_second_encoder = None if pooled is None else pooled[shown].to(model.device)
        features = FrozenFeatures(tokens[shown].to(model.device), of_second_encoder)
        logits: Tensor = model.match(features, model.tokenise([texts[t] for t in read]))[:, 1].float()
        return logits

    of_images = _best_anew(similar, k_test, lambda i, found: fit([i] * len(found), found))
    of_each_text = _best_anew(similar.t(), k_test, lambda t, found: fit(found, [t] * len(found)))
    return of_images.cpu().numpy(), of_each_text.cpu().numpy()


def _best_anew(similar: Tensor, k_test: int, logits: Callable[[int, List[int]], Tensor]) -> Tensor:
    """Each row's best, with the matching head's logit; the ranks share the rows."""
    scores = torch.zeros_like(similar, dtype=torch.float32)
    for row in range(get_rank(), len(similar), get_world_size()):
        best = similar[row].topk(min(k_test, similar.shape[1]))
        scores[row] = _NOT_ASKED
        scores[row, best.indices] = best.values.float() + logits(row, best.indices.tolist())
    return all_reduce_tensor(scores)

"""From the Q-Former's hidden states at text positions to words: BERT's output head (arXiv 1810.04805).

Names are those of BLIP-2's stage-1 checkpoints (``Qformer.cls.predictions.*``). The output layer is the word embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Transform(nn.Module):
    def __init__(self, hidden_size: int, layer_norm_eps: float):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, hidden) -> the same shape"""
        return self.LayerNorm(F.gelu(self.dense(hidden_states)))


class _Predictions(nn.Module):
    def __init__(self, embeddings: nn.Embedding, layer_norm_eps: float):
        super().__init__()
        vocab_size, hidden_size = embeddings.weight.shape
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.transform = _Transform(hidden_size, layer_norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)
        self.decoder.weight, self.decoder.bias = embeddings.weight, self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, hidden) -> (…, vocabulary)"""
        return self.decoder(self.transform(hidden_states))


class WordHead(nn.Module):
    """Hidden states (b, t, hidden) -> logits (b, t, vocabulary).

    Args:
        embeddings: the word embeddings, whose weights are the output layer's too.
        layer_norm_eps: as in the Q-Former.
    """

    def __init__(self, embeddings: nn.Embedding, *, layer_norm_eps: float = 1e-12):
        super().__init__()
        self.predictions = _Predictions(embeddings, layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the class."""
        return self.predictions(hidden_states)

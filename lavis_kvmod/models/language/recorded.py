"""Decoding in steps of one shape, which a GPU records once as a CUDA graph and replays for each token.

    positions   [ beginning | what each row has said | room, masked ]     always all of them

A step of `Steps` is as long as the text so far, and Python launches each of its many small kernels: on a large GPU that
takes longer than what they compute. A graph launches them all at once. What it reads and writes has to stay where it
is, so it has memory of its own, which the next batch of that shape uses again.
"""

import logging
from collections import OrderedDict
from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

from lavis_kvmod.models.language.attention import KeyValue

__all__ = ["FixedStep", "Recordings", "Step", "recorded_by_cuda"]

_ROUNDED_TO = 64  # positions: texts of about the same length share a recording
_KEPT = 2  # each has Keys and Values for all its positions
_WARM_UP = 3  # runs before a graph may be recorded: libraries choose their kernels in them

Step = Callable[[], None]


class _FixedLayer:
    """A layer's Keys and Values at all positions, (2, rows, heads, total, head width), as `CachedAttention` takes
    them."""

    def __init__(self, states: Tensor, at: Tensor):
        self._states, self._at = states, at

    def add(self, key: Tensor, value: Tensor) -> KeyValue:
        """Write those of the next position; returns those of all positions."""
        for place, state in zip(self._states, (key, value)):
            place.index_copy_(2, self._at, state)
        return self._states[0], self._states[1]


class FixedStep:
    """One more token for each row, in memory that stays where it is.

    Args:
        opt: a `FrozenOPT`.
        rows, total: how many texts, and positions of each at most.
        moves: whether rows change places, as a search's beams do.

    Attributes:
        tokens, parents: (rows,), to be written before a step: each row's last token, and the row that it goes on from.
        logits: (rows, vocabulary), what a step has found.
    """

    def __init__(self, opt: Any, rows: int, total: int, moves: bool):
        config, weight = opt.config, opt.get_input_embeddings().weight
        heads = config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, heads, total, config.hidden_size // heads)
        device = weight.device
        self._opt, self._moves = opt, moves
        self._store = weight.new_zeros(shape)
        self._seen = torch.zeros(rows, 1, 1, total, dtype=torch.bool, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)
        self._position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.parents = torch.arange(rows, device=device)
        self.logits = torch.zeros(rows, len(opt.lm_head.weight), device=device)

    def begin(self, beginning: Sequence[KeyValue], mask: Tensor, copies: int) -> None:
        """Take each layer's Keys and Values (b, heads, p, head width), with their mask (b, p), for all copies."""
        shared = mask.shape[1]
        for layer, pair in zip(self._store, beginning):
            for place, state in zip(layer, pair):
                place[..., :shared, :] = state.repeat_interleave(copies, dim=0)
        self._seen.zero_()[:, 0, 0, :shared] = mask.repeat_interleave(copies, dim=0).bool()
        self._position.copy_(mask.sum(1, keepdim=True).repeat_interleave(copies, dim=0))
        self._at.fill_(shared)

    def __call__(self) -> None:
        """The step itself."""
        for states in self._store if self._moves else ():
            states.copy_(states.index_select(1, self.parents))
        self._seen.index_fill_(3, self._at, True)
        words = self._opt.get_input_embeddings()(self.tokens.unsqueeze(1))
        past = [_FixedLayer(states, self._at) for states in self._store]
        hidden = self._opt.model.decoder.behind(past, words, self._position, self._seen)
        self.logits.copy_(self._opt.lm_head(hidden[:, -1]))
        self._at += 1
        self._position += 1


def recorded_by_cuda(step: Step) -> Step:
    """What replays a step as a CUDA graph; it has then been run some times, with whatever was in its memory."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Recordings:
    """A language model's recorded steps by shape; the one that was used last longest ago makes room for another."""

    def __init__(self, record: Callable[[Step], Step] = recorded_by_cuda):
        self._record = record
        self._known: OrderedDict[Tuple[int, int, bool], Tuple[FixedStep, Step]] = OrderedDict()

    def step(self, opt: Any, rows: int, total: int, moves: bool) -> Optional[Tuple[FixedStep, Step]]:
        """A step of this shape or one that is a little longer, and what runs it; None, with a line in the log, where it
        cannot be recorded: then none is tried any more."""
        shape = (rows, -(-total // _ROUNDED_TO) * _ROUNDED_TO, moves)
        if shape not in self._known:
            if len(self._known) >= _KEPT:
                self._known.popitem(last=False)
            fixed = FixedStep(opt, *shape)
            try:
                self._known[shape] = fixed, self._record(fixed)
            except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA says it by the latter
                logging.warning("decoding goes on without CUDA graphs: %s", str(error).strip().split("\n")[0])
                opt.recordings = None
                return None
        self._known.move_to_end(shape)
        return self._known[shape]

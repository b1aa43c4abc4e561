"""How the language model goes on with a text: greedy, by beam search, or drawn from its likeliest tokens.

The beginning (soft prompt and text) goes through the model once for each image and question, however many beams or
captions go on from it. The tokens are those that transformers' ``generate`` (4.26) gives, its ways included: a length
is the text's, prompt and padding counted; what stands in the prompt counts as repeated; what is drawn is one of the 50
likeliest. Whether all texts have ended is asked once a step; nothing else waits for the device.
"""

from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_kvmod.models.language.attention import KeyValueCache
from lavis_kvmod.models.language.opt import FrozenOPT
from lavis_kvmod.models.language.recorded import FixedStep, Step
from lavis_kvmod.system.distributed import all_reduce_sum
from lavis_kvmod.system.sharding import is_sharded

TOP_K = 50  # transformers' default, which LAVIS leaves as it is


class Search(NamedTuple):
    """What is looked for, and how; see ``Blip2OPTKVMod.generate``.

    ``min_new_tokens`` counts what stands in front of the stop token. ``sample`` draws from the tokens that have the
    probability ``top_p`` together, at ``temperature``; otherwise ``num_beams`` are followed, which are compared by
    log-likelihood / length ** ``length_penalty``. ``repetition_penalty`` divides the scores of tokens that are there.
    """

    max_new_tokens: int
    num_beams: int = 1
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    sample: bool = False
    top_p: float = 1.0
    temperature: float = 1.0

    def check(self) -> None:
        """Raises ValueError for what cannot be searched."""
        least = min(self.max_new_tokens, self.num_beams, self.num_return_sequences)
        if least < 1:
            raise ValueError(f"expected at least one new token, beam and text; got {self}")
        if not self.sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"expected at most as many texts as beams, of which there are {self.num_beams}; got "
                f"{self.num_return_sequences}: take more beams, or nucleus sampling"
            )
        if min(self.temperature, self.repetition_penalty, self.top_p) <= 0:
            raise ValueError(f"expected temperature, repetition_penalty and top_p above 0; got {self}")

    @property
    def copies(self) -> int:
        """How many sequences go on from each beginning."""
        return self.num_return_sequences if self.sample else self.num_beams


class Continuation(NamedTuple):
    """Tokens that were added, the stop token among them where there is one, and the log-probability that the model
    gives them, whatever was penalised."""

    ids: List[int]
    log_prob: float


class Steps:
    """The language model, token by token, behind a beginning that goes through it once.

    Args:
        opt: a `FrozenOPT`.
        beginning: (b, p, width), which all copies share.
        mask: its attention mask (b, p).
        copies, room: see `KeyValueCache`.
    """

    def __init__(self, opt: FrozenOPT, beginning: Tensor, mask: Tensor, copies: int, room: int):
        self._opt, self._sharded, self._copies = opt, is_sharded(opt), copies
        said = opt.model.decoder(inputs_embeds=beginning, attention_mask=mask, use_cache=True, return_dict=True)
        self._last = said.last_hidden_state[:, -1:]
        self._begin(said.past_key_values, mask, room)

    def _begin(self, beginning: Any, mask: Tensor, room: int) -> None:
        self.cache = KeyValueCache(beginning, self._copies, room)
        self._mask = F.pad(mask.repeat_interleave(self._copies, dim=0), (0, room), value=1)

    def first(self) -> Tensor:
        """Logits (b * copies, vocabulary) behind the beginning."""
        return self._logits(self._last).repeat_interleave(self._copies, dim=0)

    def __call__(self, tokens: Tensor, rows: Optional[Tensor] = None) -> Tensor:
        """Logits (b * copies, vocabulary) behind ``tokens`` (b * copies,); ``rows``: which row each goes on from."""
        if rows is not None:
            self.cache.reorder(rows)
        hidden = self._opt.model.decoder(
            inputs_embeds=self._opt.get_input_embeddings()(tokens.unsqueeze(1)),
            attention_mask=self._mask[:, : self.cache.length + 1],
            past_key_values=self.cache,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        self.cache.length += 1
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._opt.lm_head(hidden[:, -1]).float()

    def all_done(self, done: Tensor) -> bool:
        """Whether all texts have ended: on all ranks, where the layers are gathered from all of them at each step."""
        if not self._sharded:
            return bool(done.all())
        return all_reduce_sum([float(not done.all())], done.device) == [0.0]


class RecordedSteps(Steps):
    """The same, each step the replay of a recording."""

    def __init__(self, *args: Any, recording: Tuple[FixedStep, Step], **kwargs: Any):
        self._fixed, self._replay = recording
        super().__init__(*args, **kwargs)

    def _begin(self, beginning: Any, mask: Tensor, room: int) -> None:
        self._fixed.begin(beginning, mask, self._copies)

    def __call__(self, tokens: Tensor, rows: Optional[Tensor] = None) -> Tensor:
        """As `Steps`; the logits are written over by the next step."""
        self._fixed.tokens.copy_(tokens)
        if rows is not None:
            self._fixed.parents.copy_(rows)
        self._replay()
        return self._fixed.logits


def _steps(opt: FrozenOPT, beginning: Tensor, mask: Tensor, search: Search) -> Steps:
    room, recording = search.max_new_tokens - 1, None
    if opt.recordings is not None and room:
        moves, rows = not search.sample and search.num_beams > 1, len(mask) * search.copies
        recording = opt.recordings.step(opt, rows, mask.shape[1] + room, moves)
    if recording is None:
        return Steps(opt, beginning, mask, search.copies, room)
    return RecordedSteps(opt, beginning, mask, search.copies, room, recording=recording)


@torch.no_grad()
def decode(
    opt: FrozenOPT, beginning: Tensor, mask: Tensor, text: Tensor, search: Search, *, stop: int, pad: int
) -> List[Continuation]:
    """The continuations of each beginning, the best one first, those of a beginning together.

    Args:
        opt: the language model.
        beginning: soft prompt and text (b, q + t, width), padded on the left of the text.
        mask: attention mask (b, q + t).
        text: token ids of the text (b, t).
        search: see there.
        stop: the token that ends a text.
        pad: the token behind an end.

    Raises:
        ValueError: see `Search.check`.
    """
    search.check()
    choice = (_Rows if search.sample or search.num_beams == 1 else _Beams)(text, search, stop, pad)
    # In the weights' own precision: autocast would convert them at every step.
    with torch.autocast(beginning.device.type, enabled=False):
        beginning = beginning.to(opt.get_input_embeddings().weight.dtype)
        steps = _steps(opt, beginning, mask, search)
        following = choice.choose(steps.first())
        while choice.new < search.max_new_tokens and not steps.all_done(choice.done):
            following = choice.choose(steps(*following))
    return choice.texts()


class _Rows:
    """In each row the likeliest token, or one that is drawn, until the row ends."""

    def __init__(self, text: Tensor, search: Search, stop: int, pad: int):
        self._search, self._stop, self._pad = search, stop, pad
        self._text = text.repeat_interleave(search.copies, dim=0)  # (r, t)
        self._log_probs = torch.zeros(len(self._text), device=text.device)
        self.new, self.done = 0, torch.zeros(len(self._text), dtype=torch.bool, device=text.device)

    def choose(self, logits: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Logits (r, vocabulary) -> the next token of each row (r,)."""
        scores = _penalised(logits, self._text, self.new, self._search, self._stop)
        token = _draw(scores, self._search) if self._search.sample else scores.argmax(-1)
        log_prob = logits.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
        self._log_probs += log_prob.masked_fill(self.done, 0)
        token = token.masked_fill(self.done, self._pad)
        self._text = torch.cat([self._text, token.unsqueeze(1)], dim=1)
        self.done |= token == self._stop
        self.new += 1
        return token, None

    def texts(self) -> List[Continuation]:
        """What was added to each row."""
        added = (_up_to(self._stop, ids) for ids in self._text[:, -self.new :].tolist())
        return [Continuation(*each) for each in zip(added, self._log_probs.tolist())]


def _up_to(stop: int, ids: List[int]) -> List[int]:
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def _penalised(scores: Tensor, text: Tensor, new: int, search: Search, stop: int) -> Tensor:
    """Scores (r, vocabulary) with the penalties of what is in ``text`` (r, t), of which ``new`` tokens are new."""
    if search.repetition_penalty != 1:
        there = scores.gather(1, text)
        there = torch.where(there < 0, there * search.repetition_penalty, there / search.repetition_penalty)
        scores = scores.scatter(1, text, there)
    if new < search.min_new_tokens:
        scores = scores.index_fill(1, torch.tensor([stop], device=scores.device), -torch.inf)
    return scores


def _draw(scores: Tensor, search: Search) -> Tensor:
    """One token (r,) of each row of scores (r, vocabulary): nucleus sampling (arXiv 1904.09751)."""
    scores = scores / search.temperature
    least = scores.topk(min(TOP_K, scores.shape[1])).values[:, -1:]
    scores = scores.masked_fill(scores < least, -torch.inf)
    if search.top_p < 1:
        rising, order = scores.sort(dim=-1)
        unlikely = rising.softmax(-1).cumsum(-1) <= 1 - search.top_p
        scores = scores.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


class _Beams:
    """The k likeliest texts of each beginning, followed until nothing that goes on can become better."""

    def __init__(self, text: Tensor, search: Search, stop: int, pad: int):
        b, k, device = len(text), search.num_beams, text.device
        self._search, self._stop = search, stop
        self._text = text.repeat_interleave(k, dim=0)  # (b * k, t)
        self._first = torch.arange(0, b * k, k, device=device).unsqueeze(1)
        self._rank = torch.arange(2 * k, device=device)
        self._totals = torch.zeros(b, k, device=device)  # what is compared
        self._totals[:, 1:] = -1e9  # all beams begin alike: go on from one
        self._log_probs = torch.zeros(b, k, device=device)  # what the model says, penalties aside
        self._finished = _Finished(text, search)
        self.new = 0

    @property
    def done(self) -> Tensor:
        """Where nothing that goes on can become better (b,)."""
        return self._finished.closed

    def choose(self, logits: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Logits (b * k, vocabulary) -> the next token of each row (b * k,), and which row it goes on from."""
        b, k = self._totals.shape
        says = logits.log_softmax(-1)
        scores = _penalised(says, self._text, self.new, self._search, self._stop) + self._totals.view(-1, 1)
        best, place = scores.view(b, -1).topk(2 * k)  # (b, 2k), falling
        parent, token = place // scores.shape[1], place % scores.shape[1]
        said = self._log_probs.gather(1, parent) + says.view(b, -1).gather(1, place)
        longer = torch.cat([self._text[(self._first + parent).view(-1)], token.view(-1, 1)], dim=1).view(b, 2 * k, -1)

        ends, length = token == self._stop, longer.shape[2] - 1  # an end is not counted
        self._finished.add(longer, best, said, ends & (self._rank < k), length)
        self._finished.close(best[:, 0], length)
        # Of 2k at most k end, so that k go on.
        on = (self._rank + 2 * k * ends).topk(k, largest=False).indices
        parent, token, self._totals, self._log_probs = (each.gather(1, on) for each in (parent, token, best, said))
        self._text = longer.gather(1, on.unsqueeze(2).expand(-1, -1, length + 1)).flatten(0, 1)
        self.new += 1
        return token.view(-1), (self._first + parent).view(-1)

    def texts(self) -> List[Continuation]:
        """The best texts of each beginning, those among them that were cut at their greatest length."""
        text, everywhere = self._text.view(*self._totals.shape, -1), torch.ones_like(self._totals, dtype=torch.bool)
        self._finished.add(text, self._totals, self._log_probs, everywhere, length=text.shape[2])
        return self._finished.texts(self._search.num_return_sequences)


class _Finished:
    """The k best texts of each beginning that have ended, kept on the device.

    Of equally good ones the older are kept, and the younger come first.
    """

    def __init__(self, text: Tensor, search: Search):
        (b, prompt), k, device = text.shape, search.num_beams, text.device
        longest = prompt + search.max_new_tokens
        self.closed = torch.zeros(b, dtype=torch.bool, device=device)  # nothing that goes on can become better
        self._prompt, self._penalty = prompt, search.length_penalty
        # In double precision, as Python computes: in single precision other texts would be equally good.
        self._scores = torch.full((b, k), -torch.inf, dtype=torch.float64, device=device)
        self._log_probs = torch.zeros(b, k, device=device)
        self._ends = torch.zeros(b, k, dtype=torch.long, device=device)
        self._texts = torch.zeros(b, k, longest, dtype=torch.long, device=device)

    def _score(self, total: Tensor, length: int) -> Tensor:
        return total.double() / length**self._penalty

    def add(self, texts: Tensor, totals: Tensor, log_probs: Tensor, which: Tensor, length: int) -> None:
        """Take those of n texts (b, n, ·) that ``which`` (b, n) says; ``length`` is what they are compared by."""
        k, longest = self._texts.shape[1:]
        scores = self._score(totals, length).masked_fill(~which | self.closed.unsqueeze(1), -torch.inf)
        scores, order = torch.cat([self._scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
        kept = order[:, :k]
        self._scores = scores[:, :k]
        self._log_probs = torch.cat([self._log_probs, log_probs], dim=1).gather(1, kept)
        ends = torch.full_like(texts[..., 0], texts.shape[2])
        self._ends = torch.cat([self._ends, ends], dim=1).gather(1, kept)
        texts = torch.cat([self._texts, F.pad(texts, (0, longest - texts.shape[2]))], dim=1)
        self._texts = texts.gather(1, kept.unsqueeze(2).expand(-1, -1, longest))

    def close(self, best: Tensor, length: int) -> None:
        """Close where all k are at least as good as ``best`` (b,), the best of what goes on."""
        self.closed |= self._scores[:, -1] >= self._score(best, length)  # -inf where there are fewer than k

    def texts(self, count: int) -> List[Continuation]:
        """The ``count`` best of each beginning, the best one first."""
        found = []
        for row in zip(self._scores.tolist(), self._texts.tolist(), self._ends.tolist(), self._log_probs.tolist()):
            rising = sorted(zip(*row), key=lambda each: each[0])
            for _, text, end, log_prob in reversed(rising[-count:]):
                found.append(Continuation(text[self._prompt : end], log_prob))
        return found


__all__: Tuple[str, ...] = ("Continuation", "Search", "Steps", "decode")

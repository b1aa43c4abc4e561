"""OPT behind a soft prompt: the loss of a text, its continuation, and which of many answers is likeliest.

Positions are [q soft-prompt vectors | t text tokens]. The text's first token is predicted at the last soft-prompt
vector, every other one at the token before it. In a conversation images stand in the midst of the text instead
(`lavis_kvmod.models.language.conversation`): ids below 0 are then vectors of soft prompts, counted from -1 through all
of the batch's, and nothing stands in front.
"""

import math
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_kvmod.models.language.decoding import Continuation, Search, decode
from lavis_kvmod.models.language.packing import Packing
from lavis_kvmod.models.language.positions import require_positions
from lavis_kvmod.models.language.text import IGNORED, TextBatch, answer_ids, continuation_batch, prompt_batch
from lavis_kvmod.system.text_cleaning import one_line

# Rows that answer ranking has in the language model at once: OPT-2.7B keeps 0.3 MB of Keys and Values a position
# and row in half precision, so 2 GB for 128 rows of 50 positions.
ROWS_AT_ONCE = 128

# The rows (r,) of a batch that the language model is given -> the context in which it sees their images.
Seeing = Callable[[Tensor], ContextManager[None]]


class ScoredAnswer(NamedTuple):
    """A text that the model gave, and how likely it found it.

    ``log_prob`` is the sum of the natural log-probabilities of its ``num_tokens`` tokens, the closing newline counted
    where there is one (a text that was cut at its greatest length has none).
    """

    answer: str
    log_prob: float
    num_tokens: int

    @property
    def mean_log_prob(self) -> float:
        """``log_prob`` a token: does not fall with length alone."""
        return self.log_prob / max(self.num_tokens, 1)


def token_losses(
    opt: Any, soft_prompt: Tensor, text: TextBatch, packing: Optional[Packing] = None
) -> Tuple[Tensor, Tensor]:
    """Cross-entropy of each labelled token of ``text`` (b, t) behind ``soft_prompt`` (b, q, width).

    The text is padded on the right, so that no token sees padding: attention needs no mask. With a ``packing``, soft
    prompts are those of its i images (i, q, width), and the texts of an image share its row.

    Returns:
        For the k labelled tokens, the row each is in (k,) and its loss (k,), in the rows' order.

    Raises:
        ValueError: if no token is labelled, or the language model has not so many positions.
    """
    q = in_front(soft_prompt, text)
    require_positions(opt, q, text.input_ids.shape[1])
    unseen = int(q == 0)  # without a soft prompt nothing stands before the text's first token
    row, column = (text.targets[:, unseen:] != IGNORED).nonzero(as_tuple=True)
    if not len(row):
        raise ValueError("nothing to predict in this batch: every caption is no longer than its prompt")
    if packing is None:
        read = row * (q + text.input_ids.shape[1]) + max(q, 1) - 1 + column
        predicts = _read(opt, embedded(opt, soft_prompt, text.input_ids, text.has_images), read)
    else:
        ids = text.input_ids.flatten()[packing.token]  # (i, s)
        read = packing.predicted_at[row, column]
        predicts = _read(opt, embedded(opt, soft_prompt, ids), read, position=packing.position, seen=packing.seen)
    logits = opt.lm_head(predicts)  # only where there is a loss
    return row, F.cross_entropy(logits.float(), text.targets[row, column + unseen], reduction="none")


def in_front(soft_prompt: Tensor, text: TextBatch) -> int:
    """How many vectors of a soft prompt (…, q, width) stand before the text."""
    return 0 if text.has_images else soft_prompt.shape[1]


def embedded(opt: Any, soft_prompt: Tensor, ids: Tensor, has_images: bool = False) -> Tensor:
    """What OPT reads: soft prompts (b, q, width) in front of tokens (b, t), as (b, q + t, width); or those of i images
    (i, q, width) where ids (b, t) name their vectors, as (b, t, width)."""
    words = opt.get_input_embeddings()
    if not has_images:
        of_words = words(ids)
        return torch.cat([soft_prompt.to(of_words.dtype), of_words], dim=1)
    of_words, vectors = words(ids.clamp(min=0)), soft_prompt.flatten(0, 1)
    return torch.where(ids.unsqueeze(-1) < 0, vectors[(-1 - ids).clamp(min=0)].to(of_words.dtype), of_words)


def _read(opt: Any, states: Tensor, read: Tensor, **packed: Tensor) -> Tensor:
    """OPT's last hidden states (k, width) at the positions ``read`` (k,), of all b * p of ``states`` (b, p, width)."""
    return opt.model.decoder(inputs_embeds=states, is_causal=True, read=read, **packed).last_hidden_state


def full_mask(soft_prompt: Tensor, text: TextBatch) -> Tensor:
    """Attention mask (b, q + t): the soft prompt is seen by all. (b, t) where images stand in the text."""
    if text.has_images:
        return text.attention_mask
    seen = text.attention_mask.new_ones(soft_prompt.shape[:2])
    return torch.cat([seen, text.attention_mask], dim=1)


def continue_texts(
    opt: Any, tokenizer: Any, soft_prompt: Tensor, contexts: Sequence[List[int]], search: Search, *, stop: int
) -> List[Continuation]:
    """What OPT adds to each context up to the token ``stop``; several continuations of a context stand together.

    Raises:
        ValueError: if the language model has not so many positions, or for what cannot be searched.
    """
    text = prompt_batch(tokenizer, contexts, soft_prompt.device)
    require_positions(opt, in_front(soft_prompt, text), text.input_ids.shape[1], search.max_new_tokens)
    return decode(
        opt,
        embedded(opt, soft_prompt, text.input_ids, text.has_images),
        full_mask(soft_prompt, text),
        text.input_ids.masked_fill(text.input_ids < 0, tokenizer.pad_token_id),
        search,
        stop=stop,
        pad=tokenizer.pad_token_id,
    )


def rank_answers(
    opt: Any,
    tokenizer: Any,
    soft_prompt: Tensor,
    contexts: Sequence[List[int]],
    candidates: Sequence[str],
    num_candidates: int,
    rows_at_once: int = ROWS_AT_ONCE,
    seeing: Optional[Seeing] = None,
) -> List[ScoredAnswer]:
    """The likeliest of ``candidates`` for each context, by the log-probability of the whole answer and its newline.

    Image and question go through OPT once; their Keys and Values serve all candidates. Where there are more than
    ``num_candidates``, only those whose first token is likeliest are looked at further (as in BLIP, arXiv 2201.12086).
    ``seeing`` gives the context in which the language model sees the images of some rows by other ways.

    Raises:
        ValueError: without candidates, for an empty one, or if the language model has not so many positions.
    """
    if not candidates:
        raise ValueError("inference_method 'rank' needs candidates: give answer_list, or use 'generate'")
    ids = [answer_ids(tokenizer, answer, f"candidate {i}") for i, answer in enumerate(candidates)]
    prompt = prompt_batch(tokenizer, contexts, soft_prompt.device)
    require_positions(opt, in_front(soft_prompt, prompt), prompt.input_ids.shape[1], max(map(len, ids)))
    mask = full_mask(soft_prompt, prompt)
    seeing = seeing or _nothing_else
    with seeing(torch.arange(len(contexts), device=soft_prompt.device)):
        shared = opt.model.decoder(
            inputs_embeds=embedded(opt, soft_prompt, prompt.input_ids, prompt.has_images),
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
        )
    first = opt.lm_head(shared.last_hidden_state[:, -1]).float().log_softmax(-1)  # (b, vocabulary)
    of_first = first[:, [tokens[0] for tokens in ids]]  # (b, candidates)
    chosen = of_first.topk(min(num_candidates, len(ids)), dim=1).indices.tolist()

    pairs = [(row, candidate) for row, some in enumerate(chosen) for candidate in some]
    best = [ScoredAnswer("", -math.inf, 0)] * len(contexts)
    for start in range(0, len(pairs), rows_at_once):
        group = pairs[start : start + rows_at_once]
        rows = torch.tensor([row for row, _ in group], device=soft_prompt.device)
        text = continuation_batch(tokenizer, [[] for _ in group], [ids[c] for _, c in group], soft_prompt.device)
        past = tuple((key[rows], value[rows]) for key, value in shared.past_key_values)
        with seeing(rows):
            later = _later_tokens(opt, past, mask[rows], text)
        totals = first[rows, text.input_ids[:, 0]] + later
        for (row, candidate), total in zip(group, totals.tolist()):
            if total > best[row].log_prob:
                best[row] = ScoredAnswer(one_line(candidates[candidate]), total, len(ids[candidate]))
    return best


def _nothing_else(rows: Tensor) -> ContextManager[None]:
    return nullcontext()


def _later_tokens(opt: Any, past: Any, mask: Tensor, text: TextBatch) -> Tensor:
    """Log-probability (b,) of each row's tokens after the first, behind Keys and Values ``past``."""
    if text.input_ids.shape[1] == 1:
        return torch.zeros(len(text.input_ids), device=mask.device)
    hidden = opt.model.decoder(
        inputs_embeds=opt.get_input_embeddings()(text.input_ids),
        attention_mask=torch.cat([mask, text.attention_mask], dim=1),
        past_key_values=past,
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    row, column = (text.targets[:, 1:] != IGNORED).nonzero(as_tuple=True)
    logits = opt.lm_head(hidden[row, column]).float()
    loss = F.cross_entropy(logits, text.targets[row, column + 1], reduction="none")
    return loss.new_zeros(len(text.input_ids)).index_add(0, row, -loss)

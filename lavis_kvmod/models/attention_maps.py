"""Where the model looks: the Q-Former's attention to prefix and image, and an answer's tokens traced back to both.

    image places ─┐                                   answer token
    prefix ───────┴─► queries ─► soft prompt ─► OPT ──────► ▲
                 cross-attention           self-attention ──┘

What a map is: the weights of one attention. What `Sources` are: such weights multiplied through the layers (attention
rollout, arXiv 2005.00928), half of each layer's step being its residual connection. What neither is: a cause. Rollout
knows nothing of the Values, the feed-forwards or what a place holds, and takes a visual token for its place although
the ViT has mixed all places into each. To learn whether something is used, take it away and look at the answer.
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from lavis_kvmod.models.language.soft_prompt import full_mask
from lavis_kvmod.models.language.text import IGNORED, answer_ids, caption_contexts, continuation_batch

__all__ = ["AnswerTrace", "AttentionMaps", "Sources", "attention_maps"]


class Sources(NamedTuple):
    """What something was made of, by rollout: shares that sum to 1 over all four."""

    places: Tensor  # (…, n) the visual tokens
    prefix: Tensor  # (…, p)
    queries: Tensor  # (…) the learned query tokens, which are the same for every image
    text: Tensor  # (…) the words before; for a soft prompt those of a question that the Q-Former reads, else 0


@dataclass(frozen=True)
class AnswerTrace:
    """An answer of t tokens, its closing newline among them.

    ``to_soft_prompt`` (l, h, t, q) is OPT's attention to the soft prompt, by layer and head, from the position at which
    each token is predicted: that before it. The rest of such a row, up to 1, goes to the text.
    """

    answer: str
    tokens: List[str]
    to_soft_prompt: Tensor
    sources: Sources


@dataclass(frozen=True)
class AttentionMaps:
    """The Q-Former's attention for b images.

    ``cross`` (b, c, h, q, p + n): for each of c cross-attention layers, head and query, weights over the p prefix and
    then the n visual positions, which sum to 1. A gated prefix has a softmax of its own, whose Values are added behind
    the gate: weights are then the share of either in the sum, |tanh(g)| / (1 + |tanh(g)|) of it the prefix's.
    ``self_attention`` (b, l, h, q, q): among the queries (and words that they are read with), in every layer.
    ``soft_prompt``: what each soft-prompt vector was made of, (b, q, …).
    ``answers``: one for each text, where there was one.
    """

    cross: Tensor
    self_attention: Tensor
    num_prefix: int
    soft_prompt: Sources
    answers: List[AnswerTrace]

    def prefix_share(self) -> Tensor:
        """What the queries give the prefix, (b, c, h): the mean over queries, in [0, 1]."""
        return self.cross[..., : self.num_prefix].sum(-1).mean(-1)

    def on_grid(self, places: Tensor) -> Tensor:
        """Weights of visual positions (…, n) as the image lies, (…, side, side); that of a class token is left out.

        Raises:
            ValueError: if the n positions are no square, with or without a class token.
        """
        n = places.shape[-1]
        for class_tokens in (1, 0):
            side = math.isqrt(n - class_tokens)
            if side * side == n - class_tokens:
                return places[..., class_tokens:].unflatten(-1, (side, side))
        raise ValueError(f"expected a square of visual positions, with or without a class token, got {n} positions")


@torch.no_grad()
def attention_maps(model: Any, samples: Dict[str, Any]) -> AttentionMaps:
    """Where a `lavis_kvmod.models.blip2_opt_kvmod.Blip2OPTKVMod` looks: its Q-Former's attention to prefix and image,
    and what answers were made of.

    The passes are made anew, without gradients and without the fused kernels; nothing stays behind on the model.

    Args:
        model: with a Q-Former and a soft prompt.
        samples: ``image`` (b, 3, H, H); with ``text_input`` and ``prompt`` as in ``predict_answers``, the answers are
            traced too: those in ``answer`` (one for each text), else what the model answers greedily. ``answer``
            without a question is a caption, behind the model's prompt.

    Raises:
        ValueError: for a connector without such attention, merged visual tokens, or as many answers as there are
            not texts.
    """
    if model.merge_visual_tokens is not None:
        raise ValueError(
            "merged visual tokens have no places in the image; leave merge_visual_tokens out to look at it"
        )
    if model.gated_layers is not None:
        raise ValueError("expected a model with a soft prompt; through gated layers no answer is traced")
    if samples["image"].ndim == 5 and samples["image"].shape[1] > 1:
        raise ValueError(f"expected one image a sample, (b, 3, H, H), got {tuple(samples['image'].shape)}")
    query_output, soft_prompt = model.encode(samples, output_attentions=True)
    if not query_output.cross_attentions or not query_output.self_attentions:
        raise ValueError("expected attention maps of the Q-Former; this model's connector has no such attention")
    cross = [_shares(layer) for layer in query_output.cross_attentions]
    own = [layer.float() for layer in query_output.self_attentions]
    num_prefix = 0 if model.kv_prefix is None else model.kv_prefix.num_positions
    if model.aux_tokens is not None:  # tokens in front of the visual ones stand where a prefix would
        num_prefix += model.aux_tokens.in_front_of("visual_tokens")
    has_cross = [layer.has_cross_attention for layer in model.Qformer.bert.encoder.layer]
    sources = _of_soft_prompt(own, cross, has_cross, num_prefix)
    answers: List[AnswerTrace] = []
    if "text_input" in samples or "answer" in samples:
        index = range(len(soft_prompt))
        if "image_index" in samples and not model.reads_questions:
            index = samples["image_index"]
        rows = torch.as_tensor(list(index), device=soft_prompt.device)
        texts = _answers(model, samples, soft_prompt)
        answers = _trace(
            model, soft_prompt[rows], _contexts(model, samples), texts, Sources(*(s[rows] for s in sources))
        )
    return AttentionMaps(torch.stack(cross, 1), torch.stack(own, 1), num_prefix, sources, answers)


def _shares(weights: Tensor) -> Tensor:
    """Weights (b, h, q, p + n), a gated prefix's negative where its gate is, as shares that sum to 1."""
    weights = weights.float().abs()
    return weights / weights.sum(-1, keepdim=True)


def _contexts(model: Any, samples: Dict[str, Any]) -> List[List[int]]:
    """Token ids in front of each answer: its question, or what a caption begins with."""
    if "text_input" in samples:
        return model._question_contexts(samples)
    return caption_contexts(model.opt_tokenizer, samples.get("prompt", model.prompt), model.num_samples(samples))


def _answers(model: Any, samples: Dict[str, Any], soft_prompt: Tensor) -> List[str]:
    """The answers to be traced, one for each text: those given, else what the model answers greedily."""
    if "answer" not in samples:
        return model.predict_answers({**samples, "soft_prompt": soft_prompt}, num_beams=1)
    answers, count = samples["answer"], model.num_samples(samples)
    answers = [answers] if isinstance(answers, str) else list(answers)
    if len(answers) != count:
        raise ValueError(f"expected one answer for each of the {count} texts, got {len(answers)}")
    return answers


# ------------------------------------------------------------ rollout


def _of_soft_prompt(
    own: Sequence[Tensor], cross: Sequence[Tensor], has_cross: Sequence[bool], num_prefix: int
) -> Sources:
    """Rollout through the Q-Former: (b, h, q, q) and (b, h, q, p + n) maps to what each query output was made of."""
    b, _, m, _ = own[0].shape
    q, n = cross[0].shape[2:]  # the queries, and behind them the words of a question that the Q-Former reads
    from_start = torch.eye(m, device=own[0].device).expand(b, m, m)
    from_image = torch.zeros(b, m, n, device=own[0].device)
    maps = iter(cross)
    for layer, attends in zip(own, has_cross):
        mixed = _with_residual(layer)
        from_start, from_image = mixed @ from_start, mixed @ from_image
        if attends:
            looked = (from_image[:, :q] + next(maps).mean(1)) / 2
            from_start = torch.cat([from_start[:, :q] / 2, from_start[:, q:]], dim=1)
            from_image = torch.cat([looked, from_image[:, q:]], dim=1)
    from_image, from_start = from_image[:, :q], from_start[:, :q]
    queries, words = from_start[..., :q].sum(-1), from_start[..., q:].sum(-1)
    return Sources(from_image[..., num_prefix:], from_image[..., :num_prefix], queries, words)


def _with_residual(weights: Tensor) -> Tensor:
    """The mean over heads of (b, h, t, t), half of it replaced by the position itself."""
    mean = weights.float().mean(1)
    return (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2


def _trace(
    model: Any, soft_prompt: Tensor, contexts: List[List[int]], answers: List[str], sources: Sources
) -> List[AnswerTrace]:
    """OPT over ``[soft prompt | context | answer]``, and what each token of the answers was made of."""
    opt, tokenizer, q = model.opt_model, model.opt_tokenizer, soft_prompt.shape[1]
    # An empty answer is traced as far as there is one: its closing newline.
    ids = [answer_ids(tokenizer, a) if a.strip() else [model.eos_token_id] for a in answers]
    text = continuation_batch(tokenizer, contexts, ids, soft_prompt.device)
    with model.autocast_for(opt):
        embedded = opt.get_input_embeddings()(text.input_ids)
        layers: Tuple[Tensor, ...] = opt.model.decoder(
            inputs_embeds=torch.cat([soft_prompt.to(embedded.dtype), embedded], dim=1),
            attention_mask=full_mask(soft_prompt, text),
            use_cache=False,
            output_attentions=True,
            return_dict=True,
        ).attentions
    rolled = _with_residual(layers[0])
    for layer in layers[1:]:
        rolled = _with_residual(layer) @ rolled
    traces = []
    for row, answer in enumerate(answers):
        # A token is predicted at the position before it.
        at = q - 1 + (text.targets[row] != IGNORED).nonzero()[:, 0]
        prompt = rolled[row, at, :q]  # (t, q)
        of_prompt = Sources(
            prompt @ sources.places[row], prompt @ sources.prefix[row], prompt @ sources.queries[row], at
        )
        traces.append(
            AnswerTrace(
                answer,
                [tokenizer.decode([token]) for token in ids[row]],
                torch.stack([layer[row, :, at, :q].float() for layer in layers]),
                of_prompt._replace(text=1 - prompt.sum(-1) + prompt @ sources.text[row]),
            )
        )
    return traces

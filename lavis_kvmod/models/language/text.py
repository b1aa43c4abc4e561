"""Prompt and answer laid out for the language model: what is context, what is to be predicted, what is padding.

The text is tokenised as LAVIS and OPT do: BOS (``</s>``) first, and a closing newline that generation stops at.
"""

import logging
from typing import List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

IGNORED = -100  # label of a position without loss, as torch.nn.functional.cross_entropy has it
QUESTION = "{}"

Prompt = Union[str, Sequence[str]]


class TextBatch(NamedTuple):
    """Token ids (b, t), their attention mask (b, t) and, for training, labels (b, t)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Optional[Tensor] = None


def check_prompt(key: str, prompt) -> List[str]:
    """Problems of a prompt from a config: it is text, with at most one place for the question."""
    if not isinstance(prompt, str):
        return [f"{key}: expected text, got {prompt!r}"]
    if prompt.count(QUESTION) > 1:
        return [f"{key}: expected at most one {QUESTION} (the question's place), got {prompt!r}"]
    return []


def one_each(prompt: Prompt, count: int) -> List[str]:
    """One prompt for each of ``count`` samples, from one for all or a list.

    Raises:
        ValueError: if a list has another length.
    """
    if isinstance(prompt, str):
        return [prompt] * count
    if len(prompt) != count:
        raise ValueError(f"expected one prompt, or one for each of the {count} samples; got {len(prompt)}")
    return list(prompt)


def question_contexts(tokenizer, questions: Sequence[str], prompt: Prompt, max_length: int) -> List[List[int]]:
    """Token ids of each prompt with its question filled in, at most ``max_length`` long.

    A context that is too long loses words at the end of its *question*: the prompt's end, where the answer begins,
    is kept. A prompt without ``{}`` stands in front of the question; an empty one is the question itself.

    Raises:
        ValueError: for an empty question.
    """
    contexts = []
    for i, (question, template) in enumerate(zip(questions, one_each(prompt, len(questions)))):
        if not question.strip():
            raise ValueError(f"sample {i} of the batch has an empty question")
        if QUESTION not in template:
            template = f"{template.rstrip()} {QUESTION}".lstrip()
        contexts.append(_fit(tokenizer, template, question, max_length))
    return contexts


def _fit(tokenizer, template: str, question: str, max_length: int) -> List[int]:
    words = question.split()
    # The template is filled by `replace`, not `format`: a question may itself contain braces.
    ids = tokenizer(template.replace(QUESTION, question)).input_ids
    if len(ids) <= max_length:
        return ids
    while len(ids) > max_length and words:
        words.pop()
        ids = tokenizer(template.replace(QUESTION, " ".join(words))).input_ids
    logging.warning(
        "a question was shortened to %d words to fit max_txt_len: %d: %r",
        len(words),
        max_length,
        question,
    )
    return ids


def answer_ids(tokenizer, answer: str, what: str = "the answer") -> List[int]:
    """Tokens of an answer as the model is to write it: a leading space, the text, the closing newline; never cut.

    Raises:
        ValueError: for an empty answer; ``what`` names it.
    """
    if not answer.strip():
        raise ValueError(f"{what} is empty")
    return tokenizer(f" {answer.strip()}\n", add_special_tokens=False).input_ids


def answer_batch(tokenizer, contexts: Sequence[List[int]], answers: Sequence[str], device) -> TextBatch:
    """Contexts followed by their answers, padded on the right; the loss is on the answers alone.

    Raises:
        ValueError: for an empty answer.
    """
    targets = [answer_ids(tokenizer, answer, f"answer {i} of the batch") for i, answer in enumerate(answers)]
    return continuation_batch(tokenizer, contexts, targets, device)


def continuation_batch(tokenizer, contexts: Sequence[List[int]], added: Sequence[List[int]], device) -> TextBatch:
    """Contexts followed by token ids, padded on the right; only what was added is labelled."""
    rows = [context + target for context, target in zip(contexts, added)]
    labels = [[IGNORED] * len(context) + target for context, target in zip(contexts, added)]
    return _pad(tokenizer, rows, labels, side="right", device=device)


def caption_batch(tokenizer, captions: Sequence[str], prompt: Prompt, max_length: int, device) -> TextBatch:
    """Captions (with the prompt in front, where the text processor put it), padded on the right.

    As in LAVIS, at most ``max_length`` tokens are kept and the prompt has no loss; unlike there, only a prompt that
    the text really starts with is taken out of the loss.

    Raises:
        ValueError: for an empty caption.
    """
    rows, labels = [], []
    for i, (caption, start) in enumerate(zip(captions, one_each(prompt, len(captions)))):
        if not caption.strip():
            raise ValueError(f"caption {i} of the batch is empty")
        ids = tokenizer(caption + "\n").input_ids[:max_length]
        skipped = tokenizer(start.rstrip()).input_ids[: len(ids)] if start else []
        if ids[: len(skipped)] != skipped:
            skipped = []
        rows.append(ids)
        labels.append([IGNORED] * len(skipped) + ids[len(skipped) :])
    return _pad(tokenizer, rows, labels, side="right", device=device)


def prompt_batch(tokenizer, contexts: Sequence[List[int]], device) -> TextBatch:
    """Contexts to be continued, padded on the left so that each ends where generation starts."""
    return _pad(tokenizer, contexts, None, side="left", device=device)


def _pad(tokenizer, rows, labels, *, side: str, device) -> TextBatch:
    longest = max(len(row) for row in rows)

    def padded(values: Sequence[List[int]], fill: int) -> Tensor:
        padding = [[fill] * (longest - len(row)) for row in values]
        joined = [p + v if side == "left" else v + p for p, v in zip(padding, values)]
        return torch.tensor(joined, dtype=torch.long, device=device)

    return TextBatch(
        input_ids=padded(rows, tokenizer.pad_token_id),
        attention_mask=padded([[1] * len(row) for row in rows], 0),
        labels=None if labels is None else padded(labels, IGNORED),
    )

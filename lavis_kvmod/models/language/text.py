"""Prompt and answer laid out for the language model: what is context, what is to be predicted, what is padding.

The text is tokenised as LAVIS and OPT do: BOS (``</s>``) first, and a closing newline that generation stops at.
"""

import logging
import re
from functools import lru_cache
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor

from lavis_kvmod.system.text_cleaning import one_line

IGNORED = -100  # label of a position without loss, as torch.nn.functional.cross_entropy has it
QUESTION = "{}"
# Shortened questions that the log has whole; of more it has the number, at 100, 1000, …
QUESTIONS_TOLD = 10

Prompt = Union[str, Sequence[str]]
Device = Union[str, torch.device]


class TextBatch(NamedTuple):
    """Token ids (b, t), their attention mask (b, t) and, for training, labels (b, t); ``lengths``, each text's number
    of tokens, and ``has_images``, whether some ids are negative and stand for soft prompts in the midst of the text:
    what no device has to be asked for."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Optional[Tensor] = None
    lengths: Sequence[int] = ()
    has_images: bool = False

    @property
    def targets(self) -> Tensor:
        """The labels of a text that is to be learnt, or scored."""
        if self.labels is None:
            raise ValueError("expected a text with labels, got one to be continued")
        return self.labels


def check_prompt(key: str, prompt: Any) -> List[str]:
    """Problems of a prompt: it is text, with at most one place for the question, and no other braces."""
    if not isinstance(prompt, str):
        return [f"{key}: expected text, got {prompt!r}"]
    if prompt.count(QUESTION) > 1:
        return [f"{key}: expected at most one {QUESTION} (the question's place), got {prompt!r}"]
    if set("{}") & set(prompt.replace(QUESTION, "")):
        return [f"{key}: expected no braces but {QUESTION} (the question's place), got {prompt!r}"]
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


@lru_cache(maxsize=2**15)
def _ids_of(tokenizer: Any, text: str, after_text: bool) -> Tuple[int, ...]:
    # Questions and answers come again and again, and OPT's tokenizer is written in Python: a batch of 256 takes 0.1 s.
    return tuple(tokenizer(text, add_special_tokens=not after_text).input_ids)


def text_ids(tokenizer: Any, text: str, after_text: bool = False) -> List[int]:
    """Token ids of a text, behind BOS unless it stands ``after_text``."""
    return list(_ids_of(tokenizer, text, after_text))


def question_contexts(tokenizer: Any, questions: Sequence[str], prompt: Prompt, max_length: int) -> List[List[int]]:
    """Token ids of each prompt with its question filled in, at most ``max_length`` many.

    A context that is too long loses the end of its *question*, but never all of it: the prompt's end, where the answer
    begins, is kept. A prompt without ``{}`` stands in front of the question; an empty one is the question itself.

    Raises:
        ValueError: for an empty question, braces in the prompt other than ``{}``, or a prompt so long that no
            question fits behind it.
    """
    contexts = []
    prompts = one_each(prompt, len(questions))
    problems = [problem for template in dict.fromkeys(prompts) for problem in check_prompt("prompt", template)]
    if problems:
        raise ValueError("; ".join(problems))
    for i, (question, template) in enumerate(zip(questions, prompts)):
        if not question.strip():
            raise ValueError(f"sample {i} of the batch has an empty question")
        if QUESTION not in template:
            template = f"{template.rstrip()} {QUESTION}".lstrip()
        contexts.append(_fit(tokenizer, template, question, max_length))
    return contexts


def _fit(tokenizer: Any, template: str, question: str, max_length: int) -> List[int]:
    def ids(end: int) -> List[int]:
        # The template is filled by `replace`, not `format`: a question may itself contain braces.
        return text_ids(tokenizer, template.replace(QUESTION, question[:end].rstrip()))

    whole = ids(len(question))
    if len(whole) <= max_length:
        return whole
    question = question.strip()

    def fits(end: int) -> bool:
        return len(ids(end)) <= max_length

    # Words where there are some; else, as in Chinese or a URL, characters: half of what fits is worth a word's cut.
    end = _longest([match.end() for match in re.finditer(r"\S+", question)], fits)
    with_part = end + _longest(range(1, len(question) - end + 1), lambda more: fits(end + more))
    if with_part > 2 * end:
        end = with_part
    if end == 0:
        raise ValueError(
            f"the prompt {template!r} has {len(ids(0))} tokens, and max_txt_len: {max_length} leaves no room for the "
            f"question {shown(question)}; shorten the prompt, or set model.max_txt_len higher"
        )
    _tell_shortened(question, question[:end].rstrip(), max_length)
    return ids(end)


def _longest(rising: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The greatest of ``rising`` numbers that fits, found by halving; 0 if none does."""
    low, high = 0, len(rising)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(rising[middle]) else (low, middle)
    return rising[low - 1] if low else 0


class _Shortened:
    """Tells of each question that is shortened once, however often it is asked; after the first few it only counts."""

    def __init__(self) -> None:
        self._hashes: Set[int] = set()

    def __call__(self, question: str, kept: str, max_length: int) -> None:
        if hash(question) in self._hashes:
            return
        self._hashes.add(hash(question))
        count = len(self._hashes)
        if count <= QUESTIONS_TOLD:
            logging.warning(
                "a question was shortened to fit max_txt_len: %d: of %s the model reads %s",
                max_length,
                shown(question),
                shown(kept),
            )
        elif count == 10 ** (len(str(count)) - 1):
            logging.warning("%d questions so far were shortened to fit max_txt_len: %d", count, max_length)


_tell_shortened = _Shortened()


def shown(text: str, longest: int = 200) -> str:
    """``text`` in quotes for a message, its middle left out if it is long."""
    half = longest // 2
    return repr(text if len(text) <= longest else f"{text[:half]} … {text[-half:]}")


def answer_ids(tokenizer: Any, answer: str, what: str = "the answer") -> List[int]:
    """Tokens of an answer as the model is to write it: a leading space, the text on one line, the closing newline;
    never cut.

    Raises:
        ValueError: for an empty answer; ``what`` names it.
    """
    answer = one_line(answer)
    if not answer:
        raise ValueError(f"{what} is empty")
    return text_ids(tokenizer, f" {answer}\n", after_text=True)


def answer_batch(tokenizer: Any, contexts: Sequence[List[int]], answers: Sequence[str], device: Device) -> TextBatch:
    """Contexts followed by their answers, padded on the right; the loss is on the answers alone.

    Raises:
        ValueError: for an empty answer.
    """
    targets = [answer_ids(tokenizer, answer, f"answer {i} of the batch") for i, answer in enumerate(answers)]
    return continuation_batch(tokenizer, contexts, targets, device)


def continuation_batch(
    tokenizer: Any, contexts: Sequence[List[int]], added: Sequence[List[int]], device: Device
) -> TextBatch:
    """Contexts followed by token ids, padded on the right; only what was added is labelled."""
    rows = [context + target for context, target in zip(contexts, added)]
    labels = [[IGNORED] * len(context) + target for context, target in zip(contexts, added)]
    return labelled_batch(tokenizer, rows, labels, device)


def labelled_batch(tokenizer: Any, rows: Sequence[List[int]], labels: Sequence[List[int]], device: Device) -> TextBatch:
    """Token ids with a label each, padded on the right."""
    return _pad(tokenizer, rows, labels, side="right", device=device)


def caption_contexts(tokenizer: Any, prompt: Prompt, count: int) -> List[List[int]]:
    """Token ids that each of ``count`` captions is trained, validated and generated behind: BOS and its prompt."""
    return [tokenizer(start.rstrip()).input_ids for start in one_each(prompt, count)]


def caption_batch(
    tokenizer: Any, captions: Sequence[str], prompt: Prompt, max_length: int, device: Device, *, split: bool = False
) -> TextBatch:
    """Captions behind their prompt, padded on the right; the loss is on the captions alone.

    A prompt that stands in front already, as LAVIS's text processors can put it there, is not put there again. As in
    LAVIS, at most ``max_length`` tokens are kept, the prompt's counted, and without a prompt BOS has a loss, too. With
    ``split`` a random part of each caption, but for its last token, belongs to the prompt (BLIP-2, section 3.3).

    Raises:
        ValueError: for an empty caption.
    """
    contexts, targets = caption_contexts(tokenizer, prompt, len(captions)), []
    for i, (caption, start) in enumerate(zip(captions, one_each(prompt, len(captions)))):
        if not caption.strip():
            raise ValueError(f"caption {i} of the batch is empty")
        said = without_prompt(caption, start)
        space = " " if said and start.strip() else ""
        ids = contexts[i] + tokenizer(f"{space}{said}\n", add_special_tokens=False).input_ids
        without_loss = len(contexts[i]) if start.strip() else 0
        ids = ids[:max_length]
        if split and without_loss + 1 < len(ids):
            without_loss = int(torch.randint(max(without_loss, 1), len(ids), ()))
        contexts[i], target = ids[:without_loss], ids[without_loss:]
        targets.append(target)
    return continuation_batch(tokenizer, contexts, targets, device)


def without_prompt(caption: str, prompt: str) -> str:
    """``caption`` on one line, without ``prompt`` (in whatever case) where it begins with it."""
    caption, prompt = one_line(caption), one_line(prompt)
    start, rest = caption[: len(prompt)], caption[len(prompt) :]
    cuts_a_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return rest.strip() if start.lower() == prompt.lower() and not cuts_a_word else caption


def prompt_batch(tokenizer: Any, contexts: Sequence[List[int]], device: Device) -> TextBatch:
    """Contexts to be continued, padded on the left so that each ends where generation starts."""
    return _pad(tokenizer, contexts, None, side="left", device=device)


def _pad(
    tokenizer: Any, rows: Sequence[List[int]], labels: Optional[Sequence[List[int]]], *, side: str, device: Device
) -> TextBatch:
    longest = max(len(row) for row in rows)

    def padded(values: Sequence[List[int]], fill: int) -> Tensor:
        padding = [[fill] * (longest - len(row)) for row in values]
        joined = [p + v if side == "left" else v + p for p, v in zip(padding, values)]
        return torch.tensor(joined, dtype=torch.long, device=device)

    return TextBatch(
        input_ids=padded(rows, tokenizer.pad_token_id),
        attention_mask=padded([[1] * len(row) for row in rows], 0),
        labels=None if labels is None else padded(labels, IGNORED),
        lengths=[len(row) for row in rows],
        has_images=any(min(row, default=0) < 0 for row in rows),
    )

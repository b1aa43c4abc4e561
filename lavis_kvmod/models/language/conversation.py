"""Conversations: several turns, and images at their places in the text.

    [image 1 | Question: what is this? Short answer: a seven ⏎ Question: and image 2 ? Short answer: a three ⏎]
                                                     ───────────                                    ───────── the loss

Among the token ids of such a text a negative one stands for a vector of an image's soft prompt. A conversation of one
turn with its image in front is what a question is anywhere else: the same tokens, the same positions. (LLaVA, arXiv
2304.08485; several images in a text: Flamingo, arXiv 2204.14198.)
"""

from typing import Any, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from lavis_kvmod.models.language.text import IGNORED, QUESTION, answer_ids, question_contexts, text_ids
from lavis_kvmod.system.turns import MARK, Turn, marks_in

__all__ = ["LaidOut", "conversation_ids", "in_conversation"]


class LaidOut(NamedTuple):
    """Token ids of a conversation, and their labels, of the answers alone; both (t,)."""

    ids: List[int]
    labels: List[int]


def in_conversation(samples: Mapping[str, Any]) -> bool:
    """Whether a batch's questions have turns before them (``history``), or its texts are whole conversations
    (``turns``), so that images stand at their places in the text."""
    return "history" in samples or "turns" in samples


def conversation_ids(
    tokenizer: Any,
    turns: Sequence[Turn],
    prompt: str,
    max_length: int,
    images: Sequence[Sequence[int]],
    then: Optional[str] = None,
) -> LaidOut:
    """Turns one after the other, each question in its ``prompt``, each answer closed by a newline.

    A mark at a question's beginning puts its image in front of the prompt, any other where it stands. Without marks all
    images stand in front. ``max_length`` bounds each question as it does one by itself, but for those that images stand
    in, which are never shortened.

    Args:
        images: the ids that stand for each image of the conversation, in their order.
        then: a text behind the last turn that is to be continued as it is.

    Raises:
        ValueError: where images and marks differ in number, or for an empty question or answer.
    """
    marks = marks_in(turns)
    if marks not in (0, len(images)):
        raise ValueError(f"expected an image for each {MARK}; got {marks} marks and {len(images)} images")
    soft = iter(images)
    laid_out = LaidOut([], [])
    if not marks:
        for image in soft:
            _add(laid_out, image)
    for n, (question, answer) in enumerate(turns):
        _add(laid_out, _asked(tokenizer, question, prompt, max_length, soft, is_first=n == 0))
        if answer is not None:
            said = answer_ids(tokenizer, answer, f"the answer to {question!r}")
            laid_out.ids.extend(said)
            laid_out.labels.extend(said)
    if then is not None and (then.strip() or not turns):
        _add(laid_out, text_ids(tokenizer, then.rstrip(), after_text=bool(turns)))
    return laid_out


def _asked(
    tokenizer: Any, question: str, prompt: str, max_length: int, soft: Iterator[Sequence[int]], is_first: bool
) -> List[int]:
    """A question in its prompt; BOS stands in front of the conversation's first word."""
    ids: List[int] = []
    while question.lstrip().startswith(MARK):
        ids += next(soft)
        question = question.lstrip()[len(MARK) :]
    question = question.strip()
    if MARK not in question:
        (words,) = question_contexts(tokenizer, [question], prompt, max_length)
        return ids + words[0 if is_first else 1 :]
    template = prompt if QUESTION in prompt else f"{prompt.rstrip()} {QUESTION}".lstrip()
    for i, piece in enumerate(template.replace(QUESTION, question).split(MARK)):
        ids += next(soft) if i else []
        if piece.strip():
            ids += text_ids(tokenizer, piece.rstrip(), after_text=i > 0 or not is_first)
    return ids


def _add(laid_out: LaidOut, ids: Sequence[int]) -> None:
    laid_out.ids.extend(ids)
    laid_out.labels.extend([IGNORED] * len(ids))

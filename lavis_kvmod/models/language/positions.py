"""How long a sequence the language model can take: soft prompt, text and what is generated share its positions."""

from typing import Any, List, Optional

from lavis_kvmod.models.language.opt import language_model_weights, opt_config
from lavis_kvmod.weights.finding import MissingWeightsError


def require_positions(opt: Any, queries: int, text: int, new: int = 0) -> None:
    """Refuse a sequence of ``queries`` soft-prompt vectors, ``text`` tokens and ``new`` ones that is too long.

    Without it an embedding is looked up that is not there: a bare IndexError, on a GPU an assertion that ends the
    process's CUDA.

    Raises:
        ValueError: with the sum.
    """
    needed, has = queries + text + new, opt.config.max_position_embeddings
    if needed > has:
        parts = f"{queries} soft-prompt vectors + {text} tokens of text" + (f" + {new} new tokens" if new else "")
        raise ValueError(
            f"expected at most {has} positions, which is what the language model has; got {parts} = {needed}: shorten "
            + ("the text, or generate less" if new else "the text")
        )


def known_positions(opt_model: str) -> Optional[int]:
    """How many positions the language model of that name has, or None where only its files could tell."""
    try:
        config = opt_config(opt_model, language_model_weights(opt_model).local_path())
    except (MissingWeightsError, OSError, ValueError):  # told where the files are looked at
        return None
    return config.max_position_embeddings


def length_problems(
    *,
    opt_model: str,
    soft_prompt: int,
    max_txt_len: int,
    max_len: int,
    prompt: Optional[str] = None,
    told_by: str = "num_query_token",
) -> List[str]:
    """Whether a run's sequences fit the language model, as far as that is known before it is loaded.

    Args:
        opt_model, max_txt_len: of the model section.
        soft_prompt: vectors before the text.
        told_by: what decides how many those are, as a message has it.
        max_len: most new tokens, of the run section.
        prompt: what captions are generated behind; None if questions are answered, which take up to ``max_txt_len``.
    """
    has = known_positions(opt_model)
    if has is None:
        return []
    # A prompt has at least a token a word, and its BOS; how many more, only the tokenizer knows.
    text = max_txt_len if prompt is None else 1 + len(prompt.split())
    called = "model.max_txt_len" if prompt is None else "the prompt"
    generated, trained = soft_prompt + text + max_len, soft_prompt + max_txt_len
    problems = []
    if soft_prompt >= has:
        return [
            f"model.{told_by} gives {soft_prompt} vectors, and {opt_model} has {has} positions: no text fits behind"
        ]
    if generated > has:
        problems.append(
            f"run.max_len: model.{told_by} {soft_prompt} + {called} {text} + {max_len} = {generated} "
            f"positions, and {opt_model} has {has}; set it lower"
        )
    if trained > has:
        problems.append(
            f"model.max_txt_len: model.{told_by} {soft_prompt} + {max_txt_len} = {trained} positions, and "
            f"{opt_model} has {has}; set it lower"
        )
    return problems

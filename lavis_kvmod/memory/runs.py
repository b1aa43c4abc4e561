"""What a run file asks of memory: its sections as arguments of `estimate`, and what to change where it does not fit."""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple

from lavis_kvmod.models.settings import ModelSettings

GIB = 2**30

# Beside what is computed: the CUDA context, cuBLAS's and cuDNN's workspaces, and a share for the allocator's
# fragmentation. Our allowance, not a measurement.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05

# `answer_loss: all` trains on all distinct answers of a question; VQAv2 has ten people's (arXiv 1612.00837).
MOST_ANSWERS = 10


def training_step(model_cfg: Mapping[str, Any], run_cfg: Mapping[str, Any]) -> Dict[str, Any]:
    """The arguments of `estimate` for a step of this run, with the longest texts it lets through.

    Raises:
        SettingsError: for faults of the model section.
    """
    settings = ModelSettings.from_config(model_cfg)
    step = dict(batch_size=run_cfg["batch_size_train"], amp=run_cfg.get("amp", False), text_length=settings.max_txt_len)
    step.update(_several(settings))
    if not _answers_questions(run_cfg):
        return step
    answer = run_cfg.get("max_len", 10)
    step.update(text_length=settings.max_txt_len + answer, target_length=answer)
    return {**step, "answers": MOST_ANSWERS} if settings.answer_loss == "all" else step


def evaluation_step(model_cfg: Mapping[str, Any], run_cfg: Mapping[str, Any]) -> Dict[str, Any]:
    """As `training_step`, for generating the answers or captions of an evaluation batch.

    Raises:
        SettingsError: for faults of the model section.
    """
    settings = ModelSettings.from_config(model_cfg)
    vqa = _answers_questions(run_cfg)
    prompt = str(run_cfg.get("prompt") or settings.prompt)
    return dict(
        train=False,
        batch_size=run_cfg["batch_size_eval"],
        **_several(settings),
        amp=run_cfg.get("amp", False),
        # A caption's prompt is short; two tokens a word, and the BOS, are more than OPT's tokeniser makes of it.
        text_length=settings.max_txt_len if vqa else min(2 * len(prompt.split()) + 1, settings.max_txt_len),
        new_tokens=run_cfg.get("max_len", 10 if vqa else 30),
        num_beams=run_cfg.get("num_beams", 5),
        optimizer=not run_cfg.get("evaluate", False),
    )


def _several(settings: ModelSettings) -> Dict[str, Any]:
    images = settings.images_a_sample
    return {"images": images} if images > 1 else {}


def _answers_questions(run_cfg: Mapping[str, Any]) -> bool:
    return "vqa" in str(run_cfg.get("task", "kvmod_vqa"))


def with_allowance(computed: int) -> int:
    """What a GPU should have for ``computed`` bytes."""
    return CONTEXT_BYTES + round(computed * (1 + FRAGMENTATION))


def fits(computed: int, gpu_bytes: int) -> bool:
    """Whether ``computed`` bytes and the allowance fit a GPU of ``gpu_bytes``."""
    return with_allowance(computed) <= gpu_bytes


class Change(NamedTuple):
    """Options that make a run fit, and the bytes that are computed for it then."""

    options: Dict[str, Any]
    computed: int


def changes_that_fit(
    gpu_bytes: int,
    *,
    batch_size: int,
    accum_grad_iters: int,
    can_recompute: bool,
    compute: Callable[[Mapping[str, Any]], int],
) -> List[Change]:
    """What to change in a training run that does not fit: the largest batch that does, with as many batches to a step
    as keep the step's size; with and without gradient checkpointing, which takes time instead.

    Args:
        batch_size, accum_grad_iters: as they are.
        can_recompute: OPT's gradient checkpointing is still off.
        compute: bytes of a step with some options changed.

    Returns:
        At most one change of each kind, none if nothing fits.
    """
    found = []
    for recompute in [{"model.opt_grad_checkpoint": True}, {}] if can_recompute else [{}]:
        size = batch_size
        while size:
            options: Dict[str, Any] = dict(recompute)
            if size != batch_size:
                options["run.batch_size_train"] = size
                options["run.accum_grad_iters"] = -(-batch_size * accum_grad_iters // size)
            if options:
                computed = compute(options)
                if fits(computed, gpu_bytes):
                    found.append(Change(options, computed))
                    break
            size //= 2
    return found


def largest_batch(gpu_bytes: int, *, batch_size: int, compute: Callable[[int], int]) -> int:
    """The largest of ``batch_size``, its half, its quarter … with which ``compute(batch)`` fits; 0 if none does."""
    while batch_size and not fits(compute(batch_size), gpu_bytes):
        batch_size //= 2
    return batch_size

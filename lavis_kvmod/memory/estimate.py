"""How much memory a model takes on a device, computed without the device, and without the model's weights.

The real model runs its real forward on fake tensors (shapes and dtypes, no memory), under PyTorch's own autocast rules
for the device, and a `Ledger` writes down what would be allocated. Without a GPU PyTorch runs the forward pass for one,
but not the backward pass. That therefore runs as on a CPU, whose autocast differs in that norms and softmaxes stay in
half precision, and only what it needs *beyond* what the forward pass kept is taken from there.

Not in it: the CUDA context, workspaces of cuBLAS and cuDNN, and the allocator's fragmentation.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from lavis_kvmod.memory.fake import fake_device
from lavis_kvmod.memory.ledger import Ledger
from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod
from lavis_kvmod.models.language.decoding import Steps
from lavis_kvmod.models.language.soft_prompt import full_mask, token_losses
from lavis_kvmod.models.language.text import TextBatch
from lavis_kvmod.models.vision.auxiliary.folded import fold
from lavis_kvmod.system.precision import amp_dtype, autocast

ADAMW_STATES = 2  # two running means a trained parameter
BATCH = "batch and loss"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device at the moment when most are needed.

    Attributes:
        weights: by part, as stored on the device (trained parts in float32).
        gradients: float32, one for each trained parameter; for the whole step, as gradient accumulation has it.
        optimizer: AdamW's two float32 numbers for each trained parameter.
        activations: what the forward pass keeps for the backward pass, by part, with the batch itself.
        kv_cache: Keys and Values of all layers at the last generated token (inference).
        workspace: what comes and goes, at its most: in training what the backward pass needs beyond the above (the
            layer that is computed again, with gradient checkpointing), in inference everything but the cache.
    """

    weights: Dict[str, int]
    gradients: int = 0
    optimizer: int = 0
    activations: Dict[str, int] = field(default_factory=dict)
    kv_cache: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """All of it together."""
        kept = sum(self.weights.values()) + sum(self.activations.values())
        return kept + self.gradients + self.optimizer + self.kv_cache + self.workspace


def estimate(
    model_cfg: Mapping[str, Any],
    *,
    batch_size: int,
    text_length: int,
    target_length: Optional[int] = None,
    train: bool = True,
    amp: Any = False,
    num_beams: int = 1,
    new_tokens: int = 30,
    answers: int = 1,
    optimizer: bool = False,
    shards: int = 1,
    device: str = "cuda",
    images: int = 1,
) -> MemoryEstimate:
    """Peak memory of one training step, or of generating for one batch.

    Args:
        model_cfg: a ``model:`` section; no file it names is looked for, but for a language model's ``config.json``.
        batch_size: images at once.
        text_length: tokens in the language model beside the soft prompt: in training question and answer, or the
            caption; in inference the prompt.
        target_length: how many of them have a loss (training); all by default.
        train: a training step with AdamW; False generates.
        amp: ``run.amp``, as `lavis_kvmod.system.precision` takes it.
        num_beams, new_tokens: of generation.
        answers: rows in the language model for each image: 1, or the answers of a question with ``answer_loss: all``.
        optimizer: count AdamW's states in inference too, as when a training run evaluates.
        shards: GPUs over which ``run.fsdp`` spreads the language model's layers.
        device: ``cuda`` or ``cpu``.
        images: of each sample; ``batch_size`` is then in samples.

    Raises:
        SettingsError: for faults of the section.
        MissingWeightsError: if the language model's size is not known.
        ValueError: for sizes below 1, or texts longer than the language model has positions for.
    """
    target_length = text_length if target_length is None else target_length
    size: Dict[str, Any] = dict(batch_size=batch_size, text_length=text_length, images=images)
    training: Dict[str, Any] = dict(target_length=target_length, answers=answers)
    generating = dict(num_beams=num_beams, new_tokens=new_tokens)
    _check_sizes(**size, **training, **generating, shards=shards)
    device = torch.device(device).type
    model = _on_device(Blip2OPTKVMod.without_weights(model_cfg), device)
    _check_length(model, text_length + (0 if train else new_tokens))
    dtype = amp_dtype(amp, device)

    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    states = ADAMW_STATES * trained if train or optimizer else 0
    weights, gathered = _weights(model, device, shards)
    if not train:
        peak, cache = _generate(model, device, dtype, **size, **generating)
        return MemoryEstimate(weights, optimizer=states, kv_cache=cache, workspace=peak - cache + gathered)
    kept, workspace = _step(partial(_train_step, model, dtype=dtype, **size, **training), device, trained)
    return MemoryEstimate(
        weights, gradients=trained, optimizer=states, activations=kept, workspace=workspace + gathered
    )


def _step(step: Callable[..., Tuple[Dict[str, int], int]], device: str, trained: int) -> Tuple[Dict[str, int], int]:
    """What a training step keeps for its backward pass, and the most that it holds for a moment beside that."""
    kept, forward_peak = step(device)
    on_cpu, backward_peak = step("cpu", backward=True)
    backward = backward_peak - sum(on_cpu.values())
    # AdamW's own temporaries, at a moment when the activations are gone: one copy of the trained parameters.
    update = trained - sum(kept.values())
    return kept, max(forward_peak - sum(kept.values()), backward, update, 0)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected a whole number above 0, got {size}")


# ------------------------------------------------------------ the model, without memory


def _on_device(model: Blip2OPTKVMod, device: str) -> Blip2OPTKVMod:
    """Dtypes as on the device: `Blip2OPTKVMod.float` for the CPU, trained parameters in float32 on a GPU."""
    if device == "cpu":
        return model.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _weights(model: Blip2OPTKVMod, device: str, shards: int) -> Tuple[Dict[str, int], int]:
    """Bytes of the weights by part; and, where the language model is sharded, of the whole layers that a GPU holds
    beside its share: the one that runs and the next, which is fetched meanwhile (`lavis_kvmod.system.sharding`)."""
    weights = {row.part: row.bytes for row in model.parts()}
    weights["buffers"] = _bytes(model.buffers())
    if device == "cpu" and model.aux_encoder is not None:
        # What the CPU computes with, beside the weights that are saved. Shapes are enough: all on "meta".
        copies = [fold(copy.deepcopy(encoder.backbone).to("meta")) for encoder in model.aux_encoder.members]
        folded = sum(_bytes([*of.parameters(), *of.buffers()]) for of in copies if of is not None)
        if folded:
            weights["aux_encoder, folded"] = folded
    if shards == 1:
        return weights, 0
    layers = [_bytes(layer.parameters()) for layer in model.opt_model.model.decoder.layers]
    weights["opt_model"] -= sum(layers) - -(-sum(layers) // shards)
    return weights, 2 * max(layers)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_length(model: Blip2OPTKVMod, text_length: int) -> None:
    positions = model.opt_model.config.max_position_embeddings
    needed = model.num_soft_prompt + text_length
    if needed > positions:
        raise ValueError(
            f"expected at most {positions} positions, as the language model has, got {needed}: "
            f"{needed - text_length} of the soft prompt and {text_length} of text"
        )


# ------------------------------------------------------------ running it


def _train_step(
    model: Blip2OPTKVMod,
    device: str,
    dtype: Optional[torch.dtype],
    *,
    batch_size: int,
    text_length: int,
    images: int,
    target_length: int,
    answers: int,
    backward: bool = False,
) -> Tuple[Dict[str, int], int]:
    """What the forward pass keeps, by part; and the most that was held at once, parameters and gradients aside, in
    the whole step with ``backward``, else in the forward pass."""
    rows = batch_size * answers
    # On the CPU autocast takes only one kind of half precision.
    half = dtype if device == "cpu" else None
    with fake_device(model.train(), device, num_labels=rows * target_length, half=half):
        with _booked(model, device) as ledger, autocast(device, dtype):
            with ledger.of(BATCH):
                image = _images(model, batch_size, images, device)
            soft_prompt = model.encode({"image": image}).soft_prompt
            if answers > 1:
                soft_prompt = soft_prompt.repeat_interleave(answers, dim=0)
            with model.autocast_for(model.opt_model), ledger.of(BATCH):
                text = _text(rows, text_length, device)
                seen, seeing = model.into_language_model(soft_prompt)
                with seeing:
                    losses = token_losses(model.opt_model, seen, text)[1]
                loss = losses.mean()
            del soft_prompt, seen, seeing, text, losses
        kept = ledger.live()
        gradients = set()
        if backward:
            with ledger:
                loss.backward()
            gradients = {ledger.number(p.grad) for p in model.parameters() if p.grad is not None}
        return kept, ledger.peak(besides=gradients)


def _generate(
    model: Blip2OPTKVMod,
    device: str,
    dtype: Optional[torch.dtype],
    *,
    batch_size: int,
    text_length: int,
    images: int,
    num_beams: int,
    new_tokens: int,
) -> Tuple[int, int]:
    """The most that is held at once by the encoders, the prompt's pass or the last token's; and the cache's bytes."""
    with fake_device(model.eval(), device), torch.no_grad():
        with _booked(model, device) as ledger:
            with autocast(device, dtype):
                image = _images(model, batch_size, images, device)
                soft_prompt, seeing = model.into_language_model(model.encode({"image": image}).soft_prompt)
            opt, text = model.opt_model, _text(batch_size, text_length, device)
            embedded = opt.get_input_embeddings()(text.input_ids)
            beginning = torch.cat([soft_prompt.to(embedded.dtype), embedded], dim=1)
            # The Keys and Values of the last token are never asked for.
            with seeing:
                steps = Steps(opt, beginning, full_mask(soft_prompt, text), num_beams, room=new_tokens - 1)
                if new_tokens > 1:
                    steps.cache.length += new_tokens - 2
                    rows = torch.zeros(batch_size * num_beams, dtype=torch.long, device=device)
                    steps(rows, rows if num_beams > 1 else None)
        return ledger.peak(), steps.cache.nbytes


def _images(model: Blip2OPTKVMod, batch_size: int, images: int, device: str) -> Tensor:
    several = () if images == 1 else (images,)
    return torch.empty(batch_size, *several, 3, model.image_size, model.image_size, device=device)


def _text(rows: int, length: int, device: str) -> TextBatch:
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    return TextBatch(ids, torch.ones_like(ids), torch.zeros_like(ids))


@contextmanager
def _booked(model: Blip2OPTKVMod, device: str) -> Iterator[Ledger]:
    """A running ledger in which each part books under its own name."""
    ledger = Ledger(device)
    ledger.ignore([*model.parameters(), *model.buffers()])
    parts = {row.part: getattr(model, row.part) for row in model.parts()}
    parts["opt_model"] = model.opt_model.model.decoder  # what `token_losses` calls
    handles = []
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            handles.append(part.register_forward_pre_hook(partial(_enter, ledger, name)))
            handles.append(part.register_forward_hook(partial(_leave, ledger)))
    try:
        with ledger:
            yield ledger
    finally:
        for handle in handles:
            handle.remove()


def _enter(ledger: Ledger, name: str, module: nn.Module, args: Any) -> None:
    ledger.enter(name)


def _leave(ledger: Ledger, module: nn.Module, args: Any, output: Any) -> None:
    ledger.leave()

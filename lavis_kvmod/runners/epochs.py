"""The part of `RunnerKVMod` that trains an epoch, or what is left of one."""

import contextlib
import itertools
import logging
import math
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from lavis.common.dist_utils import is_main_process

from lavis_kvmod.datasets.bad_samples import BadSampleCounter
from lavis_kvmod.datasets.loading.loader import PADDING
from lavis_kvmod.runners.compiling import eagerly
from lavis_kvmod.runners.pace import Pace
from lavis_kvmod.runners.saving import SavesRuns
from lavis_kvmod.runners.signals import Stopped
from lavis_kvmod.runners.steps import StepResult
from lavis_kvmod.runners.training_state import get_rng_state, set_rng_state
from lavis_kvmod.system.distributed import gather, get_world_size
from lavis_kvmod.system.flops import counted_flops, matrix_peak
from lavis_kvmod.system.precision import amp_dtype
from lavis_kvmod.system.progress import Progress

__all__ = ["TrainsEpochs"]

_READ_ON_CPU = ("image_index", "image_mask", "image_place")  # of a batch: the device would have to be waited for


class TrainsEpochs(SavesRuns):
    """Reads `train_loader`, `gradient_step` and `schedule`; moves `state` on."""

    # Seconds that a sample takes at this machine's matrix peak; None until the first batch is counted.
    _peak_seconds: Optional[float] = None

    def train_epoch(self, epoch: int) -> Dict[str, Any]:
        """Train what is left of an epoch; returns its facts for log.txt.

        Gradients are accumulated over ``accum_grad_iters`` batches, averaged, and what is left at the epoch's end is
        not lost (LAVIS sums them and lets leftovers run into the next epoch, base_task.py:215).

        Raises:
            FloatingPointError: see `train`, naming the batch.
            BadDataError: if the share of samples that cannot be read is above the data set's ``max_bad_share``.
            Stopped: see `train`.
        """
        state, model, loader = self.state, self.model, self.train_loader
        if state.epoch != epoch:
            state.start_epoch(epoch)
        model.train()
        loader.set_epoch(epoch, state.batch)
        total = self.batches_in(epoch)
        self._bad_samples = self._count_bad_samples()
        self._unread: List[str] = []  # what could not be read for the step that is being computed
        batches = itertools.islice(loader, max(0, total - state.batch))
        progress = Progress(batches, f"epoch {epoch}", self.log_freq, start=state.batch, total=total)
        pace = Pace(len(loader) * self.max_epoch, self._batches_done(), state.samples, get_world_size())
        samples, facts = None, {}
        for i, samples in enumerate(progress, start=state.batch):
            pace.got_data()
            samples = on_device(samples, self.device)
            samples.update(epoch=epoch, num_iters_per_epoch=total, iters=i)
            is_last, stop = self._train_batch(samples, i, total)
            state.batch = i + 1
            pace.done_batch(len(samples.get("image", ())))
            self.profiler.step()
            rate = self.optimizer.param_groups[0]["lr"]
            progress.status(f"loss {state.mean_loss():.4f} lr {rate:.2e}")
            if (i + 1) % self.log_freq == 0 or i + 1 == total:
                facts = {
                    "epoch": epoch,
                    "batch": i + 1,
                    "loss": round(state.mean_loss(), 4),
                    "lr": rate,
                    **pace.facts(state.samples, self.device, self._peak_seconds or 0.0),
                }
                self.log.timing(facts, self._batches_done())
            if is_last and state.batch < total:  # at the end of the epoch there is more to save
                self._save_in_between(epoch, stop)
            pace.ask_for_data()
        if state.batch != total:
            raise RuntimeError(f"the loader of the training data promised {total} batches and gave {state.batch}")
        self._log_pace(epoch, facts)
        return self._epoch_facts(epoch, samples)

    def _log_pace(self, epoch: int, facts: Dict[str, Any]) -> None:
        """How fast the epoch was, and with ``log_peak_memory`` what it took."""
        if not facts:
            return
        share = facts.get("matrix_peak_share")
        of_peak = "" if share is None else f", {100 * share:.1f} % of what a large product of matrices reaches here"
        logging.info("train, epoch %d: %.1f images/s%s", epoch, facts["images_per_second"], of_peak)
        if not self.settings.log_peak_memory:
            return
        text = f"{facts['memory_gib']:.2f} GiB of this process"
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device) / 2**30
            text += f", {facts['gpu_memory_gib']:.2f} GiB allocated on the GPU ({reserved:.2f} reserved)"
            torch.cuda.reset_peak_memory_stats(self.device)
        logging.info("train, epoch %d: at most %s", epoch, text)

    @contextlib.contextmanager
    def _counted_once(self, num_samples: int) -> Iterator[None]:
        """Count what this process's first batch computes."""
        if self._peak_seconds is not None or not num_samples or self.settings.fsdp:
            yield
            return
        with eagerly(), counted_flops() as found:
            yield
        dtype = amp_dtype(self.amp, self.device.type) or torch.float32
        self._peak_seconds = found[0] / num_samples / matrix_peak(self.device, dtype)

    def _train_batch(self, samples: Dict[str, Any], i: int, total: int) -> Tuple[bool, bool]:
        """Whether a step was due, and whether some rank was asked to stop."""
        state, accumulate = self.state, self.accum_grad_iters
        group_start = i - i % accumulate
        group_size = min(accumulate, total - group_start)
        is_last = i + 1 == group_start + group_size
        self.schedule.set(epoch=state.epoch, step=i // accumulate, steps_per_epoch=-(-total // accumulate))
        bad_samples = samples.pop("bad_samples", [])
        size = 0 if samples.get(PADDING) else _num_samples(samples)
        with self._counted_once(size):
            self.gradient_step.add(
                samples,
                num_batches=group_size,
                is_last=is_last,
                counts=[size, len(bad_samples), self.signals.received is not None],
            )
        self._unread.extend(bad_samples)
        if not is_last:
            return False, False
        result = self.gradient_step.finish()
        num_samples, num_bad, stop = result.counts
        self._count_samples(int(num_samples), gather(self._unread) if num_bad else [])
        self._unread = []
        self._count_step(result, i)
        if not self.use_distributed:  # nobody to agree with, so what came during the step counts too
            stop = self.signals.received is not None
        return True, bool(stop)

    def _count_samples(self, number: int, bad: List[str]) -> None:
        """Of a step, on all ranks: how many there were, and a line for each that could not be read."""
        state = self.state
        state.samples += number
        state.bad_samples = list(dict.fromkeys([*state.bad_samples, *bad]))
        self._bad_samples.update(number, bad)

    def _count_step(self, result: StepResult, i: int) -> None:
        state = self.state
        if result.problem is None:
            state.steps_counted += 1
            state.loss_sum += result.loss
            for name, part in result.parts.items():
                state.part_sums[name] = state.part_sums.get(name, 0.0) + part
            if math.isfinite(result.grad_norm):  # fp16's scaler finds its scale by overflowing now and then
                state.norms_counted += 1
                state.grad_norm_sum += result.grad_norm
                state.grad_norm_max = max(state.grad_norm_max, result.grad_norm)
            return
        state.bad_steps += 1
        allowed = self.settings.max_bad_steps
        where = f"{result.problem} in epoch {state.epoch}, batch {i}"
        if state.bad_steps > allowed:
            raise FloatingPointError(
                f"{where}; {state.bad_steps} steps of this run were bad, and max_bad_steps is {allowed}. "
                f"Checkpoints in {self.output_dir}, if there are any, are intact"
            )
        logging.warning("%s: step skipped (%d of at most %d)", where, state.bad_steps, allowed)
        self.log_stats({"bad_step": result.problem, "epoch": state.epoch, "batch": i}, "train")

    def _count_bad_samples(self) -> BadSampleCounter:
        """A counter that knows those met before a resume."""
        dataset = self.datasets["train"]
        parts = getattr(dataset, "datasets", [dataset])
        shares = [part.max_bad_share for part in parts if hasattr(part, "max_bad_share")]
        log = logging.warning if is_main_process() else logging.debug
        counter = BadSampleCounter(max(shares), log=log) if shares else BadSampleCounter(log=log)
        counter.update(self.state.samples, self.state.bad_samples)
        return counter

    def _save_in_between(self, epoch: int, stop: bool) -> None:
        every = self.settings.save_every_n_iters
        done, before = self.state.batch, self.state.batch - self.accum_grad_iters
        if stop or (every is not None and done // every > before // every):
            self._save_checkpoint(epoch)
        if stop:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """After a checkpoint; all ranks call it, and stop together.

        Raises:
            Stopped: if one of them was asked to.
        """
        asked = [signum for signum in gather([self.signals.received]) if signum is not None]
        if asked:
            raise Stopped(asked[0])

    def _epoch_facts(self, epoch: int, samples: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        state = self.state
        rates = self.schedule.rates()
        facts: Dict[str, Any] = {
            "epoch": epoch,
            "loss": f"{state.mean_loss():.4f}",
            **{name: f"{part:.4f}" for name, part in state.mean_parts().items()},
            "lr": f"{rates.pop('lr'):.3e}",
            "grad_norm": f"{state.grad_norm_sum / max(state.norms_counted, 1):.4f}",
            "grad_norm_max": f"{state.grad_norm_max:.4f}",
        }
        if rates:
            facts["lrs"] = {name: f"{rate:.3e}" for name, rate in rates.items()}
        share = self._prefix_attention_share(samples)
        if share is not None:
            facts["prefix_attention_share"] = f"{share:.4f}"
        num_bad = self._bad_samples.report(epoch)
        if num_bad:
            facts["bad_samples"] = num_bad
        logging.info("train, epoch %d: loss %s", epoch, facts["loss"])
        return facts

    @torch.no_grad()
    def _prefix_attention_share(self, samples: Optional[Dict[str, Any]]) -> Optional[float]:
        """On the epoch's last batch, without touching the run's randomness."""
        model = self.unwrap_dist_model(self.model)
        if samples is None or not hasattr(model, "prefix_attention_share"):
            return None
        randomness = get_rng_state(self.device)
        model.eval()
        with self.autocast(), eagerly():
            share = model.prefix_attention_share(samples)
        model.train()
        set_rng_state(randomness, self.device)
        return share


def on_device(value: Any, device: torch.device) -> Any:
    """A batch whose tensors are on the device; nothing waits for the copies (LAVIS's prepare_sample does)."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: each if key in _READ_ON_CPU else on_device(each, device) for key, each in value.items()}
    if isinstance(value, list):
        return [on_device(each, device) for each in value]
    return value


def _num_samples(samples: Dict[str, Any]) -> int:
    for key in ("image_index", "image", "text_input", "instance_id"):
        if key in samples:
            return len(samples[key])
    return 1

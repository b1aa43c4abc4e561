"""What a run file asks of memory, and what is advised where that is too much."""

import pytest
from omegaconf import OmegaConf

from lavis_kvmod.config.loading import KVModConfig
from lavis_kvmod.memory.runs import (
    GIB,
    Change,
    changes_that_fit,
    evaluation_step,
    fits,
    largest_batch,
    training_step,
    with_allowance,
)
from lavis_kvmod.system.paths import resolve_config


def sections(path, *options):
    cfg = KVModConfig(resolve_config(path), options)
    return cfg.model_cfg, cfg.run_cfg


def test_a_vqa_run_is_counted_with_its_longest_texts():
    vqa = sections("projects/kvmod/vqa.yaml", "run.batch_size_train=12", "run.batch_size_eval=24")
    step = training_step(*vqa)
    assert step == dict(batch_size=12, amp="bf16", text_length=48 + 10, target_length=10)
    all_answers = sections("projects/kvmod/vqa.yaml", "model.answer_loss=all", "run.batch_size_train=12")
    assert training_step(*all_answers) == {**step, "answers": 10}
    generation = evaluation_step(*vqa)
    assert generation == dict(
        train=False, batch_size=24, amp="bf16", text_length=48, new_tokens=10, num_beams=5, optimizer=True
    )
    assert evaluation_step(*sections("projects/kvmod/vqa.yaml", "run.evaluate=true"))["optimizer"] is False


def test_a_captioning_run_has_a_loss_on_all_of_a_caption():
    caption = sections("projects/kvmod/caption.yaml", "run.batch_size_train=12")
    assert training_step(*caption) == dict(batch_size=12, amp="bf16", text_length=32)
    generation = evaluation_step(*caption)
    assert (generation["text_length"], generation["new_tokens"]) == (7, 30)  # "a photo of"


def test_the_allowance_counts():
    assert with_allowance(20 * GIB) == 22 * GIB
    assert fits(20 * GIB, 22 * GIB) and not fits(20 * GIB, 22 * GIB - 1)


def step_bytes(options):
    """A batch of 16 takes 8 GiB of weights and 16 of activations, or 2 where those are computed again."""
    size = options.get("run.batch_size_train", 16)
    return 8 * GIB + size * GIB // (8 if options.get("model.opt_grad_checkpoint") else 1)


def test_changes_keep_the_size_of_a_step():
    changes = changes_that_fit(16 * GIB, batch_size=16, accum_grad_iters=2, can_recompute=True, compute=step_bytes)
    assert changes == [
        Change({"model.opt_grad_checkpoint": True}, 10 * GIB),
        Change({"run.batch_size_train": 4, "run.accum_grad_iters": 8}, 12 * GIB),
    ]
    small = changes_that_fit(10.2 * GIB, batch_size=16, accum_grad_iters=1, can_recompute=True, compute=step_bytes)
    assert small[0].options == {
        "model.opt_grad_checkpoint": True,
        "run.batch_size_train": 4,
        "run.accum_grad_iters": 4,
    }
    assert len(small) == 1
    already = changes_that_fit(16 * GIB, batch_size=16, accum_grad_iters=1, can_recompute=False, compute=step_bytes)
    assert [change.options for change in already] == [{"run.batch_size_train": 4, "run.accum_grad_iters": 4}]
    assert changes_that_fit(8 * GIB, batch_size=16, accum_grad_iters=1, can_recompute=True, compute=step_bytes) == []


def test_the_largest_batch_that_fits():
    assert largest_batch(16 * GIB, batch_size=64, compute=lambda n: n * GIB) == 8
    assert largest_batch(GIB, batch_size=64, compute=lambda n: n * GIB) == 0


@pytest.mark.parametrize("key", ["batch_size_train", "batch_size_eval"])
def test_plain_mappings_do(key):
    model, run = (OmegaConf.to_container(section) for section in sections("projects/kvmod/demo_vqa.yaml"))
    make = training_step if key.endswith("train") else evaluation_step
    assert make(model, run)["batch_size"] == run[key]

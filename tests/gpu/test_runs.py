"""Whole runs on the device: the scaler, exact resume, NCCL and FSDP with one process, and what is waited for."""

import os
import signal
import socket

import pytest
import torch
import torch.distributed as dist

from lavis_kvmod.commands.launch import build_runner, load_config
from lavis_kvmod.commands.train import train
from lavis_kvmod.runners.steps import GradientStep
from lavis_kvmod.weights import files as checkpoints

LAST = "checkpoint_last.pth"


def options(device, *others):
    return [f"run.device={device.type}", *others]


def half(device):
    """fp16 has no fast kernels on CPUs, and is refused there."""
    return "run.amp=fp16" if device.type == "cuda" else "run.amp=bf16"


def weights(folder):
    return checkpoints.read(folder / LAST)["model"]


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-5), name


def test_fp16_with_its_scaler(write_run, on_device, runs):
    path = write_run(valid_splits=[], max_grad_norm=1.0)

    def run(device):
        runner = build_runner(load_config(path, options(device, half(device))))
        before = runner.model.opt_proj.weight.detach().clone()
        assert (runner.scaler is not None) == (device.type == "cuda")
        runner.train()
        assert not torch.equal(runner.model.opt_proj.weight, before)
        assert {p.dtype for p in runner.model.parameters() if p.requires_grad} == {torch.float32}

    on_device(run)
    saved = checkpoints.read(runs()[0] / LAST)
    assert saved["state"]["bad_steps"] == 0
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    if saved["scaler"] is not None:
        assert saved["scaler"]["scale"] >= 1


@pytest.mark.parametrize("amp", [False, True])
def test_killed_and_resumed_bit_for_bit(
    write_run, device, on_device, in_process, runs, killed_before_step, assert_same_run, amp
):
    """With the GPU's own randomness (dropout), and the scaler's scale."""
    path = write_run(save_every_n_iters=1, resume_ckpt_path="auto")
    settings = options(torch.device(device), *([half(torch.device(device))] if amp else []))
    on_device(lambda _: train(path, settings), "whole")
    code, output = in_process(killed_before_step(path, 9, settings), "killed")
    assert code == -signal.SIGKILL, output
    assert "resumed from" in on_device(lambda _: train(path, settings), "killed")
    assert_same_run(runs("killed")[0], runs("whole")[0])


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_process_group_of_one(write_run, on_device, runs, fsdp):
    """NCCL, which is told its GPU and so need not guess and warn; its run is that of a process alone."""
    path = write_run(valid_splits=["val"], test_splits=["test"])

    def grouped(device):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
        runner = build_runner(load_config(path, options(device, f"run.fsdp={fsdp}")))
        assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
        runner.train()
        dist.destroy_process_group()

    output = on_device(grouped, "grouped")
    assert "barrier()" not in output and "destroy_process_group" not in output, output
    on_device(lambda device: train(path, options(device)), "alone")
    assert_close(weights(runs("grouped")[0]), weights(runs("alone")[0]))


def test_a_batch_waits_for_nothing_and_a_step_once(on_device):
    """By PyTorch's own watch over calls that wait for the GPU."""

    def steps(device):
        model = torch.nn.Linear(64, 1).to(device)
        optimizer = torch.optim.AdamW(model.parameters())

        def train_step(model, samples):
            return model(samples["x"]).pow(2).mean()

        step = GradientStep(
            model=model, inner=model, train_step=train_step, optimizer=optimizer, max_grad_norm=1.0, device=device
        )
        batches = [{"x": torch.randn(8, 64, device=device), "question_id": [i]} for i in range(2)]
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for i, batch in enumerate(batches):
                step.add(dict(batch), num_batches=2, is_last=i == 1, counts=[8])
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            result = step.finish()
            assert result.problem is None and list(result.counts) == [16]
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")

    output = on_device(steps)
    assert output.count("called a synchronizing CUDA operation") <= 3, output

"""Two processes on the CPU (gloo)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from omegaconf import OmegaConf

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.commands.launch import build_runner, load_config
from lavis_kvmod.commands.train import main, train
from lavis_kvmod.system.distributed import all_reduce_tensor, data_parallel, group_device, init_distributed
from lavis_kvmod.system.sharding import is_sharded
from lavis_kvmod.weights import files as checkpoints

LAST = "checkpoint_last.pth"
STEADY = {  # nothing is drawn, so that runs can be compared number by number
    "answer_loss": "all",
    "qformer_geometry": {"dropout": 0.0},
}


def by_torchrun(rank, world_size, port):
    """What torchrun tells a process."""
    return dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="localhost", MASTER_PORT=port)


def by_srun(rank, world_size, port):
    """What SLURM's srun tells a task; the port is the user's, so that it is free."""
    names = dict(PROCID=rank, LOCALID=rank, STEP_NUM_TASKS=world_size, STEP_NODELIST="localhost", JOB_ID=7)
    return {"MASTER_PORT": port, **{f"SLURM_{name}": value for name, value in names.items()}}


def ranks(in_process, function, folder, world_size=2, told=by_torchrun):
    """Run ``function`` as so many ranks; their exit codes and what they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def launch():
        def one(rank):
            os.environ.update({name: str(value) for name, value in told(rank, world_size, port).items()})
            code = 1
            try:
                function()
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(code)

        processes = [get_context("fork").Process(target=one, args=(rank,)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        print("exit codes", [process.exitcode for process in processes])

    _, output = in_process(launch, folder)
    codes = eval(output[output.index("exit codes") + len("exit codes") :].split("\n")[0])
    return codes, output


def weights(folder):
    return checkpoints.read(folder / LAST)["model"]


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def steady(path, *options):
    return lambda: train(path, list(options))


@pytest.fixture()
def steady_run(write_run, model_config):
    """With the rate of `projects/kvmod/vqa.yaml`. At the 1e-3 of other tests rounding grows past 1e-6 in 20 steps, as
    it does between one process and the same with another number of threads (benchmarks/bench_processes.py)."""
    geometry = {**model_config()["qformer_geometry"], **STEADY["qformer_geometry"]}
    return partial(
        write_run,
        model={**STEADY, "qformer_geometry": geometry},
        crops="blip_image_eval",
        valid_splits=[],
        init_lr=1e-5,
        warmup_lr=1e-6,
    )


def assert_same_training(path, first, second):
    """The parameters to 1e-6, and each epoch's loss, gradient norm and rate as logged (to 4 decimals); and they have
    moved."""
    one, two = weights(first), weights(second)
    assert largest_difference(one, two) <= 1e-6
    assert largest_difference(one, build_runner(load_config(path)).model.state_dict()) > 1e-4
    logs = [(folder / "log.txt").read_text().splitlines() for folder in (first, second)]
    for epoch in range(-5, 0):
        one, two = (json.loads(lines[epoch]) for lines in logs)
        for key in ("train_loss", "train_grad_norm", "train_lr"):
            assert float(one[key]) == pytest.approx(float(two[key]), abs=1.1e-4)


@pytest.mark.slow
def test_two_processes_with_batch_b_are_one_with_2b(steady_run, in_process, runs):
    """20 steps. 13 samples with answers of different lengths: the last batch has one sample, the second rank none."""
    path = steady_run(max_epoch=5, batch_size_train=2)
    codes, output = ranks(in_process, steady(path), "two")
    assert codes == [0, 0], output
    assert in_process(steady(path, "run.batch_size_train=4"), "one")[0] == 0
    assert_same_training(path, runs("one")[0], runs("two")[0])


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(steady_run, in_process, runs):
    path = steady_run(max_epoch=5, batch_size_train=1)
    assert in_process(steady(path, "run.batch_size_train=4"), "one")[0] == 0
    assert in_process(steady(path, "run.accum_grad_iters=4"), "accumulated")[0] == 0
    codes, output = ranks(in_process, steady(path, "run.accum_grad_iters=2"), "both")
    assert codes == [0, 0], output
    for folder in ("accumulated", "both"):
        assert_same_training(path, runs("one")[0], runs(folder)[0])


@pytest.mark.slow
def test_the_process_group_is_left_at_the_end(write_run, in_process):
    """As NCCL wants it; that the process then ends well is `tests/system/test_ending.py`'s."""
    path = write_run(max_epoch=1, valid_splits=[])

    def whole():
        assert main(["--cfg-path", path]) == 0
        assert not torch.distributed.is_initialized()

    codes, output = ranks(in_process, whole, "left")
    assert codes == [0, 0], output
    assert "Warning" not in output and "No validation splits" not in output, output


@pytest.mark.slow
def test_srun_starts_one_run_of_several_processes(write_run, in_process, runs):
    """LAVIS's `init_distributed_mode` reads SLURM_PROCID; each task was a run of its own here."""
    path = write_run(max_epoch=1, valid_splits=[])
    codes, output = ranks(in_process, steady(path), "srun", told=by_srun)
    assert codes == [0, 0], output
    (folder,) = runs("srun")
    assert checkpoints.read(folder / LAST)["data"]["global_batch"] == 2 * load_config(path).run_cfg.batch_size_train
    assert len(checkpoints.read(folder / LAST)["rng"]) == 2


def test_only_what_is_trained_is_sent_around(in_process):
    """Frozen towers are gigabytes, and on all ranks already."""

    def wrap():
        rank = int(os.environ["RANK"])
        init_distributed(OmegaConf.create({"device": "cpu"}))
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
        model[:2].requires_grad_(False)
        for value in [*model.parameters(), model[1].running_mean]:
            torch.nn.init.constant_(value, rank + 1)
        wrapped = data_parallel(model, gpu=None)
        assert (model[0].weight == rank + 1).all() and (model[1].running_mean == rank + 1).all()
        assert (model[2].weight == 1).all()
        wrapped(torch.ones(3, 2) * rank).sum().backward()
        sums = all_reduce_tensor(model[2].weight.grad.clone())
        assert torch.equal(sums, 2 * model[2].weight.grad)  # the gradient is the mean on both

    codes, output = ranks(in_process, wrap, "sent")
    assert codes == [0, 0], output


def test_nccl_is_told_its_gpu():
    assert group_device("cuda", 3) == torch.device("cuda", 3)
    assert group_device("cpu", 3) is None


@pytest.mark.parametrize(("value", "minutes"), [(2, 2), ("1.5", 1.5), (None, 60)])
def test_minutes_may_be_text_or_left_empty(monkeypatch, value, minutes):
    given = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **settings: given.update(settings))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    init_distributed(OmegaConf.create({"device": "cpu", "dist_timeout": value}))
    assert given["timeout"] == timedelta(minutes=minutes)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(write_run, in_process, runs):
    path = write_run(max_epoch=1, valid_splits=[], accum_grad_iters=2)

    def broken():
        from lavis_kvmod import Blip2OPTKVMod

        forward, calls = Blip2OPTKVMod.forward, []

        def once(self, samples):
            calls.append(1)
            output = forward(self, samples)
            bad = os.environ["RANK"] == "1" and len(calls) == 1
            return {**output, "loss": output["loss"] * (float("nan") if bad else 1.0)}

        Blip2OPTKVMod.forward = once
        train(path)

    codes, output = ranks(in_process, broken, "bad")
    assert codes == [0, 0], output
    assert "the loss is nan (text_input" in output and "step skipped (1 of at most 3)" in output
    assert checkpoints.read(runs("bad")[0] / LAST)["state"]["steps_counted"] == 0  # of the epoch that is to come
    assert '"train_bad_step": "the loss is nan' in (runs("bad")[0] / "log.txt").read_text()


SMALL = {"depth": 2, "num_heads": 4}
EVERY_KIND = {  # of connector, fusion and prefix, each as small as it goes
    "prefix": {},
    "one-encoder": {"kv_modulation": False},
    "grid": {"prefix_source": "grid", "prefix_grid": 2},
    "two-encoders": {"aux_encoder": ["efficientnet-b0", "efficientnet-b0"]},
    "dropped-now-and-then": {"prefix_dropout": 0.3},
    "question": {"qformer_text_input": True, "bert_model": "demo", "load_pretrained": False},
    "linear": {"connector": "linear"},
    "mlp": {"connector": "mlp", "num_aux_tokens": 2},
    "perceiver": {"connector": "perceiver", "connector_geometry": SMALL},
    "c-abstractor": {"connector": "c_abstractor", "connector_geometry": {"hidden_size": 16}},
    "visual-abstractor": {"connector": "visual_abstractor", "connector_geometry": SMALL},
    "gated": {"connector": "linear", "fusion": "gated_cross_attention", "gated_every": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_killed_and_resumed_on_two_processes(
    write_run, in_process, runs, killed_before_step, assert_same_run, model_config, kind
):
    """Each rank goes on with its own randomness. Whatever the member, every trained parameter gets a gradient: DDP
    would tell otherwise."""
    model = dict(EVERY_KIND[kind])
    if "aux_encoder" in model:
        model["aux_checkpoint"] = [model_config()["aux_checkpoint"]] * len(model["aux_encoder"])
    path = write_run(model=model, save_every_n_iters=1, resume_ckpt_path="auto")
    codes, output = ranks(in_process, lambda: train(path), "whole")
    assert codes == [0, 0] and "got no gradient" not in output, output
    codes, _ = ranks(in_process, killed_before_step(path, 6), "killed")
    assert -signal.SIGKILL in codes
    codes, output = ranks(in_process, lambda: train(path), "killed")
    assert codes == [0, 0] and "resumed from" in output, output
    assert_same_run(runs("killed")[0], runs("whole")[0])


@pytest.mark.slow
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_sharded_language_model_trains_as_a_whole_one(steady_run, in_process, runs, tmp_path, grad_checkpoint):
    """`run.fsdp` on gloo: as DDP does, its checkpoint is the same kind of file, and it answers the same. Of three
    questions one rank has two, the other one."""
    path = steady_run(max_epoch=5, batch_size_eval=1, valid_splits=["val"], test_splits=["test"])
    evaluated = tmp_path / "data" / "val.json"
    evaluated.write_text(json.dumps(json.loads(evaluated.read_text())[:3]))
    checkpointing = f"model.opt_grad_checkpoint={grad_checkpoint}"

    def sharded():
        runner = build_runner(load_config(path, [checkpointing, "run.fsdp=true"]))
        opt = runner.model.module.opt_model
        weight = opt.model.decoder.layers[0].fc1.weight
        assert is_sharded(opt) and weight.to_local().numel() == weight.numel() // 2
        runner.train()

    for name, function in (("ddp", steady(path, checkpointing)), ("fsdp", sharded)):
        codes, output = ranks(in_process, function, name)
        assert codes == [0, 0], output
    ddp, fsdp = (weights(runs(name)[0]) for name in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys() and largest_difference(ddp, fsdp) <= 1e-6
    for name in ("val_epoch0", "val_epoch4", "test_epochbest"):
        whole, rows = (json.loads((runs(of)[0] / "result" / f"{name}.json").read_text()) for of in ("ddp", "fsdp"))
        assert [row["question_id"] for row in rows] == [13, 14, 15] and all(row["answer"] for row in rows)
        assert [row["answer"] for row in rows] == [row["answer"] for row in whole]
    metrics = [
        [line for line in (runs(of)[0] / "log.txt").read_text().splitlines() if line.startswith(('{"val_', '{"test_'))]
        for of in ("ddp", "fsdp")
    ]
    assert len(metrics[0]) == 6
    for whole, sharded_ones in zip(*metrics):
        assert json.loads(sharded_ones) == pytest.approx(json.loads(whole), abs=1e-4)
    assert in_process(steady(path, f"run.resume_ckpt_path={runs('fsdp')[0] / LAST}", "run.max_epoch=6"), "on")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_counts_every_sample_once(write_run, in_process, tmp_path, world_size):
    """Data sets smaller than the number of ranks, as large, and with every remainder; the metrics are one process's."""
    path = write_run(batch_size_eval=2)
    sizes = (1, 2, 3, 4, 5, 7)
    given = json.loads((tmp_path / "data" / "train.json").read_text())
    for size in sizes:
        (tmp_path / "data" / f"{size}.json").write_text(json.dumps(given[:size]))

    def evaluate_all():
        for size in sizes:
            files = f"[{tmp_path / 'data' / f'{size}.json'},{tmp_path / 'data' / 'answers.json'}]"
            build_info = "datasets.coco_vqa.build_info.annotations.val"
            evaluate(path, [f"{build_info}.storage={files}", f"{build_info}.url={files}", f"run.output_dir=of-{size}"])

    def found(folder, size):
        (run,) = (tmp_path / folder / f"of-{size}").iterdir()
        rows = json.loads((run / "result" / "val_epochbest.json").read_text())
        return rows, json.loads((run / "metrics.json").read_text())["val"]

    assert in_process(evaluate_all, "one")[0] == 0
    codes, output = ranks(in_process, evaluate_all, "several", world_size)
    assert codes == [0] * world_size, output
    for size in sizes:
        (alone, metrics), (rows, together) = found("one", size), found("several", size)
        assert [row["question_id"] for row in rows] == list(range(size)) and together["scored"] == size
        assert [row["answer"] for row in rows] == [row["answer"] for row in alone]
        assert together == pytest.approx(metrics, abs=1e-4)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_in_the_epoch(write_run, in_process, runs, killed_before_step):
    path = write_run(save_every_n_iters=1, resume_ckpt_path="auto", valid_splits=[], max_epoch=1)
    ranks(in_process, killed_before_step(path, 2), "moved")
    code, output = in_process(lambda: train(path), "moved")
    assert code == 0 and "number of processes: 2 -> 1" in output and "at epoch 0, batch 4" in output, output


@pytest.mark.slow
@pytest.mark.parametrize(("step", "splits", "epoch", "batch"), [(1, [], 0, 3), (3, [], 1, 0), (3, ["val"], 0, 4)])
def test_sigterm_on_one_rank_saves_on_all(write_run, in_process, runs, killed_before_step, step, splits, epoch, batch):
    """All agree with the next step's exchange, or at the end of the epoch."""
    path = write_run(valid_splits=splits)

    def one_is_told():
        signum = signal.SIGTERM if os.environ["RANK"] == "1" else signal.SIGCONT
        killed_before_step(path, step, signum=signum)()

    codes, output = ranks(in_process, one_is_told, "told")
    assert codes == [143, 143], output
    state = checkpoints.read(runs("told")[0] / LAST)["state"]
    assert (state["epoch"], state["batch"]) == (epoch, batch)


def torchrun(code, folder, *, timeout=240):
    """A script run by torchrun on two processes, as `-m lavis.train` is; its exit code, what it wrote, its seconds."""
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=timeout)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("death", "named", "told"),
    [
        (
            "raise RuntimeError('the disk of rank 1 is on fire')",
            "exitcode  : 1 ",
            "RuntimeError: the disk of rank 1 is on fire",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "exitcode  : -9 ", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_rank_that_dies_ends_the_run_and_is_named(write_run, tmp_path, runs, death, named, told):
    """By torchrun itself, within its own 30 seconds of grace."""
    path = write_run(max_epoch=1, valid_splits=[], save_every_n_iters=1)
    code, output, _ = torchrun(
        f"""
import os, signal, sys
import torch
import lavis.train
take, steps = torch.optim.AdamW.step, []
def step(self, *args, **kwargs):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        {death}
    return take(self, *args, **kwargs)
torch.optim.AdamW.step = step
sys.exit(lavis.train.main(["--cfg-path", {path!r}]))
""",
        tmp_path,
    )
    assert code != 0
    # Rank 0, which loses its peer, may be seen to fail first: the root cause is then one, the other is a failure.
    report = output[output.index("Failures:") :]
    (entry,) = (part for part in report.split("  time ")[1:] if "rank      : 1 " in part)
    assert named in entry and told in output, output
    assert checkpoints.read(runs()[0] / LAST)["state"]["batch"] == 2


WATCHED = """
import os, sys
rank, notes = os.environ["RANK"], os.open({notes!r} + os.environ["RANK"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
CHANGES = {{"os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.rmdir": 1}}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def watch(event, args):
    if event == "open":
        paths = args[:1] if args[2] & WRITING else ()
    else:
        paths = args[: CHANGES.get(event, 0)]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            os.write(notes, (os.path.abspath(os.fsdecode(path)) + "\\n").encode())
sys.addaudithook(watch)
import lavis.train, lavis.evaluate
sys.exit(lavis.{command}.main(["--cfg-path", {path!r}, "--options", *{options!r}]))
"""
LAVISS_TASK = [
    "run.task=vqa",
    "run.inference_method=generate",
    "run.valid_splits=[]",
]  # its metric wants official files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "of_rank_1"),
    [
        ("train", [], []),
        ("evaluate", [], []),
        ("train", LAVISS_TASK, ["result/test_vqa_result_rank1.json"]),  # LAVIS's way to gather answers
    ],
)
def test_only_the_first_rank_writes(write_run, tmp_path, runs, command, options, of_rank_1):
    """Every file or folder that either rank opens to write, makes, renames or removes, as Python tells (an audit hook);
    a run with checkpoints within the epoch, validation and test, that then goes on."""
    goes_on = {"resume_ckpt_path": "auto"} if command == "train" else {}
    path = write_run(save_every_n_iters=1, test_splits=["test"], tensorboard="auto", **goes_on)
    for number, epochs in enumerate([1, 2] if command == "train" else [1]):
        notes = str(tmp_path / f"notes-{number}-")
        arguments = [*options, f"run.max_epoch={epochs}"]
        code, output, _ = torchrun(WATCHED.format(notes=notes, command=command, path=path, options=arguments), tmp_path)
        assert code == 0, output
        (folder,) = runs()
        first, second = (
            {line for line in open(f"{notes}{rank}").read().splitlines() if line.startswith(str(tmp_path / "output"))}
            for rank in range(2)
        )
        assert second == {str(folder / name) for name in of_rank_1}
        wrote = "metrics.json" if command == "evaluate" else LAST
        assert any(wrote in name for name in first) and any("result/" in name for name in first), first

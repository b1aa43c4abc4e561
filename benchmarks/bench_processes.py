"""Two processes with batch b against one with 2b: the largest difference of a parameter after an epoch of the demo (20
steps of AdamW, dropout off), by learning rate.

Rounding differs with the order of additions, and grows from step to step, the faster the larger the steps. How far it
gets by itself stands beside: one process against the same on another number of threads.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RATES = ("1e-5", "1e-4", "1e-3")  # of vqa.yaml, of BLIP-2's pre-training, of the demo
BATCH = 256
OPTIONS = ["model.qformer_geometry.dropout=0", "run.max_epoch=1", "run.valid_splits=[]", "run.test_splits=[]"]
SETUPS = {  # processes, threads in each
    "one": (1, 1),
    "other threads": (1, 2),
    "two": (2, 1),
}


def train(folder: Path, rate: str, processes: int, threads: int):
    """The trained parameters of a run; with several processes by torchrun, as on a machine with several GPUs."""
    command = [sys.executable, "-W", "ignore", "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command += ["lavis.train", "--cfg-path", "projects/kvmod/demo_vqa.yaml", "--options", *OPTIONS]
    command += [f"run.init_lr={rate}", "run.min_lr=0", "run.warmup_lr=0"]
    command += [f"run.batch_size_train={BATCH // processes}", f"run.output_dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr)
    (checkpoint,) = folder.glob("*/checkpoint_last.pth")
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]


def largest_difference(first, second) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def main():
    print(f"{'learning rate':<16}{'two processes':>16}{'one, other threads':>22}")
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            trained = {
                name: train(Path(folder, f"{rate} {name}".replace(" ", "_")), rate, *setup)
                for name, setup in SETUPS.items()
            }
            apart = {name: largest_difference(trained["one"], trained[name]) for name in ("two", "other threads")}
            print(f"{rate:<16}{apart['two']:>16.1e}{apart['other threads']:>22.1e}", flush=True)


if __name__ == "__main__":
    main()

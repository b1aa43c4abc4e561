"""Training memory of the full-size model on the CPU: measured against computed (`make memory`).

With random weights of the published sizes in real files (see full_size.py), each row in a process of its own: load the
model, train two steps with AdamW, and take the second step's peak of resident memory above what Python and its
libraries held before the model was loaded. Beside it stands what `lavis_kvmod.memory.estimate` computes for the same
step on the CPU. Results go to output/memory.json; the files (8 GB) are removed. Needs Linux and 12 GB of memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BATCH_SIZES = (1, 4)
TEXT_TOKENS = 32
MODEL = ("blip2_opt_kvmod", "pretrain_opt2.7b")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/memory.json")
    parser.add_argument("--files", help="keep the weight files in this folder (and use those that are there)")
    parser.add_argument("--row", nargs=2, type=int, metavar=("BATCH", "CHECKPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row[0], bool(args.row[1]))))
        return

    import full_size  # beside this file

    folder = Path(args.files or tempfile.mkdtemp(prefix="memory.", dir=".")).resolve()
    env = {**os.environ, "TORCH_HOME": str(folder / "torch"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    rows = []
    try:
        if not (folder / "complete").is_file():
            print("writing weight files …", flush=True)
            full_size.run_step("files", env)
            (folder / "complete").touch()
        for checkpoint in (0, 1):
            for batch_size in BATCH_SIZES:
                command = [sys.executable, "-W", "ignore", __file__, "--row", str(batch_size), str(checkpoint)]
                done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(rows[-1], flush=True)
    finally:
        if not args.files:
            shutil.rmtree(folder)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")


def measure(batch_size: int, checkpoint: bool) -> dict:
    """One row of the table, in GiB."""
    import torch
    from omegaconf import OmegaConf

    from lavis_kvmod import Blip2OPTKVMod
    from lavis_kvmod.memory import estimate

    cfg = OmegaConf.load(Blip2OPTKVMod.default_config_path(MODEL[1])).model
    cfg.opt_grad_checkpoint = checkpoint
    computed = estimate(cfg, batch_size=batch_size, text_length=TEXT_TOKENS, device="cpu")

    before = status("VmRSS")
    model = Blip2OPTKVMod.from_config(cfg).float().train()
    text = "a"
    while len(model.opt_tokenizer(text + "\n").input_ids) < TEXT_TOKENS:
        text += " a"
    optimizer = torch.optim.AdamW(model.get_optimizer_params(weight_decay=0.05), lr=1e-5)
    for _ in range(2):  # AdamW makes its states in the first step
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak (proc(5))
        batch = {"image": torch.randn(batch_size, 3, 224, 224), "text_input": [text] * batch_size}
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del batch
    assert torch.isfinite(loss), loss
    measured = status("VmHWM") - before
    return {
        "batch_size": batch_size,
        "opt_grad_checkpoint": checkpoint,
        "computed_gib": round(computed.total / 2**30, 2),
        "measured_gib": round(measured / 2**30, 2),
        "python_gib": round(before / 2**30, 2),
        "kept_gib": round(sum(computed.activations.values()) / 2**30, 2),
    }


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()

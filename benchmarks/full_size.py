"""The full 3.8-billion-parameter model on the CPU, with random weights in real files (`make full-size`).

Writes files of the published sizes where LAVIS, PyTorch and Hugging Face would have downloaded them, then, each in a
process of its own: loads and captions with `load_model_and_preprocess("blip2_opt_kvmod")` and measures peak memory;
times the forward pass of one image with 16 text tokens; times the same in LAVIS's own `Blip2OPT` in float32, which is
what LAVIS makes of the model on a CPU. Results go to output/full_size.json; the files (8 GB) are removed.

On a processor with bf16 the exit status is 1 if they fall short of `MOST_GIB` or `LEAST_RATIO`; one without it computes
in float32.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
MOST_GIB, LEAST_RATIO = 10, 3
TEXT_TOKENS = 16
OPT_REPOSITORY = "models--facebook--opt-2.7b"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/full_size.json")
    parser.add_argument("--files", help="keep the weight files in this folder (and use those that are there)")
    parser.add_argument("--convert", action="store_true", help="measure `lavis-kvmod convert` instead (31 GB of disk)")
    parser.add_argument("--step", choices=["files", "ours", "stock", "convert"], help=argparse.SUPPRESS)
    parser.add_argument("convert_args", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        steps = {"files": write_files, "ours": measure_ours, "stock": measure_stock}
        steps["convert"] = lambda: measure_conversion(args.convert_args)
        steps[args.step]()
        return 0

    # A process that is asked to end removes its files as one that is interrupted does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(args.files or tempfile.mkdtemp(prefix="full_size.", dir="."))
    folder = folder.resolve()
    env = {**os.environ, "TORCH_HOME": str(folder / "torch"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    try:
        if not (folder / "complete").is_file():
            print("writing weight files …", flush=True)
            run_step("files", env)
            (folder / "complete").touch()
        if args.convert:
            measure_conversions(folder, env)
            return 0
        ours = run_step("ours", env)
        stock = run_step("stock", env)
    finally:
        if not args.files:
            shutil.rmtree(folder)
    from lavis_kvmod.system.precision import cpu_has_bf16

    results = {
        "cpu_bf16": cpu_has_bf16(),
        "peak_rss_gib": ours["peak_rss_gib"],
        "forward_s": ours["forward_s"],
        "stock_fp32_forward_s": stock["forward_s"],
        "ratio": round(stock["forward_s"] / ours["forward_s"], 2),
        "load_s": ours["load_s"],
        "caption_s": ours["caption_s"],
        "stock_fp32_peak_rss_gib": stock["peak_rss_gib"],
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        print(f"{name:<26} {value}")
    if not results["cpu_bf16"]:
        print(
            "This processor has no bf16, so the frozen weights were kept in float32, as LAVIS keeps them: memory is "
            "about as much as LAVIS's, and the ratio near 1."
        )
        return 0
    problems = shortfalls(results)
    print("\n".join(problems))
    return 1 if problems else 0


def shortfalls(results) -> list:
    """What a processor with bf16 should reach and did not."""
    problems = []
    if results["peak_rss_gib"] > MOST_GIB:
        problems.append(f"peak_rss_gib: expected at most {MOST_GIB}, got {results['peak_rss_gib']}")
    if results["ratio"] < LEAST_RATIO:
        problems.append(f"ratio: expected at least {LEAST_RATIO}, got {results['ratio']}")
    return problems


def run_step(step: str, env, *arguments) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--step", step, "--", *map(str, arguments)]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    return json.loads(last[0]) if last else {}


# ------------------------------------------------------------------ files


def write_files():
    """Random weights, as files: fp16 EVA and OPT, fp32 BLIP-2 checkpoint and EfficientNet-B3, as published."""
    import torch
    from efficientnet_pytorch import EfficientNet
    from efficientnet_pytorch.utils import url_map
    from omegaconf import OmegaConf
    from transformers import OPTConfig

    from lavis_kvmod import Blip2OPTKVMod

    torch.manual_seed(0)
    settings = OmegaConf.load(Blip2OPTKVMod.default_config_path("pretrain_opt2.7b")).model
    model = Blip2OPTKVMod.without_weights(settings)
    hub = Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints"
    snapshot = Path(os.environ["HF_HOME"]) / "hub" / OPT_REPOSITORY / "snapshots" / "random"
    for path in (hub, snapshot):
        path.mkdir(parents=True, exist_ok=True)

    def random_like(state, dtype):
        # Small enough for activations to stay finite, and cheap: every tensor is cut from one block of noise.
        noise = torch.randn(2**22).mul_(0.02)

        def fill(tensor):
            if tensor.ndim < 2:
                return torch.ones(tensor.shape, dtype=dtype)
            count = tensor.numel()
            return noise.repeat(-(-count // len(noise)))[:count].view(tensor.shape).to(dtype, copy=True)

        return {name: fill(tensor) for name, tensor in state.items()}

    torch.save(random_like(model.visual_encoder.state_dict(), torch.float16), hub / "eva_vit_g.pth")
    trained = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("query_tokens", "Qformer.", "opt_proj.", "ln_vision.")) and "position_ids" not in name
    }
    name = os.path.basename(settings.pretrained)
    torch.save({"model": random_like(trained, torch.float32)}, hub / name)
    b3 = EfficientNet.from_name("efficientnet-b3").state_dict()
    torch.save(b3, hub / os.path.basename(url_map["efficientnet-b3"]))

    config: OPTConfig = model.opt_model.config
    config.save_pretrained(snapshot)
    opt = {k[len("model.") :]: v for k, v in model.opt_model.state_dict().items() if k.startswith("model.")}
    torch.save(random_like(opt, torch.float16), snapshot / "pytorch_model.bin")
    write_tokenizer(snapshot)
    references = snapshot.parent.parent / "refs"
    references.mkdir(exist_ok=True)
    (references / "main").write_text("random")


def write_tokenizer(folder: Path):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a photo of"], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    bpe.save_model(str(folder))
    # Random weights generate any of OPT's 50,272 ids, so each needs a text.
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary.update({f"<{i}>": i for i in range(len(vocabulary), 50272)})
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    names = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", add_bos_token=True)
    GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), **names).save_pretrained(folder)


# ------------------------------------------------------------------ measurements


def measure_conversions(folder: Path, env):
    """LAVIS's files to a Hugging Face folder, that to one .pth, that to .safetensors: the memory each adds."""
    hub, made = folder / "torch" / "hub" / "checkpoints", folder / "converted"
    (blip2,) = hub.glob("blip2*.pth")
    opt = next((folder / "hf" / "hub" / OPT_REPOSITORY / "snapshots").iterdir())
    made.mkdir(exist_ok=True)
    for source, target, parts in [
        (blip2, made / "folder", [f"--vit={hub / 'eva_vit_g.pth'}", f"--opt={opt}"]),
        (made / "folder", made / "all.pth", []),
        (made / "all.pth", made / "all.safetensors", []),
    ]:
        done = run_step("convert", env, source, target, *parts)
        ratio = done["added_mib"] / done["largest_mib"]
        print(f"{source.name} -> {target.name}: {done['added_mib']:.0f} MiB, {ratio:.2f} x the largest tensor")
    shutil.rmtree(made)


def measure_conversion(arguments):
    import lavis_kvmod.commands.convert  # noqa: F401  (what it imports is the program's own memory)
    from lavis_kvmod.commands.cli import main as lavis_kvmod
    from lavis_kvmod.system.progress import resident_peak_gib

    before = resident_peak_gib()
    lavis_kvmod(["convert", *arguments])
    added = (resident_peak_gib() - before) * 1024
    print(json.dumps({"added_mib": added, "largest_mib": 50272 * 2560 * 2 / 2**20}))


def measure_ours():
    import torch
    from lavis.models import load_model_and_preprocess
    from PIL import Image

    from lavis_kvmod.system.progress import resident_peak_gib

    start = time.perf_counter()
    model, vis, _ = load_model_and_preprocess("blip2_opt_kvmod", is_eval=True, device="cpu")
    load_s = time.perf_counter() - start
    image = vis["eval"](Image.effect_noise((300, 260), 80).convert("RGB")).unsqueeze(0)
    start = time.perf_counter()
    model.generate({"image": image, "prompt": "a photo of"}, num_beams=5, max_length=10, min_length=10)
    caption_s = time.perf_counter() - start
    peak = resident_peak_gib()  # before the timings: loading and captioning are what is asked for
    report(model, image, peak, load_s=round(load_s, 1), caption_s=round(caption_s, 1))
    assert torch.isfinite(model({"image": image, "text_input": [text_of(model)]})["loss"])


def measure_stock():
    """LAVIS's own Blip2OPT at full size in float32, its forward untouched, with the same weights."""
    import torch
    from lavis.models import load_model
    from lavis.models.blip2_models.blip2_opt import Blip2OPT
    from torch import nn

    ours = load_model("blip2_opt_kvmod", "pretrain_opt2.7b", is_eval=True, device="cpu")
    parts = {
        name: getattr(ours, name) for name in ("visual_encoder", "ln_vision", "query_tokens", "opt_model", "opt_proj")
    }
    for parameter in ours.parameters():
        parameter.data = parameter.data.float()

    stock = Blip2OPT.__new__(Blip2OPT)
    nn.Module.__init__(stock)
    for name, part in parts.items():
        setattr(stock, name, part)
    stock.Qformer = stock_qformer(ours)
    stock.opt_tokenizer, stock.prompt, stock.max_txt_len = ours.opt_tokenizer, "", 32
    from lavis_kvmod.system.progress import resident_peak_gib

    image = torch.randn(1, 3, 224, 224)
    report(stock.eval(), image, resident_peak_gib())


def stock_qformer(ours):
    from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

    config = BertConfig()
    config.encoder_width, config.add_cross_attention = 1408, True
    config.cross_attention_freq, config.query_length = 2, 32
    qformer = BertLMHeadModel(config)
    qformer.cls = qformer.bert.embeddings.word_embeddings = qformer.bert.embeddings.position_embeddings = None
    for layer in qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None
    qformer.load_state_dict(ours.Qformer.state_dict())
    return qformer


def text_of(model) -> str:
    """A text of `TEXT_TOKENS` tokens with BOS and the closing newline."""
    text = "a"
    while len(model.opt_tokenizer(text + "\n").input_ids) < TEXT_TOKENS:
        text += " a"
    return text


def report(model, image, peak_gib: float, **more):
    import torch

    batch = {"image": image, "text_input": [text_of(model)]}
    times = []
    with torch.no_grad():
        model(batch)  # burn-in
        for _ in range(RUNS):
            start = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - start)
    print(json.dumps({"peak_rss_gib": round(peak_gib, 2), "forward_s": round(statistics.median(times), 3), **more}))


if __name__ == "__main__":
    sys.exit(main())

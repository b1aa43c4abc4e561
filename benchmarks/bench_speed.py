"""How fast: ours against stock LAVIS in one process (`make bench`), and against Hugging Face's (`make bench-hf`).

Random weights; on a CPU at a size that two cores can take (ViT 384x12, BERT-base Q-Former, OPT 768x12, 224 px), on a
GPU at full size (`make bench-gpu`). The sides of a row take turns, and medians are kept. Each row is written as it is
measured to `benchmarks/results/<processor or GPU>.json`; `speed_tables.py` makes the docs' tables of these files.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TEXT, QUESTION, ANSWER, PROMPT = 32, 16, 4, "a photo of"  # tokens of a caption, a question, an answer; in front
CANDIDATES, TIMED_CANDIDATES = 128, 8

Work = Callable[[], Any]


# ------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Row:
    """One kind of work. ``ours``, ``stock`` and ``base`` name methods of `Bench` that make it ready to be run;
    ``hf`` is what `speed_hf_side.py` is asked for, beside ``images`` and ``questions``."""

    work: str
    title: str
    ours: str
    images: int
    stock: Optional[str] = None
    base: Optional[str] = None  # ours in another way, where the row compares with that
    base_is: str = ""
    questions: int = 1
    precision: str = "fp32"
    hf: Optional[Dict[str, Any]] = None
    stock_runs: Optional[int] = None  # where one run of it is long
    stock_times: float = 1.0  # what is timed of it is multiplied by this
    geometry: Optional[str] = None  # where it is not the run's; such a row is measured if it is named alone


def rows_for(device: str, has_bf16: bool) -> List[Row]:
    """The rows of a CPU, or of a GPU."""
    precision = "bf16" if device == "cuda" else "fp32"
    beam = dict(do="generate", text=5, beams=5, new=20)
    caption = Row("caption_step", "caption training step", "caption_step", 8, "stock_caption_step")
    caption = replace(caption, hf=dict(do="train", text=TEXT), precision=precision)
    captioning = Row("caption_beam", "captioning, beam 5, 20 tokens", "caption_beam", 8, "stock_caption_beam")
    captioning = replace(captioning, hf=beam, precision=precision)
    vqa = Row("vqa_step", "VQA training step, 5 questions an image", "vqa_step", 8, questions=5)
    vqa = replace(vqa, hf=dict(do="train", text=QUESTION + ANSWER), precision=precision)
    answering = Row(
        "answer_beam", "VQA answering, beam 5, 10 tokens, 5 questions an image", "answer_beam", 2, questions=5
    )
    answering = replace(answering, hf=dict(beam, text=QUESTION, new=10), precision=precision)
    prefix = Row("prefix", "a forward with the prefix", "forward", 8, base="forward_without_prefix", base_is="without")
    prefix = replace(prefix, precision=precision)
    if device == "cuda":
        beams = [replace(captioning, images=images) for images in (1, 16)]
        steps = [replace(caption, images=16), replace(caption, images=64, stock=None), replace(vqa, images=16)]
        return [*steps, *beams, replace(answering, images=16), replace(prefix, images=16)]
    rank = Row("rank", f"ranking {CANDIDATES} answers, against a forward each", "rank", 1, "stock_candidates")
    cached = Row("cached_step", "caption training step from cached features", "cached_step", 8)
    rows = [
        caption,
        replace(vqa, stock="stock_vqa_step", stock_runs=2),
        replace(captioning, stock_runs=1),
        replace(answering, stock="stock_answer_beam", stock_runs=1),
        replace(rank, stock_runs=1, stock_times=CANDIDATES / TIMED_CANDIDATES),
        replace(cached, base="caption_step", base_is="with encoders"),
        prefix,
    ]
    if has_bf16:
        rows += [replace(caption, precision="bf16"), replace(captioning, precision="bf16", stock_runs=1)]
        full = dict(images=1, precision="bf16", geometry="full size", hf=None)
        of_one = "full size, one image captioned, beam 5, 20 tokens"
        rows.append(replace(captioning, work="full_caption", title=of_one, stock_runs=1, **full))
        rows.append(replace(prefix, work="full_prefix", title="full size, a forward with the prefix", **full))
    return rows


class Bench:
    """The models, built when they are first asked for, and the work of each row on them."""

    def __init__(self, geometry: str, device: str):
        self.geometry, self.device = geometry, device
        self._ours: Dict[str, Any] = {}

    def ours(self, precision: str) -> Any:
        """One at a time is kept."""
        from speed_models import build_ours

        if precision not in self._ours:
            self._ours = {precision: build_ours(self.geometry, precision, self.device)}
        return self._ours[precision]

    @cached_property
    def stock(self) -> Any:
        """It computes in float32 on a CPU, in fp16 on a GPU, whatever ours does."""
        from speed_models import build_ours, build_stock

        precision = "fp16" if self.device == "cuda" else "fp32"
        like = self._ours.get(precision) or build_ours(self.geometry, precision, self.device)
        return build_stock(like, self.geometry, self.device)

    def images(self, count: int) -> Any:
        import torch

        return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(count)).to(self.device)

    # ---- training

    def caption_step(self, row: Row) -> Work:
        return self._our_step(row, self._captions(row))

    def vqa_step(self, row: Row) -> Work:
        import torch

        count = row.images * row.questions
        question = self._question(row)
        batch = {
            "image": self.images(row.images),
            "image_index": torch.arange(row.images).repeat_interleave(row.questions),
            "text_input": [question] * count,
            "answer": ["a" + " a" * (ANSWER - 2)] * count,
            "weight": torch.ones(count),
            "n_answers": torch.ones(count, dtype=torch.long),
        }
        return self._our_step(row, batch)

    def cached_step(self, row: Row) -> Work:
        from lavis_kvmod.models.vision.feature_cache import FrozenFeatureCache

        model, cache = self.ours(row.precision), FrozenFeatureCache()
        batch = {**self._captions(row), "image_key": [str(i) for i in range(row.images)]}
        step = self._our_step(row, batch)

        def from_cache() -> None:
            model.feature_cache = cache
            step()
            model.feature_cache = None

        return from_cache

    def _our_step(self, row: Row, batch: Dict[str, Any]) -> Work:
        import torch

        from lavis_kvmod.runners.optimizers import adamw
        from lavis_kvmod.system.precision import DTYPES

        model = self.ours(row.precision)
        optimizer = adamw([{"params": [p for p in model.parameters() if p.requires_grad]}], lr=1e-5)
        dtype = DTYPES[row.precision]
        return _step(model, batch, optimizer, self.device, None if dtype is torch.float32 else dtype)

    def stock_caption_step(self, row: Row) -> Work:
        return self._stock_step(self._captions(row))

    def stock_vqa_step(self, row: Row) -> Work:
        """It trains on captions alone: question and answer are its caption, and an image comes once a question."""
        image = self.images(row.images).repeat_interleave(row.questions, dim=0)
        return self._stock_step({"image": image, "text_input": [self._question(row) + " a" * ANSWER] * len(image)})

    def _stock_step(self, batch: Dict[str, Any]) -> Work:
        import torch

        optimizer = torch.optim.AdamW([p for p in self.stock.parameters() if p.requires_grad], lr=1e-5)
        return _step(self.stock, batch, optimizer, self.device, torch.float16 if self.device == "cuda" else None)

    def _captions(self, row: Row) -> Dict[str, Any]:
        from speed_models import text_of

        return {"image": self.images(row.images), "text_input": [text_of(self.ours(row.precision), TEXT)] * row.images}

    def _question(self, row: Row) -> str:
        from speed_models import text_of

        return text_of(self.ours(row.precision), QUESTION + 1)  # it counts a newline, which a question has not

    # ---- evaluation

    def caption_beam(self, row: Row) -> Work:
        model = self.ours(row.precision).eval()
        batch = {"image": self.images(row.images), "prompt": PROMPT}
        return lambda: model.generate(batch, num_beams=5, max_length=20, min_length=20)

    def stock_caption_beam(self, row: Row) -> Work:
        return self._stock_beam(self.images(row.images), PROMPT, 20)

    def answer_beam(self, row: Row) -> Work:
        import torch

        model = self.ours(row.precision).eval()
        index = torch.arange(row.images, device=self.device).repeat_interleave(row.questions)
        batch = {
            "image": self.images(row.images),
            "image_index": index,
            "text_input": [self._question(row)] * len(index),
        }
        return lambda: model.predict_answers(batch, num_beams=5, max_len=10, min_len=10)

    def stock_answer_beam(self, row: Row) -> Work:
        image = self.images(row.images).repeat_interleave(row.questions, dim=0)
        return self._stock_beam(image, self._question(row), 10)

    def _stock_beam(self, image: Any, prompt: str, new: int) -> Work:
        stock = self.stock.eval()
        shortest = new + len(stock.opt_tokenizer(prompt).input_ids)  # transformers counts the prompt
        return lambda: stock.generate(
            {"image": image, "prompt": prompt}, num_beams=5, max_length=new, min_length=shortest
        )

    def rank(self, row: Row) -> Work:
        model = self.ours(row.precision).eval()
        batch = {"image": self.images(row.images), "text_input": [self._question(row)] * row.images}
        candidates = [" ".join(f"<{300 + 8 * i + j}>" for j in range(2)) for i in range(CANDIDATES)]
        candidates = [candidate[:40] for candidate in candidates]
        return lambda: model.predict_answers(batch, inference_method="rank", answer_list=candidates)

    def stock_candidates(self, row: Row) -> Work:
        """Some of the candidates, each in a forward of its own."""
        import torch

        batch = {"image": self.images(row.images), "text_input": [self._question(row) + " a" * ANSWER] * row.images}

        def each() -> None:
            with torch.no_grad():
                for _ in range(TIMED_CANDIDATES):
                    self.stock.eval()(batch)

        return each

    def forward(self, row: Row) -> Work:
        import torch

        model, batch = self.ours(row.precision), self._captions(row)

        def run() -> None:
            with torch.no_grad():
                model.eval()(batch)

        return run

    def forward_without_prefix(self, row: Row) -> Work:
        model, forward = self.ours(row.precision), self.forward(row)

        def without() -> None:
            kept = model.kv_prefix, model.aux_encoder
            model.kv_prefix = model.aux_encoder = None
            try:
                forward()
            finally:
                model.kv_prefix, model.aux_encoder = kept

        return without


def _step(model: Any, batch: Dict[str, Any], optimizer: Any, device: str, dtype: Any) -> Work:
    import torch

    scaler = torch.amp.GradScaler(device) if dtype is torch.float16 else None

    def step() -> None:
        model.train()
        with contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype=dtype):
            loss = model(batch)["loss"]
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------ how it is measured


class Sides:
    """What takes turns in a row: name -> (a function that runs once and gives the seconds, how many runs)."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def medians(self, sides: Dict[str, Any]) -> Dict[str, float]:
        """After one run of each that does not count, unless a side is to be run but once."""
        for name, (run, runs) in sides.items():
            if runs > 1:
                self._say(f"{name} …")
                run()
        times: Dict[str, List[float]] = {name: [] for name in sides}
        for turn in range(max(runs for _, runs in sides.values())):
            for name, (run, runs) in sides.items():
                if turn < runs:
                    times[name].append(run())
                    self._say(f"{name} {times[name][-1]:.2f} s")
        return {name: statistics.median(each) for name, each in times.items()}


def timed(work: Work, device: str) -> Callable[[], float]:
    """A function that runs it once and gives the seconds."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def run() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    return run


class HFSide:
    """A process of the environment that has a current transformers."""

    def __init__(self, python: str, geometry: str, precision: str, device: str):
        from speed_models import HF_SIZES

        command = [python, "-W", "ignore", str(HERE / "speed_hf_side.py")]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        env.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.precision = precision
        self.versions = self.ask(build=HF_SIZES[geometry], precision=precision, device=device)

    def ask(self, **what: Any) -> Dict[str, Any]:
        """Have something done.

        Raises:
            RuntimeError: if that process has ended.
        """
        print(json.dumps(what), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"Hugging Face's side has ended (exit status {self._process.wait()}) at {what}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


# ------------------------------------------------------------------ results


def machine_name(device: str) -> str:
    """Of the GPU, or of the processor with its cores, as a file may be called."""
    import torch

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        found = [line.split(":", 1)[1] for line in lines if line.startswith(("model name", "Model"))]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{found[0] if found else 'CPU'} {cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class ResultFile:
    """``benchmarks/results/<name>.json``; each row is written as it comes."""

    def __init__(self, path: Path, about: Dict[str, Any]):
        self.path = path
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.content = {**known, **about, "rows": known.get("rows", [])}
        if "versions" in known:
            self.content["versions"] = {**known["versions"], **about["versions"]}

    def find(self, row: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """The row of the same work that is there."""
        names = ("work", "precision", "batch")
        return next((old for old in self.content["rows"] if all(old[n] == row[n] for n in names)), None)

    def put(self, row: Dict[str, Any]) -> None:
        """Write a row in the place of the one of the same work."""
        old = self.find(row)
        if old is None:
            self.content["rows"].append(row)
        else:
            old.update(row)
        self.save()

    def save(self) -> None:
        """All of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def key_of(row: Row) -> Dict[str, Any]:
    """What tells rows apart."""
    return {"work": row.work, "title": row.title, "precision": row.precision, "batch": row.images}


def versions() -> Dict[str, str]:
    """Of what is measured."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "salesforce-lavis", "lavis-kvmod")}


# ------------------------------------------------------------------ the run


def measure_row(bench: Bench, row: Row, sides: Sides, runs: int, peaks: Dict[str, float]) -> Dict[str, Any]:
    """A row's figures against stock, or against ours in another way."""
    import torch

    from lavis_kvmod.system.flops import counted_flops, matrix_peak
    from lavis_kvmod.system.precision import DTYPES

    ours = getattr(bench, row.ours)(row)
    taking_turns = {"ours": (timed(ours, bench.device), runs)}
    if row.stock:
        taking_turns["stock"] = (timed(getattr(bench, row.stock)(row), bench.device), row.stock_runs or runs)
    if row.base:
        taking_turns["base"] = (timed(getattr(bench, row.base)(row), bench.device), runs)
    median = sides.medians(taking_turns)
    if row.precision not in peaks:
        peaks[row.precision] = matrix_peak(torch.device(bench.device), DTYPES[row.precision])
    with counted_flops() as counted:
        ours()
    flops = counted[0]
    found: Dict[str, Any] = {**key_of(row), "questions": row.questions, "ours_s": round(median["ours"], 4)}
    if row.stock:
        found["stock_s"] = round(median["stock"] * row.stock_times, 4)
        found["ratio_stock"] = round(found["stock_s"] / found["ours_s"], 2)
    if row.base:
        found["base_s"], found["base_is"] = round(median["base"], 4), row.base_is
        found["ratio_base"] = round(median["base"] / median["ours"], 3)
    found["tflop"] = round(flops / 1e12, 4)
    found["share_of_peak"] = round(flops / median["ours"] / peaks[row.precision], 3)
    found["runs"] = runs
    return found


def measure_hf(bench: Bench, row: Row, sides: Sides, runs: int, hf: HFSide) -> Dict[str, Any]:
    """A row's figures against Hugging Face; ours is measured again beside it."""
    asked = dict(row.hf or {}, images=row.images, questions=row.questions)
    median = sides.medians(
        {
            "ours": (timed(getattr(bench, row.ours)(row), bench.device), runs),
            "hf": (lambda: hf.ask(**asked)["s"], runs),
        }
    )
    return {
        **key_of(row),
        "hf_s": round(median["hf"], 4),
        "ours_beside_hf_s": round(median["ours"], 4),
        "ratio_hf": round(median["hf"] / median["ours"], 2),
    }


def peak_of(side: str, geometry: str, device: str, images: int) -> float:
    """GiB that a training step of one side takes beyond what its imports do, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--peak", side, "--geometry", geometry, "--device", device]
    done = subprocess.run([*command, "--images", str(images)], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(side: str, geometry: str, device: str, images: int) -> None:
    """What `peak_of` starts: two steps, and the memory they took."""
    import torch
    from speed_memory import peak_gib

    imports = Bench(geometry, device)
    import speed_models  # noqa: F401  (what it imports counts as no memory of a step)

    before = peak_gib("cpu")
    precision = "bf16" if device == "cuda" else "fp32"
    row = Row("peak", "", "caption_step", images, precision=precision)
    step = imports.caption_step(row)
    if side == "stock":
        step = imports.stock_caption_step(row)
        imports._ours = {}
    peak_gib("cpu")  # what building took is no memory of a step
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    print(peak_gib(device) - (0.0 if device == "cuda" else before))


def measure_peaks(bench: Bench, images: int, say: Callable[[str], None]) -> Dict[str, Any]:
    """The row of memory."""
    row: Dict[str, Any] = {
        "work": "peak_memory",
        "title": "peak memory of a caption training step",
        "precision": "bf16" if bench.device == "cuda" else "fp32",
        "batch": images,
    }
    for side in ("ours", "stock"):
        row[{"ours": "peak_gib", "stock": "stock_peak_gib"}[side]] = gib = round(
            peak_of(side, bench.geometry, bench.device, images), 2
        )
        say(f"{side} {gib} GiB")
    row["ratio_stock"] = round(row["peak_gib"] / row["stock_peak_gib"], 2)
    return {**row, "runs": 1}


def measure_hf_peak(row: Dict[str, Any], bench: Bench, python: str) -> Dict[str, Any]:
    """Its part of that row, in a process of its own."""
    hf = HFSide(python, bench.geometry, row["precision"], bench.device)
    hf.ask(do="memory")
    for _ in range(2):
        hf.ask(do="train", images=row["batch"], questions=1, text=TEXT)
    gib = round(hf.ask(do="memory")["gib"], 2)
    hf.close()
    return {**row, "hf_peak_gib": gib, "ratio_hf": round(row["peak_gib"] / gib, 2)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="only these (names as `work` has them; peak_memory is one)")
    parser.add_argument("--runs", type=int, default=3, help="of each side; medians are kept (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="each side once, without a run that does not count")
    parser.add_argument("--keep", action="store_true", help="leave rows as they are that have been measured before")
    parser.add_argument("--hf", metavar="PYTHON", help="a Python with a current transformers: measure its columns")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", help="the file of results (default: benchmarks/results/<machine>.json)")
    parser.add_argument("--geometry", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure what was asked for; returns the exit status."""
    args = arguments()
    import torch

    geometry = args.geometry or ("full size" if args.device == "cuda" else "two cores")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: its rows are not measured")
        return 0
    if args.peak:
        print_peak(args.peak, geometry, args.device, args.images)
        return 0
    from lavis_kvmod.system.precision import cpu_has_bf16

    start = time.monotonic()
    has_bf16 = args.device == "cuda" or cpu_has_bf16()
    if not has_bf16:
        print("this processor has no bf16: the rows in bf16 are left out")
    name = machine_name(args.device)
    about = {"machine": name, "geometry": geometry, "threads": torch.get_num_threads(), "versions": versions()}
    results = ResultFile(Path(args.output) if args.output else RESULTS / f"{name}.json", about)
    bench, runs = Bench(geometry, args.device), 1 if args.quick else args.runs
    rows = chosen(rows_for(args.device, has_bf16), args.rows)
    peaks: Dict[str, float] = {}
    hf: Optional[HFSide] = None
    for row in rows:
        wanted = "ratio_hf" if args.hf else "ours_s"
        label = f"[{time.monotonic() - start:4.0f} s] {row.work} {row.precision} batch {row.images}:"
        if (args.hf and not row.hf) or (args.keep and wanted in (results.find(key_of(row)) or {})):
            continue
        if (args.geometry or row.geometry or geometry) != bench.geometry:  # the last ones: the models before make room
            bench = Bench(args.geometry or row.geometry or geometry, args.device)
        sides = Sides(lambda text, label=label: print(label, text, flush=True))
        if args.hf:
            if hf is None or hf.precision != row.precision:
                if hf is not None:
                    hf.close()
                hf = HFSide(args.hf, geometry, row.precision, args.device)
                results.content["versions"]["hf transformers"] = hf.versions["transformers"]
            results.put(measure_hf(bench, row, sides, runs, hf))
        else:
            results.put(measure_row(bench, row, sides, runs, peaks))
            results.content["matrix_peak_tflops"] = {
                **results.content.get("matrix_peak_tflops", {}),
                **{precision: round(peak / 1e12, 3) for precision, peak in peaks.items()},
            }
            results.save()
    if hf is not None:
        hf.close()
    measure_memory(args, Bench(geometry, args.device), results)
    print(f"{results.path}: {len(results.content['rows'])} rows, {time.monotonic() - start:.0f} s")
    return 0


def chosen(rows: List[Row], named: Optional[List[str]]) -> List[Row]:
    """Those named; else all that have the run's geometry. Those of one geometry come together."""
    found = [row for row in rows if (row.work in named if named else row.geometry is None)]
    return sorted(found, key=lambda row: row.geometry or "")


def measure_memory(args: argparse.Namespace, bench: Bench, results: ResultFile) -> None:
    """The row of memory, if it is asked for."""
    if args.rows and "peak_memory" not in args.rows:
        return
    images = {"full size": 64, "two cores": 8}.get(bench.geometry, 2)
    key = {"work": "peak_memory", "precision": "bf16" if bench.device == "cuda" else "fp32", "batch": images}
    old = results.find(key)
    if args.hf:
        if old is not None and not (args.keep and "ratio_hf" in old):
            results.put(measure_hf_peak(old, bench, args.hf))
    elif not (args.keep and old is not None):
        results.put(measure_peaks(bench, images, lambda text: print("peak_memory:", text, flush=True)))


if __name__ == "__main__":
    sys.exit(main())

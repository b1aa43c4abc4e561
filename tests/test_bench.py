"""The benchmark of docs/performance.md, as far as it can be tried without measuring."""

import json
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    return runpy.run_path(str(BENCHMARKS / "bench_speed.py"))


def test_the_tables_are_made_from_the_results():
    made = runpy.run_path(str(BENCHMARKS / "speed_tables.py"))
    written = made["BLOCK"].search(made["PAGE"].read_text(encoding="utf-8"))[0]
    assert written == made["tables"](), "docs/performance.md has other figures: make bench-tables"


def test_every_row_can_be_made_ready_and_has_a_place_of_its_own(bench):
    for device in ("cpu", "cuda"):
        rows = bench["rows_for"](device, has_bf16=True)
        for row in rows:
            for name in (row.ours, row.stock, row.base):
                assert name is None or callable(getattr(bench["Bench"], name))
        places = [(row.work, row.precision, row.images) for row in rows]
        assert len(set(places)) == len(places)
    assert {row.precision for row in bench["rows_for"]("cpu", has_bf16=False)} == {"fp32"}


def test_the_full_size_on_a_cpu_is_measured_if_it_is_named(bench):
    rows, chosen = bench["rows_for"]("cpu", has_bf16=True), bench["chosen"]
    assert {row.geometry for row in chosen(rows, None)} == {None}
    named = chosen(rows, ["full_prefix", "rank", "full_caption"])
    assert [row.work for row in named] == ["rank", "full_caption", "full_prefix"]
    assert {(row.geometry, row.precision, row.images) for row in named[1:]} == {("full size", "bf16", 1)}


def test_a_row_is_measured_in_turns_and_written_at_once(bench, tmp_path):
    order = []

    def side(name, seconds):
        times = iter(seconds)
        return lambda: order.append(name) or next(times)

    sides = bench["Sides"](lambda text: None)
    median = sides.medians({"ours": (side("ours", [9, 1, 3, 2]), 3), "stock": (side("stock", [8]), 1)})
    assert median == {"ours": 2, "stock": 8} and order == ["ours", "ours", "stock", "ours", "ours"]

    path = tmp_path / "results" / "cpu.json"
    about = {"machine": "cpu", "versions": {"torch": "2"}}
    row = {"work": "caption_step", "precision": "fp32", "batch": 8}
    bench["ResultFile"](path, about).put({**row, "ours_s": 2.0})
    again = bench["ResultFile"](path, about)  # a second run adds Hugging Face's columns
    again.put({**row, "hf_s": 3.0})
    (kept,) = json.loads(path.read_text())["rows"]
    assert kept == {**row, "ours_s": 2.0, "hf_s": 3.0} and again.find({**row, "batch": 9}) is None

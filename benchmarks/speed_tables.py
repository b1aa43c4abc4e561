"""``make bench-tables``: the tables of docs/performance.md, made from ``benchmarks/results/*.json``.

What stands in the page between ``<!-- results -->`` and ``<!-- /results -->`` is written anew.
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(?<=<!-- results -->\n).*?(?=\n<!-- /results -->)", re.DOTALL)


def tables() -> str:
    """A heading and a table for each machine that was measured."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in files) or "Nothing measured yet."


def table(found: Dict[str, Any]) -> str:
    """One machine's rows."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    peaks = found.get("matrix_peak_tflops", {})
    peak = "; a matrix product reaches " + ", ".join(f"{v:g} TFLOP/s in {p}" for p, v in peaks.items()) if peaks else ""
    head = ["work", "precision", "images", "ours", "stock", "× stock", "HF", "× HF", "share of peak", "runs"]
    lines = [
        f"### {found['machine']}",
        "",
        f"Size: {found['geometry']}; {found['threads']} threads{peak}. {versions}.",
        "",
        f"| {' | '.join(head)} |",
        "|---|---|" + "---:|" * (len(head) - 2),
    ]
    return "\n".join(lines + [_line(row) for row in found["rows"]])


def _line(row: Dict[str, Any]) -> str:
    cells: List[str]
    if "peak_gib" in row:
        sizes = [_number(row.get(name), " GiB") for name in ("peak_gib", "stock_peak_gib", "hf_peak_gib")]
    else:
        sizes = [_number(row.get(name), " s") for name in ("ours_s", "stock_s", "hf_s")]
    cells = [row["title"], row["precision"], str(row["batch"]), sizes[0], sizes[1], _number(row.get("ratio_stock"))]
    cells += [sizes[2], _number(row.get("ratio_hf")), _percent(row.get("share_of_peak")), str(row.get("runs", ""))]
    if "base_s" in row:
        cells[0] += f" ({row['base_is']}: {row['base_s']:.2f} s, × {row['ratio_base']:.2f})"
    return f"| {' | '.join(cells)} |"


def _number(value: Any, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def main() -> None:
    """Write the page's block."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: tables(), text), encoding="utf-8")


if __name__ == "__main__":
    main()

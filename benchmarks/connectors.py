"""Every connector at full size, computed without memory for weights: beside the table that goes round.

    python benchmarks/connectors.py --write docs/connectors.md

EVA-CLIP-G at 224 px and OPT-2.7b, as `pretrain_opt2.7b` has them; 64 vectors where a connector may choose, the Q-Former
with its 32. Memory is a training step's of 8 images with a text of 24 tokens each in bf16, on a GPU.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

from omegaconf import OmegaConf

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.memory import estimate

BATCH, TEXT = 8, 24
PLACE = re.compile(r"(<!-- full size -->\n).*?(<!-- end -->)", re.DOTALL)
GATED: Dict[str, Any] = {"connector": "linear", "fusion": "gated_cross_attention"}
# What blog posts say, in their words: parameters, tokens.
ROWS: Tuple[Tuple[str, str, str, Dict[str, Any]], ...] = (
    ("`linear`", "~4 M", "196+", {"connector": "linear"}),
    ("`mlp`", "~8 M", "196+", {"connector": "mlp"}),
    ("`qformer`", "", "32", {}),
    ("`perceiver`", "~30 M", "64", {"connector": "perceiver", "num_query_token": 64}),
    ("`c_abstractor`", "~40 M", "64", {"connector": "c_abstractor", "num_query_token": 64}),
    ("`visual_abstractor`", "", "", {"connector": "visual_abstractor", "num_query_token": 64}),
    ("`linear`, gated layers", "~100 M", "", GATED),
)


def main() -> int:
    """Print the table, or put it into its place in a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="into the place for it in this page")
    page = parser.parse_args().write
    table = "\n".join(lines())
    if page is None:
        print(table)
        return 0
    text = page.read_text(encoding="utf-8")
    if not PLACE.search(text):
        sys.exit(f"expected <!-- full size --> and <!-- end --> in {page}, found none")
    page.write_text(PLACE.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text), encoding="utf-8")
    return 0


def lines() -> List[str]:
    """The table's lines, in Markdown."""
    head = "| | goes round | tokens | trained, one encoder | with the second | tokens, with the second | a step |"
    told = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for name, said, tokens, keys in ROWS:
        alone, both = (trained(kv_modulation=kv, **keys) for kv in (False, True))
        taken = estimate(section(**keys), batch_size=BATCH, text_length=TEXT, amp="bf16").total / 2**30
        cells = [name, said, tokens, f"{alone[0] / 1e6:.1f} M", f"{both[0] / 1e6:.1f} M", str(both[1])]
        told.append(f"| {' | '.join([*cells, f'{taken:.1f} GiB'])} |")
    return told


def section(**keys: Any) -> Any:
    """The model section of `pretrain_opt2.7b`, with these keys."""
    defaults = OmegaConf.load(Blip2OPTKVMod.default_config_path("pretrain_opt2.7b")).model
    return OmegaConf.merge(defaults, keys)


def trained(**keys: Any) -> Tuple[int, int]:
    """Trained numbers, and vectors before the text."""
    model = Blip2OPTKVMod.without_weights(section(**keys))
    return sum(part.parameters for part in model.parts() if part.trained), model.num_soft_prompt


if __name__ == "__main__":
    sys.exit(main())

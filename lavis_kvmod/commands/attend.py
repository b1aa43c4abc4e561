"""``lavis-kvmod attend``: where the model looks when it answers, as a picture."""

import argparse
import math
import sys
from typing import List, Sequence, Tuple

from PIL import Image
from torch import Tensor

from lavis_kvmod.commands.asking import TOLD, Asked, add_model_arguments, load_model
from lavis_kvmod.datasets.images import read_image
from lavis_kvmod.models.attention_maps import AnswerTrace, AttentionMaps
from lavis_kvmod.reports.attention import Panel, heat_map, panels, share_table
from lavis_kvmod.system.paths import absolute, expanded
from lavis_kvmod.weights.files import whole_or_nothing

TOKENS_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument("--question", default="", metavar="TEXT", help="about it; without one a caption is traced")
    parser.add_argument("--answer", default="", metavar="TEXT", help="trace this one; default: the model's own")
    parser.add_argument(
        "--queries", nargs="+", type=int, metavar="N", help="show these of the Q-Former's queries too (from 0)"
    )
    parser.add_argument("--out", default="attention.png", metavar="PNG", help="default: %(default)s")
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Write the picture; returns the exit status: 2 for what the user can mend."""
    try:
        if not args.out.lower().endswith(".png"):
            raise ValueError(f"--out: expected a name that ends in .png, got {args.out!r}")
        out = absolute(args.out)
        image = read_image(expanded(args.image))  # before the model, which takes longer
        asked = load_model(args.model_type, args.checkpoint, args.device)
        sheet, lines = look(asked, image, args.question, args.answer, args.queries or [])
        with whole_or_nothing(out) as temporary:
            sheet.save(temporary, "PNG")
    except (*TOLD, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*lines, str(out)]))
    return 0


def look(
    asked: Asked, image: Image.Image, question: str = "", answer: str = "", queries: Sequence[int] = ()
) -> Tuple[Image.Image, List[str]]:
    """The picture of one answer, or caption, and lines that say what is in it.

    Raises:
        ValueError: for a query that the model has not, or a connector without attention maps.
    """
    samples = asked.samples(image, question)
    said = None if answer else asked.answer(samples, num_beams=1)
    samples["answer"] = [answer or (said.answer if said else "")]
    maps = asked.model.attention_maps(samples)
    num_queries = maps.cross.shape[3]
    wrong = [q for q in queries if not 0 <= q < num_queries]
    if wrong:
        raise ValueError(f"--queries: expected numbers from 0 to {num_queries - 1}, got {wrong[0]}")
    seen = image.resize((224, 224), Image.Resampling.BICUBIC)
    trace = maps.answers[0]
    shown = [(seen, "the image"), *_of_answer(seen, maps, trace), *(_of_query(seen, maps, q) for q in queries)]
    lines = [f"{'answer' if question else 'caption'}: {trace.answer}"]
    if said is not None:
        lines.append(f"confidence: {math.exp(min(0.0, said.log_prob)):.2f}")
    if maps.num_prefix:
        share = maps.prefix_share()[0]
        shown.append((share_table(share), "the prefix's share of the Q-Former's attention, by layer and head"))
        lines.append(f"attention to the prefix: {share.mean():.0%} (the mean over layers, heads and queries)")
    title = f"{question or 'Caption:'} {trace.answer}"
    return panels(title, shown), lines


def _of_answer(seen: Image.Image, maps: AttentionMaps, trace: AnswerTrace) -> List[Panel]:
    """The whole answer, and each of its tokens where there are several, by rollout."""
    said = len(trace.tokens) - (trace.tokens[-1] == "\n" and len(trace.tokens) > 1)  # without the closing newline
    places, prefix = trace.sources.places[:said], trace.sources.prefix[:said].sum(-1)
    shown = [(heat_map(seen, maps.on_grid(places.mean(0))), _text("the answer", places.mean(0), prefix.mean()))]
    if said > 1:
        for i in range(min(said, TOKENS_SHOWN)):
            text = _text(repr(trace.tokens[i]), places[i], prefix[i])
            shown.append((heat_map(seen, maps.on_grid(places[i])), text))
    return shown


def _of_query(seen: Image.Image, maps: AttentionMaps, query: int) -> Panel:
    """What a query looks at, the mean over layers and heads."""
    weights = maps.cross[0, :, :, query].mean((0, 1))
    places, prefix = weights[maps.num_prefix :], weights[: maps.num_prefix].sum()
    return heat_map(seen, maps.on_grid(places)), _text(f"query {query}", places, prefix)


def _text(name: str, places: Tensor, prefix: Tensor) -> str:
    return f"{name}: image {float(places.sum()):.0%}, prefix {float(prefix):.0%}"

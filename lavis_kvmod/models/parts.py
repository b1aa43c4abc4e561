"""What is trained and what is frozen, and the parts as a table: how many parameters, in what dtype, how many bytes."""

from typing import Iterable, List, NamedTuple, Sequence, Tuple, Union

from torch import nn


def train_only(model: nn.Module, parts: Iterable[str]) -> None:
    """Freeze ``model``, but for the modules and parameters of these attribute names."""
    model.requires_grad_(False)
    for part in parts:
        getattr(model, part).requires_grad_(True)


class PartSummary(NamedTuple):
    """One row of the table of parts."""

    part: str
    parameters: int
    trained: bool
    dtype: str
    bytes: int


def summarise(name: str, part: Union[nn.Module, nn.Parameter]) -> PartSummary:
    """The row of a module or a single parameter."""
    parameters: List[nn.Parameter] = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
    dtypes = sorted({str(p.dtype).replace("torch.", "") for p in parameters})
    return PartSummary(
        name,
        sum(p.numel() for p in parameters),
        any(p.requires_grad for p in parameters),
        "+".join(dtypes),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def parts_table(parts: Sequence[PartSummary]) -> str:
    """A text table of the parts, with the totals trained, frozen and together."""
    rows = [_cells(p.part, p.parameters, "trained" if p.trained else "frozen", p.dtype, p.bytes) for p in parts]
    totals = {"all trained": [p for p in parts if p.trained], "all frozen": [p for p in parts if not p.trained]}
    for name, members in {**totals, "all": list(parts)}.items():
        rows.append(_cells(name, sum(p.parameters for p in members), "", "", sum(p.bytes for p in members)))
    head = ("part", "parameters", "state", "dtype", "bytes")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:<{widths[3]}}  {e:>{widths[4]}}"
        for a, b, c, d, e in [head, *rows]
    )


def _cells(name: str, parameters: int, state: str, dtype: str, size: int) -> Tuple[str, str, str, str, str]:
    return name, f"{parameters:,}", state, dtype, f"{size:,}"

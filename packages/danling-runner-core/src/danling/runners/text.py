"""Numbers, blocks and tables as plain text, the same in a terminal and in a log file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .scalars import flatten


def format_number(value: Any) -> str:
    """A number as people read it in a column; anything else as `str` has it.

    Examples:
        >>> [format_number(v) for v in (0.123456, 3e-4, 12, 7317.8598, 123456.7, 0.0, float("nan"), None)]
        ['0.1235', '3.000e-04', '12', '7317.9', '1.235e+05', '0.0000', 'nan', '-']
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if math.isfinite(value) and value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3e}"
    return f"{value:.4f}" if not abs(value) >= 100 else f"{value:.1f}"


def values_line(values: Mapping[str, Any]) -> str:
    """Numbers by name on one line; those that four digits give exactly are written that way.

    Examples:
        >>> values_line({"loss": 0.123456, "lr": 3e-4, "momentum": 0.9, "skipped": 2})
        'loss 0.1235  lr 0.0003  momentum 0.9  skipped 2'
    """

    def short(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else ""
        return text if text and float(text) == value else format_number(value)

    return "  ".join(f"{name} {short(value)}" for name, value in flatten(values).items())


def format_duration(seconds: float | None) -> str:
    """Seconds as ``h:mm:ss``, with days when there are any.

    Examples:
        >>> [format_duration(s) for s in (None, 0.25, 75, 3661, 200000)]
        ['-', '0.2s', '0:01:15', '1:01:01', '2d 7:33:20']
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02d}:{second:02d}"


def format_size(size: float) -> str:
    """Bytes in the largest unit that keeps the number above one.

    Examples:
        >>> [format_size(n) for n in (17, 2048, 5 * 1024**2, 3.5 * 1024**3)]
        ['17 B', '2.0 KiB', '5.0 MiB', '3.5 GiB']
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def block(title: str, facts: Mapping[str, Any]) -> str:
    """A title and aligned facts beneath it; facts that are None are left out.

    Examples:
        >>> print(block("run digits", {"stack": "torch", "seed": None, "directory": "experiments"}))
        run digits
          stack      torch
          directory  experiments
    """
    known = {name: format_number(value) for name, value in facts.items() if value is not None}
    width = max((len(name) for name in known), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in known.items())])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Columns aligned by blanks: text to the left, numbers to the right.

    Args:
        header: one name per column.
        rows: as many cells each.
        width: columns that do not fit into this many characters move into a further table below, which repeats the
            first.

    Examples:
        >>> print(table(["split", "loss", "acc"], [["train", "0.5", "0.91"], ["val", "12.5", "0.87"]]))
        split  loss   acc
        train   0.5  0.91
        val    12.5  0.87
    """
    widths = [max(len(str(cell)) for cell in column) for column in zip(header, *rows, strict=True)]
    numeric = [i > 0 and all(_looks_numeric(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str], columns: Sequence[int]) -> str:
        padded = (f"{cells[i]:>{widths[i]}}" if numeric[i] else f"{cells[i]:<{widths[i]}}" for i in columns)
        return "  ".join(padded).rstrip()

    parts = []
    for columns in _fitting(widths, width):
        parts.append("\n".join(line(cells, columns) for cells in (header, *rows)))
    return "\n\n".join(parts)


def evaluation_table(
    row: Mapping[str, Mapping[str, Any]],
    best: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    mark: tuple[str, str] | None = None,
    width: int | None = None,
) -> str:
    """The table after an evaluation: a line per split, a column per metric.

    Args:
        row: ``{split: {metric: value}}``; metrics may be nested. Values that are no scalars are left out.
        best: the best row before this one, shown in brackets beside each value.
        mark: split and metric of the score if this row is the new best; marked with a star.
        width: of the terminal.

    Examples:
        >>> best = {"val": {"loss": 0.31, "acc": 0.9}}
        >>> row = {"train": {"loss": 0.25}, "val": {"loss": 0.3, "acc": 0.9125}}
        >>> print(evaluation_table(row, best, mark=("val", "acc")))
        split  loss             acc
        train  0.2500           -
        val    0.3000 (0.3100)  0.9125* (0.9000)
    """
    flat = {split: flatten(metrics) for split, metrics in row.items() if isinstance(metrics, Mapping)}
    before = {split: flatten(metrics) for split, metrics in (best or {}).items() if isinstance(metrics, Mapping)}
    names = list(dict.fromkeys(name for metrics in flat.values() for name in metrics))

    def cell(split: str, name: str) -> str:
        star = "*" if (split, name) == mark else ""
        old = before.get(split, {}).get(name)
        beside = "" if old is None or name not in flat[split] else f" ({format_number(old)})"
        return format_number(flat[split].get(name)) + star + beside

    return table(["split", *names], [[split, *(cell(split, name) for name in names)] for split in flat], width=width)


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True


def _fitting(widths: Sequence[int], width: int | None) -> list[list[int]]:
    groups: list[list[int]] = []
    used = 0
    for index in range(1, len(widths)):
        cost = widths[index] + 2
        if not groups or (width is not None and used + cost > width):
            groups.append([0])
            used = widths[0]
        groups[-1].append(index)
        used += cost
    return groups or [[0]]

"""``danling plot RUN...``"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..atomic import write_bytes
from ..trackers.jsonl import read_metrics
from .main import CommandError
from .run_files import RunFiles, find_run

NOT_METRICS = {"time", "attempt", "event", "global_step", "epoch", "split"}
FORMATS = (".png", ".html", ".svg", ".pdf")
MOST_PANELS = 12


@dataclass
class Curve:
    """One line: a metric of a split of a run, over ``global_step``."""

    run: str
    split: str
    metric: str
    dense: bool
    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    parser.add_argument(
        "--metric",
        metavar="M",
        action="append",
        help="`loss`, or `val/loss` for one split; repeatable; default: every metric that is evaluated",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="metrics.png",
        help="*.png, *.html, *.svg or *.pdf; default: metrics.png",
    )


def run(args: argparse.Namespace) -> int:
    """Write the picture."""
    output = Path(args.output)
    if output.suffix.lower() not in FORMATS:
        raise CommandError(f"{output}: must end in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise CommandError(f"{output.parent}: no such directory")
    runs = [find_run(path) for path in args.runs]
    labels = _labels(runs)
    curves = [curve for files, label in zip(runs, labels, strict=True) for curve in read_curves(files, label)]
    panels = choose_panels(curves, args.metric)
    write_bytes(output, _render(panels, output.suffix.lower(), ", ".join(labels)))
    print(output)
    return 0


def read_curves(files: RunFiles, label: str) -> list[Curve]:
    """Every curve in the run's ``metrics.jsonl``; what training logs between evaluations is ``dense``."""
    try:
        rows = read_metrics(files.dir)
    except FileNotFoundError:
        raise CommandError(f"{files.dir} has no metrics.jsonl: nothing was logged yet") from None
    curves: dict[tuple[str, str, bool], Curve] = {}
    for row in rows:
        if row["event"] not in ("log", "evaluate", "epoch"):
            continue
        dense, split = row["event"] == "log", row.get("split") or ""
        for metric, value in row.items():
            if metric in NOT_METRICS or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            curve = curves.setdefault((split, metric, dense), Curve(label, split, metric, dense))
            curve.steps.append(row["global_step"])
            curve.values.append(value)
    return list(curves.values())


def choose_panels(curves: Sequence[Curve], wanted: Iterable[str] | None) -> dict[str, list[Curve]]:
    """The curves of each panel, by title.

    Raises:
        CommandError: a wanted metric was never logged, or nothing was.
    """
    panels: dict[str, list[Curve]] = {}
    if wanted:
        for name in wanted:
            found = [c for c in curves if name in (c.metric, f"{c.split}/{c.metric}")]
            if not found:
                known = sorted({f"{c.split}/{c.metric}" if c.split else c.metric for c in curves})
                raise CommandError(f"--metric {name}: never logged; there is {', '.join(known) or 'nothing'}")
            panels[name] = found
        return panels
    names = dict.fromkeys(c.metric for c in curves if not c.dense) or dict.fromkeys(c.metric for c in curves)
    if not names:
        raise CommandError("nothing to plot: no metric was logged yet")
    return {name: [c for c in curves if c.metric == name] for name in list(names)[:MOST_PANELS]}


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    names = [files.name for files in runs]
    labels = [
        name if names.count(name) == 1 else f"{name}-{files.config_id or files.dir.name}"
        for name, files in zip(names, runs, strict=True)
    ]
    return [label if labels.count(label) == 1 else str(files.dir) for label, files in zip(labels, runs, strict=True)]


def _render(panels: dict[str, list[Curve]], suffix: str, title: str) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plotting needs matplotlib: pip install "danling-runner-core[plot]"') from None
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    one_run = len({curve.run for curves in panels.values() for curve in curves}) == 1
    everything = [curve for curves in panels.values() for curve in curves]
    colours = list(dict.fromkeys(c.split if one_run else c.run for c in everything))
    styles = list(dict.fromkeys(c.split for c in everything))
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for curve in sorted(curves, key=lambda c: not c.dense):
            sparse = any(
                c is not curve and not c.dense and (c.run, c.split) == (curve.run, curve.split) for c in curves
            )
            faint = curve.dense and sparse
            label = curve.split if one_run else f"{curve.run} {curve.split}"
            axis.plot(
                curve.steps,
                curve.values,
                color=f"C{colours.index(curve.split if one_run else curve.run) % 10}",
                linestyle="-" if one_run else ("-", "--", ":", "-.")[styles.index(curve.split) % 4],
                linewidth=0.9 if faint else 1.6,
                alpha=0.4 if faint else 1.0,
                marker=None if curve.dense or len(curve.steps) > 60 else ".",
                label=None if faint else label,
            )
        axis.set_title(name)
        axis.set_xlabel("global_step")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.25)
    for axis in list(axes):
        axis.set_visible(False)
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    _add_legend(figure, handles)
    figure.suptitle(title)
    return _page(figure, title) if suffix == ".html" else _bytes(figure, suffix[1:])


def _add_legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """Put a legend under the curves, in as many columns, of up to four, as there is room for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(len(handles), 4), 0, -1):
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def _bytes(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


def _page(figure: Any, title: str) -> bytes:
    svg = _bytes(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    return (
        f"<!doctype html>{os.linesep}<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>body{{margin:1rem}}svg{{max-width:100%;height:auto}}</style></head><body>{svg}</body></html>\n"
    ).encode()

"""Pictures of measurements, where matplotlib is installed, and the tables behind them."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import AmberError


def pyplot(option: str, hint: str = "") -> Any:
    """matplotlib.pyplot, drawing to files. AmberError where it is missing; the hint says what else
    can be done."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise AmberError(
            f"{option} needs matplotlib: pip install 'amber-llm[plots]'{hint} ({error})"
        ) from error
    return plt


def outputs(name: str) -> tuple[str | None, str | None]:
    """(name of the table, name of the picture): of a name that ends so, the one; else both."""
    if name.endswith(".csv"):
        return name, None
    if name.endswith((".png", ".svg", ".pdf")):
        return None, name
    return f"{name}.csv", f"{name}.png"


def write_table(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        sheet = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        sheet.writeheader()
        sheet.writerows(rows)


def heat_maps(
    path: str, title: str, rows: Sequence[Mapping[str, Any]], values: Mapping[str, str]
) -> None:
    """One map, layers down and projections across, for every column of the rows in `values` (its
    name: what to call it). None and 0 stay white."""
    import numpy as np
    from matplotlib.colors import LogNorm

    plt = pyplot("a picture")
    layers = sorted({row["layer"] for row in rows})
    names = list(dict.fromkeys(row["projection"] for row in rows))
    figure, axes = plt.subplots(
        1, len(values), figsize=(1 + 0.75 * len(names) * len(values), 1.6 + 0.26 * len(layers)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (column, label) in zip(axes[0], values.items(), strict=True):
        grid = np.full((len(layers), len(names)), np.nan)
        for row in rows:
            if row[column]:
                place = layers.index(row["layer"]), names.index(row["projection"])
                grid[place] = row[column]
        norm = LogNorm() if np.isfinite(grid).any() else None
        image = axis.imshow(grid, aspect="auto", norm=norm, cmap="YlOrRd")
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                # Dark text on light fields and the other way round.
                level = image.norm(value)
                colour = "white" if level > 0.6 else "black"
                axis.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(layers)), layers)
        axis.set_ylabel("layer")
        axis.set_title(label, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def trade_offs(
    path: str, title: str, rows: Sequence[Mapping[str, Any]], across: Mapping[str, str],
    up: Mapping[str, str],
) -> None:  # fmt: skip
    """A panel for every pair of columns (name: what to call it), with a point for every row, its
    "plan" beside it, and a line through those that nothing beats."""
    plt = pyplot("a picture")
    figure, axes = plt.subplots(
        len(up), len(across), figsize=(6.5 * len(across), 4.2 * len(up)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, (y, y_label) in zip(axes, up.items(), strict=True):
        for axis, (x, x_label) in zip(line, across.items(), strict=True):
            known = [row for row in rows if row[x] is not None and row[y] is not None]
            axis.scatter([row[x] for row in known], [row[y] for row in known], s=14)
            best = sorted((row[x], row[y]) for row in front(known, x, y))
            axis.plot(*zip(*best, strict=True), linewidth=1, alpha=0.6)
            for row in known:
                axis.annotate(row["plan"], (row[x], row[y]), fontsize=6, xytext=(3, 2),
                              textcoords="offset points")  # fmt: skip
            if all(row[y] > 0 for row in known):
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
                axis.yaxis.set_minor_formatter(
                    lambda v, _: f"{v:g}" if f"{v:e}"[0] in "235" else ""
                )
            axis.margins(x=0.12)  # room for the names
            axis.set_xlabel(x_label)
            axis.set_ylabel(y_label)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def front(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Mapping[str, Any]]:
    """Rows that no other beats: as much x for less y, or more x for as little."""
    return [
        row
        for row in rows
        if not any(
            other[x] >= row[x] and other[y] <= row[y] and (other[x], other[y]) != (row[x], row[y])
            for other in rows
        )
    ]

"""What pruning costs each projection by itself.

e_q (arXiv 2508.02128) is local: ||Y - Y'|| / ||Y|| over all tokens of a text, Y being what the
projection makes of its input in the dense model, and Y' what it makes of the same input pruned. KL
is the whole model's: the divergence of the dense model's predictions from those of the model with
this one projection sparse.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import ArgumentError
from .timing import PROJECTIONS, Cell, Plan

if TYPE_CHECKING:
    import numpy as np

SOURCES = {"q": ("q", "k", "v"), "o": ("o",), "gate": ("gate", "up"), "down": ("down",)}


def output_errors(
    path: str,
    sparse: str,
    cells: Sequence[Cell] | Plan,
    windows: Sequence[Sequence[int]],
    threads: int | None = None,
    progress: Callable[[int, int], Any] = lambda *_: None,
    **methods: Any,
) -> dict[Cell, float]:
    """e_q of some cells under a plan. Cells that have no single matrix (experts) are left out."""
    import numpy as np

    wanted = set(cells)
    totals: dict[Cell, list[float]] = {}
    n_ctx = max(map(len, windows))
    common: dict[str, Any] = {"threads": threads, "n_ctx": n_ctx, "device": "cpu"}
    with (
        Engine(path, sparse="off", **common) as dense,
        Engine(path, sparse=sparse, evaluation=True, **methods, **common) as pruned,
        pruned.session(n_ctx=n_ctx) as ruler,
    ):
        matrices = pruned.info.matrices

        def tap(layer: int, source: str, _position: int, rows: "np.ndarray") -> None:
            for name in SOURCES[source]:
                if (layer, name) not in wanted:
                    continue
                n_out = matrices[layer][PROJECTIONS.index(name)][0]
                try:
                    whole = ruler.project(layer, name, rows, n_out, pruned=False)
                except ArgumentError:
                    wanted.discard((layer, name))
                    continue
                whole = whole.astype(np.float64)
                lost = whole - ruler.project(layer, name, rows, n_out)
                sums = totals.setdefault((layer, name), [0.0, 0.0])
                sums[0] += float(np.sum(lost * lost))
                sums[1] += float(np.sum(whole * whole))

        with dense.session(n_ctx=n_ctx, tap=tap) as session:
            for i, window in enumerate(windows):
                session.score(list(window))
                progress(i + 1, len(windows))
    return {cell: math.sqrt(lost / whole) if whole else 0.0
            for cell, (lost, whole) in sorted(totals.items())}  # fmt: skip

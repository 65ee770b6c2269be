"""The rival that papers on activation sparsity compare with: N:M magnitude pruning of weights.

Of every M consecutive weights of an output row the N largest by magnitude stay (the row WT of arXiv
2509.22166). Nothing is calibrated or trained. It holds in prefill and in decode.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import quantize
from .engine import Engine
from .errors import AmberError, ArgumentError
from .timing import Plan, read_pattern

if TYPE_CHECKING:
    import numpy as np


def prune(rows: "np.ndarray", n: int, m: int) -> "np.ndarray":
    """Weights [..., n_in] with zeros for all but the n largest of every m; of equals the first
    stays. The last group may be short: it is filled up with zeros."""
    import numpy as np

    n_in = rows.shape[-1]
    groups = np.pad(rows.reshape(-1, n_in), ((0, 0), (0, -n_in % m))).reshape(-1, m)
    size = np.abs(groups)
    least = np.partition(size, m - n, axis=1)[:, m - n, None]
    kept = size > least
    equal = size == least
    kept |= equal & (np.cumsum(equal, axis=1) <= n - kept.sum(axis=1, keepdims=True))
    return (
        np.where(kept, groups, groups.dtype.type(0))
        .reshape(-1, n_in + -n_in % m)[:, :n_in]
        .reshape(rows.shape)
    )


def full_text(text: str) -> str:
    """ "N:M", "N:M@projections" or "N:M@projections#layers" as a plan of its scope, without one of
    all matrices. ArgumentError where it is none of these."""
    head, at, _ = text.partition("@")
    pattern = read_pattern(head.partition("#")[0])
    if not pattern or pattern.suffix or ";" in text:
        raise ArgumentError(f"--prune-weights: expected N:M or N:M@projections, found {text!r}")
    return text if at else text.replace(head.partition("#")[0], f"{pattern}@all", 1)


def plan_of(text: str, path: str, threads: int | None = None) -> Plan:
    """The matrices that this prunes, in the model at `path`."""
    from . import calibrate

    full = full_text(text)
    with Engine(path, sparse=full, device="cpu", threads=threads) as engine:
        return calibrate.expand(full, engine.info, ())


def write_pruned(
    path: str, out: str, plan: Plan, progress: Callable[[int, int], Any] = lambda *_: None
) -> None:
    """Writes an Amber GGUF of a model whose weights are pruned as the plan's patterns say."""
    from . import smooth

    source = quantize.Source(path)
    if source.packed:
        raise AmberError(f"{path}: --prune-weights: expected a source file, found an Amber GGUF")
    names = {}
    for (layer, projection), method in plan.items():
        for end in ("", "_shexp", "_exps"):
            names[f"blk.{layer}.{smooth.TENSORS[projection]}{end}.weight"] = read_pattern(method)
    plain = source.rows

    def rows(name: str, first: int = 0, last: int | None = None) -> "np.ndarray":
        pattern = names.get(name)
        values = plain(name, first, last)
        return prune(values, pattern.n, pattern.m) if pattern else values

    source.rows = rows
    quantize.write_packed(source, os.fspath(out), quantize.base_keys(source), progress)

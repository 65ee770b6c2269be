"""How long a prompt must be for a sparsity plan to be faster than dense prefill on this machine.

`sparse="auto"` runs shorter prompts dense. The answer comes from a table that is measured once per
machine, a fraction of a second per pattern, and then read: the same table always gives the same
answer. The table is `crossover.json` in $XDG_CACHE_HOME/amber (~/.cache/amber), {key: {pattern:
{rows: ratio}}}, where the key names CPU, kernel column, threads and version, and the ratio is the
time of a pruned product and what precedes it to the dense one's, for batches of so many tokens and
weights that come from memory. A table that cannot be written is measured again each time; to
measure anew, delete it.
"""

import contextlib
import functools
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .engine import NEVER_SPARSE
from .kernel_bench import Case, take_turns

# Batches of fewer tokens than the first are never multiplied over lists: see MIN_LISTED in ops.h.
ROWS = (24, 32, 48, 64, 96, 128, 256)
SHAPE = (2048, 2048)  # outputs x inputs: of the order of a small model's, where lists cost most
REPEATS = 5

Ratios = dict[int, float]


def min_tokens(shares: Mapping[str, float], ratios: Mapping[str, Ratios]) -> int:
    """The least batch from which on the whole plan is faster than dense; NEVER_SPARSE: none is.

    shares: of the layers' multiplications, by the pattern that prunes their input; the rest is
    dense. ratios: by pattern and rows, as measured.
    """
    best = NEVER_SPARSE
    for rows in sorted(ROWS, reverse=True):
        saved = sum(share * (1 - ratios[pattern][rows]) for pattern, share in shares.items())
        if saved <= 0:
            break
        best = rows
    return best


def measure(pattern: str, isa: str, threads: int) -> Ratios:
    """Time of the pruned product and its input to the dense one's, by rows."""
    found = {}
    n_out, n_in = SHAPE
    cases = [
        Case(kernel, rows, n_out if kernel == "gemm" else 0, n_in, p, cold=True)
        for rows in ROWS
        for p in ("dense", pattern)
        for kernel in ("gemm", "prepare")
    ]
    best = [min(seconds) for seconds in take_turns(cases, isa, threads, REPEATS)]
    for i, rows in enumerate(ROWS):
        gemm, prepare, sparse_gemm, sparse_prepare = best[4 * i : 4 * i + 4]
        found[rows] = (sparse_gemm + sparse_prepare) / (gemm + prepare)
    return found


def table_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "amber" / "crossover.json"


def read_table(path: Path) -> dict[str, Any]:
    """What the file holds; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        table = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(table, dict):
            return table
    return {}


def _as_ratios(entry: Any) -> Ratios | None:
    """An entry as it was written; None for anything else."""
    if not isinstance(entry, dict) or set(entry) != {str(rows) for rows in ROWS}:
        return None
    if not all(isinstance(value, (int, float)) and value > 0 for value in entry.values()):
        return None
    return {int(rows): float(value) for rows, value in entry.items()}


def _write_table(path: Path, table: Mapping[str, Any]) -> None:
    """All or nothing, also beside others that write."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="crossover")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(table, file, indent=1)
            os.replace(name, path)
        except OSError:
            os.unlink(name)


@functools.cache
def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_min_tokens(shares: Mapping[str, float], isa: str, threads: int) -> int:
    """min_tokens by this machine's table, which is measured where it lacks a pattern."""
    from . import __version__

    path = table_path()
    table = read_table(path)
    key = f"{cpu_name()} | {isa} | {threads} threads | amber {__version__}"
    known = table.get(key)
    ratios = {p: _as_ratios(known.get(p)) if isinstance(known, dict) else None for p in shares}
    missing = [pattern for pattern, entry in ratios.items() if entry is None]
    for pattern in missing:
        # As it will be read again: this run decides as the next ones do.
        ratios[pattern] = {rows: round(r, 4) for rows, r in measure(pattern, isa, threads).items()}
    if missing:
        table = read_table(path)  # others may have written meanwhile
        old = table.get(key) if isinstance(table.get(key), dict) else {}
        _write_table(path, table | {key: old | {p: ratios[p] for p in missing}})
    return min_tokens(shares, ratios)

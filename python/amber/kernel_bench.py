"""The kernels of the engine by themselves: `amber-bench --kernels`.

Every kernel runs on one thread. The cases of one kernel and shape take turns within each
repetition; seconds are CPU time of that thread. A row holds the seconds of one call; `speedup` is the dense
case over it, by medians. share_of_peak holds products of many rows against the INT8
operations of this machine (what a sparse product skips counts as done, so that it may pass 1), and
what waits for memory, products of up to 16 rows and attention of one, against its reads.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ._lib import check, ffi, lib
from .engine import isa_list

KEYS = (
    "kernel", "pattern", "rows", "n_out", "n_in", "depth", "isa", "seconds", "seconds_min",
    "rate", "unit", "speedup", "share_of_peak", "repeats", "commit", "cpu",
)  # fmt: skip

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
FEW_ROWS = (1, 4, 8, 16)
PATTERNS = ("dense", "4:16x4t2", "8:16x4t2", "12:16x4t2", "8:16x4", "8:16")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
FROM_MEMORY = 16  # rows up to which a product waits for its weights


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel: `rows` rows against [n_out, n_in] weights, or attention of `rows` tokens behind
    `depth` others."""

    kernel: str  # "gemm" | "prepare" | "attention"
    rows: int
    n_out: int = 0
    n_in: int = 0
    pattern: str = "dense"
    depth: int = 0

    def work(self) -> tuple[float, str]:
        """What one call does, and its unit per second: GMAC, GB or G (elements)."""
        if self.kernel == "prepare":
            return self.rows * self.n_in / 1e9, "G/s"
        if self.kernel == "gemm":
            many = self.rows > FROM_MEMORY
            return self.n_out * self.n_in * (self.rows if many else 1) / 1e9, (
                "GMAC/s" if many else "GB/s"
            )
        if self.rows == 1:
            return 4 * (self.depth + 1) * KV_HEADS * HEAD_DIM / 1e9, "GB/s"
        pairs = self.rows * self.depth + self.rows * (self.rows + 1) / 2
        return 2 * pairs * HEADS * HEAD_DIM / 1e9, "GMAC/s"


class Timer:
    """Holds the operands of a case. Errors: ArgumentError, OutOfMemoryError."""

    def __init__(self, case: Case, isa: str) -> None:
        names = [ffi.new("char[]", text.encode()) for text in (isa, case.kernel, case.pattern)]
        described = ffi.new("amber_kernel_case *")
        described.isa, described.kernel, described.pattern = names
        described.rows, described.n_out, described.n_in = case.rows, case.n_out, case.n_in
        described.depth, described.head_dim = case.depth, HEAD_DIM
        described.n_head, described.n_head_kv = HEADS, KV_HEADS
        out, err = ffi.new("amber_kernel_timer **"), ffi.new("amber_error *")
        check(lib.amber_kernel_timer_new(described, out, err), err)
        self._pointer = ffi.gc(out[0], lib.amber_kernel_timer_free)

    def seconds(self) -> float:
        return lib.amber_kernel_timer_run(self._pointer)

    def close(self) -> None:
        ffi.release(self._pointer)


def groups(rows: Sequence[int], depths: Sequence[int], patterns: Sequence[str]) -> list[list[Case]]:
    """Cases that are measured together; the first of a group is its dense one."""
    found = []
    for n_out, n_in in SHAPES:
        found += [[Case("gemm", r, n_out, n_in)] for r in FEW_ROWS]
        found += [[Case("gemm", r, n_out, n_in, p) for p in patterns] for r in rows]
    for r in rows:
        for n_in in sorted({n_in for _, n_in in SHAPES}):
            found.append([Case("prepare", r, 0, n_in, p) for p in patterns])
    for depth in depths:
        found += [[Case("attention", r, depth=depth)] for r in (1, *rows) if depth or r > 1]
    return found


def measure_group(
    cases: Sequence[Case], isa: str, repeats: int, limits: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """Rows with KEYS but commit and cpu. limits: INT8 operations and bytes read per second."""
    timers: list[Timer] = []
    try:
        for case in cases:
            timers.append(Timer(case, isa))
        seconds: list[list[float]] = [[] for _ in cases]
        for repeat in range(repeats + 1):  # the first warms up
            for timer, found in zip(timers, seconds, strict=True):
                value = timer.seconds()
                if repeat:
                    found.append(value)
    finally:
        for timer in timers:
            timer.close()
    ops, read = limits
    dense = statistics.median(seconds[0])
    for case, found in zip(cases, seconds, strict=True):
        amount, unit = case.work()
        middle = statistics.median(found)
        share = None
        if unit == "GB/s":
            share = amount * 1e9 / middle / read
        elif case.kernel == "gemm":
            share = 2e9 * amount / middle / ops
        yield {
            "kernel": case.kernel, "pattern": case.pattern, "rows": case.rows,
            "n_out": case.n_out, "n_in": case.n_in, "depth": case.depth, "isa": isa,
            "seconds": middle, "seconds_min": min(found), "rate": amount / middle, "unit": unit,
            "speedup": dense / middle, "share_of_peak": share, "repeats": repeats,
        }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    head = [
        "kernel",
        "pattern",
        "rows",
        "shape",
        "isa",
        "ms",
        "min ms",
        "rate",
        "x dense",
        "of peak",
    ]
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for r in rows:
        shape = f"{r['n_out']} x {r['n_in']}" if r["n_out"] else f"{r['n_in']}"
        if r["kernel"] == "attention":
            shape = f"{HEADS}/{KV_HEADS} x {HEAD_DIM} @ {r['depth']}"
        share = r["share_of_peak"]
        cells = [
            r["kernel"], r["pattern"], str(r["rows"]), shape, r["isa"],
            f"{1e3 * r['seconds']:.3f}", f"{1e3 * r['seconds_min']:.3f}",
            f"{r['rate']:.2f} {r['unit']}", f"{r['speedup']:.2f}",
            "-" if share is None else f"{share:.2f}",
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def default_isas() -> list[str]:
    return isa_list()[:1]

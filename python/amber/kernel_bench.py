"""The kernels of the engine by themselves: `amber-bench --kernels`, and a time model of plans.

A row (`--json`: one object per line, `--csv`: one line; keys as in KEYS) is one kernel with one
shape:

kernel   "gemm": y [rows, n_out] = x [rows, n_in] W^T in INT8, the rows of x already pruned by
         `pattern` ("dense": not at all), quantized and listed. Up to 16 rows W comes from memory
         each time, as in decode; with more rows the same W is read again and again.
         "prepare": what precedes it, `rows` rows of n_in float32 pruned, quantized and listed;
         n_out is 0. Projections that read the same input and have the same rule share it.
         "attention": `rows` tokens behind `depth` others, 32 query heads and 8 cache heads of 64,
         keys and values kept as `kv_type` (null for other kernels).
seconds  of one call, the median over `repeats`; `seconds_min` is the least. With one thread the
         thread's CPU time, with several the clock.
rate     what a call does in `unit` per second: "GMAC/s" counts what a sparse product skips as
         done, "GB/s" the bytes of W or of the cache, "G/s" elements.
speedup  of the dense case of the same kernel, rows and shape over it (of the first kv_type, in
         attention), by medians; the cases that are compared take turns within each repetition.
share_of_peak  of this machine's INT8 operations (gemm of more than 16 rows; may pass 1 where the
         product skips) or of its memory reads (gemm of fewer rows, attention of one); else null.
threads, isa, repeats, commit, cpu   how and where it was measured.

A layer of a plan takes, for `rows` tokens, the sum over its inputs of prepare(pattern, rows, n_in)
and over its projections of gemm(pattern, rows, n_out, n_in); time is proportional to n_out to
within a few per cent, so that `--shapes` needs only a model's distinct n_in.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ._lib import check, ffi, lib
from .engine import isa_list
from .session import KV_TYPES

KEYS = (
    "kernel", "pattern", "rows", "n_out", "n_in", "depth", "kv_type", "threads", "isa", "seconds",
    "seconds_min", "rate", "unit", "speedup", "share_of_peak", "repeats", "commit", "cpu",
)  # fmt: skip

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
FEW_ROWS = (1, 4, 8, 16)
PATTERNS = ("dense", "4:16x4t2", "8:16x4t2", "12:16x4t2", "8:16x4", "8:16")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
FROM_MEMORY = 16  # rows up to which a product waits for its weights


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel: `rows` rows against [n_out, n_in] weights, or attention of `rows` tokens behind
    `depth` others. cold: the weights come from memory each time, however many rows there are."""

    kernel: str  # "gemm" | "prepare" | "attention"
    rows: int
    n_out: int = 0
    n_in: int = 0
    pattern: str = "dense"
    depth: int = 0
    cold: bool = False
    kv_type: str = "f16"  # of attention

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
            row = HEAD_DIM + 4 if self.kv_type == "int8" else 2 * HEAD_DIM
            return 2 * (self.depth + 1) * KV_HEADS * row / 1e9, "GB/s"
        pairs = self.rows * self.depth + self.rows * (self.rows + 1) / 2
        return 2 * pairs * HEADS * HEAD_DIM / 1e9, "GMAC/s"


class Timer:
    """Holds the operands of a case. weights: a timer whose weights it borrows where the shapes
    agree. Errors: ArgumentError, OutOfMemoryError."""

    def __init__(
        self, case: Case, isa: str, threads: int = 1, weights: "Timer | None" = None
    ) -> None:
        names = [ffi.new("char[]", text.encode()) for text in (isa, case.kernel, case.pattern)]
        described = ffi.new("amber_kernel_case *")
        described.isa, described.kernel, described.pattern = names
        described.kv_type = KV_TYPES[case.kv_type]
        described.rows, described.n_out, described.n_in = case.rows, case.n_out, case.n_in
        described.threads, described.cold = threads, case.cold
        described.depth, described.head_dim = case.depth, HEAD_DIM
        described.n_head, described.n_head_kv = HEADS, KV_HEADS
        if weights is not None:
            described.weights = weights._pointer
        out, err = ffi.new("amber_kernel_timer **"), ffi.new("amber_error *")
        check(lib.amber_kernel_timer_new(described, out, err), err)
        self._pointer = out[0]
        self._lender = weights  # lives as long as this

    def seconds(self) -> float:
        return lib.amber_kernel_timer_run(self._pointer)

    def close(self) -> None:
        """May be called again. What it lent must be closed first."""
        lib.amber_kernel_timer_free(self._pointer)
        self._pointer = ffi.NULL


def take_turns(cases: Sequence[Case], isa: str, threads: int, repeats: int) -> list[list[float]]:
    """Seconds of the repetitions of each case, after one to warm up."""
    timers: list[Timer] = []
    try:
        for case in cases:
            timers.append(Timer(case, isa, threads, timers[0] if timers else None))
        seconds: list[list[float]] = [[] for _ in cases]
        for repeat in range(repeats + 1):
            for timer, found in zip(timers, seconds, strict=True):
                value = timer.seconds()
                if repeat:
                    found.append(value)
        return seconds
    finally:
        for timer in reversed(timers):
            timer.close()


def groups(
    rows: Sequence[int],
    depths: Sequence[int],
    patterns: Sequence[str],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    kv_types: Sequence[str] = ("f16",),
) -> list[list[Case]]:
    """Cases that are measured together; the first of a group is its dense one."""
    found = []
    for n_out, n_in in shapes:
        found += [[Case("gemm", r, n_out, n_in)] for r in FEW_ROWS]
        found += [[Case("gemm", r, n_out, n_in, p) for p in patterns] for r in rows]
    for r in rows:
        for n_in in sorted({n_in for _, n_in in shapes}):
            found.append([Case("prepare", r, 0, n_in, p) for p in patterns])
    for depth in depths:
        found += [
            [Case("attention", r, depth=depth, kv_type=kv_type) for kv_type in kv_types]
            for r in (1, *rows)
            if depth or r > 1
        ]
    return found


def measure_group(
    cases: Sequence[Case], isa: str, threads: int, repeats: int, limits: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """Rows with KEYS but commit and cpu. limits: INT8 operations and bytes read per second."""
    seconds = take_turns(cases, isa, threads, repeats)
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
            "n_out": case.n_out, "n_in": case.n_in, "depth": case.depth,
            "kv_type": case.kv_type if case.kernel == "attention" else None,
            "threads": threads,
            "isa": isa, "seconds": middle, "seconds_min": min(found), "rate": amount / middle,
            "unit": unit, "speedup": dense / middle, "share_of_peak": share, "repeats": repeats,
        }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    head = ["kernel", "pattern", "rows", "shape", "isa", "threads", "ms", "min ms", "rate",
            "x dense", "of peak"]  # fmt: skip
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for r in rows:
        shape = f"{r['n_out']} x {r['n_in']}" if r["n_out"] else f"{r['n_in']}"
        if r["kernel"] == "attention":
            shape = f"{HEADS}/{KV_HEADS} x {HEAD_DIM} @ {r['depth']} {r['kv_type']}"
        share = r["share_of_peak"]
        cells = [
            r["kernel"], r["pattern"], str(r["rows"]), shape, r["isa"], str(r["threads"]),
            f"{1e3 * r['seconds']:.3f}", f"{1e3 * r['seconds_min']:.3f}",
            f"{r['rate']:.2f} {r['unit']}", f"{r['speedup']:.2f}",
            "-" if share is None else f"{share:.2f}",
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def default_isas() -> list[str]:
    return isa_list()[:1]

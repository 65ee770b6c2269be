"""How long a prefill's projections take under a plan, modelled from times of single kernels.

Without a table the model is the arithmetic that is left: N of M multiplications, and for two-token
blocks (N:16x4t2) a line measured on AVX-512 VNNI. With a table (`amber-bench --kernels --json`) a
projection takes what the product of the nearest measured shape takes per multiplication, and its
input what pruning and quantizing the nearest measured width takes per value. A pattern between two
measured ones of its kind is interpolated in the share that it keeps; one whose kind was not
measured takes as long as the dense product, which is how the engine runs it.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError

if TYPE_CHECKING:
    from .engine import EngineInfo

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
READERS = {"q": 3, "k": 3, "v": 3, "gate": 2, "up": 2}  # of one input; others have their own
KEYS = ("kernel", "pattern", "rows", "n_out", "n_in", "isa", "seconds")

Cell = tuple[int, str]  # (layer, projection)
Plan = dict[Cell, str]  # "8:16x4t2/amber": pattern and methods of what runs sparse


@dataclass(frozen=True, slots=True)
class Pattern:
    """n of m blocks, and what follows: "x4t2"."""

    n: int
    m: int
    suffix: str

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{self.suffix}"

    @property
    def share(self) -> float:
        """Of the channels that are kept."""
        return self.n / self.m


def read_pattern(text: str) -> Pattern | None:
    """None for patterns that have no family of others: relief windows, top-k, dense."""
    found = re.fullmatch(r"(?:(\d+):)?(\d+)(x4t2|x4)?", text.strip())
    if not found:
        return None
    m = int(found[2])
    return Pattern(int(found[1] or m), m, found[3] or "")


def share_kept(text: str) -> tuple[str, float]:
    """(kind, share of the channels that are kept) of any pattern: the kinds are those whose times
    can be interpolated."""
    pattern = read_pattern(text)
    if pattern:
        return pattern.suffix, pattern.share
    if text.startswith("top"):
        return "top", int(text[3:-1]) / 100
    relief = re.fullmatch(r"2:4\+r(\d+)", text)
    return ("+r", 0.5 + 2 / int(relief[1])) if relief else (text, 0.5 if text != "dense" else 1.0)


class TimeModel:
    """Modelled seconds (without a table: multiplications) per token."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = (), source: str = "") -> None:
        """rows: of `amber-bench --kernels`; of several instruction sets or thread counts the first
        counts, of several numbers of rows the largest. source: where they come from, for messages.
        ArgumentError where they are no such rows."""
        self.products: dict[tuple[int, int], dict[str, float]] = {}
        self.inputs: dict[int, dict[str, float]] = {}
        self.name = "0.074 + 0.060 N for N:16x4t2, else N / M"
        usable = [row for row in rows if row.get("kernel") in ("gemm", "prepare")]
        if not source and not usable:
            return
        if not usable or any(key not in row for row in usable for key in KEYS):
            raise ArgumentError(f"{source}: expected what amber-bench --kernels --json prints")
        isa, threads = usable[0]["isa"], usable[0].get("threads")
        most = max(row["rows"] for row in usable)
        for row in usable:
            if (row["isa"], row.get("threads"), row["rows"]) != (isa, threads, most):
                continue
            if not row["seconds"] > 0:
                continue
            if row["kernel"] == "gemm":
                place = self.products.setdefault((row["n_out"], row["n_in"]), {})
            else:
                place = self.inputs.setdefault(row["n_in"], {})
            place[row["pattern"]] = row["seconds"] / most
        if not self.products or any("dense" not in times for times in self.products.values()):
            raise ArgumentError(f"{source}: expected products (gemm) of {most} rows, dense too")
        machine = usable[0].get("cpu", "a machine")
        self.name = f"kernels measured on {machine}, {isa}, {threads or 1} threads, {most} rows"

    @classmethod
    def read(cls, path: str | os.PathLike | None) -> "TimeModel":
        """From a file of `amber-bench --kernels --json`; None: without a table."""
        if path is None:
            return cls()
        try:
            with open(path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        except (ValueError, UnicodeDecodeError) as error:
            raise ArgumentError(
                f"{path}: expected what amber-bench --kernels --json prints, found {error}"
            ) from error
        if not all(isinstance(row, dict) for row in rows):
            raise ArgumentError(f"{path}: expected what amber-bench --kernels --json prints")
        return cls(rows, os.fspath(path))

    def projection(self, method: str, name: str, work: int, matrix: tuple[int, int]) -> float:
        """Time of one projection for one token. method: as in a Plan, or "dense"; work: its
        multiplications, with matrices of this (n_out, n_in). Factors of rank R (rsparse:R) count as
        R (n_out + n_in) dense ones."""
        text = method.partition("/")[0]
        rank = re.search(r"/rsparse:(\d+)", method)
        extra = int(rank[1]) * sum(matrix) if rank else 0
        if not self.products:
            kind, share = share_kept(text)
            return extra + work * (0.074 + 0.060 * 16 * share if kind == "x4t2" else share)
        n_out, n_in = max(matrix[0], 1), max(matrix[1], 1)
        shape = min(
            self.products,
            key=lambda s: abs(math.log(s[0] / n_out)) + abs(math.log(s[1] / n_in)),
        )
        times = self.products[shape]
        seconds = (work * _ratio(times, text) + extra) / math.prod(shape) * times["dense"]
        if not self.inputs:
            return seconds
        width = min(self.inputs, key=lambda w: abs(math.log(w / n_in)))
        times = self.inputs[width]
        prepare = n_in / width * times.get("dense", 0.0)
        # A pruned input is made beside the dense one that the other readers share.
        if text == "dense":
            return seconds + prepare / READERS.get(name, 1)
        return seconds + prepare * _ratio(times, text)

    def plan(self, plan: Plan, info: "EngineInfo") -> float:
        """Time of the layers' projections under a plan, over dense."""
        dense = sparse = 0.0
        for layer, (counts, matrices) in enumerate(zip(info.work, info.matrices, strict=True)):
            for name, work, matrix in zip(PROJECTIONS, counts, matrices, strict=True):
                full = self.projection("dense", name, work, matrix) if work else 0.0
                method = plan.get((layer, name))
                dense += full
                sparse += self.projection(method, name, work, matrix) if method and work else full
        return sparse / dense


def _ratio(times: Mapping[str, float], text: str) -> float:
    """Time of a pattern over the dense time, from the measured patterns of its kind."""
    dense = times["dense"]
    if text in times:
        return times[text] / dense
    kind, share = share_kept(text)
    known = sorted(
        (kept, seconds / dense)
        for pattern, seconds in times.items()
        for other, kept in [share_kept(pattern)]
        if other == kind and pattern != "dense"
    )
    if not known:
        return 1.0
    if len(known) == 1:
        known.append((1.0, 1.0))
    before, after = known[0], known[1]
    for pair in zip(known, known[1:], strict=False):
        before, after = pair
        if after[0] >= share:
            break
    slope = (after[1] - before[1]) / (after[0] - before[0])
    return max(before[1] + slope * (share - before[0]), 0.0)

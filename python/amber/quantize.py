"""amber-quantize: writes an Amber GGUF, a model file that Amber maps instead of converting.

stdout carries the results and nothing else. Exit codes: 0 done, 1 failure, 2 usage,
130 interrupted.

The format is described in engine/packed.h. Matrices are read, rounded to INT8 with one scale per
output and written one after the other, so memory stays near that of the largest layer matrix. A
Hugging Face folder is first converted (convert.py), to a file beside the output that is removed in
the end, or with --type to the output itself. With
a sparsity plan, the file is written first, then opened and measured, and then gets its last keys;
the tensors' bytes are copied as they are.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import convert, smooth
from .command import UsageError, run_command
from .convert import gguf_module
from .engine import memory_estimate
from .errors import AmberError, FileFormatError, UnsupportedModelError
from .models import find_model
from .sparse import CRITERIA, MITIGATIONS

if TYPE_CHECKING:
    import numpy as np

    from .permute import Orders
    from .smooth import Smoothing

FORMAT, LAYOUT, ALIGNMENT = 1, "p16k4o128", 64
PANEL, K_ALIGN = 16, 64  # outputs of a panel; inputs are padded to a multiple
STATISTICS = 2048  # tokens whose activations choose an order
RANDOM_CTX = 64  # of a window of random tokens, which later ones do not tell more of
SLICE_BYTES = 1 << 26  # of float32 rows that are converted at once where no score needs them all
LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down)(_shexp)?)\.weight")
EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.weight")
F32, F16, I8 = 0, 1, 24  # tensor types
U32, F64, BOOL, STRING = 4, 12, 7, 8  # value types
# Tensors "<matrix>.<part>" that the methods of a plan use (engine/packed.h).
VECTORS = ("shift", "gain", "offset", "left", "right")

# The engine's scores sum rows in 16 fixed parts (engine/score.c); the same sums in the same order
# give the same bits.
SCORE_PARTS = 16


# ---- INT8 ----


def pack(rows: "np.ndarray", name: str = "weight") -> tuple["np.ndarray", "np.ndarray"]:
    """INT8 panels and scales of weight rows [n, k] float32, as amber_pack_w8_panel makes them.

    Returns (uint8 [panels, k_pad * 16], float32 [panels * 16]). Errors: FileFormatError where a
    weight is not finite.
    """
    import numpy as np

    n, k = rows.shape
    panels, k_pad = -(-n // PANEL), -(-k // K_ALIGN) * K_ALIGN
    absmax = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    bad = np.flatnonzero(~np.isfinite(absmax))
    if bad.size:
        raise FileFormatError(
            f"{name}: expected finite weights, found {absmax[bad[0]]} in row {bad[0]} (damaged "
            "source)"
        )
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / absmax
    tiny = ~np.isfinite(inverse)  # a row of zeros, or as good as that
    inverse[tiny] = 0
    scale = np.zeros(panels * PANEL, np.float32)
    scale[:n] = np.where(tiny, np.float32(0), absmax / np.float32(127))
    q = np.full((panels * PANEL, k_pad), 128, np.uint8)
    scaled = rows * inverse[:, None]
    np.rint(scaled, out=scaled)
    scaled += np.float32(128)
    q[:n, :k] = scaled
    groups = q.view(np.uint32).reshape(panels, PANEL, k_pad // 4).transpose(0, 2, 1)
    return np.ascontiguousarray(groups).view(np.uint8).reshape(panels, k_pad * PANEL), scale


def percentiles(w: "np.ndarray", low: float, high: float) -> tuple["np.float32", "np.float32"]:
    """Exact percentiles (shares) of all entries, with linear interpolation."""
    import numpy as np

    flat = w.ravel()
    last = flat.size - 1
    at = [low * last, high * last]
    ranks = [r for a in at for r in (int(a), min(int(a) + 1, last))]
    offset, parts = 0, flat
    if flat.size > 1 << 20:  # sort the two tails alone, where a sample has found them well
        bounds = np.quantile(flat[:: flat.size >> 16], (2 * low, 1 - 2 * (1 - high)))
        lower, upper = flat[flat <= bounds[0]], flat[flat >= bounds[1]]
        if ranks[1] < lower.size and ranks[2] >= flat.size - upper.size and bounds[0] < bounds[1]:
            parts, offset = np.concatenate([lower, upper]), flat.size - lower.size - upper.size
    places = [r if i < 2 else r - offset for i, r in enumerate(ranks)]
    sorted_parts = np.partition(parts, sorted(set(places)))
    values = [float(sorted_parts[p]) for p in places]
    first, second = (
        np.float32(values[2 * i] + (a - math.floor(a)) * (values[2 * i + 1] - values[2 * i]))
        for i, a in enumerate(at)
    )
    return first, second


def scores(w: "np.ndarray") -> "np.ndarray":
    """Channel factors [3, k] float32 of weights [n, k] float32 for the criteria norm, amber and
    amber-b: Wanda's column norm, and Robust-Norm Scoring (arXiv 2508.02128), bit for bit as
    engine/score.c computes them."""
    import numpy as np

    n, k = w.shape
    low, high = percentiles(w, 0.005, 0.995)
    inner, every = (np.zeros((3, SCORE_PARTS, k)) for _ in range(2))  # sum, sum of squares, count
    for part in range(SCORE_PARTS):
        rows = w[n * part // SCORE_PARTS : n * (part + 1) // SCORE_PARTS]
        kept = (rows >= low) & (rows <= high)
        for moments, values, count in (
            (every, rows.astype(np.float64), np.full(k, len(rows))),
            (inner, np.where(kept, rows, np.float32(0)).astype(np.float64), kept.sum(axis=0)),
        ):
            moments[0, part] = values.sum(axis=0)
            np.square(values, out=values)
            moments[1, part] = values.sum(axis=0)
            moments[2, part] = count
    mean = _ordered_sum(inner[0].ravel()) / max(inner[2].sum(), 1)
    return np.stack([_factors(every, 0.0), _factors(inner, mean), _factors(every, mean)])


def _ordered_sum(values: "np.ndarray") -> float:
    """From first to last: numpy's own sum adds in pairs."""
    import numpy as np

    return float(np.add.accumulate(values)[-1])


def _factors(moments: "np.ndarray", mean: float) -> "np.ndarray":
    """Column norms around the mean, the smallest at 1."""
    import numpy as np

    total = np.zeros_like(moments[:, 0])
    for part in range(SCORE_PARTS):
        total += moments[:, part]
    norm = np.sqrt(np.maximum(total[1] - 2 * mean * total[0] + total[2] * mean * mean, 0))
    f = norm.astype(np.float32)
    least = norm[norm > 0].min() if (norm > 0).any() else 1.0
    return np.where(f > 0, (f / least).astype(np.float32), np.float32(1))


# ---- files ----


@dataclass(slots=True)
class Part:
    """A tensor to write. shape: fastest-varying first. data: pieces of its bytes, in order."""

    name: str
    kind: int
    shape: tuple[int, ...]
    n_bytes: int
    data: Callable[[], Iterator[Any]]


@dataclass(slots=True)
class Stored:
    """A tensor of the source, or some rows of one. data: [rows, bytes or values]; shape:
    fastest-varying first."""

    name: str
    tensor_type: Any
    shape: tuple[int, ...]
    data: "np.ndarray"

    def cut(self, name: str, first: int, last: int) -> "Stored":
        """Rows as a tensor of their own; elements of a vector."""
        shape = (*self.shape[:-1], last - first)
        return Stored(name, self.tensor_type, shape, self.data[first:last])


class Source:
    """A GGUF file that is to be quantized, or an Amber GGUF that is to get another plan."""

    def __init__(self, path: str, name: str | None = None) -> None:
        """name: what the source is called, where it is not the file's own name."""
        self.path, self.gguf = path, gguf_module()
        self.name = name or os.path.basename(path)
        self.orders: Orders | None = None  # of channels, for what parts() writes
        self.smoothing: Smoothing | None = None  # of its inputs and outputs
        try:
            self.reader = self.gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise FileFormatError(f"{os.path.basename(path)}: {error}") from error
        self.packed = "amber.format" in self.reader.fields
        stored = (
            Stored(t.name, t.tensor_type, tuple(int(n) for n in t.shape), t.data)
            for t in self.reader.tensors
        )
        self.tensors = {part.name: part for t in stored for part in self._separate(t)}

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a key "<arch>.name"; of a list, the first."""
        fields = self.reader.fields
        key = f"{fields['general.architecture'].contents()}.{name}"
        found = fields[key].contents() if key in fields else default
        return found[0] if isinstance(found, list) else found

    def _separate(self, tensor: Stored) -> list[Stored]:
        """Projections that share a tensor one by one: attn_qkv, and an ffn_up with the gate
        above (engine/model.c)."""
        layer, _, what = tensor.name.rpartition(".attn_qkv.")
        if layer:
            heads = self.value("attention.head_count")
            head = self.value("attention.key_length") or self.value("embedding_length") // heads
            q = heads * head
            kv = (self.value("attention.head_count_kv") or heads) * head
            sizes = {"attn_q": q, "attn_k": kv, "attn_v": kv}
        else:
            layer, _, what = tensor.name.rpartition(".ffn_up.")
            n_ff = self.value("feed_forward_length")
            if not layer or self.packed or tensor.shape[-1] != 2 * n_ff:
                return [tensor]
            sizes = {"ffn_gate": n_ff, "ffn_up": n_ff}
        if tensor.shape[-1] != sum(sizes.values()):
            raise FileFormatError(
                f"{tensor.name}: expected {sum(sizes.values())} rows, found {tensor.shape[-1]}"
            )
        parts, first = [], 0
        for name, n in sizes.items():
            parts.append(tensor.cut(f"{layer}.{name}.{what}", first, first + n))
            first += n
        return parts

    def keys(self) -> list[bytes]:
        """Key-value pairs as they stand in the file, but for those that the new file says anew."""
        skip = {"general.alignment", "general.file_type"}
        return [
            self.reader.data[f.offset : f.offset + sum(p.nbytes for p in f.parts)].tobytes()
            for f in self.reader.fields.values()
            if f.name not in skip and not f.name.startswith(("amber.", "GGUF."))
        ]

    def rows(self, name: str, first: int = 0, last: int | None = None) -> "np.ndarray":
        """Rows of a tensor as float32."""
        import numpy as np

        tensor = self.tensors[name]
        data = tensor.data[first:last]
        try:
            values = self.gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{name}: the installed gguf package cannot read {tensor.tensor_type.name} "
                "(update it)"
            ) from None
        return np.ascontiguousarray(values, np.float32)

    def tied(self) -> bool:
        return "output.weight" not in self.tensors

    def parts(self) -> list[Part]:
        """The tensors of the Amber GGUF."""
        parts: list[Part] = []
        for tensor in self.tensors.values():
            if LINEAR.fullmatch(tensor.name) or tensor.name == "output.weight":
                parts += self._matrix(tensor.name, tensor.name.removesuffix(".weight"))
            elif EXPERTS.fullmatch(tensor.name):
                parts += self._experts(tensor.name)
            elif len(tensor.shape) == 1:
                parts.append(self._vector(tensor))
            elif tensor.name == "token_embd.weight" and self.orders:
                parts.append(self._embedding(tensor))
            else:
                parts.append(
                    Part(
                        tensor.name,
                        int(tensor.tensor_type),
                        tensor.shape,
                        tensor.data.nbytes,
                        lambda t=tensor: iter([t.data]),
                    )
                )
        if self.tied():
            parts += self._matrix("token_embd.weight", "output")
        return parts

    def _vector(self, tensor: Stored) -> Part:
        n = tensor.shape[0]
        return Part(
            tensor.name, F32, (n,), 4 * n, lambda: iter([self._ordered(tensor.name, None, None)])
        )

    def _ordered(self, name: str, first: int | None, last: int | None) -> "np.ndarray":
        """Rows as float32, in the new order of channels. Slices are for what keeps its outputs."""
        rows = self.rows(name, first, last)
        if self.smoothing:
            rows = self.smoothing.apply(name, rows)
        return self.orders.apply(name, rows) if self.orders else rows

    def _score_rows(self, name: str, rows: "np.ndarray") -> "np.ndarray":
        """What channel scores are taken from: the rows that are written, or those before
        smoothing."""
        if not self.smoothing or not self.smoothing.original_scores:
            return rows
        rows = self.rows(name)
        return self.orders.apply(name, rows) if self.orders else rows

    def unpacked(self, stem: str, n_out: int, n_in: int) -> "np.ndarray":
        """float32 [n_out, n_in] of a layer's matrix in an Amber GGUF."""
        import numpy as np

        panels = self.tensors[f"{stem}.weight"].data.reshape(-1).view(np.uint8)
        scale = np.asarray(self.tensors[f"{stem}.scale"].data).reshape(-1)
        q = panels.reshape(len(scale) // PANEL, -1, PANEL, 4).transpose(0, 2, 1, 3)
        rows = q.reshape(len(scale), -1)[:n_out, :n_in].astype(np.float32) - 128
        return rows * scale[:n_out, None]

    def _embedding(self, tensor: Stored) -> Part:
        """The embedding with its columns in the new order: of the same type where that keeps every
        value whole, else F16."""
        import numpy as np

        k, n = tensor.shape
        kinds = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
        bits = kinds.get(tensor.tensor_type.name)
        kind, width = (int(tensor.tensor_type), bits().itemsize) if bits else (F16, 2)
        step = max(1, SLICE_BYTES // (4 * k))

        def pieces() -> Iterator[Any]:
            for first in range(0, n, step):
                if bits:
                    rows = np.ascontiguousarray(tensor.data[first : first + step]).view(bits)
                    yield self.orders.apply(tensor.name, rows)
                else:
                    yield self._ordered(tensor.name, first, first + step).astype(np.float16)

        return Part(tensor.name, kind, (k, n), width * k * n, pieces)

    def _experts(self, name: str) -> list[Part]:
        """The experts' matrices one below the other, each in whole panels. One mask per token
        serves all of them, so they have no scores."""
        import numpy as np

        k, n, experts = self.tensors[name].shape
        panels, k_pad = -(-n // PANEL) * experts, -(-k // K_ALIGN) * K_ALIGN
        scales: list[Any] = []

        def weight() -> Iterator[Any]:
            for e in range(experts):
                q, scale = pack(self.rows(name, e, e + 1)[0], f"{name}, expert {e}")
                scales.append(scale)
                yield q

        stem = name.removesuffix(".weight")
        shape = (k_pad * PANEL, panels)
        return [
            Part(f"{stem}.weight", I8, shape, panels * PANEL * k_pad, weight),
            Part(
                f"{stem}.scale",
                F32,
                (panels * PANEL,),
                4 * panels * PANEL,
                lambda: iter([np.concatenate(scales)]),
            ),
        ]

    def _matrix(self, name: str, stem: str) -> list[Part]:
        import numpy as np

        k, n = self.tensors[name].shape
        panels, k_pad = -(-n // PANEL), -(-k // K_ALIGN) * K_ALIGN
        scored = stem != "output"
        step = n if scored else max(PANEL, SLICE_BYTES // (4 * k) // PANEL * PANEL)
        made: dict[str, Any] = {"scale": np.zeros(panels * PANEL, np.float32)}

        def weight() -> Iterator[Any]:
            for first in range(0, n, step):
                rows = self._ordered(name, first, min(first + step, n))
                q, scale = pack(rows, name)
                made["scale"][first : first + len(scale)] = scale
                if scored:
                    made["score"] = scores(self._score_rows(name, rows))
                yield q

        parts = [
            Part(f"{stem}.weight", I8, (k_pad * PANEL, panels), panels * PANEL * k_pad, weight),
            Part(
                f"{stem}.scale",
                F32,
                (panels * PANEL,),
                4 * panels * PANEL,
                lambda: iter([made["scale"]]),
            ),
        ]
        if scored:
            parts.append(Part(f"{stem}.score", F32, (k, 3), 12 * k, lambda: iter([made["score"]])))
        return parts


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key_bytes(key: str, value: Any) -> bytes:
    """One key-value pair of a GGUF file: str, bool, float (as F64) or int (as U32)."""
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return _text(key) + struct.pack("<I?", BOOL, value)
    if isinstance(value, float):
        return _text(key) + struct.pack("<Id", F64, value)
    return _text(key) + struct.pack("<II", U32, value)


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def header(keys: Sequence[bytes], parts: Sequence[Part]) -> bytes:
    """Everything before the tensors' data (GGUF specification, version 3)."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(parts), len(keys)), *keys]
    offset = 0
    for part in parts:
        shape = struct.pack(f"<I{len(part.shape)}Q", len(part.shape), *part.shape)
        out.append(_text(part.name) + shape + struct.pack("<IQ", part.kind, offset))
        offset += _padded(part.n_bytes)
    raw = b"".join(out)
    return raw + bytes(_padded(len(raw)) - len(raw))


def write_packed(
    source: Source, out: str, keys: dict[str, Any], progress: Callable[[int, int], Any]
) -> None:
    """Writes the source as an Amber GGUF. progress(bytes written, bytes in all)."""
    parts = source.parts()
    total = sum(part.n_bytes for part in parts)
    done = 0
    with open(out, "wb") as file:
        file.write(header(source.keys() + [key_bytes(*item) for item in keys.items()], parts))
        for part in parts:
            written = 0
            for piece in part.data():
                written += file.write(piece.data if piece.flags.c_contiguous else piece.tobytes())
                progress(done + written, total)
            if written != part.n_bytes:
                raise AssertionError(f"{part.name}: {written} bytes, expected {part.n_bytes}")
            file.write(bytes(_padded(written) - written))
            done += written


def copy_with_keys(
    source: Source, out: str, keys: dict[str, Any], vectors: "dict[str, np.ndarray] | None" = None
) -> None:
    """Writes an Amber GGUF again with other keys; the tensors' bytes are copied.

    vectors: float32 tensors to add, by name, in place of all that the methods of a plan had
        (engine/mitigation.c); None: those stay.
    """
    parts = [
        Part(
            t.name,
            int(t.tensor_type),
            tuple(int(n) for n in t.shape),
            int(t.n_bytes),
            lambda t=t: iter([t.data]),
        )
        for t in source.reader.tensors
        if vectors is None or t.name.rpartition(".")[2] not in VECTORS
    ]
    for name, values in (vectors or {}).items():
        rows = values.astype("<f4", order="C")
        parts.append(Part(name, F32, rows.shape[::-1], rows.nbytes, lambda rows=rows: iter([rows])))
    with open(out, "wb") as file:
        file.write(header(source.keys() + [key_bytes(*item) for item in keys.items()], parts))
        for part in parts:
            for piece in part.data():
                file.write(memoryview(piece).cast("B"))
            file.write(bytes(_padded(part.n_bytes) - part.n_bytes))


def file_hash(path: str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def base_keys(source: Source) -> dict[str, Any]:
    """Keys that say what the file is and what it was made from."""
    if source.packed:  # the tensors stay, so do these
        kept = ("format", "layout", "tied_output", "permuted", "shift", "smooth", "smooth.alpha")
        kept += ("source.name", "source.size", "source.sha256")
        fields = source.reader.fields
        keys = {
            f"amber.{name}": fields[f"amber.{name}"].contents()
            for name in kept
            if f"amber.{name}" in fields
        }
    else:
        keys = {
            "amber.format": FORMAT,
            "amber.layout": LAYOUT,
            "amber.tied_output": source.tied(),
            "amber.permuted": source.orders is not None,
            "amber.source.name": source.name,
            "amber.source.size": str(os.path.getsize(source.path)),
            "amber.source.sha256": file_hash(source.path),
        }
    return {"general.alignment": ALIGNMENT} | keys


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "amber-quantize",
        description="Write an Amber GGUF: INT8 weights that load by mapping, and where asked for a "
        "sparsity plan whose cost was measured.",
        allow_abbrev=False,
    )
    top.add_argument(
        "model", metavar="IN", help="a GGUF file, a built-in name or a Hugging Face folder"
    )
    top.add_argument("out", metavar="OUT", help="the file to write")
    top.add_argument(
        "--type",
        choices=convert.TYPES,
        help="convert a Hugging Face folder to a plain GGUF file of this type instead, for any "
        "program that reads GGUF",
    )
    top.add_argument(
        "--sparse",
        metavar="PLAN",
        help="what runs sparse in prefill: a pattern such as 8:16x4t2, 8:16@all or 8:16@q,gate, or "
        "a plan file; within a budget (--max-kl and others) the family of patterns to choose from "
        "(8:16x4t2)",
    )
    top.add_argument("--criterion", help=f"{', '.join(CRITERIA)}: how channels are ranked")
    top.add_argument("--mitigation", help=f"{', '.join(MITIGATIONS)}: what is given back")
    top.add_argument(
        "--skip",
        metavar="preset|auto|LAYERS",
        help="layers whose q and gate stay dense where the plan names no projections: the paper's "
        "for its models (preset), the most sensitive ones (auto), or such as 0,26-27",
    )
    top.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="choose the pattern of each projection so that the KL divergence from the dense model "
        "stays within X nats per token",
    )
    top.add_argument(
        "--max-ppl-increase",
        type=float,
        metavar="P",
        help="the same, so that the perplexity rises by P percent at most",
    )
    top.add_argument(
        "--min-speedup",
        type=float,
        metavar="X",
        help="the same, so that the layers' projections are X times as fast by the model of time: "
        "at the least KL divergence, or as fast as the other budgets allow",
    )
    top.add_argument(
        "--times",
        metavar="FILE",
        help="what amber-bench --kernels --json printed: times of this machine's kernels, to model "
        "speed by (multiplications that are left)",
    )
    top.add_argument(
        "--smooth",
        choices=smooth.KINDS,
        help="scale input channels by max|X|^a / max|W|^(1-a) and weights by the inverse, folded "
        "into norms and weights: smoothquant divides activations by it, outstanding multiplies "
        "them",
    )
    top.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="a of --smooth, 0-1 (smoothquant 0.5, outstanding 0.10)",
    )
    top.add_argument(
        "--scores-from",
        choices=("smoothed", "original"),
        default="smoothed",
        help="the weights that the criteria norm and amber look at under --smooth (smoothed)",
    )
    top.add_argument(
        "--permute",
        action="store_true",
        help="put channels in an order in which the pattern of --sparse (N:16x4) loses less: those "
        "that are large together side by side for blocks, apart for single channels; the model "
        "stays the same function",
    )
    top.add_argument(
        "--permute-from",
        choices=("text", "weights"),
        default="text",
        help="what chooses the order: activations of the calibration text, or of random tokens, "
        "which takes the weights alone (text)",
    )
    top.add_argument(
        "--calibrate",
        default="self",
        metavar="FILE|self",
        help="text to measure on; self: sampled from the model (self)",
    )
    top.add_argument("-c", "--ctx", type=int, default=512, help="tokens per window (512)")
    top.add_argument("--chunks", type=int, default=8, help="windows to measure on (8)")
    top.add_argument("-t", "--threads", type=int, help="threads (physical cores)")
    top.add_argument(
        "--report",
        metavar="FILE",
        help="write what was chosen and why: as JSON, or under a name in .md as a table by layer",
    )
    top.add_argument("--json", action="store_true", help="print that as one line of JSON")
    top.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return top


class Bar:
    """A progress bar on stderr for one step."""

    def __init__(self, name: str, unit: str, quiet: bool, scale: bool = False) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread beside the engine's
        self._bar = tqdm(
            desc=name,
            unit=unit,
            unit_scale=scale,
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=True if quiet else None,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.close()

    def __call__(self, done: float, total: float) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def check(args: argparse.Namespace) -> None:
    """UsageError for arguments that cannot be meant together, before any work is done."""
    for option, least in (("--max-kl", 0), ("--max-ppl-increase", 0), ("--min-speedup", 1)):
        value = getattr(args, option[2:].replace("-", "_"))
        if value is not None and not least < value < math.inf:
            raise UsageError(f"{option}: expected a number above {least}, found {value:g}")
    budget = args.max_kl, args.max_ppl_increase, args.min_speedup
    budgeted = any(value is not None for value in budget)
    if args.ctx < 4:
        raise UsageError(f"--ctx: expected 4 or more, found {args.ctx}")
    if args.chunks < 1:
        raise UsageError(f"--chunks: expected 1 or more, found {args.chunks}")
    planned = args.sparse is not None or budgeted
    if args.type and (planned or args.permute or args.smooth):
        raise UsageError(
            "--type: expected without --sparse, budgets, --smooth and --permute (they are for "
            "Amber GGUFs)"
        )
    if args.alpha is not None and not args.smooth:
        raise UsageError("--alpha: expected --smooth beside it")
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        raise UsageError(f"--alpha: expected a number from 0 to 1, found {args.alpha:g}")
    for name in ("criterion", "mitigation"):
        if getattr(args, name) and not planned:
            raise UsageError(f"--{name}: expected --sparse or a budget beside it")
    if args.skip is not None and (args.sparse is None or budgeted):
        raise UsageError("--skip: expected --sparse beside it, and no budget such as --max-kl")
    if args.permute_from != "text" and not args.permute:
        raise UsageError("--permute-from: expected --permute beside it")
    if args.times is not None and not planned:
        raise UsageError("--times: expected --sparse or a budget beside it")
    if args.sparse in ("off", "auto", ""):
        raise UsageError(
            f"--sparse: expected a pattern or a plan file, found {args.sparse!r} (leave it out for "
            "a dense file)"
        )


def quantize(args: argparse.Namespace) -> dict[str, Any]:
    """Writes args.out. Returns the report."""
    started = perf_counter()
    path = args.model if os.path.isdir(args.model) else find_model(args.model)
    if os.path.exists(args.out) and os.path.samefile(path, args.out):
        raise AmberError(f"{args.out}: expected another file than the source")
    report: dict[str, Any] = {"source": path, "out": args.out}
    if os.path.isdir(path):
        report |= _from_folder(path, args)
    elif args.type:
        raise UsageError(f"--type: expected a Hugging Face folder beside it, found the file {path}")
    else:
        report |= {"source_bytes": os.path.getsize(path)} | _from_file(path, None, args)
    report["out_bytes"] = os.path.getsize(args.out)
    report["seconds"] = perf_counter() - started
    return report


def _from_folder(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """Converts a Hugging Face folder and writes args.out. Returns its part of the report."""
    folder = convert.Folder(path)
    plain = args.out + ".source"
    try:
        with Bar("convert", "B", args.quiet, scale=True) as bar:
            convert.write_gguf(
                folder,
                plain,
                args.type or "auto",
                check=lambda name: _prove(name, folder.path),
                progress=bar,
            )
        if args.type:
            os.replace(plain, args.out)
            part: dict[str, Any] = {"type": args.type, "permuted": False, "sparse": "off"}
        else:
            part = _from_file(plain, folder.name(), args)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(plain)
    return {"source_bytes": folder.stored_bytes()} | part


def _prove(path: str, folder: str) -> None:
    """Lets the engine read the header of a file that was made from a folder."""
    try:
        memory_estimate(path, sparse="off")
    except AmberError as error:
        raise type(error)(str(error).replace(os.path.basename(path), folder)) from None


def _from_file(path: str, name: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Writes args.out from a GGUF file. Returns its part of the report."""
    started = perf_counter()
    from . import calibrate, permute

    def bars(name: str, unit: str) -> Bar:
        return Bar(name, unit, args.quiet)

    plan = None
    budget = args.max_kl, args.max_ppl_increase, args.min_speedup
    if args.sparse or any(value is not None for value in budget):
        plan = calibrate.Wish(args)
        plan.check(path)
    else:
        memory_estimate(path, sparse="off")  # proves the file before anything is written
    source = Source(path, name)
    text = None
    for option in ("permute", "smooth"):
        if getattr(args, option) and source.packed:
            raise AmberError(f"{path}: --{option}: expected a source file, found an Amber GGUF")
    from_text = args.permute and args.permute_from == "text"
    if plan or from_text or args.smooth:
        text = calibrate.Text(path, args, bars)
    if args.smooth:
        alpha = smooth.KINDS[args.smooth] if args.alpha is None else args.alpha
        with bars("activations", "window") as bar:
            found = smooth.statistics(path, text.windows, args.threads, bar)
        source.smoothing = smooth.smooth(source, found, args.smooth, alpha)
        source.smoothing.original_scores = args.scores_from == "original"
    if args.permute:
        if from_text:
            windows = text.windows[: max(1, STATISTICS // text.ctx)]
        else:
            n_vocab = source.tensors["token_embd.weight"].shape[-1]
            windows = permute.random_windows(n_vocab, RANDOM_CTX, STATISTICS // RANDOM_CTX)
        first = re.split("[;@#/]", plan.text)[0] if plan else ""
        layout = permute.Layout.of(first.strip()) if first else permute.Layout()
        with bars("activations", "layer") as bar:
            source.orders = permute.choose(source, windows, bar, layout)
    keys = base_keys(source)
    if args.smooth:
        keys |= {"amber.smooth": args.smooth, "amber.smooth.alpha": float(alpha)}
    partial = [args.out + ".part", args.out + ".part2"]
    try:
        if source.packed:
            copy_with_keys(source, partial[0], keys)
        else:
            with Bar("weights", "B", args.quiet, scale=True) as bar:
                write_packed(source, partial[0], keys, bar)
        report: dict[str, Any] = {
            "pack_seconds": perf_counter() - started,
            "permuted": source.orders is not None,
            "smooth": args.smooth and {"kind": args.smooth, "alpha": alpha},
            "sparse": "off",
        }
        if plan:
            made = plan.vectors(partial[0], text, bars)
            if made:
                keys |= made.keys
                copy_with_keys(Source(partial[0]), partial[1], keys, made.tensors)
                os.replace(partial[1], partial[0])
        if plan is None:
            os.replace(partial[0], args.out)
        else:
            result = plan.carry_out(partial[0], text, bars)
            copy_with_keys(Source(partial[0]), partial[1], keys | result.keys)
            os.replace(partial[1], args.out)
            report |= result.report
    finally:
        for leftover in partial:
            with contextlib.suppress(FileNotFoundError):
                os.remove(leftover)
    return report


def summary(report: dict[str, Any]) -> str:
    """The report for people."""
    line = (
        f"{report['out']}: {report['out_bytes'] / 2**20:.1f} MiB from "
        f"{report['source_bytes'] / 2**20:.1f} MiB in {report['seconds']:.1f} s"
    )
    if report["sparse"] == "off" and report.get("plan"):
        line += "\nno pattern stays within the budget: the plan is dense"
    if report["sparse"] != "off":
        change = 100 * (report["perplexity"] / report["dense_perplexity"] - 1)
        line += (
            f"\n{report['sparse']}: coverage {100 * report['coverage']:.1f} %, modelled time of "
            f"the layers' projections {100 * report['modelled_time']:.1f} % of dense\n"
            f"KL {report['kl_mean']:.5f}, perplexity {report['perplexity']:.4f} (dense "
            f"{report['dense_perplexity']:.4f}, {change:+.2f} %) on {report['tokens']} tokens of "
            f"{report['calibration']}"
        )
    return line


def layer_table(report: dict[str, Any]) -> str:
    """The report in Markdown. A cell: pattern, e_q, KL of this projection alone where it was
    studied, modelled time over dense."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    lines = [summary(report), ""]
    if not report.get("layers"):
        return lines[0]
    lines += [
        "Cells: pattern, error of the projection's output e_q / KL of the model with it alone / "
        f"modelled time over dense ({report.get('time_model', 'N / M')}).",
        "",
        "| layer | coverage | time | KL | " + " | ".join(names) + " |",
        "|" + " --- |" * (len(names) + 4),
    ]

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in report["layers"]:
        known = [kl for kl in row["kl"].values() if kl is not None]
        cells = [str(row["layer"]), f"{100 * row['coverage']:.0f} %"]
        cells += [f"{row['modelled_time']:.2f}", number(sum(known) if known else None, ".2g")]
        for name in names:
            if name not in row["time"]:
                cells.append(row[name])
                continue
            figures = (
                (row["e_q"][name], ".3f"),
                (row["kl"][name], ".2g"),
                (row["time"][name], ".2f"),
            )
            cells.append(f"{row[name]} " + " / ".join(number(*figure) for figure in figures))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    check(args)
    report = quantize(args)
    if args.report:
        with open(args.report, "w", encoding="utf-8") as file:
            markdown = args.report.endswith(".md")
            file.write((layer_table(report) if markdown else json.dumps(report, indent=1)) + "\n")
    print(json.dumps(report) if args.json else summary(report), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command amber-quantize. Returns its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

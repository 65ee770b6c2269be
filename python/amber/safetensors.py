"""Reads the tensors of *.safetensors files where they lie, without copying them.

The format: 8 bytes of header length, a JSON header that names every tensor with its type, shape and
place, then the data (https://github.com/huggingface/safetensors). numpy has no bfloat16, so BF16
comes as its bits in uint16.
"""

import json
import math
import os
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import FileFormatError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER = 100_000_000  # bytes; the format's own limit
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# numpy's name of a value's bits, by the file's types.
BITS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
WIDTHS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WIDTHS |= {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file."""

    name: str
    file: str
    kind: str  # "F32", "BF16", ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    part: tuple[int, int] = (0, 1)  # which of how many equal parts of axis 1
    turn: tuple[slice, tuple[int, ...]] | None = None  # of the last axis; the shape in the file

    def turned(self, picked: slice) -> "Stored":
        """Some of the last axis, which comes before the one before it."""
        last = len(range(*picked.indices(self.shape[-1])))
        shape = (self.shape[0], last, *self.shape[1:-1])
        return replace(self, shape=shape, turn=(picked, self.shape))

    def slab(self, i: int, n: int) -> "Stored":
        """The i-th of n equal parts of axis 1."""
        shape = (self.shape[0], self.shape[1] // n, *self.shape[2:])
        return replace(self, shape=shape, part=(i, n))

    def rows(self, i: int, n: int) -> "Stored":
        """The i-th of n equal parts of axis 0 of a whole tensor."""
        shape = (self.shape[0] // n, *self.shape[1:])
        behind = i * math.prod(shape) * WIDTHS.get(self.kind, 0)
        return replace(self, shape=shape, offset=self.offset + behind)

    def bits(self) -> "np.ndarray":
        """Its values, mapped: float32, float16, float64, or for BF16 uint16."""
        import numpy as np

        if self.kind not in BITS:
            raise UnsupportedModelError(
                f"{os.path.basename(self.file)}: {self.name}: type {self.kind} cannot be "
                f"converted; {', '.join(BITS)} can (quantized checkpoints must be unpacked first)"
            )
        if 0 in self.shape:
            return np.zeros(self.shape, BITS[self.kind])
        if self.turn:
            picked, whole = self.turn
            mapped = np.memmap(self.file, BITS[self.kind], "r", self.offset, whole)[..., picked]
            return mapped.swapaxes(1, 2) if len(whole) > 2 else mapped
        i, n = self.part
        if n == 1:
            return np.memmap(self.file, BITS[self.kind], "r", self.offset, self.shape)
        rows = self.shape[1]
        whole = (self.shape[0], n * rows, *self.shape[2:])
        mapped = np.memmap(self.file, BITS[self.kind], "r", self.offset, whole)
        return mapped[:, i * rows : (i + 1) * rows]

    def octets(self) -> "np.ndarray":
        """The bytes of a tensor of bytes, mapped."""
        import numpy as np

        return np.memmap(self.file, np.uint8, "r", self.offset, self.shape)


def read_json(path: str) -> dict[str, Any]:
    """A file that holds one JSON object. FileFormatError where it does not."""
    name = os.path.basename(path)
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name}: expected JSON, found {error}") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def read_file(path: str) -> dict[str, Stored]:
    """The tensors of one file, by name; every one proved to lie within it."""
    label, size = os.path.basename(path), os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FileFormatError(
                f"{label}: expected a header within the file's {size} bytes, found a length of "
                f"{length} (damaged, cut short, or a pointer to a file that was not fetched)"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{label}: header: expected JSON, found {error}") from None
    if not isinstance(header, dict):
        raise FileFormatError(f"{label}: header: expected a JSON object")
    start = 8 + length
    return {
        name: _entry(name, entry, path, start, size)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _entry(name: str, entry: Any, path: str, start: int, size: int) -> Stored:
    where = f"{os.path.basename(path)}: {name}"
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(kind, str) and all(
            type(n) is int and n >= 0 for n in (*shape, begin, end)
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise FileFormatError(f"{where}: expected dtype, shape and data_offsets in the header")
    if end < begin or start + end > size:
        raise FileFormatError(
            f"{where}: expected its data within the file's {size} bytes, found {begin}..{end} "
            f"behind byte {start} (the file is cut short)"
        )
    if kind in WIDTHS:
        expected = math.prod(shape) * WIDTHS[kind]
        if expected != end - begin:
            raise FileFormatError(
                f"{where}: shape {list(shape)} of {kind} takes {expected} bytes, found "
                f"{end - begin}"
            )
    return Stored(name, path, kind, tuple(shape), start + begin)


def read_folder(folder: str) -> dict[str, Stored]:
    """The tensors of a model: of the files that the index names, else of model.safetensors (others
    may hold the same weights under other names), else of all there are."""
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise FileFormatError(f"{INDEX}: weight_map: expected file names by tensor")
        files = sorted(set(places.values()))
    else:
        places = None
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        files = [WHOLE] if WHOLE in files else files
    if not files:
        raise FileFormatError(
            f"{folder}: expected *.safetensors files, found none (weights in another form, such "
            "as pytorch_model.bin, must be saved as safetensors first)"
        )
    tensors: dict[str, Stored] = {}
    for name in files:
        if os.path.basename(name) != name:
            raise FileFormatError(f"{INDEX}: expected names of files in its folder, found {name!r}")
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileFormatError(f"{folder}: {name}: expected by {INDEX}, not found (fetch it)")
        for tensor in read_file(os.path.join(folder, name)).values():
            if tensor.name in tensors:
                raise FileFormatError(f"{name}: {tensor.name}: found in another file too")
            tensors[tensor.name] = tensor
    missing = next((t for t in places or () if t not in tensors), None)
    if missing:
        raise FileFormatError(f"{places[missing]}: {missing}: expected by {INDEX}, not found")
    return tensors

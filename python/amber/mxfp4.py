"""Weights of gpt-oss as its makers publish them: MXFP4 in two tensors.

    NAME_blocks [..., rows, inputs / 32, 16] uint8: two values each, the lower half first
    NAME_scales [..., rows, inputs / 32] uint8: the exponent of 32 values, with a bias of 127

A value is a sign, two bits of exponent and one of fraction: 0, 0.5, 1, 1.5, 2, 3, 4 or 6 (OCP
Microscaling Formats specification, version 1.0). Times a power of two it fits bfloat16 exactly.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import FileFormatError
from .safetensors import Stored

if TYPE_CHECKING:
    import numpy as np

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Packed:
    """One expert's matrix, or every nth row of it, in the place of a Stored tensor."""

    name: str
    file: str
    blocks: Stored
    scales: Stored
    expert: int
    rows: slice
    shape: tuple[int, int]
    kind: str = "BF16"

    def bits(self) -> "np.ndarray":
        """Its values as the bits of bfloat16, uint16 [rows, inputs]."""
        import numpy as np

        low = np.array(VALUES, np.float32)
        signed = np.concatenate((low, -low))
        pairs = self.blocks.octets()[self.expert, self.rows]
        halves = np.stack((pairs & 15, pairs >> 4), axis=-1)  # [rows, blocks, 16, 2]
        exponents = self.scales.octets()[self.expert, self.rows].astype(np.int32) - 127
        values = np.ldexp(signed[halves.reshape(*exponents.shape, BLOCK)], exponents[..., None])
        bits = values.astype(np.float32).reshape(self.shape).view(np.uint32)
        return (bits >> 16).astype(np.uint16)


def unpacked(stored: Mapping[str, Stored]) -> Iterator[tuple[str, "Stored | Packed"]]:
    """The tensors of a folder with those of each expert in the place of packed ones. Of rows that
    gate and up projections share, theirs take turns."""
    for name, tensor in stored.items():
        if name.endswith("_scales"):
            continue
        if not name.endswith("_blocks"):
            yield name, tensor
            continue
        stem = name.removesuffix("_blocks")
        scales = stored.get(f"{stem}_scales")
        shape = tensor.shape
        whole = scales is not None and {tensor.kind, scales.kind} == {"U8"}
        if not whole or len(shape) != 4 or scales.shape != shape[:3] or shape[3] * 2 != BLOCK:
            raise FileFormatError(
                f"{os.path.basename(tensor.file)}: {name}: expected MXFP4 in bytes, blocks "
                f"[experts, rows, n, 16] and scales [experts, rows, n], found {list(shape)} and "
                f"{list(scales.shape) if scales else 'none'}"
            )
        prefix, _, leaf = stem.rpartition(".")
        parts = {leaf: slice(None)}
        if leaf == "gate_up_proj":
            parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        for part, rows in parts.items():
            size = (len(range(*rows.indices(shape[1]))), shape[2] * BLOCK)
            for expert in range(shape[0]):
                full = f"{prefix}.{expert}.{part}.weight"
                yield full, Packed(full, tensor.file, tensor, scales, expert, rows, size)

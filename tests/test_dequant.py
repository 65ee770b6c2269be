"""Dequantizers and half conversions against the package `gguf` and numpy, bit for bit.

Exactness is demanded because both sides do the same single-precision operations in the same
order: one product, and where there is a minimum one sum. Only NaNs are compared as NaNs, since
hardware and software conversions may quiet them differently.
"""

import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

STORED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL")  # in the test data
STORED += ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
STORED += ("IQ3_S",)
READABLE = (*STORED, "I8", "Q4_1", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
READABLE += ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
# Those of them that the installed package knows.
KNOWN = [name for name in READABLE if name in GGMLQuantizationType.__members__]
# Byte positions of the 16-bit scales of one block.
SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "IQ1_S": [0],
    "IQ2_XXS": [0],
    "IQ2_XS": [0],
    "IQ2_S": [0],
    "IQ3_XXS": [0],
    "IQ3_S": [0],
}


def tool(test_bin: Path, argument: str, data: bytes = b"") -> bytes:
    program = test_bin / "tool_dequant"
    return subprocess.run([program, argument], input=data, capture_output=True, check=True).stdout


def dequantize(test_bin: Path, name: str, data: bytes) -> np.ndarray:
    return np.frombuffer(tool(test_bin, str(int(GGMLQuantizationType[name])), data), np.float32)


def oracle(name: str, data: np.ndarray) -> np.ndarray:
    if name == "I8":
        return data.view(np.int8).astype(np.float32).ravel()
    try:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(data, GGMLQuantizationType[name]).ravel()
    except NotImplementedError:
        pytest.skip(f"the installed gguf package cannot read {name}")


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    differ = np.flatnonzero((ours.view(np.uint32) != theirs.view(np.uint32)) & ~nan)
    assert differ.size == 0, (differ[:5], ours[differ[:5]], theirs[differ[:5]])


def test_type_table(test_bin: Path) -> None:
    table = {}
    for line in tool(test_bin, "types").decode().splitlines():
        number, name, values, size, readable = line.split()
        table[int(number)] = name, int(values), int(size), readable == "1"
    for kind, (values, size) in GGML_QUANT_SIZES.items():
        name, our_values, our_size, _ = table[int(kind)]
        assert name == kind.name
        # Q8_1 is never stored; its size is left open on purpose.
        if kind.name != "Q8_1":
            assert (our_values, our_size) == (values, size), name
    assert {name for name, _, _, readable in table.values() if readable} == set(READABLE)
    assert sorted(table) == list(range(len(table)))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("scales", ["normal", "special"])
def test_random_blocks(test_bin: Path, name: str, scales: str) -> None:
    """Random codes; scales of every size and sign, subnormal, zero, then NaN and infinity."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(size * 1000 + values)
    n = 4096
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    if name == "F32":
        blocks = blocks.reshape(-1, 4)
    for position in SCALES.get(name, []):
        half = rng.normal(0, 0.05, n).astype(np.float16)
        half[: n // 4] = rng.integers(0, 0x400, n // 4).astype(np.uint16).view(np.float16)
        half[n // 4 : n // 3] *= -1
        half[:8] = [0.0, -0.0, 6e-8, -6e-8, 65504, -65504, 1, -1]
        if scales == "special":
            half[:] = rng.integers(0, 65536, n).astype(np.uint16).view(np.float16)
            half[:3] = [np.nan, np.inf, -np.inf]
        blocks[:, position : position + 2] = half.view(np.uint8).reshape(n, 2)
    assert_same_bits(dequantize(test_bin, name, blocks.tobytes()), oracle(name, blocks))


@pytest.mark.parametrize("name", KNOWN)
def test_every_code_in_every_place(test_bin: Path, name: str) -> None:
    """Each byte of a block takes every value while the rest stays: every bit has its place."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(5)
    base = rng.integers(0, 256, size, dtype=np.uint8)
    for position in SCALES.get(name, []):
        base[position : position + 2] = np.array([0.37], np.float16).view(np.uint8)
    blocks = np.tile(base, (size * 256, 1))
    for place in range(size):
        blocks[place * 256 : place * 256 + 256, place] = np.arange(256)
    assert_same_bits(dequantize(test_bin, name, blocks.tobytes()), oracle(name, blocks))


def test_real_tensors(test_bin: Path, testdata: Path) -> None:
    seen = set()
    for path in sorted((testdata / "models").glob("*.gguf")):
        for tensor in gguf.GGUFReader(path).tensors:
            name = tensor.tensor_type.name
            if name not in READABLE:
                continue
            seen.add(name)
            data = np.asarray(tensor.data)
            ours = dequantize(test_bin, name, data.tobytes())
            assert_same_bits(ours, oracle(name, data).astype(np.float32))
    assert seen >= set(STORED)


def test_all_halves(test_bin: Path) -> None:
    halves = np.arange(65536, dtype=np.uint16)
    ours = np.frombuffer(tool(test_bin, "1", halves.tobytes()), np.float32)
    assert_same_bits(ours, halves.view(np.float16).astype(np.float32))
    # And back: a half's float is that half again (NaNs stay NaNs).
    back = np.frombuffer(tool(test_bin, "to-f16", ours.tobytes()), np.uint16)
    finite = ~np.isnan(halves.view(np.float16))
    assert np.array_equal(back[finite], halves[finite])
    assert np.isnan(back[~finite].view(np.float16)).all()


def test_round_to_nearest_half(test_bin: Path) -> None:
    """Every half, every midpoint of neighbours, the floats beside each of them, and random ones."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    upper = np.append(halves[1:], np.float32(65536))  # infinity begins at the last midpoint
    middle = (halves + upper) / 2  # exact: one bit more than a half has
    points = np.concatenate([halves, middle])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))]
    )
    rng = np.random.default_rng(1)
    anything = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint64).astype(np.uint32).view(np.float32)
    floats = np.concatenate([points, -points, anything])
    ours = np.frombuffer(tool(test_bin, "to-f16", floats.tobytes()), np.uint16)
    with np.errstate(all="ignore"):
        theirs = floats.astype(np.float16)
    nan = np.isnan(theirs)
    assert np.isnan(ours.view(np.float16)[nan]).all()
    assert np.array_equal(ours[~nan], theirs.view(np.uint16)[~nan])

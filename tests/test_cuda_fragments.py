"""Fragments of the CUDA kernels against numpy: masks, layouts, metadata and the tensor-core
instructions, read lane by lane from the register maps of the PTX ISA, not from the C code."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from test_sparse_masks import cases, oracle_mask

FORMS = ["dense", "2:4", "2:4+r32", "2:4+r16", "8:16x"]
# Blocks of 64 channels in a period, and blocks of windows behind them.
PERIOD = {"dense": (1, 0), "2:4": (1, 0), "2:4+r32": (8, 1), "2:4+r16": (4, 1), "8:16x": (4, 2)}
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def mma_s8(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mma.m16n8k32: a [32 lanes, 16 bytes], b [32, 8] -> D [16, 8]."""
    x, y = np.zeros((16, 32), np.int64), np.zeros((8, 32), np.int64)
    for i in range(16):
        x[G + 8 * (i // 4 % 2), 4 * T + i % 4 + 16 * (i // 8)] = a[:, i]
    for i in range(8):
        y[G, 4 * T + i % 4 + 16 * (i // 4)] = b[:, i]
    return x @ y.T


def mma_sp_s8(a: np.ndarray, b: np.ndarray, e: np.ndarray) -> np.ndarray:
    """mma.sp::ordered_metadata.m16n8k64: a, b [32 lanes, 16 bytes], e [32] words -> D [16, 8]."""
    # Compressed matrix [16, 32]: the fragment of a dense m16n8k32.
    packed = np.zeros((16, 32), np.int64)
    for i in range(16):
        packed[G + 8 * (i // 4 % 2), 4 * T + i % 4 + 16 * (i // 8)] = a[:, i]
    # Metadata: lane l has row l / 4 + 8 (l % 2), k half (l / 2) % 2.
    meta = np.zeros((16, 2), np.uint32)
    meta[G + 8 * (LANE % 2), LANE // 2 % 2] = e
    x, y = np.zeros((16, 64), np.int64), np.zeros((8, 64), np.int64)
    rows = np.arange(16)
    for slot in range(16):
        nibble = meta[:, slot // 8] >> np.uint32(4 * (slot % 8)) & np.uint32(15)
        first, second = (nibble & 3).astype(int), (nibble >> 2).astype(int)
        assert (first < second).all(), "metadata is not ordered"
        x[rows, 4 * slot + first] = packed[:, 2 * slot]
        x[rows, 4 * slot + second] = packed[:, 2 * slot + 1]
    for i in range(16):
        y[G, 4 * T + i % 4 + 16 * (i // 4)] = b[:, i]
    return x @ y.T


def window_channels(form: str, which: int) -> np.ndarray:
    """[16 slots, 4]: the channels of a period whose weights a block of windows repeats."""
    slots = np.empty((16, 4), int)
    for slot in range(16):
        if form == "2:4+r32":  # slot 4 (block / 2) + 2 m + block % 2: channels 32 m of the block
            block = 2 * (slot // 4) + slot % 2
            slots[slot] = 64 * block + 32 * (slot // 2 % 2) + 8 * np.arange(4)
        else:  # slot 4 block + lane: channels 16 lane of the block
            slots[slot] = 64 * (slot // 4) + 16 * (slot % 4) + 4 * np.arange(4) + which
    return slots


def weights_of_block(form: str, w: np.ndarray, block: int) -> np.ndarray:
    """[n, 64] in the order of the instruction's k, out of w [n, k_pad]."""
    base, relief = PERIOD[form]
    period, within = divmod(block, base + relief)
    if within < base:
        # Lane t of a quad has the channels 16 t ..; its register j is slot 4 j + t.
        order = np.arange(64).reshape(4, 4, 4).transpose(1, 0, 2).reshape(64)
        at = 64 * (period * base + within) + order
    else:
        at = 64 * period * base + window_channels(form, within - base).reshape(64)
    wide = np.pad(w, ((0, 0), (0, 64 * base)))
    return wide[:, np.minimum(at, wide.shape[1] - 1)]


def lanes_of_b(y: np.ndarray) -> np.ndarray:
    """y [8, 64] in the order of k -> [32 lanes, 16 bytes]."""
    out = np.empty((32, 16), np.int8)
    for i in range(16):
        out[:, i] = y[G, 16 * (i // 4) + 4 * T + i % 4]
    return out


def multiply(form: str, a: np.ndarray, e: np.ndarray, w: np.ndarray, rows: int) -> np.ndarray:
    """Products [rows, n] from fragments a (int8) and e (uint32), and plain weights w [n, k_pad]."""
    n, k_pad = w.shape
    base, relief = PERIOD[form]
    real = k_pad // 64
    blocks = -(-real // base) * (base + relief) if relief else real
    tiles = -(-rows // 16)
    w = np.pad(w, ((0, -n % 8), (0, 0)))
    out = np.zeros((16 * tiles, len(w)), np.int64)
    if form == "dense":
        a = a.reshape(tiles, blocks, 2, 32, 16)
    else:
        a = a.reshape(tiles, blocks, 32, 16)
        e = e.reshape(tiles, -1, 32, 4)
    for tile in range(tiles):
        for block in range(blocks):
            y = weights_of_block(form, w, block)
            for n0 in range(0, len(w), 8):
                b = lanes_of_b(y[n0 : n0 + 8])
                here = out[16 * tile : 16 * tile + 16, n0 : n0 + 8]
                if form == "dense":
                    low, high = a[tile, block]  # rows g and g + 8
                    for half in range(2):
                        s = slice(8 * half, 8 * half + 8)
                        x, z = low[:, s].reshape(32, 2, 4), high[:, s].reshape(32, 2, 4)
                        both = np.stack([x[:, 0], z[:, 0], x[:, 1], z[:, 1]], axis=1)
                        here += mma_s8(both.reshape(32, 16), b[:, s])
                else:
                    here += mma_sp_s8(a[tile, block], b, e[tile, block // 4, :, block % 4])
    return out[:rows, :n]


def run_tool(
    test_bin: Path, form: str, z: np.ndarray, f: np.ndarray | None, w: np.ndarray
) -> tuple[np.ndarray, ...]:
    program = test_bin / "tool_fragments"
    if not program.exists():
        pytest.skip("tool_fragments is not built")
    rows, k = z.shape
    n, k_pad = w.shape
    head = f"{form} {rows} {k} {int(f is not None)} {n}\n".encode()
    data = head + (f.tobytes() if f is not None else b"") + z.tobytes() + w.tobytes()
    done = subprocess.run([program], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    base, relief = PERIOD[form]
    blocks = -(-(k_pad // 64) // base) * (base + relief) if relief else k_pad // 64
    tiles = -(-rows // 16)
    sizes = [
        tiles * blocks * (1024 if form == "dense" else 512),
        0 if form == "dense" else tiles * -(-blocks // 4) * 512,
        4 * rows,
        -(-n // 8) * 8 * k_pad,
        4 * rows * n,
    ]
    parts = np.split(np.frombuffer(done.stdout, np.uint8), np.cumsum(sizes))
    assert parts[-1].size == 0
    a, e, scale, b, acc = parts[:-1]
    return (
        a.view(np.int8),
        e.view(np.uint32),
        scale.view(np.float32),
        b.view(np.int8),
        acc.view(np.int32).reshape(rows, n),
    )


def quantized(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by the rules of quantize_row."""
    largest = np.abs(z).max(axis=1)
    with np.errstate(all="ignore"):
        factor = np.float32(127) / largest
        tiny = ~np.isfinite(factor) & np.isfinite(largest)
        bad = ~np.isfinite(largest)
        scale = np.where(tiny, 0, np.where(bad, np.nan, largest / np.float32(127)))
        x = z * np.where(tiny | bad, 0, factor)[:, None]
    x[tiny | bad] = 0
    return np.rint(x).astype(np.int8), scale.astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factors", [False, True])
def test_fragments(test_bin: Path, form: str, factors: bool) -> None:
    rng = np.random.default_rng(FORMS.index(form))
    for rows, k, n in [(4, 48, 5), (18, 328, 9)]:
        k_pad = -(-k // 64) * 64
        f = rng.uniform(0.5, 2, k).astype(np.float32) if factors else None
        w = np.zeros((n, k_pad), np.int8)
        w[:, :k] = rng.integers(-127, 128, (n, k))
        for name, z in cases(rng, rows, k):
            masks = np.concatenate([oracle_mask(form, z[r : r + 1], f) for r in range(rows)])
            q, scale = quantized(np.where(masks, z, np.float32(0)))
            x = np.pad(q.astype(np.int64), ((0, 0), (0, k_pad - k)))
            a, e, found_scale, b, acc = run_tool(test_bin, form, z, f, w)
            assert np.array_equal(scale, found_scale, equal_nan=True), name
            assert np.array_equal(acc, x @ w.T.astype(np.int64)), name
            assert np.array_equal(multiply(form, a, e, w, rows), acc), name
            for n0 in range(0, n, 8):  # B as stored is what the lanes want
                for block in range(k_pad // 64):
                    stored = b.reshape(-1, k_pad // 64, 32, 16)[n0 // 8, block]
                    y = np.pad(weights_of_block("2:4", w, block), ((0, -n % 8), (0, 0)))
                    assert np.array_equal(stored, lanes_of_b(y[n0 : n0 + 8])), name

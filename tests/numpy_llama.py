"""A llama forward pass in numpy float64 with N:M pruned inputs: the oracle of the sparse tests.

Written from the formulas of arXiv 2508.02128 and 2509.22166 alone; shares nothing with the engine.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

PROJECTIONS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@dataclass(frozen=True)
class Rule:
    """Keep n of every m blocks of `block` channels, one mask per `tokens` neighbouring tokens."""

    n: int
    m: int
    block: int = 1
    tokens: int = 1
    criterion: str = "act"
    var: bool = False
    shift: str = "none"  # none | mean | median
    # Of one projection: eta [K] taken off every row, factor and offset [O] of what comes out,
    # and factors [O, R], [R, K] that what was pruned away goes through.
    eta: np.ndarray | None = None
    gain: np.ndarray | None = None
    offset: np.ndarray | None = None
    left: np.ndarray | None = None
    right: np.ndarray | None = None


def channel_factors(w: np.ndarray, criterion: str) -> np.ndarray:
    """f [K] of a weight matrix w [O, K]; the smallest is 1."""
    if criterion == "act":
        return np.ones(w.shape[1])
    if criterion == "norm":
        f = np.linalg.norm(w, axis=0)
    else:
        low, high = np.percentile(w, [0.5, 99.5])
        kept = (w >= low) & (w <= high)
        centred = w - w[kept].mean()
        f = np.linalg.norm(centred * kept if criterion == "amber" else centred, axis=0)
    f = np.where(f > 0, f, f[f > 0].min())
    return f / f.min()


def keep_mask(score: np.ndarray, rule: Rule) -> np.ndarray:
    """Boolean [T, K] for scores [T, K] >= 0: stable sort, so that ties go to the lower index."""
    t, k = score.shape
    group = rule.m * rule.block
    padded = np.zeros((t + t % rule.tokens, -(-k // group) * group))
    padded[:t, :k] = score
    unit = padded if rule.block == 1 else padded**2
    unit = unit.reshape(len(padded) // rule.tokens, rule.tokens, -1, rule.m, rule.block)
    unit = unit.sum(axis=(1, 4))
    order = np.argsort(-unit, axis=-1, kind="stable")
    kept = np.zeros(unit.shape, bool)
    np.put_along_axis(kept, order[..., : rule.n], True, axis=-1)
    kept = np.repeat(kept.reshape(len(unit), -1), rule.block, axis=1)
    return np.repeat(kept, rule.tokens, axis=0)[:t, :k]


def round_rows(x: np.ndarray) -> np.ndarray:
    """Rows as symmetric INT8 holds them: multiples of absmax / 127."""
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1)
    return np.rint(x / scale) * scale


def sparse_linear(
    x: np.ndarray, w: np.ndarray, rule: Rule | None, int8: bool = False
) -> np.ndarray:
    """x [T, K], w [O, K] -> [T, O]; with int8, both operands rounded row by row."""
    wq = round_rows(w) if int8 else w
    if rule is None:
        return (round_rows(x) if int8 else x) @ wq.T
    eta = np.zeros((len(x), 1))
    if rule.shift == "mean":
        eta = x.mean(axis=1, keepdims=True)
    if rule.shift == "median":
        eta = np.sort(x, axis=1)[:, [(x.shape[1] - 1) // 2]]
    z = x - eta
    if rule.eta is not None:
        z = z - rule.eta
    if rule.criterion == "clact":  # arXiv 2509.22166, in full: columns over rows
        f = np.linalg.norm(x, axis=0) / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-8)
    else:
        f = channel_factors(w, rule.criterion)
    kept = z * keep_mask(np.abs(z) * f, rule)
    nu = np.ones((len(x), 1))
    if rule.var:
        nu = np.sqrt(z.var(axis=1) / np.maximum(kept.var(axis=1), 1e-9))[:, None]
    y = nu * ((round_rows(kept) if int8 else kept) @ wq.T)
    if rule.gain is not None:
        y = y * rule.gain + rule.offset
    if rule.eta is not None:
        y = y + wq @ rule.eta
    if rule.left is not None:
        y = y + (z - kept) @ rule.right.T @ rule.left.T
    return y + eta * wq.sum(axis=1)


class NumpyLlama:
    """Interleaved RoPE, grouped-query attention, SwiGLU, tied head. With int8, linear layers round
    both operands and the KV cache is float16."""

    def __init__(self, path: Path, int8: bool = False) -> None:
        self.int8 = int8
        self.freq: np.ndarray | None = None  # [head_dim / 2] radians per position
        self.mscale = 1.0  # factor on cosines and sines
        reader = GGUFReader(path)
        self.t = {
            t.name: dequantize(t.data, t.tensor_type).astype(np.float64).reshape(t.shape[::-1])
            for t in reader.tensors
        }

        def value(name: str) -> float:
            return reader.fields[f"llama.{name}"].parts[-1][0]

        self.layers = int(value("block_count"))
        self.heads = int(value("attention.head_count"))
        self.kv_heads = int(value("attention.head_count_kv"))
        self.eps = float(value("attention.layer_norm_rms_epsilon"))

    def norm(self, x: np.ndarray, weight: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.eps) * self.t[weight]

    def rope(self, x: np.ndarray) -> np.ndarray:
        """x [T, heads, head_dim]"""
        half = x.shape[-1] // 2
        freq = 10000.0 ** (-np.arange(half) / half) if self.freq is None else self.freq
        angle = np.arange(len(x))[:, None] * freq
        c, s = self.mscale * np.cos(angle)[:, None], self.mscale * np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2], out[..., 1::2] = even * c - odd * s, even * s + odd * c
        return out

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        t = len(q)
        q = self.rope(q.reshape(t, self.heads, -1))
        k, v = self.rope(k.reshape(t, self.kv_heads, -1)), v.reshape(t, self.kv_heads, -1)
        if self.int8:
            k, v = k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)
        k, v = (a.repeat(self.heads // self.kv_heads, axis=1) for a in (k, v))
        score = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        score = np.where(np.tri(t, dtype=bool), score, -np.inf)
        weight = np.exp(score - score.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        return np.einsum("hij,jhd->ihd", weight, v).reshape(t, -1)

    def logits(
        self,
        tokens: list[int],
        rules: dict[tuple[int, str], Rule],
        inputs: dict[tuple[int, str], np.ndarray] | None = None,
    ) -> np.ndarray:
        """[T, vocabulary]; rules by (layer, projection). inputs: filled with what each reads."""
        x = self.t["token_embd.weight"][tokens]
        for il in range(self.layers):

            def linear(name: str, z: np.ndarray, il: int = il) -> np.ndarray:
                w = self.t[f"blk.{il}.{PROJECTIONS[name]}.weight"]
                if inputs is not None:
                    inputs[il, name] = z
                return sparse_linear(z, w, rules.get((il, name)), self.int8)

            z = self.norm(x, f"blk.{il}.attn_norm.weight")
            attention = self.attention(linear("q", z), linear("k", z), linear("v", z))
            x = x + linear("o", attention)
            z = self.norm(x, f"blk.{il}.ffn_norm.weight")
            gate = linear("gate", z)
            x = x + linear("down", gate / (1 + np.exp(-gate)) * linear("up", z))
        z = self.norm(x, "output_norm.weight")
        head = self.t.get("output.weight", self.t["token_embd.weight"])
        return sparse_linear(z, head, None, self.int8)

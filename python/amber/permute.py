"""Channel orders that make patterns cheaper, chosen from activations and folded into weights.

A block pattern (N:16x4) keeps four neighbouring channels or none of them, so it loses least where
channels that are large for the same tokens stand together. A pattern of single channels (2:4) loses
least where every group has its share of large ones. Three orders are free at run time:

    residual  one order of the width for the whole model: columns of what reads the residual stream,
              rows of what writes it, norms and embedding
    heads     within each value head: rows of v, columns of o for every query head that reads it
    ffn       of the feed-forward width of each layer: rows of gate and up, columns of down

The permuted model is the same function. INT8 results keep their bits under the last two (integer
sums have no order); the first changes the order of the norms' sums, and a block-quantized embedding
is kept as F16, since its blocks lie along the width.

Activations come from a plain forward pass in numpy, layer by layer; only the choice of the order
depends on them, not the function. They are those of a calibration text, or of tokens drawn at
random, which asks for nothing but the weights.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

    from .quantize import Source

BLOCK, GROUP = 4, 16  # channels of a block, blocks of a group
NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# RoPE of the architectures that pair channel i with i + n/2 (engine/arch.c); others: with i + 1.
HALVES = ("qwen2", "qwen3")
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # whose layers Forward computes


@dataclass(slots=True)
class Orders:
    """New channel i is old channel order[i]."""

    residual: "np.ndarray"  # [n_embd]
    values: list["np.ndarray"] = field(default_factory=list)  # per layer [n_head_kv * head_dim]
    outputs: list["np.ndarray"] = field(default_factory=list)  # per layer [n_head * head_dim]
    ffn: list["np.ndarray"] = field(default_factory=list)  # per layer [n_ff]

    def of(self, name: str) -> tuple["np.ndarray | None", "np.ndarray | None"]:
        """Orders of a tensor's outputs and inputs; of a vector: the first."""
        if name in ("token_embd.weight", "output.weight"):
            return None, self.residual
        if name == "output_norm.weight":
            return self.residual, None
        found = NAME.fullmatch(name)
        if not found:
            return None, None
        il, what = int(found[1]), found[2]
        return {
            "attn_norm": (self.residual, None),
            "ffn_norm": (self.residual, None),
            "attn_q": (None, self.residual),
            "attn_k": (None, self.residual),
            "attn_v": (self.values[il], self.residual),
            "attn_output": (self.residual, self.outputs[il]),
            "ffn_gate": (self.ffn[il], self.residual),
            "ffn_up": (self.ffn[il], self.residual),
            "ffn_down": (self.residual, self.ffn[il]),
        }.get(what, (None, None))

    def apply(self, name: str, rows: "np.ndarray") -> "np.ndarray":
        """A whole tensor, or rows of one whose outputs stay, in the new order."""
        import numpy as np

        outputs, inputs = self.of(name)
        if rows.ndim == 1:
            return rows if outputs is None else rows[outputs]
        if inputs is not None:
            rows = np.take(rows, inputs, axis=1)
        return rows if outputs is None else rows[outputs]


# ---- orders from statistics ----


def together(x: "np.ndarray", centred: bool) -> "np.ndarray":
    """How much channels are large for the same tokens: [k, k] from x [tokens, k].

    Plain, large channels go with large ones and small ones are left out for most tokens, which
    keeps the most energy. Centred (the correlation of magnitudes), each channel goes with those
    that it rises and falls with. The residual stream wants the latter: channels that hardly ever
    survive cost it more than their energy says, in all of its readers.
    """
    import numpy as np

    size = np.abs(x) / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-30)
    if centred:
        size -= size.mean(axis=0)
        size /= np.sqrt(np.mean(size * size, axis=0) + 1e-12)
    return size.T @ size / len(size)


def blocks(shared: "np.ndarray") -> "np.ndarray":
    """Channels in blocks of four [k / 4, 4], from their matrix: the largest channel that is left
    takes the partners that share most with the block so far."""
    import numpy as np

    free = np.zeros(len(shared), np.float32)  # -inf once taken
    made = []
    for first in np.argsort(-np.diagonal(shared), kind="stable"):
        if free[first]:
            continue
        free[first] = -np.inf
        block, score = [first], shared[first].copy()
        for _ in range(BLOCK - 1):
            partner = int(np.argmax(score + free))
            free[partner] = -np.inf
            block.append(partner)
            score += shared[partner]
        made.append(block)
    return np.array(made)


def deal(count: int, piles: int) -> "np.ndarray":
    """0..count - 1 dealt to piles back and forth, pile after pile."""
    import numpy as np

    turn, place = np.divmod(np.arange(count), piles)
    return np.lexsort((turn, np.where(turn % 2 == 0, place, piles - 1 - place)))


@dataclass(frozen=True, slots=True)
class Layout:
    """What a pattern looks at together: groups of `group` blocks of `block` channels; of 2:4 with
    relief windows, `group` channels of a window."""

    block: int = BLOCK
    group: int = GROUP
    relief: bool = False

    @classmethod
    def of(cls, pattern: str) -> "Layout":
        """Of a pattern's text. Single channels are spread over the groups, so that none holds many
        large ones; blocks are made of channels that are large together."""
        relief = re.fullmatch(r"2:4\+r(\d+)", pattern)
        if relief:
            return cls(1, int(relief[1]), True)
        found = re.fullmatch(r"(?:\d+:)?(\d+)(x4t2|x4|x)?", pattern)
        if not found or (found[2] or "x") != "x":
            return cls(BLOCK, int(found[1]) if found else GROUP)
        return cls(1, int(found[1]))


def order(shared: "np.ndarray", layout: Layout = Layout()) -> "np.ndarray":
    """The order of k channels: their blocks dealt to the groups from the largest to the smallest,
    back and forth, so that every group has its share of large ones. Widths that do not come in
    blocks stay as they are."""
    import numpy as np

    if len(shared) % layout.block:
        return np.arange(len(shared))
    made = blocks(shared) if layout.block > 1 else np.arange(len(shared))[:, None]
    energy = np.diagonal(shared)[made].sum(axis=1)
    n_groups = max(1, len(made) // layout.group)
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    for rank, index in enumerate(np.argsort(-energy, kind="stable")):
        turn, place = divmod(rank, n_groups)
        groups[place if turn % 2 == 0 else n_groups - 1 - place].append(index)
    if layout.relief:  # in a window the same again, the largest of every four first
        groups = [[group[i] for i in deal(len(group), max(1, len(group) // 4))] for group in groups]
    # A group that got more than it holds passes the rest on: sizes differ where k has a ragged end.
    flat = [index for group in groups for index in group[: layout.group]]
    flat += [index for group in groups for index in group[layout.group :]]
    return made[flat].ravel()


# ---- activations ----


class Forward:
    """A forward pass in float32 of the architectures that Amber runs, for statistics alone: RoPE
    scaling beyond the file's own divisors is left out, which short windows hardly feel."""

    def __init__(self, source: "Source") -> None:
        self.source = source
        value = source.value
        self.arch = source.reader.fields["general.architecture"].contents()
        if self.arch not in ARCHITECTURES or value("expert_count"):
            raise UnsupportedModelError(
                f"--permute: expected a model of {', '.join(ARCHITECTURES)} without experts, "
                f"found {self.arch}"
            )
        self.n_layer = value("block_count")
        self.n_head = value("attention.head_count")
        self.n_head_kv = value("attention.head_count_kv") or self.n_head
        self.head_dim = value("attention.key_length") or value("embedding_length") // self.n_head
        self.eps = value("attention.layer_norm_rms_epsilon")
        self.n_rot = value("rope.dimension_count") or self.head_dim
        self.base = value("rope.freq_base", 10000.0)

    def _linear(self, name: str, x: "np.ndarray") -> "np.ndarray":
        y = x @ self.source.rows(f"{name}.weight").T
        if f"{name}.bias" in self.source.tensors:
            y += self.source.rows(f"{name}.bias")
        return y

    def _weighted(self, x: "np.ndarray", *names: str) -> "np.ndarray":
        """Rows [tokens, channels] with each channel times the norm of its weights in the matrices
        that read it: what leaving it out would cost."""
        import numpy as np

        cost = sum(np.square(self.source.rows(f"{name}.weight")).sum(axis=0) for name in names)
        return x.reshape(-1, x.shape[-1]) * np.sqrt(cost)

    def _norm(self, name: str, x: "np.ndarray") -> "np.ndarray":
        import numpy as np

        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.source.rows(f"{name}.weight")

    def _head_norm(self, name: str, x: "np.ndarray") -> "np.ndarray":
        """Of each head alone, where the model has such a norm."""
        return self._norm(name, x) if f"{name}.weight" in self.source.tensors else x

    def _rope(self, x: "np.ndarray") -> "np.ndarray":
        """x [windows, tokens, heads, head_dim]"""
        import numpy as np

        half = self.n_rot // 2
        frequency = self.base ** (-np.arange(half) / half)
        if "rope_freqs.weight" in self.source.tensors:
            frequency = frequency / self.source.rows("rope_freqs.weight")
        angle = (np.arange(x.shape[1])[:, None] * frequency)[:, None]
        c, s = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        out = x.copy()
        if self.arch in HALVES:
            first, second = slice(0, half), slice(half, self.n_rot)
        else:
            first, second = slice(0, self.n_rot, 2), slice(1, self.n_rot, 2)
        a, b = x[..., first], x[..., second]
        out[..., first], out[..., second] = a * c - b * s, a * s + b * c
        return out

    def _attention(self, il: int, z: "np.ndarray") -> "np.ndarray":
        import numpy as np

        n, t, _ = z.shape
        shape = (n, t, -1, self.head_dim)
        q = self._linear(f"blk.{il}.attn_q", z).reshape(shape)
        k = self._linear(f"blk.{il}.attn_k", z).reshape(shape)
        q = self._rope(self._head_norm(f"blk.{il}.attn_q_norm", q))
        k = self._rope(self._head_norm(f"blk.{il}.attn_k_norm", k))
        v = self._linear(f"blk.{il}.attn_v", z).reshape(shape)
        out = np.empty_like(q)
        hidden = np.triu(np.full((t, t), -np.inf, np.float32), 1)
        for h in range(self.n_head):
            g = h * self.n_head_kv // self.n_head
            score = q[:, :, h] @ k[:, :, g].transpose(0, 2, 1) / np.sqrt(self.head_dim) + hidden
            weight = np.exp(score - score.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            out[:, :, h] = weight @ v[:, :, g]
        return out.reshape(n, t, -1)

    def run(
        self,
        windows: Sequence[Sequence[int]],
        see: Callable[[int, str, "np.ndarray"], Any],
        progress: Callable[[int, int], Any],
    ) -> None:
        """Calls see(layer, what, rows [tokens, channels]) with weighted inputs: "residual" (twice a
        layer), "heads" and "ffn"."""
        import numpy as np

        tokens = np.array(windows)
        used, place = np.unique(tokens, return_inverse=True)
        embedding = np.concatenate(
            [self.source.rows("token_embd.weight", t, t + 1) for t in used.tolist()]
        )
        x = embedding[place.reshape(tokens.shape)]
        for il in range(self.n_layer):
            z = self._norm(f"blk.{il}.attn_norm", x)
            names = [f"blk.{il}.attn_{which}" for which in "qkv"]
            see(il, "residual", self._weighted(z, *names))
            z = self._attention(il, z)
            see(il, "heads", self._weighted(z, f"blk.{il}.attn_output"))
            x = x + self._linear(f"blk.{il}.attn_output", z)
            z = self._norm(f"blk.{il}.ffn_norm", x)
            see(il, "residual", self._weighted(z, f"blk.{il}.ffn_gate", f"blk.{il}.ffn_up"))
            gate = self._linear(f"blk.{il}.ffn_gate", z)
            with np.errstate(over="ignore"):  # exp(-gate) may be infinite: silu is 0 there
                z = gate / (1 + np.exp(-gate)) * self._linear(f"blk.{il}.ffn_up", z)
            see(il, "ffn", self._weighted(z, f"blk.{il}.ffn_down"))
            x = x + self._linear(f"blk.{il}.ffn_down", z)
            progress(il + 1, self.n_layer)


def random_windows(n_vocab: int, ctx: int, count: int) -> list[list[int]]:
    """Windows of tokens drawn with equal chance, always the same ones."""
    import numpy as np

    return np.random.default_rng(0).integers(0, n_vocab, (count, ctx)).tolist()


def choose(
    source: "Source",
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], Any],
    layout: Layout = Layout(),
) -> Orders:
    """The orders for a model from its activations on some windows of equal length."""
    import numpy as np

    forward = Forward(source)
    orders = Orders(np.empty(0, int))
    residual: Any = 0
    per_kv = forward.n_head // forward.n_head_kv
    size = forward.head_dim

    def see(_il: int, what: str, rows: "np.ndarray") -> None:
        nonlocal residual
        if what == "residual":
            residual = residual + together(rows, centred=layout.block > 1)
        elif what == "ffn":
            orders.ffn.append(order(together(rows, centred=False), layout))
        else:
            shared = together(rows, centred=False)
            values, outputs = [], []
            for g in range(forward.n_head_kv):
                heads = range(g * per_kv, (g + 1) * per_kv)
                inside = sum(shared[h * size : (h + 1) * size, h * size : (h + 1) * size]
                             for h in heads)  # fmt: skip
                new = order(inside, layout)
                values.append(g * size + new)
                outputs += [h * size + new for h in heads]
            orders.values.append(np.concatenate(values))
            orders.outputs.append(np.concatenate(outputs))

    forward.run(windows, see, progress)
    orders.residual = order(residual, layout)
    return orders

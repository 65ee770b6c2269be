"""Statistics of a model's activations, and what amber-quantize makes of them: smoothing that is
folded into weights, shifts (S-PTS) and low-rank factors (R-Sparse).

Smoothing scales the inputs of a layer channel by channel and its weight columns by the inverse; the
model stays the same function. With s_j = max|X_j|^alpha / max|W_j|^(1 - alpha):

    smoothquant   X_j / s_j   takes outliers out of the activations (arXiv 2211.10438)
    outstanding   X_j * s_j   the inverse, so that pruning finds more to drop (arXiv 2508.02128)

It costs nothing at run time: the factor goes into the norm before q, k, v and before gate, up, into
up's rows for down, and into v's rows for o (one factor for all query heads that read a value head).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

    from .quantize import Source

KINDS = {"smoothquant": 0.5, "outstanding": 0.10}  # default alpha
# Whose norms feed q, k, v and gate, up alone, and whose down reads f(gate) * up.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
TENSORS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
INPUT = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}


@dataclass(slots=True)
class Statistics:
    """Of one input over the tokens of a text."""

    largest: "np.ndarray"  # [n_in] max |x|
    total: "np.ndarray"  # [n_in] sum of x
    medians: float  # sum over tokens of the median over channels
    tokens: int


def statistics(
    path: str,
    windows: Sequence[Sequence[int]],
    threads: int | None,
    progress: Callable[[int, int], Any],
) -> dict[tuple[int, str], Statistics]:
    """What the projections of the dense INT8 model read: by (layer, "q", "o", "gate" or "down")."""
    import numpy as np

    found: dict[tuple[int, str], Statistics] = {}

    def tap(layer: int, projection: str, _position: int, rows: "np.ndarray") -> None:
        largest, total = np.abs(rows).max(axis=0), rows.sum(axis=0, dtype=np.float64)
        medians = float(np.median(rows, axis=1).sum())
        new = Statistics(largest, total, medians, len(rows))
        if old := found.get((layer, projection)):
            new.largest = np.maximum(old.largest, new.largest)
            new.total += old.total
            new.medians += old.medians
            new.tokens += old.tokens
        found[layer, projection] = new

    n_ctx = max(map(len, windows))
    with (
        Engine(path, sparse="off", device="cpu", threads=threads, n_ctx=n_ctx) as engine,
        engine.session(n_ctx=n_ctx, tap=tap) as session,
    ):
        for i, window in enumerate(windows):
            session.score(list(window))
            progress(i + 1, len(windows))
    return found


def shifts(found: dict[tuple[int, str], Statistics], method: str) -> dict[str, "np.ndarray"]:
    """S-PTS (arXiv 2509.22166): tensors "blk.N.<matrix>.shift". "spts": the mean over tokens of
    their medians, the same for all channels; "spts-channel": the mean of each channel."""
    import numpy as np

    made = {}
    for (layer, name), s in found.items():
        if method == "spts":
            shift = np.full(len(s.total), s.medians / s.tokens)
        else:
            shift = s.total / s.tokens
        for projection, source in INPUT.items():
            if source == name:
                made[f"blk.{layer}.{TENSORS[projection]}.shift"] = shift
    return made


def factors(
    source: "Source",
    shapes: dict[tuple[int, str], tuple[int, int]],
    rank: int,
    progress: Callable[[int, int], Any],
) -> dict[str, "np.ndarray"]:
    """R-Sparse (arXiv 2504.19449): W ~ left [O, rank] right [rank, K], the truncated SVD of the
    weights as an Amber GGUF holds them; zeros where a matrix has a smaller rank. shapes: (n_out,
    n_in) by (layer, projection)."""
    import numpy as np

    made = {}
    for i, ((layer, projection), shape) in enumerate(shapes.items()):
        stem = f"blk.{layer}.{TENSORS[projection]}"
        u, s, v = np.linalg.svd(source.unpacked(stem, *shape), full_matrices=False)
        root = np.sqrt(s[:rank])
        left = np.zeros((len(u), rank), np.float32)
        right = np.zeros((rank, v.shape[1]), np.float32)
        left[:, : len(root)] = u[:, :rank] * root
        right[: len(root)] = v[:rank] * root[:, None]
        made |= {f"{stem}.left": left, f"{stem}.right": right}
        progress(i + 1, len(shapes))
    return made


@dataclass(slots=True)
class Smoothing:
    """Factors on the rows (outputs) and columns (inputs) of a file's tensors."""

    rows: dict[str, "np.ndarray"] = field(default_factory=dict)
    columns: dict[str, "np.ndarray"] = field(default_factory=dict)
    original_scores: bool = False  # channel scores are taken from W, not from W'

    def apply(self, name: str, values: "np.ndarray") -> "np.ndarray":
        """A whole tensor [n_out, n_in], or a vector [n], in float32."""
        if name in self.columns:
            values = values * self.columns[name]
        if name in self.rows:
            row = self.rows[name]
            values = values * (row if values.ndim == 1 else row[:, None])
        return values


def smooth(
    source: "Source", found: dict[tuple[int, str], Statistics], kind: str, alpha: float
) -> Smoothing:
    """The factors for a model. Channels that no token or no weight uses keep theirs at 1."""
    import numpy as np

    arch = source.reader.fields["general.architecture"].contents()
    if arch not in ARCHITECTURES or source.value("expert_count"):
        raise UnsupportedModelError(
            f"--smooth: expected a model of {', '.join(ARCHITECTURES)} without experts, "
            f"found {arch}"
        )
    heads = source.value("attention.head_count")
    kv_heads = source.value("attention.head_count_kv") or heads
    made = Smoothing()

    def factor(x: "np.ndarray", w: "np.ndarray") -> "np.ndarray":
        s = np.ones(len(x))
        used = (x > 0) & (w > 0)
        s[used] = x[used].astype(float) ** alpha / w[used].astype(float) ** (1 - alpha)
        s[used] /= np.exp(np.log(s[used]).mean()) if used.any() else 1
        return (s if kind == "outstanding" else 1 / s).astype(np.float32)

    def column_max(layer: int, *names: str) -> "np.ndarray":
        return np.max(
            [np.abs(source.rows(f"blk.{layer}.{TENSORS[n]}.weight")).max(axis=0) for n in names],
            axis=0,
        )

    for layer in range(source.value("block_count")):
        stem = f"blk.{layer}"
        for norm, names in (("attn_norm", ("q", "k", "v")), ("ffn_norm", ("gate", "up"))):
            d = factor(found[layer, names[0]].largest, column_max(layer, *names))
            made.rows[f"{stem}.{norm}.weight"] = made.rows[f"{stem}.{norm}.bias"] = d
            made.columns |= {f"{stem}.{TENSORS[name]}.weight": 1 / d for name in names}
        d = factor(found[layer, "down"].largest, column_max(layer, "down"))
        made.rows[f"{stem}.ffn_up.weight"] = made.rows[f"{stem}.ffn_up.bias"] = d
        made.columns[f"{stem}.ffn_down.weight"] = 1 / d
        shape = (kv_heads, heads // kv_heads, -1)
        x = found[layer, "o"].largest.reshape(shape).max(axis=1)
        w = column_max(layer, "o").reshape(shape).max(axis=1)
        d = factor(x.ravel(), w.ravel())
        made.rows[f"{stem}.attn_v.weight"] = made.rows[f"{stem}.attn_v.bias"] = d
        repeated = np.repeat(d.reshape(kv_heads, 1, -1), heads // kv_heads, axis=1).ravel()
        made.columns[f"{stem}.attn_output.weight"] = 1 / repeated
    return made

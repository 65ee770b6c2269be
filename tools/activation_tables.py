"""Masks on what the projections of a model really read: errors of their outputs, and energy lost.

    python tools/activation_tables.py MODEL TEXT [--tokens 1024] [--out FILE]

Captures the inputs of every projection of a dense run in float32 (Engine.activations). The order of
channels ("order") is chosen on the first half of the tokens, and everything is measured on the
second. Tables, in Markdown:

    error     mean over tokens of ||Y - Y'|| / ||Y||, Y = X W^T with the model's weights, Y' with X
              pruned, averaged over layers, one column per input. g: channels times tokens that
              share a decision.
    equal     how many blocks of 16 the masks that CPU kernels skip (N:16x4t2) must keep for the
              error of a mask of single channels, between the measured N, and how much faster than
              dense that is (amber/timing.py).
    energy    sum of dropped x^2 over sum of x^2, in percent, averaged over layers, for masks that
              sparse tensor cores hold (2:4 and its relief windows) beside the papers'.

All masks are selected here, in numpy, apart from the engine's kernels.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amber import Engine, permute, quantize
from amber.models import find_model
from amber.smooth import INPUT, TENSORS
from amber.timing import TimeModel

INPUTS = {"q": "q, k, v", "o": "o", "gate": "gate, up", "down": "down"}


@dataclass
class Input:
    """Of one layer: what was read, and the weights of all that read it."""

    seen: np.ndarray  # [tokens, channels], to choose orders on
    x: np.ndarray  # [tokens, channels], to measure on
    w: np.ndarray  # [outputs, channels]
    y: np.ndarray  # x w^T

    def __init__(self, rows: np.ndarray, w: np.ndarray) -> None:
        half = len(rows) // 2
        self.seen, self.x, self.w = rows[:half], rows[half:], w
        self.y = self.x @ w.T

    def error(self, kept: np.ndarray) -> float:
        lost = (self.x * ~kept) @ self.w.T
        return float(np.mean(np.linalg.norm(lost, axis=1) / np.linalg.norm(self.y, axis=1)))

    def energy(self, kept: np.ndarray) -> float:
        return float(np.sum(np.square(self.x * ~kept)) / np.sum(np.square(self.x)))


Mask = Callable[[Input], np.ndarray]  # [tokens, channels] bool of Input.x


# ---- masks ----


def largest(score: np.ndarray, n: int) -> np.ndarray:
    """Marks the n largest of the last axis; of equals the first."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :n]
    kept = np.zeros(score.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return kept


def blocks(x: np.ndarray, n: int, m: int, channels: int = 1, tokens: int = 1) -> np.ndarray:
    """n of m blocks of channels x tokens."""
    rows, width = x.shape
    energy = np.pad(x * x, ((0, -rows % tokens), (0, -width % (m * channels))))
    unit = energy.reshape(len(energy) // tokens, tokens, -1, m, channels).sum(axis=(1, 4))
    kept = np.repeat(largest(unit, n).reshape(len(unit), -1), channels, axis=1)
    return np.repeat(kept, tokens, axis=0)[:rows, :width]


def relief(x: np.ndarray, window: int) -> np.ndarray:
    """2:4 where of every `window` channels two of four neighbouring groups may keep a third value,
    if their first channel is one of the three: those where that gains most."""
    rows, width = x.shape
    energy = np.pad(x * x, ((0, 0), (0, -width % window))).reshape(rows, -1, window // 4, 4)
    places = energy[:, :, :: window // 16]  # the four groups that the window looks at
    gain = np.minimum(places[..., 0], np.sort(places, axis=-1)[..., 1])
    chosen = np.zeros(energy.shape[:3], bool)
    chosen[:, :, :: window // 16] = largest(gain, 2)
    three = np.ones(energy.shape, bool)
    three[..., 1:] = largest(energy[..., 1:], 2)
    kept = np.where(chosen[..., None], three, largest(energy, 2))
    return kept.reshape(rows, -1)[:, :width]


def in_order(order: np.ndarray, mask: Callable[[np.ndarray], np.ndarray], x: np.ndarray):
    kept = np.empty(x.shape, bool)
    kept[:, order] = mask(x[:, order])
    return kept


def by_energy(seen: np.ndarray, channels: int, m: int) -> np.ndarray:
    """Channels by mean energy; neighbours form a block; blocks are dealt in turn to the groups of
    m, so that every group spans the whole range."""
    ranked = np.argsort(-np.mean(seen * seen, axis=0), kind="stable")
    if len(ranked) % channels:
        return ranked
    made = ranked.reshape(-1, channels)
    return made[permute.deal(len(made), max(1, len(made) // m))].ravel()


def spread(seen: np.ndarray, text: str) -> np.ndarray:
    """As amber-quantize --permute spreads single channels for a pattern."""
    return permute.order(permute.together(seen, centred=False), permute.Layout.of(text))


def pattern(n: int, m: int, channels: int = 1, tokens: int = 1, order: bool = False) -> Mask:
    def mask(i: Input) -> np.ndarray:
        def choose(x: np.ndarray) -> np.ndarray:
            return blocks(x, n, m, channels, tokens)

        return in_order(by_energy(i.seen, channels, m), choose, i.x) if order else choose(i.x)

    return mask


def own_order(n: int, m: int, channels: int, tokens: int) -> Mask:
    """As amber-quantize --permute chooses it, by what is large together."""

    def mask(i: Input) -> np.ndarray:
        weighted = i.seen * np.linalg.norm(i.w, axis=0)
        order = permute.order(permute.together(weighted, centred=False))
        return in_order(order, lambda x: blocks(x, n, m, channels, tokens), i.x)

    return mask


def static(i: Input) -> np.ndarray:
    energy = np.mean(i.seen * i.seen, axis=0)
    return np.broadcast_to(largest(energy, len(energy) // 2), i.x.shape)


def union_of_two(i: Input) -> np.ndarray:
    alone = pattern(8, 16, 4, 1, order=True)(i)
    pairs = alone[: len(alone) // 2 * 2].reshape(-1, 2, alone.shape[1])
    alone[: len(pairs) * 2] = np.repeat(pairs.any(axis=1), 2, axis=0)
    return alone


def heaviest_dense(i: Input) -> np.ndarray:
    """A quarter of the channels is kept always, of the others 2 of 4: 10 of 16 in all."""
    energy = np.mean(i.seen * i.seen, axis=0)
    heavy = largest(energy, len(energy) // 4)
    kept = np.broadcast_to(heavy, i.x.shape).copy()
    kept[:, ~heavy] = blocks(i.x[:, ~heavy], 2, 4)
    return kept


ERRORS: list[tuple[str, str, Mask]] = [
    ("element 2:4 per token", "1", pattern(2, 4)),
    ("element 4:8", "1", pattern(4, 8)),
    ("element 8:16", "1", pattern(8, 16)),
    ("element 16:32", "1", pattern(16, 32)),
    ("unstructured 50 % per token", "1", lambda i: largest(np.abs(i.x), i.x.shape[1] // 2)),
    ("pair 2:4 per token", "2", pattern(2, 4, 2)),
    ("element 2:4 + order", "1", pattern(2, 4, order=True)),
    ("pair 8:16 per token + order", "2", pattern(8, 16, 2, order=True)),
    ("element 8:16, 2 tokens + order", "2", pattern(8, 16, 1, 2, order=True)),
    ("quad 8:16 per token (8:16x4)", "4", pattern(8, 16, 4)),
    ("quad 8:16 per token + order", "4", pattern(8, 16, 4, order=True)),
    ("quad 8:16 per token + amber-quantize's order", "4", own_order(8, 16, 4, 1)),
    ("element 8:16, 4 tokens + order", "4", pattern(8, 16, 1, 4, order=True)),
    ("oct 8:16 per token + order", "8", pattern(8, 16, 8, order=True)),
    ("quad 8:16, 2 tokens (8:16x4t2)", "8", pattern(8, 16, 4, 2)),
    ("quad 8:16, 2 tokens + order", "8", pattern(8, 16, 4, 2, order=True)),
    ("quad 8:16, 2 tokens + amber-quantize's order", "8", own_order(8, 16, 4, 2)),
    ("quad 10:16, 2 tokens + order", "8", pattern(10, 16, 4, 2, order=True)),
    ("quad 12:16, 2 tokens + order", "8", pattern(12, 16, 4, 2, order=True)),
    ("quad 14:16, 2 tokens + order", "8", pattern(14, 16, 4, 2, order=True)),
    ("quad 8:16, 4 tokens + order", "16", pattern(8, 16, 4, 4, order=True)),
    ("element 8:16, 16 tokens + order", "16", pattern(8, 16, 1, 16, order=True)),
    ("element 8:16, 64 tokens + order", "64", pattern(8, 16, 1, 64, order=True)),
    ("static channel pruning 50 %", "all", static),
    ("quad, union of 2 tokens' 8:16 masks + order", "-", union_of_two),
]
ENERGY: list[tuple[str, Mask]] = [
    ("2:4", pattern(2, 4)),
    ("4:8", pattern(4, 8)),
    ("8:16", pattern(8, 16)),
    ("16:32", pattern(16, 32)),
    ("unstructured 50 %", lambda i: largest(np.abs(i.x), i.x.shape[1] // 2)),
    ("2:4, order", lambda i: in_order(spread(i.seen, "2:4"), lambda x: blocks(x, 2, 4), i.x)),
    ("2:4+r32", lambda i: relief(i.x, 32)),
    ("2:4+r32, order", lambda i: in_order(spread(i.seen, "2:4+r32"), lambda x: relief(x, 32), i.x)),
    ("2:4+r16", lambda i: relief(i.x, 16)),
    ("2:4+r16, order", lambda i: in_order(spread(i.seen, "2:4+r16"), lambda x: relief(x, 16), i.x)),
    ("6:8", pattern(6, 8)),
    ("quarter dense + 2:4", heaviest_dense),
]


EQUAL = ["element 2:4 per token", "element 2:4 + order", "element 8:16"]
QUADS = {n: f"quad {n}:16, 2 tokens + order" for n in (8, 10, 12, 14)}  # by the blocks they keep

# ---- measuring ----


def capture(model: str, text: str, tokens: int) -> dict[str, list[Input]]:
    """By input, one entry per layer."""
    source = quantize.Source(find_model(model))
    found: dict[str, list[Input]] = {name: [] for name in INPUTS}
    with Engine(model, precision="float", sparse="off") as engine:
        ids = engine.tokenize(text)[:tokens]
        if len(ids) < tokens:
            raise SystemExit(f"TEXT: expected {tokens} tokens, found {len(ids)}")
        step = min(engine.info.n_ctx, tokens)
        windows = [engine.activations(ids[i : i + step]) for i in range(0, tokens, step)]
        for layer in range(engine.info.n_layer):
            for name in INPUTS:
                rows = np.concatenate([window[layer, name] for window in windows])
                readers = [p for p, source_name in INPUT.items() if source_name == name]
                w = [source.rows(f"blk.{layer}.{TENSORS[p]}.weight") for p in readers]
                found[name].append(Input(rows, np.concatenate(w)))
    return found


def rounding(i: Input) -> float:
    """Error of activations as INT8 rows hold them, and nothing pruned."""
    scale = np.abs(i.x).max(axis=1, keepdims=True) / 127
    lost = (i.x - np.rint(i.x / scale) * scale) @ i.w.T
    return float(np.mean(np.linalg.norm(lost, axis=1) / np.linalg.norm(i.y, axis=1)))


def spread_of(found: dict[str, list[Input]]) -> list[str]:
    """What the inputs are like: how unequal channels are, how heavy the tails within them."""
    lines = ["| input | channels | spread of the channels' RMS, ln | kurtosis within channels |",
             "|---|---|---|---|"]  # fmt: skip
    for name, inputs in found.items():
        sigma, tails = [], []
        for i in inputs:
            rms = np.sqrt(np.mean(i.x**2, axis=0))
            sigma.append(np.log(rms[rms > 0]).std())
            tails.append(np.median(np.mean(i.x**4, axis=0)[rms > 0] / rms[rms > 0] ** 4))
        lines.append(
            f"| {INPUTS[name]} | {inputs[0].x.shape[1]} | {np.mean(sigma):.2f} "
            f"| {np.mean(tails):.1f} |"
        )
    return lines


def equal(errors: dict[str, list[float]]) -> list[str]:
    """errors: of each mask, by input."""
    lines = [
        row(["N of N:16x4t2 + order for the error of", *INPUTS.values()]),
        "|---|---|---|---|---|",
    ]
    times = [TimeModel().projection(f"{n}:16x4t2", "q", 1, (1, 1)) for n in range(1, 17)]
    for name in EQUAL:
        cells = [name]
        for i, wanted in enumerate(errors[name]):
            found = [errors[quad][i] for quad in QUADS.values()]
            n = np.interp(-wanted, -np.array([*found, 0.0]), [*QUADS, 16])
            cells.append(f"{n:.1f} ({1 / np.interp(n, range(1, 17), times):.2f} times)")
        lines.append(row(cells))
    return lines


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(found: dict[str, list[Input]]) -> str:
    lines = [
        *spread_of(found),
        "",
        row(["mask", "g", *INPUTS.values()]),
        "|---|---|---|---|---|---|",
    ]
    measured: dict[str, list[float]] = {}
    for name, g, mask in ERRORS:
        errors = [float(np.mean([i.error(mask(i)) for i in inputs])) for inputs in found.values()]
        measured[name] = errors
        lines.append(row([name, g, *(f"{e:.3f}" for e in errors)]))
    errors = [np.mean([rounding(i) for i in inputs]) for inputs in found.values()]
    lines.append(row(["INT8 rounding alone", "-", *(f"{e:.3f}" for e in errors)]))
    lines += ["", *equal(measured)]
    lines += [
        "",
        row(["energy lost, %, of", *(name for name, _ in ENERGY)]),
        "|---" * (len(ENERGY) + 1) + "|",
    ]
    for name, inputs in found.items():
        lost = [np.mean([i.energy(mask(i)) for i in inputs]) for _, mask in ENERGY]
        lines.append(row([INPUTS[name], *(f"{100 * e:.2f}" for e in lost)]))
    return "\n".join(lines)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("model")
    top.add_argument("text")
    top.add_argument("--tokens", type=int, default=1024)
    top.add_argument("--out", type=Path, help="also write the tables there")
    args = top.parse_args()
    text = Path(args.text).read_text(encoding="utf-8")
    found = capture(args.model, text, args.tokens)
    head = f"### {Path(args.model).stem}: {args.tokens} tokens of {Path(args.text).name}\n\n"
    made = head + tables(found) + "\n"
    print(made, end="")
    if args.out:
        args.out.write_text(made)


if __name__ == "__main__":
    main()

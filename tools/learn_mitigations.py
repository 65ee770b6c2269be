"""Learns what gives back the outputs of pruned layers, and writes it into an Amber GGUF.

    python tools/learn_mitigations.py IN OUT --text FILE --sparse 8:16/lpts/ls@all

The plan says what is learned, of every projection that it prunes (arXiv 2509.22166; the engine's
form of it is in engine/mitigation.c):

    lpts        a shift per input channel that is taken off before pruning and comes back as a bias
    ls          a factor and an offset per output channel
    rsparse:R   factors of rank R for what was pruned away; they begin as the weights' SVD

beside which a rule may have a criterion, var and dpts. As in the paper's recipe, decoder blocks are
trained one after the other, each to give for the activations that the pruned blocks before it give
what it would give for them if it were dense: mean square error, AdamW, a warm-up over 3 % of the
steps and a linear decay, gradients clipped at norm 1, one window of the text per step. Weights stay
as they are, rounded to INT8 as in the file; activations are not rounded here. What is learned costs
nothing at run time but for rsparse.

Needs PyTorch: pip install 'amber-llm[train]'.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from amber import Engine, calibrate, quantize
from amber.errors import AmberError
from amber.models import find_model
from amber.sparse import plan_text
from amber.timing import PROJECTIONS, Plan, read_pattern

ARCHITECTURES = {"llama": False, "qwen2": True, "qwen3": True}  # RoPE turns halves, else pairs
TENSORS = dict(zip(PROJECTIONS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                                 "ffn_down"), strict=True))  # fmt: skip
CRITERIA = {"norm": 0, "amber": 1, "amber-b": 2}  # rows of a file's scores
LEARNED = ("lpts", "ls", "rsparse")


class Rule:
    """One projection's part of the plan. ValueError for what cannot be learned under."""

    def __init__(self, method: str) -> None:
        text, *methods = method.split("/")
        pattern = read_pattern(text)
        if pattern is None:
            raise ValueError(f"--sparse: expected N:M, N:Mx4 or N:Mx4t2, found {text!r}")
        self.n, self.m = pattern.n, pattern.m
        self.channels = 4 if pattern.suffix else 1
        self.tokens = 2 if pattern.suffix.endswith("t2") else 1
        self.methods = set(methods)
        self.rank = next((int(m[8:]) for m in methods if m.startswith("rsparse:")), 0)
        unknown = self.methods - {"act", *CRITERIA, "var", "dpts", "dpts-median", "lpts", "ls"}
        unknown -= {f"rsparse:{self.rank}"}
        if unknown:
            raise ValueError(f"--sparse: {'/'.join(sorted(unknown))} cannot be learned under")
        self.criterion = next((CRITERIA[m] for m in methods if m in CRITERIA), None)

    def mask(self, score: Tensor) -> Tensor:
        """0 or 1 for scores [tokens, channels] >= 0; of equals the first channel is kept."""
        rows, width = score.shape
        group = self.m * self.channels
        filled = nn.functional.pad(score, (0, -width % group, 0, -rows % self.tokens))
        unit = filled if self.channels == self.tokens == 1 else filled.square()
        unit = unit.reshape(len(unit) // self.tokens, self.tokens, -1, self.m, self.channels)
        unit = unit.sum(dim=(1, 4))
        order = unit.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        kept = torch.zeros_like(unit).scatter_(-1, order, 1.0)
        kept = kept.reshape(len(unit), -1).repeat_interleave(self.channels, 1)
        return kept.repeat_interleave(self.tokens, 0)[:rows, :width]


class Linear(nn.Module):
    """y = x W^T + bias for dense rows, and for pruned ones what the rule makes of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, score: Tensor, rule: Rule | None):
        super().__init__()
        self.weight, self.bias, self.rule, self.pruned = weight, bias, rule, False
        n_out, n_in = weight.shape
        self.score = score[rule.criterion] if rule and rule.criterion is not None else None
        methods = rule.methods if rule else ()
        if "lpts" in methods:
            self.shift = nn.Parameter(torch.zeros(n_in))
        if "ls" in methods:
            self.gain = nn.Parameter(torch.ones(n_out))
            self.offset = nn.Parameter(torch.zeros(n_out))
        if rule and rule.rank:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            rank = min(rule.rank, len(s))
            left, right = torch.zeros(n_out, rule.rank), torch.zeros(rule.rank, n_in)
            left[:, :rank] = u[:, :rank] * s[:rank].sqrt()
            right[:rank] = v[:rank] * s[:rank].sqrt()[:, None]
            self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pruned or self.rule is None:
            return nn.functional.linear(x, self.weight, self.bias)
        methods, z, own = self.rule.methods, x, None
        if methods & {"dpts", "dpts-median"}:
            own = x.mean(-1, keepdim=True) if "dpts" in methods else x.median(-1, keepdim=True)[0]
            z = z - own
        if hasattr(self, "shift"):
            z = z - self.shift
        with torch.no_grad():
            size = z.abs() if self.score is None else z.abs() * self.score
            mask = self.rule.mask(size)
        kept = z * mask
        y = nn.functional.linear(kept, self.weight)
        if "var" in methods:
            variances = z.var(-1, correction=0), kept.var(-1, correction=0).clamp(min=1e-9)
            y = y * (variances[0] / variances[1]).sqrt()[:, None]
        if hasattr(self, "gain"):
            y = y * self.gain + self.offset
        if hasattr(self, "shift"):
            y = y + self.weight @ self.shift
        if hasattr(self, "left"):
            y = y + (z - kept) @ self.right.T @ self.left.T
        if own is not None:
            y = y + own * self.weight.sum(1)
        return y if self.bias is None else y + self.bias


@dataclass
class Shape:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    n_rot: int
    eps: float
    base: float
    halves: bool
    divisors: Tensor = field(default_factory=lambda: torch.ones(1))


class Block(nn.Module):
    """One decoder block of a Llama kind of model."""

    def __init__(self, shape: Shape, linears: dict[str, Linear], norms: dict[str, Tensor]) -> None:
        super().__init__()
        self.shape, self.norms = shape, norms
        self.linears = nn.ModuleDict(linears)

    def norm(self, name: str, x: Tensor) -> Tensor:
        if name not in self.norms:
            return x  # heads without a norm of their own
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.shape.eps)
        return x * scale * self.norms[name]

    def rope(self, x: Tensor) -> Tensor:
        """x [heads, tokens, head_dim]"""
        s, half = self.shape, self.shape.n_rot // 2
        frequency = s.base ** (-torch.arange(half, dtype=torch.float64) / half) / s.divisors
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        turned, rest = x[..., : s.n_rot], x[..., s.n_rot :]
        if s.halves:
            a, b = turned[..., :half], turned[..., half:]
            return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([turned, rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, width], one window from its start."""
        s, linears = self.shape, self.linears

        def heads(name: str, count: int) -> Tensor:
            return linears[name](z).reshape(len(x), count, s.head_dim).transpose(0, 1)

        z = self.norm("attn_norm", x)
        q = self.rope(self.norm("attn_q_norm", heads("q", s.heads)))
        k = self.rope(self.norm("attn_k_norm", heads("k", s.kv_heads)))
        v = heads("v", s.kv_heads)
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, 0) for t in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linears["o"](mixed.transpose(0, 1).reshape(len(x), -1))
        z = self.norm("ffn_norm", x)
        return x + linears["down"](nn.functional.silu(linears["gate"](z)) * linears["up"](z))

    def prune(self, pruned: bool) -> None:
        for linear in self.linears.values():
            linear.pruned = pruned


class Model:
    """The blocks of an Amber GGUF, one at a time."""

    def __init__(self, path: str, plan: Plan) -> None:
        self.source, self.plan = quantize.Source(path), plan
        value = self.source.value
        arch = self.source.reader.fields["general.architecture"].contents()
        if arch not in ARCHITECTURES or value("expert_count"):
            raise ValueError(
                f"{path}: expected a model of {', '.join(ARCHITECTURES)} without experts, "
                f"found {arch}"
            )
        heads = value("attention.head_count")
        head_dim = value("attention.key_length") or value("embedding_length") // heads
        self.shape = Shape(
            value("block_count"), heads, value("attention.head_count_kv") or heads, head_dim,
            value("rope.dimension_count") or head_dim,
            value("attention.layer_norm_rms_epsilon"), value("rope.freq_base", 10000.0),
            ARCHITECTURES[arch],
        )  # fmt: skip
        if "rope_freqs.weight" in self.source.tensors:
            self.shape.divisors = self.vector("rope_freqs.weight").double()
        self.width = value("embedding_length")
        self.widths = {"o": heads * head_dim, "down": value("feed_forward_length")}

    def vector(self, name: str) -> Tensor:
        return torch.from_numpy(self.source.rows(name).copy())

    def embed(self, tokens: Sequence[int]) -> Tensor:
        rows = [self.source.rows("token_embd.weight", t, t + 1) for t in tokens]
        return torch.from_numpy(np.concatenate(rows))

    def block(self, layer: int) -> Block:
        tensors, linears, norms = self.source.tensors, {}, {}
        kv = self.shape.kv_heads * self.shape.head_dim
        outputs = {"q": self.widths["o"], "k": kv, "v": kv, "gate": self.widths["down"],
                   "up": self.widths["down"]}  # fmt: skip
        for name, tensor in TENSORS.items():
            stem = f"blk.{layer}.{tensor}"
            size = outputs.get(name, self.width), self.widths.get(name, self.width)
            weight = torch.from_numpy(np.ascontiguousarray(self.source.unpacked(stem, *size)))
            bias = self.vector(f"{stem}.bias") if f"{stem}.bias" in tensors else None
            score = torch.from_numpy(np.array(tensors[f"{stem}.score"].data))
            method = self.plan.get((layer, name))
            linears[name] = Linear(weight, bias, score, Rule(method) if method else None)
        for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            if f"blk.{layer}.{name}.weight" in tensors:
                norms[name] = self.vector(f"blk.{layer}.{name}.weight")
        return Block(self.shape, linears, norms)


# ---- learning ----


def loss_of(block: Block, x: Tensor, target: Tensor) -> Tensor:
    """Mean square error over the mean square of what the block adds."""
    return (block(x) - target).square().mean() / (target - x).square().mean()


def learn(
    block: Block, inputs: list[Tensor], lr: float, epochs: int, held: int
) -> tuple[list[Tensor], float, float]:
    """Trains what the block's rules learn. inputs: [tokens, width] of each window; the last `held`
    of them are kept out. Returns what the pruned block gives for them, and the error on the windows
    kept out before and after; what does not lower it there is undone."""
    block.prune(False)
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    block.prune(True)
    train, check = range(len(inputs) - held), range(len(inputs) - held, len(inputs))

    def error() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss_of(block, inputs[i], targets[i])) for i in check]))

    before = after = error()
    begun = {name: values.clone() for name, values in block.state_dict().items()}
    parameters = list(block.parameters())
    if parameters and any(linear.rule for linear in block.linears.values()):
        steps = epochs * len(train)
        warm = max(1, round(0.03 * steps))
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for i in torch.randperm(len(train), generator=generator).tolist():
                optimizer.zero_grad()
                loss_of(block, inputs[i], targets[i]).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
        after = error()
        if after > before:
            block.load_state_dict(begun)
            after = before
    with torch.no_grad():
        return [block(x) for x in inputs], before, after


def vectors(layer: int, block: Block) -> Iterator[tuple[str, np.ndarray]]:
    """What was learned, by the names that the file gives it."""
    for name, linear in block.linears.items():
        for part, values in linear.named_parameters():
            yield f"blk.{layer}.{TENSORS[name]}.{part}", values.detach().numpy().copy()


@dataclass
class Learned:
    tensors: dict[str, np.ndarray]
    errors: list[tuple[float, float]]  # of each block, before and after


def learn_model(
    path: str, plan: Plan, windows: Sequence[Sequence[int]], *, lr: float, epochs: int, held: int,
    say: Callable[[str], None] = lambda _: None,
) -> Learned:  # fmt: skip
    """path: an Amber GGUF. windows: token ids."""
    model, made = Model(path, plan), Learned({}, [])
    inputs = [model.embed(window) for window in windows]
    for layer in range(model.shape.layers):
        block = model.block(layer)
        inputs, before, after = learn(block, inputs, lr, epochs, held)
        made.tensors |= dict(vectors(layer, block))
        made.errors.append((before, after))
        say(f"block {layer}: error {before:.4f} -> {after:.4f}")
    return made


# ---- the command ----


def random_windows(
    tokens: Sequence[int], count: int, length: int, bos: int | None
) -> list[list[int]]:
    """Windows that begin anywhere in a text, with BOS in the first token's place."""
    starts = np.random.default_rng(0).integers(0, len(tokens) - length + 1, count)
    windows = [list(tokens[start : start + length]) for start in starts]
    for window in windows if bos is not None else ():
        window[0] = bos
    return windows


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("learn_mitigations.py", description=__doc__.splitlines()[0])
    top.add_argument("model", metavar="IN", help="a GGUF file or a built-in name")
    top.add_argument("out", metavar="OUT", help="the Amber GGUF to write")
    top.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to learn on")
    top.add_argument("--sparse", required=True, metavar="PLAN", help="such as 8:16/lpts/ls@all")
    top.add_argument("--windows", type=int, default=256, help="of the text (256)")
    top.add_argument("--ctx", type=int, default=512, help="tokens of a window (512)")
    top.add_argument("--epochs", type=int, default=1, help="times through the windows (1)")
    top.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (1e-3)")
    top.add_argument("-t", "--threads", type=int, help="threads (PyTorch's choice)")
    top.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return top


def run(args: argparse.Namespace) -> Learned:
    if args.threads:
        torch.set_num_threads(args.threads)
    text = plan_text(args.sparse)
    path = find_model(args.model)
    with open(args.text, encoding="utf-8", errors="replace") as file:
        story = file.read()
    # Dense: the file does not have yet what the plan asks for.
    with Engine(path, sparse="off", device="cpu", threads=args.threads) as engine:
        plan = calibrate.expand(text, engine.info, calibrate.preset(engine.info))
        tokens = engine.tokenize(story)
        bos = engine.tokenizer.bos if engine.tokenizer.adds_bos else None
    methods = {method.partition(":")[0] for rule in plan.values() for method in rule.split("/")[1:]}
    if not methods & set(LEARNED):
        raise ValueError(f"--sparse: expected one of {', '.join(LEARNED)} in it, found {text}")
    if args.windows < 2 or args.epochs < 1 or len(tokens) < args.ctx:
        raise ValueError(
            "expected two windows or more, an epoch or more and a text of "
            f"{args.ctx} tokens, found {args.windows}, {args.epochs} and {len(tokens)}"
        )
    windows = random_windows(tokens, args.windows, args.ctx, bos)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=os.path.dirname(args.out) or ".")
        )
        plain, full = os.path.join(folder, "plain.gguf"), os.path.join(folder, "learned.gguf")
        source = quantize.Source(path)
        if source.packed:
            quantize.copy_with_keys(source, plain, quantize.base_keys(source), {})
        else:
            quantize.write_packed(source, plain, quantize.base_keys(source), lambda *_: None)
        made = learn_model(
            plain, plan, windows, lr=args.lr, epochs=args.epochs, held=max(1, args.windows // 8),
            say=lambda line: None if args.quiet else print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        source = quantize.Source(plain)
        keys = quantize.base_keys(source)
        if "lpts" in methods:
            keys["amber.shift"] = "lpts"
        quantize.copy_with_keys(source, full, keys, made.tensors)
        # The plan goes into the file with what it costs, as amber-quantize measures it.
        measured = [
            "--sparse",
            calibrate.compact(plan),
            "--calibrate",
            args.text,
            "-c",
            str(args.ctx),
        ]
        options = quantize.parser().parse_args([full, args.out, *measured, "-q"])
        report = quantize.quantize(options)
    if not args.quiet:
        print(quantize.summary(report))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(argv))
    except (AmberError, ValueError, OSError) as error:
        print(f"learn_mitigations.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

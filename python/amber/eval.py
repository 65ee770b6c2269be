"""amber-eval: how well a model predicts a text, and what its precision costs.

stdout carries the results and nothing else. Exit codes: 0 done, 1 failure, 2 usage,
130 interrupted.

The protocol is llama-perplexity's (llama.cpp, tools/perplexity), so that the figures compare: the
text is tokenized once, BOS included where the model wants it, and cut into windows of `ctx` tokens
that do not overlap; BOS takes the place of each window's first token; positions ctx/2 .. ctx - 2
predict the tokens ctx/2 + 1 .. ctx - 1.

The engines here only measure, so that the criterion clact, which no serving engine takes, can be.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .command import UsageError, run_command
from .engine import PRECISIONS, Engine, isa_list, memory_estimate
from .errors import AmberError
from .models import find_model
from .session import KV_TYPES, Session
from .sparse import CRITERIA, MITIGATIONS, plan_text
from .timing import PROJECTIONS, TimeModel

if TYPE_CHECKING:
    import numpy as np

CTX, CHUNKS = 512, 40
# What --pareto compares where no plans are given.
PARETO = tuple(
    f"{pattern}{scope}"
    for pattern in ("2:4", "4:8", "8:16", "16:32", "2:4+r16", "8:16x4t2", "12:16x4t2", "14:16x4t2")
    for scope in ("", "@all")
)
CSV_HINT = ", or give a name in .csv for the figures alone"
CACHE_BYTES = 1 << 29  # of a reference's logits that are kept for the next plan
BLOCK_BYTES = 1 << 24  # of float64 rows that are normalized at once


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality of a model on a text. The last four are None without a reference to compare with.

    Natural logarithms; KL divergence is of the reference from the model, per token.
    """

    perplexity: float
    perplexity_stderr: float
    tokens: int  # that were predicted
    chunks: int
    ctx: int
    seconds: float  # of the model's own computation
    tokens_per_second: float  # prefilled, predicted or not
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None  # share of tokens where both think the same token likeliest


def evaluate(
    engine: Engine,
    text: str,
    *,
    ctx: int = CTX,
    chunks: int = CHUNKS,
    against: Engine | None = None,
    cache: dict[int, Any] | None = None,
    progress: Callable[[int, int, float], Any] | None = None,
) -> Evaluation:
    """Perplexity of `text`, and with `against` (the same vocabulary) the distance to that engine.

    chunks: windows to score, fewer where the text ends first; 0: all.
    cache: keeps logits of `against` (CACHE_BYTES at most) for the next call with the same text, ctx
        and reference.
    progress: called as progress(windows done, windows, perplexity so far).

    Errors: ValueError where the text is too short, AmberError where logits are not finite.
    """
    import numpy as np

    if ctx < 4:
        raise ValueError(f"ctx: expected 4 or more, found {ctx}")
    if chunks < 0:
        raise ValueError(f"chunks: expected 1 or more, or 0 for all, found {chunks}")
    if against is not None and against.info.n_vocab != engine.info.n_vocab:
        raise ValueError(
            f"against: expected a vocabulary of {engine.info.n_vocab} tokens, "
            f"found {against.info.n_vocab}"
        )
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode(text, add_special=True, parse_special=False)
    available = len(tokens) // ctx
    if not available:
        raise ValueError(
            f"text: expected at least {ctx} tokens for one window, found {len(tokens)} "
            "(use a longer text or a smaller ctx)"
        )
    count = min(chunks, available) if chunks else available
    first = ctx // 2
    losses, reference_losses, divergences, same = [], [], [], 0
    seconds = 0.0
    with engine.session(n_ctx=ctx) as session:
        reference = None if against is None else against.session(n_ctx=ctx)
        for chunk in range(count):
            window = tokens[chunk * ctx : (chunk + 1) * ctx]
            if tokenizer.adds_bos and tokenizer.bos is not None:
                window[0] = tokenizer.bos
            targets = np.array(window[first + 1 :])
            started = perf_counter()
            logits = window_logits(session, window, first, chunk)
            seconds += perf_counter() - started
            other = None if cache is None else cache.get(chunk)
            if other is None and reference is not None:
                other = window_logits(reference, window, first, chunk)
                if cache is not None and (chunk + 1) * other.nbytes <= CACHE_BYTES:
                    cache[chunk] = other
            for begin, end in row_blocks(len(targets), logits.shape[1]):
                part = log_softmax(logits[begin:end])
                picked = np.arange(end - begin), targets[begin:end]
                losses.append(-part[picked])
                if other is not None:
                    truth = log_softmax(other[begin:end])
                    reference_losses.append(-truth[picked])
                    divergences.append(np.sum(np.exp(truth) * (truth - part), axis=1))
                    same += int(np.sum(truth.argmax(axis=1) == part.argmax(axis=1)))
            if progress:
                progress(chunk + 1, count, perplexity(losses)[0])
        if reference is not None:
            reference.close()
    value, stderr = perplexity(losses)
    compared: dict[str, float] = {}
    if against is not None:
        kl = np.concatenate(divergences)
        compared = {
            "reference_perplexity": perplexity(reference_losses)[0],
            "kl_mean": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "top1_agreement": same / len(kl),
        }
    return Evaluation(
        perplexity=value,
        perplexity_stderr=stderr,
        tokens=count * (ctx - 1 - first),
        chunks=count,
        ctx=ctx,
        seconds=seconds,
        tokens_per_second=count * ctx / seconds,
        **compared,
    )


def window_logits(session: Session, window: list[int], first: int, chunk: int) -> "np.ndarray":
    """float32 logits [len(window) - first - 1, n_vocab] of positions first..len(window) - 2."""
    import numpy as np

    logits = session.score(window, first)[:-1]
    if not np.isfinite(logits).all():
        raise AmberError(f"window {chunk + 1}: some logits are not finite (a damaged file?)")
    return logits


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges whose float64 rows take BLOCK_BYTES at most, or one row."""
    step = max(1, BLOCK_BYTES // (8 * columns))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def log_softmax(logits: "np.ndarray") -> "np.ndarray":
    """Natural log probabilities [rows, n_vocab] float64 of float32 logits [rows, n_vocab]."""
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def perplexity(losses: Sequence["np.ndarray"]) -> tuple[float, float]:
    """(exp(mean loss), its standard error) of losses in nats. The error is that of the mean carried
    through exp(); the tokens are taken as independent, as llama-perplexity does."""
    import numpy as np

    every = np.concatenate(losses)
    value = math.exp(every.mean())
    return value, value * math.sqrt(every.var() / max(len(every) - 1, 1))


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "amber-eval",
        description="Perplexity of a text by llama-perplexity's protocol, and with --against the "
        "distance (KL divergence) to a reference.",
        allow_abbrev=False,
    )
    top.add_argument("models", nargs="+", metavar="MODEL", help="GGUF files or built-in names")
    top.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to predict")
    top.add_argument("--ctx", type=int, default=CTX, help=f"tokens of a window ({CTX})")
    top.add_argument("--chunks", type=int, default=CHUNKS, help=f"windows; 0: all ({CHUNKS})")
    top.add_argument(
        "--precision", default="int8", metavar="P[,P]", help=f"{', '.join(PRECISIONS)} (int8)"
    )
    top.add_argument(
        "--kv-type",
        default="f16",
        metavar="K[,K]",
        help=f"what keys and values are kept as: {', '.join(KV_TYPES)} (f16)",
    )
    top.add_argument(
        "--sparse",
        action="append",
        metavar="S",
        help="off, auto, a pattern such as 8:16, a plan file; may be given again (auto)",
    )
    top.add_argument("--criterion", help=f"{', '.join(CRITERIA)}, clact: how channels are ranked")
    top.add_argument("--mitigation", help=f"{', '.join(MITIGATIONS)}: what is given back")
    top.add_argument(
        "--prune-weights",
        action="append",
        metavar="N:M",
        help="also the model with N of M weights kept by magnitude, in all projections or "
        "N:M@q,gate; may be given again",
    )
    top.add_argument(
        "--against",
        choices=("off", "float"),
        help="also the distance to the same model: off: without sparsity, in the same precision, "
        "with keys and values in float16; float: in float32 without sparsity",
    )
    study = top.add_argument_group(
        "studies", "FILE: a name in .csv or in .png, .svg, .pdf; another name gives both"
    )
    study.add_argument(
        "--sensitivity",
        metavar="FILE",
        help="for every projection of every layer, pruned by --sparse (8:16) alone: the error of "
        "its output, and the KL divergence from the dense model",
    )
    study.add_argument(
        "--pareto",
        metavar="FILE",
        help="the plans of --sparse, else some of every kind, and --prune-weights: quality against "
        "coverage and modelled speed",
    )
    study.add_argument(
        "--times",
        metavar="FILE",
        help="what amber-bench --kernels --json printed, to model speed by (multiplications)",
    )
    top.add_argument("-t", "--threads", type=int, help="threads (physical cores)")
    top.add_argument("--device", metavar="D", help="cpu, cuda, cuda:N, auto ($AMBER_DEVICE or cpu)")
    top.add_argument("--isa", help=f"kernel column of {', '.join(isa_list())} (the first)")
    top.add_argument("--json", action="store_true", help="one JSON object per result")
    top.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return top


def read_text(path: str) -> str:
    """The file as it is: line ends stay, bytes that are not UTF-8 become U+FFFD."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except OSError as error:
        raise AmberError(f"{path}: expected a text file, {error.strerror}") from None


def table_line(result: dict[str, Any]) -> str:
    """One result for people."""
    pruned = result["plan"] if result["plan"].startswith("weights") else result["sparse"]
    sparse = "" if pruned == "off" else f"{pruned} ({100 * result['coverage']:.1f} %)  "
    kv = "KV int8  " if result["kv_type"] == "int8" else ""
    line = (
        f"{os.path.basename(result['model']):34s} {result['precision']:5s}  {kv}{sparse}"
        f"perplexity {result['perplexity']:.4f} ± {result['perplexity_stderr']:.4f}"
    )
    if result["kl_mean"] is not None:
        change = 100 * (result["perplexity"] / result["reference_perplexity"] - 1)
        name = "float" if result["against"] == "float" else "dense"
        line += (
            f"  {name} {result['reference_perplexity']:.4f} ({change:+.2f} %)"
            f"  KL {result['kl_mean']:.5f}, p99 {result['kl_p99']:.4f}"
            f"  same top token {100 * result['top1_agreement']:.2f} %"
        )
    return line + (
        f"  {result['tokens']} tokens of {result['chunks']} x {result['ctx']}"
        f"  {result['tokens_per_second']:.0f} tok/s"
    )


class _Bar:
    """Progress on a terminal's stderr, with the perplexity so far."""

    def __init__(self, name: str, quiet: bool, unit: str = "window") -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread beside the engine's
        self._bar = tqdm(
            desc=name,
            unit=unit,
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=True if quiet else None,
        )

    def __call__(self, done: int, total: int, value: float | None) -> None:
        self._bar.total = total
        if value is not None:
            self._bar.set_postfix_str(f"perplexity {value:.3f}", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class Ruler:
    """The reference that --against names, open for as long as plans of one model and precision are
    measured."""

    def __init__(self, model: str, precision: str, args: argparse.Namespace) -> None:
        self.kind, self.cache = args.against, {}
        self.engine = None
        if self.kind:
            which = "float" if self.kind == "float" else precision
            place = "cpu" if which == "float" else args.device
            self.engine = Engine(
                model, precision=which, sparse="off", n_ctx=args.ctx, threads=args.threads,
                isa=args.isa, device=place,
            )  # fmt: skip

    def __enter__(self) -> "Ruler":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.engine:
            self.engine.close()


def measure(
    model: str, precision: str, sparse: str, text: str, args: argparse.Namespace, ruler: Ruler,
    weights: str | None = None, kv_type: str = "f16",
) -> dict[str, Any]:  # fmt: skip
    """Opens a model, evaluates it, and returns the object that --json prints. weights: how its
    weights are pruned, in place of its activations."""
    common: dict[str, Any] = {"n_ctx": args.ctx, "threads": args.threads, "isa": args.isa}
    common["kv_type"] = kv_type
    common["sparse_min_tokens"] = 0  # the plan's quality, whatever the machine gains by it
    if sparse not in ("off", "auto"):
        common |= {"criterion": args.criterion, "mitigation": args.mitigation}
    with contextlib.ExitStack() as stack:
        bar = _Bar(os.path.basename(model), args.quiet)
        stack.callback(bar.close)
        path, weights_plan = model, {}
        if weights:
            from .weights import plan_of, write_pruned

            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = os.path.join(folder, "pruned.gguf")
            weights_plan = plan_of(weights, model, args.threads)
            write_pruned(find_model(model), path, weights_plan)
        engine = stack.enter_context(
            Engine(
                path,
                precision=precision,
                sparse=sparse,
                evaluation=True,
                device=args.device,
                **common,
            )
        )
        result = evaluate(
            engine, text, ctx=args.ctx, chunks=args.chunks, against=ruler.engine, cache=ruler.cache,
            progress=bar,
        )  # fmt: skip
        info = engine.info
        plan = weights_plan or plan_cells(engine, sparse, args)
    times = TimeModel.read(args.times)
    return {
        "model": model,
        "text": args.text,
        "precision": precision,
        "kv_type": info.kv_type,
        "plan": f"weights {weights}" if weights else sparse,
        "sparse": info.sparse,
        "coverage": coverage(plan, info) if weights else info.coverage,
        "modelled_speedup": 1 / times.plan(plan, info),
        "against": args.against,
        "device": info.device,
        "isa": info.isa,
        "threads": info.threads,
        "n_params": info.n_params,
        "weight_types": info.weight_types,
    } | asdict(result)


def plan_cells(engine: Engine, sparse: str, args: argparse.Namespace) -> dict[Any, str]:
    """What runs sparse in an engine, by layer and projection."""
    from . import calibrate

    if sparse in ("off", "auto"):
        text = engine.metadata.get("amber.plan", "off") if sparse == "auto" else "off"
    else:
        text = plan_text(sparse, args.criterion, args.mitigation)
    if text == "off":
        return {}
    return calibrate.expand(text, engine.info, calibrate.preset(engine.info))


def coverage(plan: dict[Any, str], info: Any) -> float:
    from . import calibrate

    return calibrate.coverage(plan, info)


# ---- studies ----


def sensitivity(model: str, sparse: str, text: str, args: argparse.Namespace) -> list[dict]:
    """A row for every projection: layer, projection, plan, e_q (None for experts), kl, share (of
    the layers' multiplications)."""
    from . import calibrate
    from .sensitivity import output_errors

    path = find_model(model)
    wish = plan_text(sparse, args.criterion, args.mitigation)
    if "@" not in wish and ";" not in wish:  # a pattern alone: everywhere
        head, mark, layers = wish.partition("#")
        wish = f"{head}@all{mark}{layers}"
    with Engine(path, sparse=wish, evaluation=True, device="cpu", threads=args.threads) as engine:
        info = engine.info
        windows = calibrate.cut(engine.tokenizer, text, args.ctx, args.chunks or len(text))
    if not windows:
        raise ValueError(f"text: expected at least {args.ctx} tokens for one window, found fewer")
    plan = calibrate.expand(wish, info, calibrate.preset(info))
    bar = _Bar(f"{os.path.basename(model)}: outputs", args.quiet)
    with contextlib.closing(bar):
        errors = output_errors(
            path, wish, plan, windows, args.threads, lambda done, total: bar(done, total, None)
        )
    bar = _Bar(f"{os.path.basename(model)}: projections", args.quiet, "projection")
    rows = []
    with contextlib.closing(bar):
        reference = calibrate.Reference(path, text, args.ctx, len(windows), args.threads)
        total = sum(map(sum, info.work))
        for i, (cell, method) in enumerate(sorted(plan.items(), key=_place)):
            layer, name = cell
            rows.append(
                {
                    "layer": layer,
                    "projection": name,
                    "plan": method,
                    "e_q": errors.get(cell),
                    "kl": reference.kl({cell: method}),
                    "share": calibrate.work(info, layer)[name] / total,
                }
            )
            bar(i + 1, len(plan), None)
    return rows


def _place(item: tuple[tuple[int, str], str]) -> tuple[int, int]:
    (layer, name), _ = item
    return layer, PROJECTIONS.index(name)


def sensitivity_table(rows: Sequence[dict[str, Any]]) -> str:
    """e_q and KL for people: layers down, projections across."""
    names = [name for name in PROJECTIONS if any(row["projection"] == name for row in rows)]
    lines = [f"{'':8s}{'e_q':{9 * len(names)}s}  KL", ""]
    lines[1] = f"{'layer':8s}" + "".join(f"{n:>9s}" for n in names) + "  " + "".join(
        f"{n:>9s}" for n in names
    )  # fmt: skip
    for layer in sorted({row["layer"] for row in rows}):
        own = {row["projection"]: row for row in rows if row["layer"] == layer}

        def cells(column: str, form: str, own: dict[str, Any] = own) -> str:
            values = [own[name][column] if name in own else None for name in names]
            return "".join(f"{'-' if v is None else format(v, form):>9s}" for v in values)

        lines.append(f"{layer:<8d}{cells('e_q', '.3f')}  {cells('kl', '.5f')}")
    return "\n".join(lines)


def run_sensitivity(args: argparse.Namespace, text: str) -> None:
    from . import plots

    table, picture = plots.outputs(args.sensitivity)
    if picture:
        plots.pyplot("--sensitivity", CSV_HINT)
    sparse = (args.sparse or ["8:16"])[0]
    rows = sensitivity(args.models[0], sparse, text, args)
    if args.json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        print(sensitivity_table(rows), flush=True)
    if table:
        plots.write_table(table, rows)
    if picture:
        name = os.path.basename(args.models[0])
        kinds = {"e_q": "error of the projection's own output, e_q", "kl": "KL of the model, nats"}
        plots.heat_maps(picture, f"{name}, one projection pruned {sparse}", rows, kinds)


def write_pareto(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    from . import plots

    table, picture = plots.outputs(args.pareto)
    keys = ("plan", "coverage", "modelled_speedup", "perplexity", "reference_perplexity",
            "kl_mean", "kl_p99", "top1_agreement", "tokens")  # fmt: skip
    best = {id(row) for row in plots.front(rows, "modelled_speedup", "kl_mean")}
    if table:
        chosen = [{key: row[key] for key in keys} | {"front": id(row) in best} for row in rows]
        plots.write_table(table, chosen)
    if picture:
        across = {
            "coverage": "coverage",
            "modelled_speedup": "modelled speed-up of the projections",
        }
        whole = "float32" if args.against == "float" else "dense"
        up = {"kl_mean": f"KL from {whole}, nats", "perplexity": "perplexity"}
        plots.trade_offs(picture, os.path.basename(args.models[0]), rows, across, up)


def check_plans(args: argparse.Namespace) -> None:
    """Proves every plan on every model's head before anything is measured."""
    plans = [
        plan_text(sparse, args.criterion, args.mitigation)
        for sparse in args.sparse or ()
        if sparse not in ("off", "auto")
    ]
    if args.prune_weights:
        from .weights import full_text

        plans += map(full_text, args.prune_weights)
    for model, plan in itertools.product(args.models, plans):
        memory_estimate(model, sparse=plan, evaluation=True)


def run(args: argparse.Namespace) -> int:
    precisions = args.precision.split(",")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UsageError(
                f"--precision: expected {' or '.join(PRECISIONS)}, found {precision!r}"
            )
    kv_types = args.kv_type.split(",")
    for kv_type in kv_types:
        if kv_type not in KV_TYPES:
            raise UsageError(f"--kv-type: expected {' or '.join(KV_TYPES)}, found {kv_type!r}")
    if args.kv_type != "f16" and (args.sensitivity or args.pareto):
        raise UsageError("--sensitivity, --pareto: expected --kv-type f16")
    if args.ctx < 4:
        raise UsageError(f"--ctx: expected 4 or more, found {args.ctx}")
    if args.chunks < 0:
        raise UsageError(f"--chunks: expected 1 or more, or 0 for all, found {args.chunks}")
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise AmberError("this command needs numpy: pip install 'amber-llm[numpy]'") from None
    TimeModel.read(args.times)
    if (args.sensitivity or args.pareto) and len(args.models) * len(precisions) > 1:
        raise UsageError("--sensitivity, --pareto: expected one model and one precision")
    if args.sensitivity and (args.precision != "int8" or args.pareto or args.prune_weights):
        raise UsageError("--sensitivity: expected int8, and neither --pareto nor --prune-weights")
    if args.sensitivity and len(args.sparse or [""]) > 1:
        raise UsageError("--sensitivity: expected one --sparse at most")
    if args.pareto:
        from . import plots

        if plots.outputs(args.pareto)[1]:
            plots.pyplot("--pareto", CSV_HINT)
        args.sparse = args.sparse or list(PARETO)
        args.against = args.against or "off"
    text = read_text(args.text)
    check_plans(args)
    try:
        if args.sensitivity:
            run_sensitivity(args, text)
            return 0
        rows = []
        for model, precision in itertools.product(args.models, precisions):
            with Ruler(model, precision, args) as ruler:
                plans = [(sparse, None) for sparse in args.sparse or ["auto"]]
                plans += [("off", weights) for weights in args.prune_weights or ()]
                for (sparse, weights), kv_type in itertools.product(plans, kv_types):
                    result = measure(model, precision, sparse, text, args, ruler, weights, kv_type)
                    print(json.dumps(result) if args.json else table_line(result), flush=True)
                    rows.append(result)
        if args.pareto:
            write_pareto(args, rows)
    except AmberError:
        raise
    except ValueError as error:  # what only the vocabulary could judge
        raise AmberError(f"{args.text}: {error}") from None
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command amber-eval. Returns its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

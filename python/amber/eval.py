"""amber-eval: how well a model predicts a text, and what its precision costs.

stdout carries the results and nothing else. Exit codes: 0 done, 1 failure, 2 usage,
130 interrupted.

The protocol is llama-perplexity's (llama.cpp, tools/perplexity), so that the figures compare: the
text is tokenized once, BOS included where the model wants it, and cut into windows of `ctx` tokens
that do not overlap; BOS takes the place of each window's first token; positions ctx/2 .. ctx - 2
predict the tokens ctx/2 + 1 .. ctx - 1.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .command import UsageError, run_command
from .engine import PRECISIONS, Engine, isa_list
from .errors import AmberError
from .session import Session
from .sparse import CRITERIA, MITIGATIONS

if TYPE_CHECKING:
    import numpy as np

CTX, CHUNKS = 512, 40
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
    progress: Callable[[int, int, float], Any] | None = None,
) -> Evaluation:
    """Perplexity of `text`, and with `against` (the same vocabulary) the distance to that engine.

    chunks: windows to score, fewer where the text ends first; 0: all.
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
            other = None if reference is None else window_logits(reference, window, first, chunk)
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
        "--sparse",
        action="append",
        metavar="S",
        help="off, auto, a pattern such as 8:16, a plan file; may be given again (auto)",
    )
    top.add_argument("--criterion", help=f"{', '.join(CRITERIA)}: how channels are ranked")
    top.add_argument("--mitigation", help=f"{', '.join(MITIGATIONS)}: what is given back")
    top.add_argument(
        "--against",
        choices=("off", "float"),
        help="also the distance to the same model: off: without sparsity, in the same precision; "
        "float: in float32 without sparsity",
    )
    top.add_argument("-t", "--threads", type=int, help="threads (physical cores)")
    top.add_argument("--device", metavar="D", help="cpu, cuda, cuda:N, auto ($AMBER_DEVICE or cpu)")
    top.add_argument("--isa", help=f"kernel column of {', '.join(isa_list())} (the first)")
    top.add_argument("--json", action="store_true", help="one JSON object per result")
    top.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return top


def read_text(path: str) -> str:
    """The file as it is: line ends stay, bytes that are not UTF-8 become U+FFFD."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        return file.read()


def table_line(result: dict[str, Any]) -> str:
    """One result for people."""
    sparse = "" if result["sparse"] == "off" else f"{result['sparse']}  "
    line = (
        f"{os.path.basename(result['model']):34s} {result['precision']:5s}  {sparse}"
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

    def __init__(self, name: str, quiet: bool) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread beside the engine's
        self._bar = tqdm(
            desc=name,
            unit="window",
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
            disable=True if quiet else None,
        )

    def __call__(self, done: int, total: int, value: float) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(f"perplexity {value:.3f}", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def measure(
    model: str, precision: str, sparse: str, text: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Opens a model, evaluates it, and returns the object that --json prints."""
    common = {"n_ctx": args.ctx, "threads": args.threads, "isa": args.isa}
    common["sparse_min_tokens"] = 0  # the plan's quality, whatever the machine gains by it
    methods = {}
    if sparse not in ("off", "auto"):
        methods = {"criterion": args.criterion, "mitigation": args.mitigation}
    bar = _Bar(os.path.basename(model), args.quiet)
    reference = None
    try:
        with Engine(
            model, precision=precision, sparse=sparse, device=args.device, **methods, **common
        ) as engine:
            if args.against:
                which = "float" if args.against == "float" else precision
                place = "cpu" if which == "float" else args.device
                reference = Engine(model, precision=which, sparse="off", device=place, **common)
            result = evaluate(
                engine, text, ctx=args.ctx, chunks=args.chunks, against=reference, progress=bar
            )
            info = engine.info
    finally:
        bar.close()
        if reference is not None:
            reference.close()
    return {
        "model": model,
        "text": args.text,
        "precision": precision,
        "sparse": info.sparse,
        "coverage": info.coverage,
        "against": args.against,
        "device": info.device,
        "isa": info.isa,
        "threads": info.threads,
        "n_params": info.n_params,
        "weight_types": info.weight_types,
    } | asdict(result)


def run(args: argparse.Namespace) -> int:
    precisions = args.precision.split(",")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UsageError(
                f"--precision: expected {' or '.join(PRECISIONS)}, found {precision!r}"
            )
    if args.ctx < 4:
        raise UsageError(f"--ctx: expected 4 or more, found {args.ctx}")
    if args.chunks < 0:
        raise UsageError(f"--chunks: expected 1 or more, or 0 for all, found {args.chunks}")
    try:
        import numpy  # noqa: F401
    except ImportError:
        raise AmberError("this command needs numpy: pip install 'amber-llm[numpy]'") from None
    text = read_text(args.text)
    choices = itertools.product(args.models, precisions, args.sparse or ["auto"])
    for model, precision, sparse in choices:
        try:
            result = measure(model, precision, sparse, text, args)
        except AmberError:
            raise
        except ValueError as error:  # what only the vocabulary could judge
            raise AmberError(f"{args.text}: {error}") from None
        print(json.dumps(result) if args.json else table_line(result), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command amber-eval. Returns its exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

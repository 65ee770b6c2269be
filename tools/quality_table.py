"""What pruning costs in quality, and what a budget buys: the tables of tools/results/quality-*.md.

    python tools/quality_table.py TESTDATA [--out tools/results] [--chunks 40] [--only demo]

TESTDATA is the folder of small models and texts. Two models: the demo model, calibrated on the
first part of its training text and measured on held-out text, and stories3M, on two parts of one
text. For every pattern: all projections ("naive"), the paper's policy (down, q and gate), the same
in a model whose channels were put in an order for it, and the fastest plan that costs no more KL on
the calibration text than the policy did (amber-quantize --max-kl). Then one projection at a time,
criteria and mitigations at 2:4 and 8:16, what can be learned (where PyTorch is), smoothing, and
pruned weights beside them. quality.md holds the papers' claims against the figures of both models.

Perplexity by llama-perplexity's protocol (windows of 512 tokens), KL divergence and top-1 agreement
against the same model in float32 without sparsity. Speed is modelled: of the layers' projections,
by the multiplications that are left, for N:16x4t2 by what AVX-512 VNNI measured (amber/timing.py).
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amber import Engine, calibrate, quantize, weights
from amber.eval import evaluate
from amber.models import find_model
from amber.timing import PROJECTIONS, TimeModel

try:
    import learn_mitigations as learning
except ImportError:  # without PyTorch nothing is learned
    learning = None

PATTERNS = ["2:4", "4:8", "8:16", "16:32", "2:4+r32", "2:4+r16", "8:16x4", "12:16x4", "8:16x4t2",
            "12:16x4t2"]  # fmt: skip
UNORDERED = ["top50%"]  # any order of channels is as good
# Whose family a budget chooses from, and whether channels are put in order too.
BUDGETED = {"2:4": (False,), "8:16": (False,), "12:16x4t2": (False, True)}
METHODS = ["", "/norm", "/amber", "/amber-b", "/clact", "/var", "/dpts", "/dpts-median", "/spts",
           "/spts-channel", "/rsparse:8", "/rsparse:32", "/amber/var", "/dpts-median/var",
           "/norm/dpts-median"]  # fmt: skip
LEARNED = ["/lpts", "/lpts/ls", "/lpts/ls/var"]  # by tools/learn_mitigations.py, where PyTorch is
LEARNING = ["--windows", "32", "--ctx", "512"]
STUDY_CHUNKS = 4  # windows of the calibration text that a budget is measured on


class Setup:
    """A model, the text that measures it and the text that it is calibrated on."""

    def __init__(self, name: str, testdata: Path, folder: Path) -> None:
        if name == "demo":
            self.model = find_model("demo")
            text = (testdata / "corpus" / "heldout.txt").read_text(encoding="utf-8")
            other = (testdata / "corpus" / "train-00.txt").read_text(encoding="utf-8")
        else:
            self.model = str(testdata / "models" / "stories3M-f16.gguf")
            whole = (testdata / "text" / "tinystories-eval.txt").read_text(encoding="utf-8")
            text, other = whole[:400_000], whole[400_000:]
        self.name, self.text, self.folder = name, text, folder
        self.calibration = folder / f"{name}.txt"
        self.calibration.write_text(other[:120_000], encoding="utf-8")

    def quantize(self, *options: str) -> tuple[str, dict[str, Any]]:
        """An Amber GGUF and its report."""
        out = self.folder / "-".join([self.name, *options]).replace("/", "_").replace(":", "_")
        common = ["--calibrate", str(self.calibration), "--chunks", str(STUDY_CHUNKS), "-q"]
        args = quantize.parser().parse_args([self.model, str(out), *common, *options])
        quantize.check(args)
        return str(out), quantize.quantize(args)


class Table:
    """Measures rows of one model."""

    def __init__(self, setup: Setup, chunks: int) -> None:
        self.setup, self.chunks, self.times, self.cache = setup, chunks, TimeModel(), {}
        self.reference = Engine(setup.model, precision="float", sparse="off")
        self.rows: list[dict[str, Any]] = []

    def measure(self, table: str, label: str, model: str, sparse: str, **options: Any) -> dict:
        started = time.monotonic()
        pruned = options.pop("weights", None)
        with Engine(model, sparse=sparse, evaluation=True, **options) as engine:
            result = evaluate(
                engine, self.setup.text, chunks=self.chunks, against=self.reference,
                cache=self.cache,
            )  # fmt: skip
            info = engine.info
            text = engine.metadata.get("amber.plan", "off") if sparse == "auto" else sparse
        plan = pruned or {}
        if text != "off":
            plan = calibrate.expand(text, info, calibrate.preset(info))
        row = {
            "model": self.setup.name, "table": table, "label": label, "plan": text,
            "coverage": calibrate.coverage(plan, info),
            "speedup": 1 / self.times.plan(plan, info),
        } | asdict(result)  # fmt: skip
        self.rows.append(row)
        took = time.monotonic() - started
        print(f"{self.setup.name} {table} {label}: KL {row['kl_mean']:.4f}  ({took:.1f} s)",
              file=sys.stderr)  # fmt: skip
        return row

    def patterns(self) -> None:
        model = self.setup.model
        self.measure("pattern", "float32, dense", model, "off", precision="float")
        self.measure("pattern", "INT8, dense", model, "off")
        for pattern in PATTERNS + UNORDERED:
            self.measure("pattern", f"{pattern}, every projection", model, f"{pattern}@all")
            self.measure("pattern", f"{pattern}, policy", model, pattern)
            if pattern in ("2:4", "8:16"):
                self.measure("pattern", f"{pattern}, policy, amber", model, f"{pattern}/amber")
            if pattern in UNORDERED:
                continue
            for options, label in ((), ""), (("--permute-from", "weights"), " by weights alone"):
                out, _ = self.setup.quantize("--sparse", pattern, "--permute", *options)
                self.measure("pattern", f"{pattern}, policy, in order{label}", out, "auto")
            if pattern in BUDGETED:
                self.budgeted(pattern)

    def budgeted(self, pattern: str) -> None:
        """The policy's cost on the calibration text is the budget; with channels in order too."""
        _, fixed = self.setup.quantize("--sparse", pattern)
        for ordered in BUDGETED[pattern]:
            options, label = (("--permute",), ", in order") if ordered else ((), "")
            out, report = self.setup.quantize(
                "--sparse", pattern, "--max-kl", f"{fixed['kl_mean']:.6f}", *options
            )
            row = self.measure("pattern", f"{pattern} family, budgeted{label}", out, "auto")
            row["calibration"] = {"policy": fixed["kl_mean"], "budgeted": report["kl_mean"]}

    def projections(self) -> None:
        for name in PROJECTIONS:
            self.measure("projection", name, self.setup.model, f"8:16@{name}")

    def methods(self) -> None:
        files = {}
        for method in METHODS:
            name = method.rpartition("/")[2]
            if name.startswith(("spts", "rsparse")):
                files[method], _ = self.setup.quantize("--sparse", f"8:16{method}@all")
        for pattern in ("2:4", "8:16"):
            for method in METHODS:
                label = method.strip("/") or "act"
                model = files.get(method, self.setup.model)
                self.measure(pattern, label, model, f"{pattern}{method}@all")
            for method in LEARNED if learning else ():
                out = str(self.setup.folder / "learned")
                options = [
                    "--text",
                    str(self.setup.calibration),
                    "--sparse",
                    f"{pattern}{method}@all",
                ]
                args = learning.parser().parse_args(
                    [self.setup.model, out, "-q", *options, *LEARNING]
                )
                learning.run(args)
                self.measure(pattern, f"{method.strip('/')}, learned", out, "auto")
            for kind, alpha in (("smoothquant", "0.5"), ("outstanding", "0.10")):
                out, _ = self.setup.quantize("--smooth", kind, "--alpha", alpha)
                self.measure(pattern, f"{kind}, alpha {alpha}", out, f"{pattern}@all")
                self.measure(pattern, f"{kind}, alpha {alpha}, amber", out, f"{pattern}/amber@all")
            plan = weights.plan_of(pattern, self.setup.model)
            out = str(self.setup.folder / "weights")
            weights.write_pruned(self.setup.model, out, plan)
            self.measure(pattern, "weights by magnitude instead", out, "off", weights=plan)


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['label']} | {100 * row['coverage']:.1f} % | {row['speedup']:.2f} "
        f"| {row['perplexity']:.3f} | {row['kl_mean']:.4f} | {100 * row['top1_agreement']:.1f} % |"
    )


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown for one model."""
    head = "coverage | modelled speed-up | perplexity | KL to float | same top token |"
    rule = "|---|---|---|---|---|---|"
    yield f"### {rows[0]['model']}: {rows[0]['chunks']} windows of {rows[0]['ctx']} tokens\n"
    yield f"| plan | {head}\n{rule}"
    yield from (line(row) for row in rows if row["table"] == "pattern")
    budgets = [row for row in rows if "calibration" in row]
    if budgets:
        yield "\nKL from dense INT8 on the calibration text that the budgets were met on:\n"
        yield "| family | policy | budgeted | speed-up of the policy | budgeted |"
        yield "|---|---|---|---|---|"
    for row in budgets:
        pattern = row["label"].partition(" ")[0]
        policy = next(r for r in rows if r["label"] == f"{pattern}, policy")
        found = row["calibration"]
        yield (
            f"| {row['label'].replace(' family, budgeted', '')} | {found['policy']:.4f} "
            f"| {found['budgeted']:.4f} | {policy['speedup']:.2f} | {row['speedup']:.2f} |"
        )
    yield f"\n| 8:16 in one projection of every layer | {head}\n{rule}"
    yield from (line(row) for row in rows if row["table"] == "projection")
    for pattern in ("2:4", "8:16"):
        yield f"\n| {pattern}, every projection | {head}\n{rule}"
        yield from (line(row) for row in rows if row["table"] == pattern)


# ---- the papers' claims ----


class Figures:
    """KL divergences of one model's rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = {(row["table"], row["label"]): row for row in rows}

    def kl(self, label: str, table: str = "pattern") -> float:
        return self.rows[table, label]["kl_mean"]

    def all(self, pattern: str) -> float:
        return self.kl(f"{pattern}, every projection")

    def policy(self, pattern: str, more: str = "") -> float:
        return self.kl(f"{pattern}, policy{more}")


def rising(figures: list[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(figures))


def numbers(figures: list[float], between: str = ", ") -> str:
    return between.join(f"{x:.3g}" for x in figures)


Claim = Callable[[Figures], tuple[list[bool], str]]

# What a paper says, and of one model's figures: whether they agree with each part of it, and the
# figures as text. P1 is
# arXiv 2508.02128, P2 is arXiv 2509.22166.


def larger_groups(f: Figures) -> tuple[list[bool], str]:
    found = [f.all(p) for p in ("top50%", "16:32", "8:16", "4:8", "2:4")]
    fixed = [f.policy(p) for p in ("top50%", "16:32", "8:16", "4:8", "2:4")]
    return [rising(found), rising(fixed)], f"{numbers(found)}; by policy {numbers(fixed)}"


def by_how_much(f: Figures) -> tuple[list[bool], str]:
    found = [f.all("2:4") / f.all(p) for p in ("8:16", "16:32")]
    return [found[0] >= 1.9, found[1] >= 2.7], numbers(found)


def skipping(f: Figures) -> tuple[list[bool], str]:
    pairs = [(f.all(p), f.policy(p)) for p in ("2:4", "8:16")]
    text = "; ".join(f"{a:.3g} to {b:.3g}" for a, b in pairs)
    return [b < a / 2 for a, b in pairs], text


def robust_norm(f: Figures) -> tuple[list[bool], str]:
    pairs = [(f.policy(p), f.policy(p, ", amber")) for p in ("2:4", "8:16")]
    text = "; ".join(f"{a:.3g} to {b:.3g}" for a, b in pairs)
    return [b < a for a, b in pairs], text


def sensitive(f: Figures) -> tuple[list[bool], str]:
    found = sorted((f.kl(name, "projection"), name) for name in PROJECTIONS)
    names = [name for _, name in found]
    agrees = [names[0] == "down", set(names[-2:]) == {"o", "up"}]
    return agrees, ", ".join(f"{name} {kl:.3g}" for kl, name in found)


def sparsity_dominates(f: Figures) -> tuple[list[bool], str]:
    found = [f.kl("INT8, dense"), f.policy("16:32")]
    return [rising(found)], numbers(found)


def outstanding(f: Figures) -> tuple[list[bool], str]:
    pairs = [(f.kl("act", p), f.kl("outstanding, alpha 0.10", p)) for p in ("2:4", "8:16")]
    text = "; ".join(f"{a:.3g} to {b:.3g}" for a, b in pairs)
    return [b < a for a, b in pairs], text


def against_weights(f: Figures) -> tuple[list[bool], str]:
    pairs = [(f.kl("act", p), f.kl("weights by magnitude instead", p)) for p in ("2:4", "8:16")]
    text = "; ".join(f"{a:.3g}, weights {b:.3g}" for a, b in pairs)
    return [a < b for a, b in pairs], text


def method(label: str, better: Sequence[bool] = (True, True)) -> Claim:
    """A method against magnitude alone, and whether it is said to be better at 2:4 and at 8:16."""

    def claim(f: Figures) -> tuple[list[bool], str]:
        pairs = [(f.kl("act", p), f.kl(label, p)) for p in ("2:4", "8:16")]
        text = "; ".join(f"{a:.3g} to {b:.3g}" for a, b in pairs)
        return [(b < a) == said for (a, b), said in zip(pairs, better, strict=True)], text

    return claim


def within_noise(f: Figures) -> tuple[list[bool], str]:
    methods = ("act", "norm", "amber", "amber-b", "var", "dpts", "dpts-median", "spts")
    found = [f.kl(label, "8:16") for label in methods]
    spread, pattern = max(found) / min(found), f.all("2:4") / f.all("16:32")
    return [spread < pattern], f"{spread:.2f} times between methods, {pattern:.2f} between patterns"


def rank(f: Figures) -> tuple[list[bool], str]:
    pairs = [(f.kl("rsparse:8", p), f.kl("rsparse:32", p)) for p in ("2:4", "8:16")]
    text = "; ".join(f"{a:.3g} to {b:.3g}" for a, b in pairs)
    return [b >= a for a, b in pairs], text


def combined(f: Figures) -> tuple[list[bool], str]:
    found = []
    for p in ("2:4", "8:16"):
        single = min(f.kl(label, p) for label in ("norm", "amber", "var", "dpts-median"))
        both = ("amber/var", "dpts-median/var", "norm/dpts-median")
        found.append((single, min(f.kl(label, p) for label in both)))
    text = "; ".join(f"single {a:.3g}, two {b:.3g}" for a, b in found)
    return [a <= b for a, b in found], text


def windows(f: Figures) -> tuple[list[bool], str]:
    found = [f.policy("2:4+r16"), f.policy("8:16"), f.policy("2:4+r32"), f.policy("2:4")]
    return [found[0] < found[1], found[2] < found[3]], numbers(found)


def orders(f: Figures) -> tuple[list[bool], str]:
    pairs = [(f.policy(p), f.policy(p, ", in order")) for p in PATTERNS]
    gains = [b / a - 1 for a, b in pairs]
    text = ", ".join(f"{p} {100 * g:+.0f} %" for p, g in zip(PATTERNS, gains, strict=True))
    return [g < 0 for g in gains], text


def budget(f: Figures) -> tuple[list[bool], str]:
    found, agrees = [], []
    for pattern in BUDGETED:
        fixed = f.rows["pattern", f"{pattern}, policy"]
        row = f.rows["pattern", f"{pattern} family, budgeted"]
        agrees += [row["speedup"] > fixed["speedup"], row["kl_mean"] < 1.1 * fixed["kl_mean"]]
        found.append(
            f"{pattern}: {fixed['speedup']:.2f} times at {fixed['kl_mean']:.3g} with "
            f"{100 * fixed['coverage']:.0f} %, {row['speedup']:.2f} at {row['kl_mean']:.3g} with "
            f"{100 * row['coverage']:.0f} %"
        )
    return agrees, "; ".join(found)


CLAIMS: list[tuple[str, str, Claim]] = [
    ("P1, P2", "larger groups cost less: unstructured, 16:32, 8:16, 4:8, 2:4", larger_groups),
    ("P2", "8:16 costs 1.9 times less than 2:4, 16:32 2.7 times (there: accuracy)", by_how_much),
    ("P1, P2", "k, v, o and up left dense, 2:4 and 8:16 cost less than half", skipping),
    ("P1, P2", "down is the least sensitive projection, o and up the most (8:16)", sensitive),
    ("P1", "Robust-Norm scoring beats magnitude under the policy (2:4; 8:16)", robust_norm),
    ("P1", "INT8 costs less than sparsity (of 16:32 by policy)", sparsity_dominates),
    ("P1", "Outstanding-sparse makes activations easier to prune (2:4; 8:16)", outstanding),
    ("P2", "pruned activations cost less than pruned weights (2:4; 8:16)", against_weights),
    ("P2", "VAR beats plain magnitude at 2:4, and not at 8:16", method("var", (True, False))),
    ("P2", "D-PTS beats it at 8:16, and not at 2:4", method("dpts-median", (False, True))),
    ("P2", "CLACT is behind plain magnitude (2:4; 8:16)", method("clact", (False, False))),
    ("P2", "the method matters less at 8:16 than the pattern does", within_noise),
    ("P2", "two methods together are no better than the best of them", combined),
    ("P2", "L-PTS, LS and VAR, learned, beat plain magnitude", method("lpts/ls/var, learned")),
    ("P2", "R-Sparse: more rank is not better (ranks 8 and 32, from the SVD)", rank),
    ("here", "relief windows: 2:4+r16 beats 8:16, 2:4+r32 beats 2:4 (by policy)", windows),
    ("here", "an order of channels lowers every pattern's cost", orders),
    ("here", "a budget of the policy's KL (met on the calibration text) buys more speed", budget),
]


def claims(models: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Markdown that holds the claims against figures. models: rows by name."""
    yield "### What the papers say, and what these small models do\n"
    yield (
        "P1: arXiv 2508.02128, P2: arXiv 2509.22166; both measured models of 7 B parameters and "
        "more.\nFigures are KL divergences from the float32 model, in the order in which the "
        "claim names\nthings; the tables are in "
        + " and ".join(f"quality-{name}.md" for name in models)
        + ". Every figure is of held-out text.\n"
    )
    yield "| claim | of | " + " | ".join(models) + " |\n|" + "---|" * (2 + len(models))
    for source, text, claim in CLAIMS:
        cells = []
        for rows in models.values():
            agrees, found = claim(Figures(rows))
            verdict = "yes" if all(agrees) else "in part" if any(agrees) else "no"
            cells.append(f"**{verdict}**: {found}")
        yield f"| {text} | {source} | {' | '.join(cells)} |"


def write_claims(folder: Path) -> None:
    files = {name: folder / f"quality-{name}.json" for name in ("demo", "3m")}
    if all(path.exists() for path in files.values()):
        models = {n: json.loads(path.read_text(encoding="utf-8")) for n, path in files.items()}
        text = "\n".join(claims(models)) + "\n"
        (folder / "quality.md").write_text(text, encoding="utf-8")


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("testdata", type=Path)
    top.add_argument("--chunks", type=int, default=40)
    top.add_argument("--only", choices=("demo", "3m"), help="one model")
    top.add_argument("--out", type=Path, help="a folder for quality-NAME.md and .json")
    args = top.parse_args()
    for name in [args.only] if args.only else ("demo", "3m"):
        with tempfile.TemporaryDirectory() as folder:
            table = Table(Setup(name, args.testdata, Path(folder)), args.chunks)
            table.patterns()
            table.projections()
            table.methods()
            table.reference.close()
        text = "\n".join(tables(table.rows)) + "\n"
        print(text, flush=True)
        if args.out:
            (args.out / f"quality-{name}.md").write_text(text, encoding="utf-8")
            figures = json.dumps(table.rows, indent=1) + "\n"
            (args.out / f"quality-{name}.json").write_text(figures, encoding="utf-8")
    if args.out:
        write_claims(args.out)


if __name__ == "__main__":
    main()

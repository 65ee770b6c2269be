"""What pruning costs in quality, and what a budget buys: the tables of tools/results/quality-*.md.

    python tools/quality_table.py TESTDATA [--out tools/results] [--chunks 40] [--only demo]

TESTDATA is the folder of small models and texts. Two models: the demo model, calibrated on the
first part of its training text and measured on held-out text, and stories3M, on two parts of one
text. For every pattern: all projections ("naive"), the paper's policy (down, q and gate), the same
in a model whose channels were put in an order for it, and the fastest plan that costs no more KL on
the calibration text than the policy did (amber-quantize --max-kl). Then criteria and mitigations at
2:4 and 8:16, what can be learned (where PyTorch is), smoothing, and pruned weights beside them.

Perplexity by llama-perplexity's protocol (windows of 512 tokens), KL divergence and top-1 agreement
against the same model in float32 without sparsity. Speed is modelled: of the layers' projections,
by the multiplications that are left, for N:16x4t2 by what AVX-512 VNNI measured (amber/timing.py).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amber import Engine, calibrate, quantize, weights
from amber.eval import evaluate
from amber.models import find_model
from amber.timing import TimeModel

try:
    import learn_mitigations as learning
except ImportError:  # without PyTorch nothing is learned
    learning = None

PATTERNS = ["2:4", "4:8", "8:16", "16:32", "2:4+r32", "2:4+r16", "8:16x4", "12:16x4", "8:16x4t2",
            "12:16x4t2"]  # fmt: skip
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
        for pattern in PATTERNS:
            self.measure("pattern", f"{pattern}, every projection", model, f"{pattern}@all")
            self.measure("pattern", f"{pattern}, policy", model, pattern)
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
    for pattern in ("2:4", "8:16"):
        yield f"\n| {pattern}, every projection | {head}\n{rule}"
        yield from (line(row) for row in rows if row["table"] == pattern)


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
            table.methods()
            table.reference.close()
        text = "\n".join(tables(table.rows)) + "\n"
        print(text, flush=True)
        if args.out:
            (args.out / f"quality-{name}.md").write_text(text, encoding="utf-8")
            figures = json.dumps(table.rows, indent=1) + "\n"
            (args.out / f"quality-{name}.json").write_text(figures, encoding="utf-8")


if __name__ == "__main__":
    main()

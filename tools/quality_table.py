"""What pruning costs in quality: one table of patterns, one of criteria and mitigations.

    python tools/quality_table.py TEXT MODEL [MODEL ...] [--chunks 40] [--json FILE]

Perplexity by llama-perplexity's protocol (windows of 512 tokens), KL divergence and top-1 agreement
against the same model in float32 without sparsity. Prints Markdown; --json keeps the raw figures.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from amber import Engine
from amber.eval import evaluate

PATTERNS = ["2:4", "4:8", "8:16", "16:32", "2:4+r16", "8:16x4", "12:16x4", "8:16x4t2", "12:16x4t2"]
METHODS = ["", "/norm", "/amber", "/amber-b", "/var", "/dpts", "/dpts-median", "/amber/var"]


def rows_of(model: str, text: str, chunks: int) -> list[dict]:
    """One result per (precision, plan) of both tables."""
    plans = [("float", "off"), ("int8", "off")]
    plans += [("int8", f"{p}{scope}") for p in PATTERNS for scope in ("@all", "")]
    plans += [("int8", f"{p}{m}@all") for p in ("2:4", "8:16") for m in METHODS if m]
    rows = []
    with Engine(model, precision="float") as reference:
        for precision, sparse in plans:
            with Engine(model, precision=precision, sparse=sparse) as engine:
                result = evaluate(engine, text, chunks=chunks, against=reference)
                rows.append(
                    {"model": Path(model).stem, "precision": precision, "plan": sparse}
                    | {"coverage": engine.info.coverage}
                    | asdict(result)
                )
            print(f"{rows[-1]['model']} {precision} {sparse}", file=sys.stderr)
    return rows


def line(row: dict, name: str) -> str:
    return (
        f"| {name} | {100 * row['coverage']:.1f} % | {row['perplexity']:.3f} "
        f"| {row['kl_mean']:.4f} | {100 * row['top1_agreement']:.1f} % |"
    )


def tables(rows: list[dict]) -> str:
    """Markdown for one model."""
    head = "| coverage | perplexity | KL to float | same top token |\n|---|---|---|---|---|"
    by_plan = {(row["precision"], row["plan"]): row for row in rows}
    out = [f"\n### {rows[0]['model']}\n", f"| plan {head}"]
    out.append(line(by_plan["float", "off"], "float32, dense"))
    out.append(line(by_plan["int8", "off"], "INT8, dense"))
    for pattern in PATTERNS:
        out.append(line(by_plan["int8", f"{pattern}@all"], f"{pattern}, every projection"))
        out.append(line(by_plan["int8", pattern], f"{pattern}, policy (down, q, gate)"))
    for pattern in ("2:4", "8:16"):
        out.append(f"\n| {pattern}, every projection {head}")
        for method in METHODS:
            out.append(line(by_plan["int8", f"{pattern}{method}@all"], method.strip("/") or "act"))
    return "\n".join(out)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("text")
    top.add_argument("models", nargs="+")
    top.add_argument("--chunks", type=int, default=40)
    top.add_argument("--json", type=Path)
    args = top.parse_args()
    text = Path(args.text).read_text(encoding="utf-8")
    every = []
    for model in args.models:
        rows = rows_of(model, text, args.chunks)
        every += rows
        print(tables(rows), flush=True)
    if args.json:
        args.json.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()

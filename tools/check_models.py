"""Real models against independent implementations: one line for every file of TESTDATA/models.

    python tools/check_models.py TESTDATA [--only NAME ...] [--chunks 40]

logits: the largest distance, in float mode, of the 8 largest logits of each of 64 steps from those
of TESTDATA/reference (computed in float64 by another implementation), relative to the step's
largest. tokens: how many of the 64 greedy ones are the same before the first that differs; where
one does, how close the choice was. Then the perplexity of text/tinystories-eval.txt, in float mode
and in INT8, by llama.cpp's rules (chunks of 512 tokens that begin with BOS, the second half of each
counts), beside what llama.cpp measured, as TESTDATA/README.md tells.

Ends with 1 where logits are off by more than 5e-5, a token differs that was not a near tie, or a
perplexity in float mode is off from llama.cpp's by more than 1.5 %: that engine rounds activations
to 8 bits where weights are quantized, Amber's float mode does not.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

import amber

CHUNK = 512
LOGITS, PERPLEXITY = 5e-5, 0.015


def expected_perplexities(testdata: Path) -> dict[str, float]:
    """llama.cpp's, by file."""
    rows = re.findall(
        r"\| (\S+\.gguf) \| [\d,]+ \| ([\d.]+) ±", (testdata / "README.md").read_text()
    )
    return {name: float(value) for name, value in rows}


def compare_reference(engine: amber.Engine, reference: dict) -> tuple[float, int, float]:
    """(largest relative error, equal greedy tokens, lead of theirs where one differs)"""
    prompt, greedy, steps = (reference[k] for k in ("prompt_ids", "greedy_ids", "steps"))
    with engine.session() as session:
        rows = np.array(session.score(prompt + greedy[:-1], len(prompt) - 1), np.float64)
    worst = 0.0
    for row, step in zip(rows, steps, strict=True):
        expected = np.array(step["top_logits"])
        worst = max(worst, float(np.abs(row[step["top_ids"]] - expected).max() / abs(expected[0])))
    same = 0
    for row, step, token in zip(rows, steps, greedy, strict=True):
        if row.argmax() != token:
            logits = dict(zip(step["top_ids"], step["top_logits"], strict=True))
            lead = logits[token] - logits.get(int(row.argmax()), -np.inf)
            return worst, same, lead / abs(step["top_logits"][0])
        same += 1
    return worst, same, 0.0


def perplexity(engine: amber.Engine, text: str, chunks: int) -> float:
    tokens = engine.tokenize(text)
    total, count = 0.0, 0
    with engine.session(n_ctx=CHUNK) as session:
        for i in range(min(chunks, len(tokens) // CHUNK)):
            part = list(tokens[i * CHUNK : (i + 1) * CHUNK])
            part[0] = engine.tokenizer.bos
            first = CHUNK // 2
            rows = np.array(session.score(part, first), np.float64)[:-1]
            most = rows.max(-1, keepdims=True)
            sums = np.log(np.exp(rows - most).sum(-1)) + most[:, 0]
            total += float((sums - rows[np.arange(len(rows)), part[first + 1 :]]).sum())
            count += len(rows)
    return float(np.exp(total / count))


def check(testdata: Path, path: Path, text: str, chunks: int, theirs: float) -> bool:
    """Prints a line. Returns whether all is well."""
    reference = json.loads((testdata / "reference" / f"{path.name}.reference.json").read_text())
    with amber.Engine(path, precision="float") as engine:
        error, same, lead = compare_reference(engine, reference)
        ours = perplexity(engine, text, chunks)
    with amber.Engine(path, sparse="off") as engine:
        int8 = perplexity(engine, text, chunks)
    near = f" (near tie: {lead:.0e})" if lead else ""
    print(
        f"{path.name:30} logits {error:.0e}  tokens {same}/64{near}  perplexity float {ours:.4f}, "
        f"INT8 {int8:.4f} ({100 * (int8 / ours - 1):+.2f} %), llama.cpp {theirs:.4f} "
        f"({100 * (ours / theirs - 1):+.2f} %)",
        flush=True,
    )
    tied = lead < 2 * LOGITS
    close = abs(ours / theirs - 1) <= PERPLEXITY or chunks != 40
    return error <= LOGITS and tied and close


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testdata", type=Path)
    parser.add_argument("--only", nargs="*", help="files, without .gguf")
    parser.add_argument("--chunks", type=int, default=40, help="of text (llama.cpp's figures: 40)")
    args = parser.parse_args()
    expected = expected_perplexities(args.testdata)
    text = (args.testdata / "text" / "tinystories-eval.txt").read_text()
    held = [
        check(args.testdata, path, text, args.chunks, expected[path.name])
        for path in sorted((args.testdata / "models").glob("*.gguf"))
        if not args.only or path.stem in args.only
    ]
    return 0 if held and all(held) else 1


if __name__ == "__main__":
    sys.exit(main())

"""How far Amber's logits are from transformers' for every architecture, as a table.

    python tools/architecture_table.py > tools/results/architectures.md

Float columns are relative errors (the expected values are stored in half precision, which is 2e-4
of them); INT8 columns are mean KL divergences of the next token's distribution. The models are tiny
and of random weights, which have no structure: real ones lose less (see the README). The golden
files of tests/golden are what tools/make_architectures.py made.
"""

import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import amber  # noqa: E402
import architecture_checks as checks  # noqa: E402
import make_architectures as maker  # noqa: E402


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    patterns = list(maker.PATTERNS)
    print(f"`python tools/architecture_table.py` on {cpu()}, kernels {amber.isa_list()[0]}\n")
    columns = ["case", "architecture", "class of transformers", "float: prefill", "decode",
               "prefill and decode", *patterns, "INT8: dense", *patterns]  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for name, case in maker.CASES.items():
        errors, divergences = checks.float_errors(name), checks.int8_divergences(name)
        row = [name, case.arch, case.config.removesuffix("Config")]
        row += [f"{e:.1e}" for e in errors.values()] + [f"{d:.4f}" for d in divergences.values()]
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

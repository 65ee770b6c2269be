"""Memory that a long prompt takes, against the estimate that is printed before it.

    python tools/check_memory.py [--tokens 32768] [--shape NAME ...] [--model FILE ...]

Without --model: a small Llama, and a small Gemma 3, of whose layers five in six see a window, both
with random weights. Each model reads a prompt of so many tokens in a process of its own, whose
anonymous memory (weights, KV cache, scratch; the file is mapped) is watched from before the model
is opened. Ends with 1 where the most that it grew differs from the estimate by more than 5 %.
Needs Linux, numpy and gguf.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy  # noqa: F401 - before anything is measured: logits come in its arrays

import amber

BOUND = 0.05
PERIOD = 0.005  # seconds between looks


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status: expected a line RssAnon (Linux)")


class Watch:
    """The most anonymous memory since it began."""

    def __init__(self) -> None:
        self.most, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()

    def _look(self) -> None:
        while not self.done.wait(PERIOD):
            self.most = max(self.most, anonymous_bytes())

    def finish(self) -> int:
        self.done.set()
        self.thread.join()
        return max(self.most, anonymous_bytes())


def measure(path: str, n: int) -> None:
    """In a process of its own: prints the estimate and what came of it."""
    with amber.Tokenizer(path) as tokenizer:
        size = len(tokenizer)
    tokens = [3 + i * 7919 % (size - 6) for i in range(n)]
    estimate = amber.memory_estimate(path, n_ctx=n)
    before = anonymous_bytes()
    watch = Watch()
    with amber.Engine(path, n_ctx=n) as engine:
        info = engine.info
        begun = time.perf_counter()
        engine.logits(tokens)
        seconds = time.perf_counter() - begun
        most = watch.finish()
    printed = {"weights": info.weight_bytes, "kv": info.kv_bytes, "scratch": info.scratch_bytes}
    print(json.dumps({"estimate": asdict(estimate), "printed": printed, "seconds": seconds,
                      "grown": most - before}))  # fmt: skip


def check(path: Path, name: str, n: int) -> bool:
    """Prints what was found. Returns whether the estimate held."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", path, "--tokens", str(n)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
        return False
    found = json.loads(done.stdout)
    printed = found["printed"]
    total = sum(printed.values())
    off = found["grown"] / total - 1
    print(
        f"{name:16} {n} tokens in {found['seconds']:.1f} s: weights "
        f"{printed['weights'] / 1e6:.1f} + KV {printed['kv'] / 1e6:.1f} + scratch "
        f"{printed['scratch'] / 1e6:.1f} = {total / 1e6:.1f} MB, grown by "
        f"{found['grown'] / 1e6:.1f} MB ({100 * off:+.1f} %)"
    )
    estimate = found["estimate"]
    same = [estimate[k] for k in ("weights_bytes", "kv_bytes", "scratch_bytes")]
    if same != list(printed.values()):
        print(f"{name}: memory_estimate says {same}", file=sys.stderr)
        return False
    return abs(off) <= BOUND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shape", nargs="*", default=["small", "small-windows"],
                        help="of make_synthetic.py")  # fmt: skip
    parser.add_argument("--model", type=Path, nargs="*", default=[])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.tokens)
        return 0
    held = [check(path, path.name, args.tokens) for path in args.model]
    if not args.model:
        maker = Path(__file__).with_name("make_synthetic.py")
        for shape in args.shape:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{shape}.gguf"
                subprocess.run(
                    [sys.executable, maker, path, "--shape", shape],
                    check=True, capture_output=True,
                )  # fmt: skip
                held.append(check(path, shape, args.tokens))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())

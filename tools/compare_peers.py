"""Amber beside other engines: the same GGUF file, the same threads, in turns.

    python tools/compare_peers.py model.gguf -p 512,2048 -n 64 -t 2 -r 5 --out tools/results/peers

Peers come from PyPI into a virtual environment of their own (--venv keeps it for the next time):
llama-cpp-python, the llama.cpp of record, and OpenVINO GenAI where it installs. Every engine runs
in a process of its own, and within each repetition they take turns test by test, so that ratios
hold on a machine whose speed wanders. Prompts are random tokens and differ between repetitions,
so that no prefix cache can answer. Figures are medians. Writes PREFIX.md and PREFIX.json.

pp: seconds from tokens to the logits of the last one. tg: n tokens one by one after a single one;
of OpenVINO GenAI the library's own time to first token and time per output token are taken.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"llama.cpp": "llama-cpp-python", "openvino": "openvino-genai"}
Test = tuple[str, int]  # ("pp" | "tg", tokens)


class Engine(Protocol):
    version: str
    n_vocab: int

    def run(self, test: Test, tokens: list[int]) -> float:
        """Seconds."""


# ---- the engines, each in a process of its own ----


class Amber:
    def __init__(self, model: str, threads: int, n_ctx: int, sparse: str) -> None:
        import amber

        self.engine = amber.Engine(model, threads=threads, n_ctx=n_ctx, sparse=sparse)
        self.session = self.engine.session(n_ctx=n_ctx)
        self.version = f"amber {amber.__version__} ({self.engine.info.isa})"
        self.n_vocab = self.engine.info.n_vocab

    def run(self, test: Test, tokens: list[int]) -> float:
        self.session.rewind(0)
        if test[0] == "pp":
            return timed(lambda: self.session.sync(tokens))
        self.session.sync(tokens[:1])
        return timed(lambda: [self.session.append(t) for t in tokens[1:]])


class LlamaCpp:
    def __init__(self, model: str, threads: int, n_ctx: int, sparse: str) -> None:
        import llama_cpp

        self.llm = llama_cpp.Llama(
            model,
            n_ctx=n_ctx,
            n_batch=2048,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.version = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"
        self.n_vocab = self.llm.n_vocab()

    def run(self, test: Test, tokens: list[int]) -> float:
        self.llm.reset()
        if test[0] == "pp":
            return timed(lambda: self.llm.eval(tokens))
        self.llm.eval(tokens[:1])
        return timed(lambda: [self.llm.eval([t]) for t in tokens[1:]])


class OpenVino:
    def __init__(self, model: str, threads: int, n_ctx: int, sparse: str) -> None:
        import openvino
        import openvino_genai

        self.ov, self.genai = openvino, openvino_genai
        self.pipe = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
        self.version = f"OpenVINO GenAI {openvino_genai.__version__}"
        self.n_vocab = 0

    def run(self, test: Test, tokens: list[int]) -> float:
        import numpy as np

        count = 1 if test[0] == "pp" else len(tokens)
        ids = np.array([tokens if test[0] == "pp" else tokens[:1]], np.int64)
        inputs = self.genai.TokenizedInputs(self.ov.Tensor(ids), self.ov.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        metrics = self.pipe.generate(inputs, config).perf_metrics
        if test[0] == "pp":
            return metrics.get_ttft().mean / 1000
        return metrics.get_tpot().mean / 1000 * (count - 1)


ENGINES: dict[str, Callable[[str, int, int, str], Engine]] = {
    "amber": Amber,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve(name: str, model: str, threads: int, n_ctx: int, sparse: str) -> None:
    """Opens one engine, then answers a request {"test", "tokens"} a line with {"seconds"}."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    started = time.perf_counter()
    engine = ENGINES[name](model, threads, n_ctx, sparse)
    ready = {
        "version": engine.version,
        "n_vocab": engine.n_vocab,
        "load_seconds": time.perf_counter() - started,
    }
    print(json.dumps(ready), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = engine.run(tuple(request["test"]), request["tokens"])
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


# ---- the comparison ----


class Worker:
    def __init__(self, label: str, python: str, args: list[str]) -> None:
        self.label = label
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self.process = subprocess.Popen(
            [python, __file__, "--serve", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
        )
        self.ready = self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            why = (self.said.read().strip().splitlines() or ["without a word"])[-1]
            raise RuntimeError(f"{self.label} ended (exit code {code}): {why}")
        return json.loads(line)

    def seconds(self, test: Test, tokens: list[int]) -> float:
        assert self.process.stdin
        print(json.dumps({"test": test, "tokens": tokens}), file=self.process.stdin, flush=True)
        return self._reply()["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()


def peers_python(venv: Path, wanted: list[str]) -> tuple[str, list[str]]:
    """The environment's interpreter, and those of the wanted peers that could be installed."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    have = []
    for name in wanted:
        command = [python, "-m", "pip", "install", "--quiet", PACKAGES[name]]
        print(f"installing {PACKAGES[name]} into {venv} ...", file=sys.stderr)
        if subprocess.run(command).returncode:
            print(f"{PACKAGES[name]} does not install here: left out", file=sys.stderr)
        else:
            have.append(name)
    return str(python), have


def measure(workers: list[Worker], tests: list[Test], repeats: int) -> dict[str, dict[str, Any]]:
    """tokens per second by engine and test: the median, and all values."""
    n_vocab = max(worker.ready["n_vocab"] for worker in workers)
    speeds: dict[str, dict[str, list[float]]] = {w.label: {} for w in workers}
    for repeat in range(-1, repeats):  # the first round warms up and does not count
        for test in tests:
            kind, n = test
            rng = random.Random(f"{repeat} {kind} {n}")
            tokens = [rng.randrange(n_vocab // 100, n_vocab) for _ in range(n + (kind == "tg"))]
            order = workers if repeat % 2 else workers[::-1]
            for worker in order:
                seconds = worker.seconds(test, tokens)
                if repeat >= 0:
                    speeds[worker.label].setdefault(f"{kind}{n}", []).append(n / seconds)
                print(
                    f"\r{repeat + 1}/{repeats} {worker.label} {kind}{n} {n / seconds:.1f} tok/s"
                    + " " * 20,
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
    print(file=sys.stderr)
    return {
        label: {t: {"median": statistics.median(v), "all": v} for t, v in tests_.items()}
        for label, tests_ in speeds.items()
    }


def markdown(report: dict[str, Any]) -> str:
    first = report["engines"][0]["label"]
    names = list(report["engines"][0]["tests"])
    lines = [
        f"# {report['model']}, {report['threads']} threads, {report['date']}",
        "",
        f"{report['cpu']}. Tokens per second, medians of {report['repeats']}, in turns; in "
        f"brackets how many times as fast {first} is.",
        "",
        f"`{report['command']}`",
        "",
        "| engine | load s | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    base = report["engines"][0]["tests"]
    for engine in report["engines"]:
        cells = []
        for name in names:
            speed = engine["tests"][name]["median"]
            ratio = base[name]["median"] / speed
            cells.append(f"{speed:.1f}" + ("" if engine["label"] == first else f" ({ratio:.2f}x)"))
        row = [f"{engine['label']}: {engine['version']}", f"{engine['load_seconds']:.1f}", *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if int(part) > 0]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        name, model, threads, n_ctx, sparse = sys.argv[2:]
        serve(name, model, int(threads), int(n_ctx), sparse)
        return 0
    from amber.bench import cpu_name  # the peers' interpreter, which serves above, has no Amber

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("-p", "--prompt", type=numbers, default=[512], metavar="N[,N]")
    parser.add_argument("-n", "--gen", type=numbers, default=[64], metavar="N[,N]")
    parser.add_argument("-t", "--threads", type=positive, default=2)
    parser.add_argument("-r", "--repeats", type=positive, default=5)
    parser.add_argument("--sparse", action="append", help="another Amber, with this plan")
    parser.add_argument("--peers", default="llama.cpp,openvino", help="%(default)s")
    parser.add_argument("--venv", type=Path, default=Path("build/peers"), help="%(default)s")
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="write PREFIX.md and .json")
    args = parser.parse_args()
    wanted = [name for name in args.peers.split(",") if name]
    if unknown := [name for name in wanted if name not in PACKAGES]:
        parser.error(f"--peers: expected {', '.join(PACKAGES)}, found {unknown[0]}")
    if not os.path.isfile(args.model):
        parser.error(f"{args.model}: no such file")
    tests: list[Test] = [("pp", n) for n in args.prompt] + [("tg", n) for n in args.gen]
    if not tests:
        parser.error("nothing to measure: -p and -n are both empty")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent}: no such folder")

    python, peers = peers_python(args.venv, wanted)
    common = [args.model, str(args.threads), str(max(n for _, n in tests) + 64)]
    plans = [
        ("amber", sys.executable, "amber", "off"),
        *[(f"amber --sparse {s}", sys.executable, "amber", s) for s in args.sparse or []],
        *[(name, python, name, "off") for name in peers],
    ]
    workers: list[Worker] = []
    try:
        for label, interpreter, name, sparse in plans:
            print(f"opening {label} ...", file=sys.stderr)
            try:
                workers.append(Worker(label, interpreter, [name, *common, sparse]))
            except RuntimeError as e:
                print(f"left out: {e}", file=sys.stderr)
        if not workers or workers[0].label != "amber":
            print("compare_peers: Amber itself did not open this model", file=sys.stderr)
            return 1
        speeds = measure(workers, tests, args.repeats)
    finally:
        for worker in workers:
            worker.close()
    report = {
        "model": os.path.basename(args.model),
        "threads": args.threads,
        "repeats": args.repeats,
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.system()}",
        "command": "python " + shlex.join([os.path.relpath(__file__), *sys.argv[1:]]),
        "engines": [{"label": w.label, **w.ready, "tests": speeds[w.label]} for w in workers],
    }
    text = markdown(report)
    print(text, end="")
    if args.out:
        Path(f"{args.out}.md").write_text(text)
        Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""amber-bench: how fast a model runs on this machine, and how near the machine's limits that is.

stdout carries the results and nothing else. Exit codes: 0 done, 1 failure, 2 usage,
130 interrupted.

Every configuration (threads, precision, instruction set) runs in a process of its own, so that its
peak memory is its own, and the configurations take turns within each repetition, so that ratios
hold on a machine whose speed wanders. Figures are medians over the repetitions.
"""

import argparse
import contextlib
import csv
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from . import kernel_bench, plots
from ._lib import check, ffi, lib
from .batch import MOST, append_each
from .command import UsageError, run_command
from .crossover import cpu_name
from .engine import PRECISIONS, Engine, isa_list, memory_estimate
from .errors import AmberError
from .models import find_model
from .session import KV_TYPES, Session

KEYS = (
    "model", "test", "threads", "device", "isa", "precision", "kv_type", "sparse", "coverage",
    "tokens_per_second", "stddev", "share_of_peak", "peak_rss_bytes", "load_seconds",
    "logits_hash", "n_params", "weight_bytes", "repeats", "peak_int8_ops", "peak_read_bytes",
    "commit", "cpu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """pp: a prompt of n tokens at once; tg: n tokens one by one; both after `depth` tokens. tg may
    be of `batch` sequences at once, n tokens each."""

    kind: str  # "pp" | "tg"
    n: int
    depth: int = 0
    batch: int = 1

    def __str__(self) -> str:
        batch = f" b{self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.n}{batch}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Config:
    """What one process opens."""

    model: str
    threads: int | None
    precision: str
    isa: str | None
    sparse: str = "auto"
    device: str | None = None
    kv_type: str = "f16"


# ---- work and limits ----


def work(job: Job, info: dict[str, Any]) -> float:
    """What the limit of a job counts, for all its tokens.

    Of several sequences, the weights count once a step, as many experts as one token uses.

    pp: operations of the linear layers, a multiply and its addition counting as two, the output
    head for the last token alone; attention is not counted, and what a sparse layer skips is
    counted as if it were done. tg: bytes of weights, each that a token needs once, and of the KV
    cache as it grows, windows not considered.
    """
    if job.kind == "pp":
        return 2.0 * (info["layer_multiplications"] * job.n + info["n_embd"] * info["n_vocab"])
    row = {"f32": 4 * info["head_dim"], "f16": 2 * info["head_dim"], "int8": info["head_dim"] + 4}
    kv_bytes = 2 * info["n_layer"] * info["n_head_kv"] * row[info["kv_type"]]
    return job.n * (info["token_bytes"] + job.batch * kv_bytes * (job.depth + job.n / 2))


@functools.cache
def peaks(threads: int, isa: str) -> tuple[float, float]:
    """(INT8 operations per second, bytes read per second) at best: amber_measure_peaks."""
    ops, read, err = ffi.new("double *"), ffi.new("double *"), ffi.new("amber_error *")
    check(lib.amber_measure_peaks(threads, isa.encode(), ops, read, err), err)
    return ops[0], read[0]


def on_gpu(info: dict[str, Any]) -> bool:
    return info["device"] != "cpu"


def share_of_peak(job: Job, info: dict[str, Any], tokens_per_second: float) -> float | None:
    """Share of the limit that a speed reaches; None for float prefill, which INT8 says nothing
    about, and on a GPU, whose limits are not measured here."""
    if on_gpu(info) or (job.kind == "pp" and info["precision"] == "float"):
        return None
    ops, read = peaks(info["threads"], info["isa"])
    rate = work(job, info) * tokens_per_second / (job.n * job.batch)
    return rate / (ops if job.kind == "pp" else read)


def fnv1a(data: bytes) -> str:
    """64-bit FNV-1a (Fowler, Noll, Vo) in hexadecimal: a short name for exactly these bytes."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def sample_tokens(count: int, n_vocab: int, bos: int | None) -> list[int]:
    """Token ids that stand for a text: spread over the vocabulary, the same on every run."""
    state, ids = 1, [] if bos is None else [bos]
    while len(ids) < count:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % n_vocab)
    return ids[:count]


def room_of(jobs: Sequence[Job], depth: int) -> int:
    """n_ctx of the sessions for the jobs after `depth` tokens; it also limits a batch."""
    return max(max(job.depth + job.n, job.batch) for job in jobs if job.depth == depth) + 1


# ---- the process that runs one configuration ----


class Worker:
    """Runs jobs on one engine. `serve` answers JSON requests, one a line."""

    def __init__(self, config: Config, jobs: Sequence[Job]) -> None:
        self.engine = Engine(
            config.model,
            n_ctx=1,
            threads=config.threads,
            precision=config.precision,
            isa=config.isa,
            sparse=config.sparse,
            device=config.device,
            kv_type=config.kv_type,
        )
        most = max(job.depth + job.n for job in jobs) + 1
        self.tokens = sample_tokens(most, self.engine.info.n_vocab, self.engine.tokenizer.bos)
        self.sessions: dict[tuple[int, int], Session] = {}
        self.room = {depth: room_of(jobs, depth) for depth in {job.depth for job in jobs}}

    def info(self) -> dict[str, Any]:
        fields = self.engine.info
        return {name: getattr(fields, name) for name in fields.__dataclass_fields__}

    def _session(self, depth: int, index: int = 0) -> Session:
        """The index-th session that holds `depth` tokens and no more."""
        if (depth, index) not in self.sessions:
            self.sessions[depth, index] = self.engine.session(n_ctx=self.room[depth])
        session = self.sessions[depth, index]
        if len(session) < depth:
            session.sync(self.tokens[:depth])
        session.rewind(depth)
        return session

    def run(self, job: Job, want_hash: bool) -> dict[str, Any]:
        """Seconds of one run, and on request the hash of its last logits."""
        sessions = [self._session(job.depth, index) for index in range(job.batch)]
        session = sessions[0]
        ids = self.tokens[: job.depth + job.n]
        if job.kind == "pp":
            started = perf_counter()
            session.sync(ids)
            seconds = perf_counter() - started
        else:  # by the session's own clock: Python's share of a call is not the model's
            before = session.stats["decode_seconds"]
            for step in range(job.n):  # sequence i is ahead of its neighbour by a token
                places = [job.depth + (step + i) % job.n for i in range(job.batch)]
                append_each(sessions, [ids[place] for place in places])
            seconds = session.stats["decode_seconds"] - before
        name = fnv1a(bytes(memoryview(session.logits).cast("B"))) if want_hash else None
        return {
            "seconds": seconds,
            "logits_hash": name,
            "peak_rss_bytes": peak_rss_bytes(),
            "sparse": bool(session.stats["prefill_sparse"]),
        }


def peak_rss_bytes() -> int:
    """Most memory that this process has held, the mapped file's pages included."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        # Not ru_maxrss: that starts with what the parent held when it forked.
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def serve() -> int:
    """The child process: requests on stdin, answers on stdout."""
    worker = None
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if worker is None:
                    jobs = [Job(**job) for job in request["jobs"]]
                    worker = Worker(Config(**request["config"]), jobs)
                    answer = worker.info()
                else:
                    answer = worker.run(Job(**request["job"]), request["want_hash"])
            except (AmberError, ValueError, OSError, MemoryError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    return 0


class Child:
    """The parent's end of a Worker."""

    def __init__(self, config: Config, jobs: Sequence[Job]) -> None:
        self.config = config
        self._process = subprocess.Popen(
            [sys.executable, "-m", "amber.bench", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        self.info = self._ask({"config": fields, "jobs": [_fields(job) for job in jobs]})

    def run(self, job: Job, want_hash: bool) -> dict[str, Any]:
        return self._ask({"job": _fields(job), "want_hash": want_hash})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise AmberError(
                f"{self.config.model}: the measuring process ended with code {code} "
                "(out of memory?)"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise AmberError(answer["error"])
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__dataclass_fields__}


# ---- the measurement ----


def measure(
    configs: Sequence[Config], jobs: Sequence[Job], repeats: int, quiet: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows with KEYS, one per configuration and job."""
    children: list[Child] = []
    try:
        for config in configs:
            children.append(Child(config, jobs))
        for child in children:
            if not on_gpu(child.info):
                peaks(child.info["threads"], child.info["isa"])
        runs: dict[tuple[int, Job], list[dict[str, Any]]] = {
            (index, job): [] for index in range(len(children)) for job in jobs
        }
        with _bar((repeats + 1) * len(runs), quiet) as bar:
            for repeat in range(repeats + 1):  # the first warms up and names the logits
                for (index, job), results in runs.items():
                    bar.set_postfix_str(str(job), refresh=False)
                    results.append(children[index].run(job, want_hash=repeat == 0))
                    bar.update()
        for (index, job), results in runs.items():
            yield row(children[index], job, results)
    finally:
        for child in children:
            child.close()


def row(child: Child, job: Job, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    info = child.info
    rates = [job.n * job.batch / result["seconds"] for result in results[1:]]
    speed = statistics.median(rates)
    gpu = on_gpu(info)
    ops, read = (None, None) if gpu else peaks(info["threads"], info["isa"])
    values = {
        "model": child.config.model,
        "test": str(job),
        "sparse": "off" if job.kind == "pp" and not results[0]["sparse"] else info["sparse"],
        "tokens_per_second": speed,
        "stddev": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "share_of_peak": share_of_peak(job, info, speed),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        "logits_hash": results[0]["logits_hash"],
        "repeats": len(rates),
        "peak_int8_ops": ops,
        "peak_read_bytes": read,
        "commit": commit(),
        "cpu": cpu_name(),
    }
    return {key: values[key] if key in values else info[key] for key in KEYS}


def _bar(total: int, quiet: bool) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    return tqdm(
        total=total, unit="run", leave=False, file=sys.stderr, dynamic_ncols=True,
        disable=True if quiet else None,
    )  # fmt: skip


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    folder, name = os.path.split(os.path.abspath(__file__))
    git = ["git", "-C", folder]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", name], capture_output=True)
        if tracked.returncode:
            return None
        head = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        return None
    return head.stdout.strip() or None


def check_memory(configs: Sequence[Config], jobs: Sequence[Job]) -> None:
    """Refuses what would swap: all configurations stay open at once. AmberError tells the sizes."""
    need = 0
    for config in configs:
        for depth in {job.depth for job in jobs}:
            room = room_of(jobs, depth)
            part = memory_estimate(
                config.model, n_ctx=room, precision=config.precision, kv_type=config.kv_type
            )
            sessions = max(t.batch for t in jobs if t.depth == depth)
            need += sessions * (part.kv_bytes + part.scratch_bytes)
        need += part.weights_bytes
    need += part.mapped_bytes
    available = None
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        available = int(re.search(r"MemAvailable:\s+(\d+)", file.read())[1]) * 1024
    if available is not None and need > available:
        raise AmberError(
            f"{len(configs)} configurations need {need / 2**30:.1f} GiB together, "
            f"{available / 2**30:.1f} GiB are free (measure fewer at once)"
        )


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "amber-bench",
        description="Speed of prefill (pp) and decode (tg). Options that list values with commas "
        "measure every combination. share_of_peak holds prefill against the INT8 operations and "
        "decode against the memory reads of this machine, both measured in the same run.",
        allow_abbrev=False,
    )
    top.add_argument("models", nargs="*", metavar="MODEL", help="GGUF files or built-in names")
    top.add_argument(
        "--kernels",
        action="store_true",
        help="no model: single kernels on -t threads (1), products of 1 to 16 and -p rows, dense "
        "and with the patterns of --sparse, and attention behind -d tokens (0,4096)",
    )
    top.add_argument(
        "--shapes",
        metavar="NxK[,NxK]",
        help="of the products of --kernels, outputs x inputs (2048x2048,8192x2048,2048x8192)",
    )
    top.add_argument("-p", "--prompt", default="512", metavar="N[,N]", help="pp sizes; 0: no (512)")
    top.add_argument("-n", "--gen", default="64", metavar="N[,N]", help="tg sizes; 0: no (64)")
    top.add_argument(
        "--batch",
        default="1",
        metavar="N[,N]",
        help="sequences that tg decodes at once; tok/s of all, the hash of the first one (1)",
    )
    top.add_argument("-d", "--depth", metavar="N[,N]", help="tokens before it (0)")
    top.add_argument("-t", "--threads", metavar="N[,N]", help="threads (physical cores)")
    top.add_argument("-r", "--repeats", type=int, default=5, help="repetitions (5)")
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
        "--isa", metavar="I[,I]", help=f"kernel columns of {', '.join(isa_list())} (the first)"
    )
    top.add_argument(
        "--device",
        metavar="D[,D]",
        help="cpu, cuda, cuda:N, auto ($AMBER_DEVICE or cpu); see amber-run --list-devices",
    )
    top.add_argument(
        "--sparse",
        action="append",
        metavar="S",
        help="off, auto, a pattern such as 8:16, a plan file; may be given again (auto)",
    )
    form = top.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per row")
    form.add_argument("--csv", action="store_true", help="comma-separated, with a head line")
    form.add_argument("--md", action="store_true", help="a Markdown table (default)")
    top.add_argument(
        "--plot", metavar="FILE", help="also draws the rows: .png, .svg or .pdf (needs matplotlib)"
    )
    top.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return top


def integers(name: str, text: str, low: int) -> list[int]:
    """ "1,2" -> [1, 2], each at least `low`."""
    values = []
    for item in text.split(","):
        if not re.fullmatch(r"\d+", item) or int(item) < low:
            raise UsageError(f"{name}: expected whole numbers from {low}, found {text!r}")
        values.append(int(item))
    return list(dict.fromkeys(values))


def shapes(text: str) -> list[tuple[int, int]]:
    """ "2048x8192,3x5" -> [(2048, 8192), (3, 5)]."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise UsageError(f"--shapes: expected outputs x inputs such as 2048x8192, found {text!r}")
    return [(int(n), int(k)) for n, k in (shape.split("x") for shape in text.split(","))]


def columns(text: str) -> list[str]:
    isas = text.split(",")
    for isa in isas:
        if isa not in isa_list():
            raise UsageError(f"--isa: expected one of {', '.join(isa_list())}, found {isa!r}")
    return isas


def kv_types_of(args: argparse.Namespace) -> list[str]:
    kv_types = args.kv_type.split(",")
    for kv_type in kv_types:
        if kv_type not in KV_TYPES:
            raise UsageError(f"--kv-type: expected {' or '.join(KV_TYPES)}, found {kv_type!r}")
    return kv_types


def plan(args: argparse.Namespace) -> tuple[list[Config], list[Job]]:
    """What a command line asks for."""
    if not args.models:
        raise UsageError("expected a MODEL, or --kernels")
    depths = integers("-d", args.depth or "0", 0)
    sizes = [("pp", n) for n in integers("-p", args.prompt, 0)]
    sizes += [("tg", n) for n in integers("-n", args.gen, 0)]
    batches = integers("--batch", args.batch, 1)
    if max(batches) > MOST:
        raise UsageError(f"--batch: expected at most {MOST}, found {max(batches)}")
    jobs = [
        Job(kind, n, depth, batch)
        for depth in depths
        for kind, n in sizes
        for batch in (batches if kind == "tg" else [1])
        if n
    ]
    if not jobs:
        raise UsageError("nothing to measure: -p and -n are 0")
    threads = integers("-t", args.threads, 1) if args.threads else [None]
    precisions = args.precision.split(",")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise UsageError(
                f"--precision: expected {' or '.join(PRECISIONS)}, found {precision!r}"
            )
    kv_types = kv_types_of(args)
    isas = columns(args.isa) if args.isa else [None]
    for model in args.models:
        find_model(model)
    configs = [
        Config(*values)
        for values in itertools.product(
            args.models,
            threads,
            precisions,
            isas,
            args.sparse or ["auto"],
            args.device.split(",") if args.device else [None],
            kv_types,
        )
    ]
    return configs, jobs


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table like llama-bench's."""
    head = ["model", "params", "precision", "KV", "isa", "threads", "sparse", "test", "tok/s",
            "of peak", "peak RSS", "load s", "logits"]  # fmt: skip
    table = [head]
    for r in rows:
        share = r["share_of_peak"]
        table.append([
            os.path.basename(r["model"]),
            f"{r['n_params'] / 1e6:.1f} M",
            r["precision"],
            r["kv_type"],
            r["isa"] if r["device"] == "cpu" else r["device"],
            str(r["threads"]),
            r["sparse"],
            r["test"],
            f"{r['tokens_per_second']:.1f} ± {r['stddev']:.1f}",
            "-" if share is None else f"{100 * share:.0f} %",
            f"{r['peak_rss_bytes'] / 2**20:.0f} MiB",
            f"{r['load_seconds']:.2f}",
            r["logits_hash"][:8],
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for number, line in enumerate(table):
        yield "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        if number == 0:
            yield "| " + " | ".join("-" * w for w in widths) + " |"


def peak_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    done: set[tuple[int, str]] = set()
    for r in rows:
        if r["device"] == "cpu" and (r["threads"], r["isa"]) not in done:
            done.add((r["threads"], r["isa"]))
            yield (
                f"peak of {r['threads']} threads, {r['isa']}: {r['peak_int8_ops'] / 1e9:.0f} GOPS "
                f"int8, {r['peak_read_bytes'] / 1e9:.1f} GB/s read  ({r['cpu']})"
            )


def write(
    rows: Iterator[dict[str, Any]],
    keys: Sequence[str],
    table: Callable[[Sequence[dict[str, Any]]], Iterator[str]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Prints the rows in the form that was asked for, each as soon as it is there."""
    results = []
    sheet = csv.DictWriter(sys.stdout, keys, lineterminator="\n")
    if args.csv:
        sheet.writeheader()
    for result in rows:
        results.append(result)
        if args.json:
            print(json.dumps(result), flush=True)
        elif args.csv:
            sheet.writerow(result)
    if not args.json and not args.csv:
        print("\n".join(table(results)))
    return results


def model_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from markdown(rows)
    yield ""
    yield from peak_lines(rows)


def kernel_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows with kernel_bench.KEYS."""
    patterns = list(dict.fromkeys(["dense", *(args.sparse or kernel_bench.PATTERNS)]))
    groups = kernel_bench.groups(
        [n for n in integers("-p", args.prompt, 0) if n],
        integers("-d", args.depth or "0,4096", 0),
        patterns,
        shapes(args.shapes) if args.shapes else kernel_bench.SHAPES,
        kv_types_of(args),
    )
    isas = columns(args.isa) if args.isa else kernel_bench.default_isas()
    configs = list(itertools.product(isas, integers("-t", args.threads or "1", 1)))
    with _bar(len(configs) * len(groups), args.quiet) as bar:
        for isa, threads in configs:
            limits = peaks(threads, isa)
            for group in groups:
                for result in kernel_bench.measure_group(group, isa, threads, args.repeats, limits):
                    yield result | {"commit": commit(), "cpu": cpu_name()}
                bar.update()


# ---- the picture ----


def label_of(r: dict[str, Any]) -> str:
    """What tells a row from its neighbours."""
    if "kernel" in r:
        shape = f"{r['n_out']}x{r['n_in']}" if r["n_out"] else f"{r['n_in'] or r['depth']}"
        return f"{r['kernel']} {shape} T={r['rows']} {r['pattern']} x{r['threads']}"
    name = os.path.splitext(os.path.basename(r["model"]))[0]
    name = f"{r['test']}  {name} {r['sparse']} {r['precision']} {r['isa']} x{r['threads']}"
    return name if r["kv_type"] != "int8" else f"{name} KV int8"


def plot(pyplot: Any, rows: Sequence[dict[str, Any]], path: str) -> None:
    """One panel of bars per unit, with the share of the machine's limit beside each bar."""
    panels: dict[str, list[tuple[str, float, float, float | None]]] = {}
    for r in rows:
        if "kernel" in r:
            unit, value, error = r["unit"], r["rate"], 0.0
        else:
            unit = "tokens/s, " + ("prefill" if r["test"].startswith("pp") else "decode")
            value, error = r["tokens_per_second"], r["stddev"]
        panels.setdefault(unit, []).append((label_of(r), value, error, r["share_of_peak"]))
    heights = [len(bars) for bars in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 1.2 * len(panels) + 0.3 * sum(heights)),
        gridspec_kw={"height_ratios": heights}, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (unit, bars) in zip(axes[:, 0], panels.items(), strict=True):
        labels, values, errors, shares = zip(*bars, strict=True)
        places = range(len(bars))
        axis.barh(places, values, xerr=errors if any(errors) else None)
        axis.set_yticks(places, labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        for place, value, share in zip(places, values, shares, strict=True):
            if share is not None:
                axis.text(value, place, f" {100 * share:.0f} %", va="center", fontsize=7)
    figure.suptitle(rows[0]["cpu"], fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise UsageError(f"-r: expected 1 or more, found {args.repeats}")
    if args.plot and not args.plot.endswith((".png", ".svg", ".pdf")):
        raise UsageError(f"--plot: expected a name in .png, .svg or .pdf, found {args.plot!r}")
    pyplot = plots.pyplot("--plot") if args.plot else None
    if args.kernels:
        if args.models:
            raise UsageError(f"--kernels: expected no model, found {args.models[0]!r}")
        rows = write(kernel_rows(args), kernel_bench.KEYS, kernel_bench.markdown, args)
    else:
        if args.shapes:
            raise UsageError("--shapes: expected --kernels beside it")
        configs, jobs = plan(args)
        check_memory(configs, jobs)
        rows = write(measure(configs, jobs, args.repeats, args.quiet), KEYS, model_table, args)
    if pyplot:
        plot(pyplot, rows, args.plot)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command amber-bench. Returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--serve"]:  # a child of this command, see Child
        return serve()
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Checks and measures Amber on this machine's NVIDIA GPU, in less than nine minutes.

    python3 tools/gpu_check.py                        builds in build/gpu_check first
    python3 tools/gpu_check.py --bin DIR              takes the programs that a build left in DIR
    python3 tools/gpu_check.py --steps gemm,torch     these steps alone
    python3 tools/gpu_check.py --emulated --bin DIR   tiny shapes on the emulated GPU

Needs Python 3.10 and nothing beside it from a checkout that is built; to build, nvcc, cmake and a
compiler for C and C++. torch, compute-sanitizer and ncu are used where they are. Every result is a
line of JSON in the file that --out names, written at once, so that a run that is cut short keeps
what it has. A step that fails or lacks a tool is recorded with the reason; the next one goes on.

Steps: device, build, probe (register layouts, issue rates, bandwidth), kernels (correctness under
poisoned outputs and ragged rows), sanitizer, gemm, input, attention, torch (the same shapes in
bfloat16, int8, fp8 and cuSPARSELt's 2:4), text (the same words as on the CPU), model (random
weights in the shape of Llama-3.2-1B, and of 8B where time and memory allow), ncu.

Exit codes: 0 done, 1 something is wrong on the GPU, 2 wrong use, 3 there is no GPU.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "python" / "amber" / "models" / "demo.gguf"
PATTERNS = ("off", "2:4@all", "2:4+r16@all", "8:16x@all", "8:16")
# (rows, outputs, inputs) that torch is asked about, the most telling first.
SHAPES = [
    (rows, n_out, n_in)
    for rows in (2048, 512, 8192)
    for n_out, n_in in (
        (14336, 4096), (4096, 14336), (4096, 4096), (18944, 3584), (3584, 18944), (8192, 2048),
        (2048, 8192), (2048, 2048),
    )
]  # fmt: skip


class Missing(Exception):
    """A step cannot run here; the text says what it lacks."""


class Wrong(Exception):
    """A step found something wrong."""


# ---- the GPU ----


def find_gpu(driver: str) -> str:
    """Compute capability of the first GPU, "9.0". Missing tells why there is none."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError as error:
        raise Missing(f"no NVIDIA driver ({error})") from None
    if code := cuda.cuInit(0):
        known = {100: "no GPU", 803: "driver and library do not match"}
        raise Missing(f"cuInit: error {code}{f' ({known[code]})' if code in known else ''}")
    count, values = ctypes.c_int(), []
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        raise Missing("the driver sees no GPU")
    for attribute in (75, 76):  # compute capability, major and minor
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        values.append(value.value)
    if values[0] < 8:
        raise Missing(f"compute capability {values[0]}.{values[1]}, 8.0 is needed")
    return f"{values[0]}.{values[1]}"


def arch_of(capability: str) -> str:
    """What nvcc calls it: the architectures with an `a` have instructions of their own."""
    number = capability.replace(".", "")
    return number + ("a" if number in ("90", "100", "103", "110") else "")


# ---- the run ----


class Run:
    """Where results go, how much time is left, and how programs are started."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.monotonic() + args.limit
        self.step = ""
        self.results: list[dict[str, Any]] = []
        Path(args.out).write_text("")
        self.bin = Path(args.bin) if args.bin else ROOT / "build" / "gpu_check"
        name = "libamber_cuda_emulated.so" if args.emulated else "libamber_cuda.so"
        self.addon = self.bin / name
        self.env = {**os.environ, "AMBER_CUDA_LIBRARY": str(self.addon)}
        self.quick = ["--quick"] if args.emulated else []

    def record(self, **fields: Any) -> None:
        line = {"step": self.step, **fields}
        self.results.append(line)
        with open(self.args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def left(self) -> float:
        return self.end - time.monotonic()

    def program(self, name: str) -> str:
        path = self.bin / name
        if not path.exists():
            raise Missing(f"{path} was not built")
        return str(path)

    def tool(self, name: str) -> str:
        found = shutil.which(name)
        for folder in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
            path = Path(folder or "") / "bin" / name
            found = found or (str(path) if folder and path.exists() else None)
        if not found:
            raise Missing(f"{name} was not found")
        return found

    def call(
        self,
        command: list[str],
        limit: float,
        on_line: Callable[[str], None],
        stdin: str | None = None,
    ) -> tuple[int, str]:
        """Runs a program for `limit` seconds at most, each line of its output to on_line as it
        comes. Returns its exit code and the end of its stderr."""
        limit = min(limit, self.left())
        if limit <= 1:
            raise Missing("no time left")
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env=self.env,
                cwd=ROOT,
            )
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(limit, stop)
            timer.start()
            try:
                if stdin is not None:
                    process.stdin.write(stdin)
                    process.stdin.close()
                for line in process.stdout:
                    on_line(line)
                code = process.wait()
            except BrokenPipeError:
                code = process.wait()
            finally:
                timer.cancel()
                process.stdout.close()
            errors.seek(0)
            tail = errors.read()[-2000:]
        if late.is_set():
            raise Missing(f"stopped after {limit:.0f} s: {Path(command[0]).name}")
        return code, tail

    def lines(self, command: list[str], limit: float) -> None:
        """Records every line of JSON that a program prints."""

        def on_line(line: str) -> None:
            try:
                self.record(**json.loads(line))
            except ValueError:
                self.record(text=line.rstrip())

        code, errors = self.call(command, limit, on_line)
        if code:
            last = self.results[-1] if self.results else {}
            reason = last.get("error") or last.get("reason") or errors.strip() or "no words"
            raise Wrong(f"{Path(command[0]).name} ended with code {code}: {reason}")

    def text(self, command: list[str], limit: float, stdin: str | None = None) -> str:
        """All that a program prints."""
        out: list[str] = []
        code, errors = self.call(command, limit, out.append, stdin)
        if code:
            raise Wrong(f"{Path(command[0]).name} ended with code {code}: {errors.strip()}")
        return "".join(out)


# ---- steps ----


def step_device(run: Run) -> None:
    run.record(
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        machine=platform.platform(),
        python=platform.python_version(),
        processors=os.cpu_count(),
    )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    run.record(commit=commit.stdout.strip() or None)
    keys = (
        "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,"
        "power.draw,temperature.gpu"
    )
    query = [run.tool("nvidia-smi"), f"--query-gpu={keys}", "--format=csv,noheader"]
    for line in run.text(query, 10).splitlines():
        values = [value.strip() for value in line.split(",")]
        run.record(**dict(zip(keys.split(","), values, strict=False)))


def step_build(run: Run) -> None:
    if run.args.bin:
        raise Missing(f"taken as it is from {run.args.bin}")
    cmake = run.tool("cmake")
    options = ["-DAMBER_CUDA=ON", f"-DAMBER_CUDA_ARCHS={arch_of(run.args.capability)}"]
    start = time.monotonic()
    run.text([cmake, "-S", str(ROOT), "-B", str(run.bin), *options], 60)
    # The library alone first: nothing can be done without it.
    run.text([cmake, "--build", str(run.bin), "--target", "amber_cuda"], 240)
    run.record(library_seconds=round(time.monotonic() - start, 1))
    run.text([cmake, "--build", str(run.bin), "--parallel"], 240)
    run.record(seconds=round(time.monotonic() - start, 1), library_bytes=run.addon.stat().st_size)


def step_probe(run: Run) -> None:
    name = "tool_gpu_probe_emulated" if run.args.emulated else "tool_gpu_probe"
    run.lines([run.program(name), *run.quick], 40)


def step_kernels(run: Run) -> None:
    first = ["first"] if run.args.emulated else []
    start = time.monotonic()
    said = run.text([run.program("test_cuda_kernels"), str(run.addon), *first], 90)
    run.record(result=said.strip(), seconds=round(time.monotonic() - start, 1))


def step_sanitizer(run: Run) -> None:
    sanitizer = run.tool("compute-sanitizer")
    kernels = [run.program("test_cuda_kernels"), str(run.addon), "first"]
    native = [run.program("amber-native"), str(DEMO), "-p", "Once upon a time there was", "-n", "4",
              "--temp", "0", "--device", "cuda", "--sparse", "2:4+r16@all"]  # fmt: skip
    wrong = []
    for tool, command, limit in (("memcheck", native, 40), ("racecheck", kernels, 40)):
        start = time.monotonic()
        try:
            said = run.text([sanitizer, "--tool", tool, "--error-exitcode", "9", *command], limit)
            summary = [line for line in said.splitlines() if "SUMMARY" in line]
            run.record(tool=tool, result=summary or "clean",
                       seconds=round(time.monotonic() - start, 1))  # fmt: skip
        except Missing as error:
            run.record(tool=tool, lacks=str(error))
        except Wrong as error:
            wrong.append(tool)
            run.record(tool=tool, wrong=str(error))
    if wrong:
        raise Wrong(f"compute-sanitizer: {', '.join(wrong)}")


def step_bench(what: str, limit: float) -> Callable[[Run], None]:
    def step(run: Run) -> None:
        run.lines([run.program("tool_cuda_bench"), *run.quick, what], limit)

    return step


def step_torch(run: Run) -> None:
    command = [run.args.torch_python, str(Path(__file__).resolve()), "--torch-child"]
    run.lines([*command, *(["--emulated"] if run.args.emulated else [])], 110)


def step_text(run: Run) -> None:
    """Greedy text of real models, on the GPU and on the CPU."""
    native = run.program("amber-native")
    folder = Path(os.environ.get("AMBER_TESTDATA", ROOT.parent / "shared" / "testdata")) / "models"
    models = [DEMO, *sorted(folder.glob("*.gguf"))]
    tokens, prompt = "100", "Once upon a time there was a little girl who"
    if run.args.emulated:
        models, tokens = models[1:2] or models[:1], "6"
    different = []
    for model in models:
        for sparse in PATTERNS[:1] if run.args.emulated else ("off", "2:4+r16@all"):
            options = ["-p", prompt, "-n", tokens, "--temp", "0", "--sparse", sparse]
            cpu = run.text([native, str(model), *options, "--device", "cpu"], 60)
            gpu = run.text([native, str(model), *options, "--device", "cuda"], 60)
            same = len(os.path.commonprefix([cpu, gpu]))
            run.record(model=model.name, sparse=sparse, equal=cpu == gpu, characters=len(cpu),
                       same_characters=same)  # fmt: skip
            if cpu != gpu:
                different.append(f"{model.name} {sparse}")
    if different:
        run.record(note="float sums in another order may tip an INT8 rounding; look at how early "
                        "the texts part", different=different)  # fmt: skip


def step_model(run: Run) -> None:
    tool = run.program("tool_cuda_bench")
    with tempfile.TemporaryDirectory(dir=run.args.scratch) as folder:
        for name, shape in MODELS.items() if not run.args.emulated else [("tiny", TINY)]:
            need = model_bytes(shape)
            if shutil.disk_usage(folder).free < 1.2 * need:
                run.record(model=name, lacks=f"{need / 1e9:.1f} GB on disk (see --scratch)")
                continue
            if need > 2e9 and run.left() < 150:
                run.record(model=name, lacks=f"time: {run.left():.0f} s are left")
                continue
            path = Path(folder) / f"{name}.gguf"
            start = time.monotonic()
            write_model(path, shape)
            run.record(model=name, file_bytes=path.stat().st_size,
                       write_seconds=round(time.monotonic() - start, 1))  # fmt: skip
            for sparse in PATTERNS:
                start = time.monotonic()
                run.lines([tool, *run.quick, "model", str(path), "cuda", sparse], 60)
                run.record(model=name, sparse=sparse, seconds=round(time.monotonic() - start, 1))
            path.unlink()


def step_ncu(run: Run) -> None:
    ncu = run.tool("ncu")
    bench = run.program("tool_cuda_bench")
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
    options = ["--clock-control", "none", "--launch-count", "1"]
    options += [word for section in sections for word in ("--section", section)]
    for name, kernel, command in (
        ("sparse", "gemm_kernel", ["gemm", "2:4", "2048", "14336", "4096"]),
        ("dense", "gemm_kernel", ["gemm", "dense", "2048", "14336", "4096"]),
        ("input", "input_kernel", ["input"]),
        ("attention", "flash_kernel", ["attention"]),
        ("gemv", "gemv_kernel", ["gemm", "dense", "1", "14336", "4096"]),
    ):
        path = Path(run.args.out).with_suffix(f".ncu-{name}.txt")
        said = run.text([ncu, *options, "--kernel-name", f"regex:{kernel}", bench, *command], 25)
        path.write_text(said)
        wanted = ("Duration", "Throughput", "Registers Per", "Achieved Occupancy", "No Eligible")
        picked = [
            " ".join(line.split()) for line in said.splitlines() if any(w in line for w in wanted)
        ]
        run.record(kernel=name, report=str(path), figures=picked)


STEPS: dict[str, Callable[[Run], None]] = {
    "device": step_device,
    "build": step_build,
    "probe": step_probe,
    "kernels": step_kernels,
    "sanitizer": step_sanitizer,
    "gemm": step_bench("gemm", 150),
    "input": step_bench("input", 30),
    "attention": step_bench("attention", 30),
    "torch": step_torch,
    "text": step_text,
    "model": step_model,
    "ncu": step_ncu,
}


# ---- a model file with random weights ----

TINY = {"layers": 2, "embd": 256, "heads": 4, "heads_kv": 2, "head_dim": 64, "ff": 512,
        "vocab": 512, "context": 256}  # fmt: skip
MODELS = {
    "llama-3.2-1b": {"layers": 16, "embd": 2048, "heads": 32, "heads_kv": 8, "head_dim": 64,
                     "ff": 8192, "vocab": 128256, "context": 16384},
    "llama-3.1-8b": {"layers": 32, "embd": 4096, "heads": 32, "heads_kv": 8, "head_dim": 128,
                     "ff": 14336, "vocab": 128256, "context": 16384},
}  # fmt: skip
BLOCK = 34  # bytes of 32 values in Q8_0: a float16 scale and the bytes
POOL = 65521  # blocks of random values; prime, so that rows differ


def matrices(s: dict[str, int]) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs)"""
    q, kv = s["heads"] * s["head_dim"], s["heads_kv"] * s["head_dim"]
    names = [("token_embd", s["vocab"], s["embd"]), ("output", s["vocab"], s["embd"])]
    for layer in range(s["layers"]):
        names += [
            (f"blk.{layer}.attn_q", q, s["embd"]),
            (f"blk.{layer}.attn_k", kv, s["embd"]),
            (f"blk.{layer}.attn_v", kv, s["embd"]),
            (f"blk.{layer}.attn_output", s["embd"], q),
            (f"blk.{layer}.ffn_gate", s["ff"], s["embd"]),
            (f"blk.{layer}.ffn_up", s["ff"], s["embd"]),
            (f"blk.{layer}.ffn_down", s["embd"], s["ff"]),
        ]
    return [(f"{name}.weight", n_out, n_in) for name, n_out, n_in in names]


def model_bytes(s: dict[str, int]) -> int:
    return sum(n_out * n_in // 32 * BLOCK for _, n_out, n_in in matrices(s))


def write_model(path: Path, s: dict[str, int]) -> None:
    """A llama GGUF in Q8_0 with a vocabulary of bytes; the same shape gives the same file."""
    norms = ["output_norm.weight"]
    for layer in range(s["layers"]):
        norms += [f"blk.{layer}.attn_norm.weight", f"blk.{layer}.ffn_norm.weight"]

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def array(kind: int, items: list[bytes]) -> bytes:
        return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)

    def integer(value: int) -> bytes:
        return struct.pack("<II", 4, value)

    def real(value: float) -> bytes:
        return struct.pack("<If", 6, value)

    def words(text: str) -> bytes:
        return struct.pack("<I", 8) + string(text)

    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    tokens += [f"word{i}" for i in range(s["vocab"] - len(tokens))]
    kinds += [1] * (s["vocab"] - len(kinds))
    keys = {
        "general.architecture": words("llama"),
        "general.name": words("random weights"),
        "llama.block_count": integer(s["layers"]),
        "llama.context_length": integer(s["context"]),
        "llama.embedding_length": integer(s["embd"]),
        "llama.feed_forward_length": integer(s["ff"]),
        "llama.attention.head_count": integer(s["heads"]),
        "llama.attention.head_count_kv": integer(s["heads_kv"]),
        "llama.attention.key_length": integer(s["head_dim"]),
        "llama.attention.value_length": integer(s["head_dim"]),
        "llama.rope.dimension_count": integer(s["head_dim"]),
        "llama.rope.freq_base": real(5e5),
        "llama.attention.layer_norm_rms_epsilon": real(1e-5),
        "llama.vocab_size": integer(s["vocab"]),
        "tokenizer.ggml.model": words("llama"),
        "tokenizer.ggml.tokens": array(8, [string(token) for token in tokens]),
        "tokenizer.ggml.scores": array(6, [struct.pack("<f", -i) for i in range(s["vocab"])]),
        "tokenizer.ggml.token_type": array(5, [struct.pack("<i", kind) for kind in kinds]),
        "tokenizer.ggml.bos_token_id": integer(1),
        "tokenizer.ggml.eos_token_id": integer(2),
        "tokenizer.ggml.unknown_token_id": integer(0),
    }
    places = matrices(s)
    with open(path, "wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(places) + len(norms), len(keys)))
        for key, value in keys.items():
            file.write(string(key) + value)
        at = 0
        for name, n_out, n_in in places:
            file.write(string(name) + struct.pack("<IQQIQ", 2, n_in, n_out, 8, at))
            at += -(-(n_out * n_in // 32 * BLOCK) // 32) * 32
        for name in norms:
            file.write(string(name) + struct.pack("<IQIQ", 1, s["embd"], 0, at))
            at += 4 * s["embd"]
        pad(file)
        for _, n_out, n_in in places:
            write_blocks(file, n_out * n_in // 32, n_in)
            pad(file)
        for _ in norms:
            file.write(struct.pack("<f", 1.0) * s["embd"])


def pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % 32))


def write_blocks(file: BinaryIO, count: int, n_in: int) -> None:
    """Uniform values of variance 1 / n_in, from random places of one pool."""
    dice = random.Random(n_in)
    pool = bytearray(dice.randbytes(POOL * BLOCK))
    low, high = struct.pack("<e", 1 / (math.sqrt(n_in) * 73.9))
    pool[0::BLOCK], pool[1::BLOCK] = bytes([low]) * POOL, bytes([high]) * POOL
    view = memoryview(pool)
    while count:
        start = dice.randrange(POOL // 2)
        length = min(count, POOL - start)
        file.write(view[start * BLOCK : (start + length) * BLOCK])
        count -= length


# ---- torch, in a process of its own ----


def torch_products(
    torch: Any, shape: tuple[int, int, int], device: str
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Ways to multiply: each makes its operands and returns what is to be timed."""
    rows, n_out, n_in = shape
    x8 = torch.randint(-127, 128, (rows, n_in), dtype=torch.int8, device=device)
    w8 = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8, device=device)
    wanted = {"out_dtype": torch.bfloat16}

    def pruned() -> Any:
        groups = x8.view(rows, -1, 4).clone()
        groups[:, :, 2:] = 0
        return groups.view(rows, n_in)

    def bf16() -> Callable[[], Any]:
        x = torch.randn(rows, n_in, dtype=torch.bfloat16, device=device)
        w = torch.randn(n_out, n_in, dtype=torch.bfloat16, device=device)
        return lambda: x @ w.t()

    def int8() -> Callable[[], Any]:
        return lambda: torch._int_mm(x8, w8.t())

    def fp8() -> Callable[[], Any]:
        one = torch.ones((), device=device)
        x, w = (v.float().to(torch.float8_e4m3fn) for v in (x8, w8))
        return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, **wanted)

    def sparse() -> Callable[[], Any]:
        packed = torch._cslt_compress(pruned())
        search = getattr(torch, "_cslt_sparse_mm_search", None)
        best = search(packed, w8.t(), **wanted) if search else 0
        return lambda: torch._cslt_sparse_mm(packed, w8.t(), alg_id=best, **wanted)

    def compress() -> Callable[[], Any]:
        x = pruned()
        return lambda: torch._cslt_compress(x)

    return {
        "torch bf16": bf16,
        "torch int8": int8,
        "torch fp8": fp8,
        "cusparselt int8 2:4": sparse,
        "cusparselt compress": compress,
    }


def torch_attention(torch: Any, rows: int, heads: int, device: str) -> Callable[[], Any]:
    q, k, v = (
        torch.randn(1, heads, rows, 128, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(q, k, v, is_causal=True)


def torch_child(emulated: bool) -> int:
    """Prints a line of JSON for every shape and way to multiply, on the GPU, or tiny on the CPU."""

    def tell(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    try:
        import torch
    except ImportError as error:
        tell(error=f"torch cannot be imported ({error})")
        return 1
    device = "cpu" if emulated else "cuda"
    tell(torch=torch.__version__, cuda=torch.version.cuda, device=device)
    if not emulated and not torch.cuda.is_available():
        tell(error="torch sees no GPU")
        return 1

    def wait() -> None:
        if not emulated:
            torch.cuda.synchronize()

    def measure(make: Callable[[], Callable[[], Any]], count: int, **fields: Any) -> None:
        """Seconds of one call, the median of some runs of `count` calls."""
        try:
            work, times = make(), []
            work()
            wait()
            for _ in range(2 if emulated else 7):
                start = time.perf_counter()
                for _ in range(count):
                    work()
                wait()
                times.append((time.perf_counter() - start) / count)
            tell(**fields, us=sorted(times)[len(times) // 2] * 1e6)
        except Exception as error:  # whatever this torch lacks
            tell(**fields, lacks=f"{type(error).__name__}: {str(error)[:300]}")

    for shape in [(32, 64, 128)] if emulated else SHAPES:
        count = 2 if emulated else 20 if 2.0 * math.prod(shape) < 3e11 else 5
        names = dict(zip(("rows", "outputs", "inputs"), shape, strict=True))
        for what, make in torch_products(torch, shape, device).items():
            measure(make, count, what=what, **names)
    heads = 4 if emulated else 32
    for rows in (16,) if emulated else (2048, 512, 8192):
        measure(
            lambda rows=rows: torch_attention(torch, rows, heads, device),
            3,
            what="torch attention bf16",
            rows=rows,
            heads=heads,
            head_dim=128,
        )
    x = torch.randn(16 if emulated else 1 << 28, device=device)
    measure(lambda: x.clone, 3, what="torch copy", bytes=8 * x.numel())
    return 0


# ---- the table at the end ----


def summary(results: list[dict[str, Any]]) -> list[str]:
    """What matters, in some forty lines."""
    lines = []
    for r in results:
        if r.get("probe") == "rate":
            lines.append(f"{r['what']:40s} {r['tops']:10.1f} TOPS")
        if r.get("probe") == "read":
            lines.append(f"{'read':40s} {r['gb_per_second']:10.0f} GB/s")
        if r.get("probe") == "launch":
            lines.append(
                f"{'launch, in a graph':40s} {r['us_single']:6.2f} {r['us_in_graph']:.2f} us"
            )
    others: dict[tuple[int, int, int], dict[str, float]] = {}
    for r in results:
        if "us" in r and "outputs" in r and "rows" in r:
            key = (r["rows"], r["outputs"], r["inputs"])
            others.setdefault(key, {})[r.get("form") or r["what"]] = r["us"]
    columns = ["dense", "2:4", "2:4+r32", "2:4+r16", "8:16x", "torch int8", "torch fp8",
               "torch bf16", "cusparselt int8 2:4"]  # fmt: skip
    if others:
        lines.append("us of a product: " + ", ".join(columns))
    for key in [*SHAPES[:8], *(k for k in others if k not in SHAPES)][:14]:
        if key in others:
            cells = [f"{others[key][c]:9.1f}" if c in others[key] else "        -" for c in columns]
            lines.append(f"{key[0]:5d} x {key[1]:5d} x {key[2]:5d} " + "".join(cells))
    read = next((r["gb_per_second"] for r in results if r.get("probe") == "read"), None)
    for r in results:
        if r.get("bench") == "model" and "tokens_per_second" in r:
            share = ""
            if r["what"] == "decode" and read:
                share = f", {100 * r['weight_gb_per_second'] / read:.0f} % of the read bandwidth"
            lines.append(
                f"{r['what']} of {r['tokens']} tokens, {r['sparse']:24s}"
                f" {r['tokens_per_second']:10.1f} tok/s{share}"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bin", help="folder with the programs; without it they are built")
    parser.add_argument("--out", default="gpu_check.jsonl", help="results (gpu_check.jsonl)")
    parser.add_argument("--steps", help=f"some of {','.join(STEPS)}")
    parser.add_argument("--limit", type=float, default=520, help="seconds for all of it (520)")
    parser.add_argument("--scratch", help="folder for model files (the system's)")
    parser.add_argument("--torch-python", default=sys.executable, help="Python that has torch")
    parser.add_argument("--driver", default="libcuda.so.1", help=argparse.SUPPRESS)
    parser.add_argument("--emulated", action="store_true", help="tiny shapes, on the emulated GPU")
    parser.add_argument("--torch-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_child:
        return torch_child(args.emulated)
    steps = args.steps.split(",") if args.steps else list(STEPS)
    if unknown := [name for name in steps if name not in STEPS]:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, found {', '.join(unknown)}")
    if args.emulated and not args.bin:
        parser.error("--emulated: expected --bin, the folder of a build")
    args.out = str(Path(args.out).resolve())
    if args.bin:
        args.bin = str(Path(args.bin).resolve())
    run = Run(args)
    run.step = "gpu"
    try:
        args.capability = "emulated" if args.emulated else find_gpu(args.driver)
        run.record(ok=True, capability=args.capability)
    except Missing as error:
        run.record(ok=False, reason=f"no GPU: {error}")
        print(f"no GPU: {error}", file=sys.stderr)
        return 3
    failed = False
    for name in steps:
        run.step = name
        start = time.monotonic()
        outcome: dict[str, Any] = {"ok": True}
        try:
            STEPS[name](run)
        except Missing as error:
            outcome = {"ok": None, "lacks": str(error)}
        except Wrong as error:
            outcome = {"ok": False, "wrong": str(error)}
            failed = True
        except Exception as error:  # a step must not take the others with it
            outcome = {"ok": False, "wrong": f"{type(error).__name__}: {error}"}
            failed = True
        outcome["step_seconds"] = round(time.monotonic() - start, 1)
        run.record(**outcome)
        words = outcome.get("lacks") or outcome.get("wrong") or "done"
        print(f"{name:10} {outcome['step_seconds']:6.1f} s  {words}", file=sys.stderr, flush=True)
    print("\n".join(summary(run.results)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

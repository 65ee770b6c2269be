"""The engine on a GPU that is emulated on the CPU, thread by thread, against the CPU's own kernels:
logits of whole prompts, decoding through a recorded graph, memory, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parent / "golden"
PATTERNS = [
    "2:4@all",
    "2:4+r32/amber@all",
    "2:4+r16@all",
    "8:16x/norm@all",
    "8:16@q,gate,down",
    "8:16x4t2/var@all",
    "2:4/dpts/var@all",
]

# Runs in a process of its own: the library is chosen once per process.
PROGRAM = """
import json, sys
import numpy as np
from amber import Engine
from amber.session import Session

def run(path, device, sparse, n, seed):
    options = dict(sparse=sparse, n_ctx=192, n_batch=64, sparse_first_n=int(n == 70))
    with Engine(path, device=device, **options) as e:
        rng = np.random.default_rng(seed)
        tokens = [int(t) for t in rng.integers(0, e.info.n_vocab, n + 5)]
        with Session(e) as s:
            rows = [np.asarray(s.score(tokens[:n]))]
            s.sync(tokens[:n])
            for token in tokens[n:]:  # the same tokens on both, whatever they would pick
                rows.append(np.array(s.logits)[None])
                s.append(token)
            s.rewind(n)  # a recorded step goes on from another position
            s.append(tokens[n])
            rows.append(np.array(s.logits)[None])
        return np.concatenate(rows), e.info.device

out = []
for path, sparse, n, seed in json.load(sys.stdin):
    cpu, _ = run(path, "cpu", sparse, n, seed)
    gpu, name = run(path, "cuda", sparse, n, seed)
    off = np.abs(cpu - gpu).mean(1) / cpu.std()
    out.append([float((off < 1e-5).mean()), float(off.mean()), name])
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def emulated(test_bin: Path) -> dict[str, str]:
    """An environment in which a process finds the emulated GPU."""
    library = test_bin / "libamber_cuda_emulated.so"
    if not library.exists():
        pytest.skip("no C++ compiler built the emulated device")
    return {**os.environ, "AMBER_CUDA_LIBRARY": str(library)}


def python(code: str, env: dict[str, str], data: object = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(data),
        capture_output=True,
        text=True,
        env=env,
    )


def compare(
    env: dict[str, str], cases: list[tuple[str, str, int]], agree: float = 0.6, far: float = 0.03
) -> None:
    """Logits on both. Float sums differ in their last bits; now and then one tips the rounding of
    an INT8 value, which moves the logits of its row and of all rows that look at it. So no text may
    be far off, and of three texts one must agree in most rows: an error would be in all of them."""
    left = cases
    for seed in (1, 2, 3):
        inputs = [
            (path if path == "demo" else str(GOLDEN / f"{path}.gguf"), *case, seed)
            for path, *case in left
        ]
        done = python(PROGRAM, env, inputs)
        assert done.returncode == 0, done.stderr[-4000:]
        results = json.loads(done.stdout.splitlines()[-1])
        for case, (_, mean, name) in zip(left, results, strict=True):
            assert name == "cuda:0 emulated"
            assert mean < far, f"{case}: {mean}"
        left = [case for case, (same, *_) in zip(left, results, strict=True) if same < agree]
        if not left:
            return
    raise AssertionError(f"too few rows agree: {left}")


def test_architectures(emulated: dict[str, str]) -> None:
    names = sorted({path.stem for path in GOLDEN.glob("*.gguf")} - {"olmo"})  # refused, see below
    assert len(names) >= 15
    compare(emulated, [(name, "off", 70) for name in names])


@pytest.mark.parametrize("sparse", PATTERNS)
def test_patterns(emulated: dict[str, str], sparse: str) -> None:
    # 66 rows in batches of 64 and 2, or 70 in two of about 35 with a protected token.
    cases = [("llama", sparse, 66), ("llama", sparse, 70)]
    compare(emulated, [*cases, ("mixtral", sparse, 66), ("qwen2moe", sparse, 70)])


def test_demo(emulated: dict[str, str]) -> None:
    # Eight layers of pruned inputs: nearly every row meets a rounding that tips.
    compare(emulated, [("demo", "2:4+r16@all", 40)], agree=0, far=0.1)
    compare(emulated, [("demo", "off", 12)], far=0.1)


def test_refusals(emulated: dict[str, str], tmp_path: Path) -> None:
    code = """
import amber, json, sys
from amber import Engine
from amber.session import Session
try:
    with Engine(sys.argv[1] if len(sys.argv) > 1 else json.load(sys.stdin), **OPTIONS) as e:
        print(e.info.device, e.info.device_bytes, e.info.weight_bytes)
        EXTRA
except amber.AmberError as error:
    print(type(error).__name__, error)
"""

    def said(path: str, options: str, extra: str = "pass", **env: str) -> str:
        text = code.replace("OPTIONS", options).replace("EXTRA", extra)
        done = python(text, {**emulated, **env}, path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    llama = str(GOLDEN / "llama.gguf")
    cuda, auto = "{'device': 'cuda'}", "{'device': 'auto'}"
    assert said(llama, auto).startswith("cuda:0 emulated ")
    on_gpu, left = map(int, said(llama, cuda).split()[2:])
    alone = int(said(llama, "{}").split()[2])
    assert left < alone < on_gpu + left  # the matrices are not held twice
    assert said(llama, "{}", AMBER_DEVICE="cuda:0").startswith("cuda:0 emulated ")
    assert said(llama, "{}").startswith("cpu 0")
    assert "expected cuda:0..cuda:0" in said(llama, "{'device': 'cuda:1'}")
    olmo = str(GOLDEN / "olmo.gguf")
    assert "models that clamp q, k and v run on the CPU only" in said(olmo, "{'device': 'cuda'}")
    assert "precision float run on the CPU" in said(
        llama, "{'device': 'cuda', 'precision': 'float'}"
    )
    ls = "{'device': 'cuda', 'sparse': '8:16/clact@all', 'evaluation': True}"
    assert "clact run on the CPU only" in said(llama, ls)
    assert said(llama, ls.replace("'cuda'", "'auto'")).startswith("cpu 0")
    assert "MB are free (use a smaller model" in said(llama, cuda, AMBER_EMULATED_BYTES="1000")
    assert said(llama, auto, AMBER_EMULATED_BYTES="1000").startswith("cpu 0")
    little = said(llama, "{'device': 'cuda', 'n_ctx': 256}", AMBER_EMULATED_BYTES="200000")
    assert "a context of 256 tokens needs" in little and "use a smaller context" in little
    tap = "Session(e, tap=lambda *a: None)"
    assert "on the CPU only (use device cpu)" in said(llama, cuda, tap)
    int8 = "Session(e, kv_type='int8')"
    assert "kv_type: expected f16 on a GPU, found int8" in said(llama, cuda, int8)
    each = "amber.append_each([Session(e), Session(e)], [5, 6])"
    assert "several at once run on the CPU only" in said(llama, cuda, each)
    many = "e.generate([[5], [6]], max_tokens=2); e.generate_batch([[5], [6]], max_tokens=2)"
    assert "several prompts at once run on the CPU only" in said(llama, cuda, many)
    assert "no-such.so" in said(llama, cuda, AMBER_CUDA_LIBRARY=str(tmp_path / "no-such.so"))


def test_session_files(emulated: dict[str, str], tmp_path: Path) -> None:
    """A session that a GPU saved goes on there bit for bit, and on the CPU within its rounding; one
    that the CPU saved goes on on the GPU. Single layers are the CPU's."""
    code = f"""
import json
import numpy as np
from amber import Engine
path, file = {str(GOLDEN / "llama.gguf")!r}, {str(tmp_path / "session")!r}
tokens = [int(t) for t in np.random.default_rng(3).integers(3, 280, 60)]
said = []
for first in ("cuda", "cpu"):
    with Engine(path, device=first, sparse="2:4@all", n_ctx=96) as e, e.session() as s:
        s.sync(tokens[:50])
        s.save(file)
        s.sync(tokens)
        expected = np.array(s.logits)
        if first == "cuda":
            try:
                s.project(0, "q", np.zeros((1, e.info.n_embd)), e.info.matrices[0][0][0])
            except Exception as error:
                said.append(str(error))
    for second in ("cuda", "cpu"):
        with Engine(path, device=second, sparse="2:4@all", n_ctx=80) as e, e.session() as s:
            said += [s.load(file), s.sync(tokens)]
            far = np.linalg.norm(s.logits - expected) / np.linalg.norm(expected)
            said.append(float(far))
print(json.dumps(said))
"""
    done = python(code, emulated)
    assert done.returncode == 0, done.stderr
    refusal, *rest = json.loads(done.stdout.splitlines()[-1])
    assert "CPU only" in refusal
    assert rest[0::3] == rest[1::3] == [50] * 4
    assert rest[2] == rest[11] == 0 and rest[5] < 0.2 and rest[8] < 0.2


def test_cancelled_in_the_last_row(emulated: dict[str, str]) -> None:
    """A prompt's last batch may be a single row, which is never a recorded step: it can be
    cancelled half-way, and what is then said is what a fresh session says."""
    code = f"""
import numpy as np
from amber import Cancelled, Engine
with Engine({str(GOLDEN / "llama.gguf")!r}, device="cuda", n_ctx=64, n_batch=2) as e:
    prompts, expected, armed = ([5, 6, 7, 8], [9, 6, 7, 8]), [], []
    with e.session() as s:
        for tokens in prompts:
            s.sync(tokens)
            expected.append(np.array(s.logits))
    with e.session(progress=lambda phase, done, total: bool(armed and done > 2)) as s:
        s.sync([5, 6, 7])
        armed.append(True)
        for _ in range(2):
            try:
                s.sync([9, 6, 7])
            except Cancelled as error:
                print(error)
            s.rewind(0)
        armed.clear()
        for tokens, logits in 3 * list(zip(prompts, expected)):
            s.sync(tokens)
            assert np.array_equal(s.logits, logits)
"""
    done = python(code, emulated)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 2 * "prefill: cancelled after 2 of 3 tokens\n"


def test_list(emulated: dict[str, str], tmp_path: Path) -> None:
    code = "import amber; print('\\n'.join(amber.device_list()))"
    lines = python(code, emulated).stdout.splitlines()
    assert lines[0].startswith("cpu  ") and lines[1].startswith("cuda:0  emulated, ")
    none = {**emulated, "AMBER_CUDA_LIBRARY": str(tmp_path / "no-such.so")}
    lines = python(code, none).stdout.splitlines()
    assert len(lines) == 2 and lines[1].startswith("cuda  none: ") and "no-such.so" in lines[1]

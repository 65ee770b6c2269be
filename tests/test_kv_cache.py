"""Keys and values kept as INT8: what stands in the cache, the same bits however a prompt comes,
rings, batches, files, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import amber

GOLDEN = Path(__file__).parent / "golden"  # made by tools/make_architectures.py
HEAD = 280  # bytes of a session file before its tokens
# Windows, sinks and rings; heads of other sizes for keys; growing queries; caps of scores.
MODELS = ["llama", "gemma3", "gpt-oss", "cohere2", "qwen3moe", "mistral3", "gemma2", "phi2"]


def texts(n: int, n_vocab: int) -> list[int]:
    return np.random.default_rng(n).integers(3, n_vocab, n).tolist()


def first_layer(path: Path, info: amber.EngineInfo, n: int, int8: bool) -> np.ndarray:
    """Keys and values [2, heads, n, head_dim] of layer 0 in a session file of n tokens, and their
    scales [2, heads, n, 1] or ones."""
    data = path.read_bytes()[HEAD + 4 * n + 4 * info.n_vocab :]
    heads, shape = info.n_head_kv, (info.n_head_kv, n, info.head_dim)
    cells, scales, at = [], [], 0
    for _ in range(2):
        kind = np.int8 if int8 else np.float16
        cells.append(np.frombuffer(data, kind, np.prod(shape), at).reshape(shape))
        at += cells[-1].nbytes
        if int8:
            scales.append(np.frombuffer(data, np.float32, heads * n, at).reshape(heads, n, 1))
            at += scales[-1].nbytes
    return np.stack(cells).astype(np.float64), np.stack(scales or [np.ones((heads, n, 1))] * 2)


def test_what_is_kept(demo_model: Path, tmp_path: Path) -> None:
    """Each row is the float16 cache's, to half a step of its own scale, absmax / 127."""
    kept = {}
    for kv_type in ("f16", "int8"):
        with amber.Engine(demo_model, kv_type=kv_type) as engine, engine.session() as session:
            tokens = texts(70, engine.info.n_vocab)
            session.sync(tokens[:60])
            for token in tokens[60:]:
                session.append(token)
            session.save(tmp_path / kv_type)
            kept[kv_type] = first_layer(tmp_path / kv_type, engine.info, 70, kv_type == "int8")
    exact = kept["f16"][0]
    cells, scales = kept["int8"]
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    half = 2.0**-11 * largest  # what float16 itself is off by
    assert np.all(np.abs(cells).max(axis=-1) == 127)
    assert np.all(np.abs(scales * 127 - largest) <= half + 1e-6 * largest)
    assert np.all(np.abs(cells * scales - exact) <= 0.5001 * scales + half)


@pytest.mark.parametrize("model", MODELS)
def test_every_way_to_a_prompt(model: str) -> None:
    """Batches of any size, single steps, rewinding behind a ring, and sessions in one step: the
    same bits, which are near those of a float16 cache."""
    with amber.Engine(GOLDEN / f"{model}.gguf", kv_type="int8", threads=2, n_ctx=400) as engine:
        assert engine.info.kv_type == "int8"
        tokens = texts(300, engine.info.n_vocab)
        with engine.session(n_batch=64) as whole, engine.session(n_batch=4) as other:
            whole.sync(tokens)
            expected = whole.logits
            other.sync(tokens[:290])
            for token in tokens[290:]:
                other.append(token)
            assert np.array_equal(other.logits, expected)
            other.rewind(40)
            other.sync(tokens)
            assert np.array_equal(other.logits, expected)
            with engine.session(kv_type="f16") as half:
                half.sync(tokens)
                assert not np.array_equal(half.logits, expected)
                assert np.corrcoef(half.logits, expected)[0, 1] > 0.99
                half.append(5)
                exact = half.logits
                half.rewind(300)
                whole.append(5)
                other.rewind(300)
                amber.append_each([half, other], [5, 5])  # caches of both types in one step
                assert np.array_equal(half.logits, exact)
                assert np.array_equal(other.logits, whole.logits)


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_files(model: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with amber.Engine(GOLDEN / f"{model}.gguf", threads=1, n_ctx=400) as engine:
        info = engine.info
        tokens = texts(300, info.n_vocab)
        with engine.session(n_batch=8, kv_type="int8") as session:
            session.sync(tokens)
            session.save(path)
            session.append(7)
            appended = session.logits
        for n_batch in (64, 8):
            with engine.session(n_batch=n_batch, kv_type="int8") as session:
                assert session.load(path) == 300
                session.append(7)
                assert np.array_equal(session.logits, appended)
                session.sync([*tokens[:200], 9])
                with engine.session(kv_type="int8") as fresh:
                    fresh.sync([*tokens[:200], 9])
                    assert np.array_equal(session.logits, fresh.logits)
        if not info.window:
            rows = 2 * info.n_layer * info.n_head_kv * 300 * (info.head_dim + 4)
            assert path.stat().st_size == HEAD + 4 * 300 + 4 * info.n_vocab + rows
        with engine.session() as session:
            with pytest.raises(
                ValueError, match="of precision int8 with kv_type f16, found one of"
            ):
                session.load(path)
            session.sync(tokens[:20])
            session.save(path)
        with engine.session(kv_type="int8") as session, pytest.raises(ValueError, match="kv_type"):
            session.load(path)


def test_memory(demo_model: Path) -> None:
    """A byte for each element and four for each head, as estimated."""
    sizes = {}
    for kv_type in ("f16", "int8"):
        estimate = amber.memory_estimate(demo_model, n_ctx=500, kv_type=kv_type)
        with amber.Engine(demo_model, n_ctx=500, kv_type=kv_type) as engine:
            info = engine.info
            assert estimate.kv_bytes == info.kv_bytes
            sizes[kv_type] = info.kv_bytes
    assert sizes["int8"] / sizes["f16"] == (info.head_dim + 4) / (2 * info.head_dim)


def test_refusals(demo_model: Path) -> None:
    with pytest.raises(ValueError, match="expected f16 or int8, found 'q4'"):
        amber.Engine(demo_model, kv_type="q4")
    with pytest.raises(amber.UnsupportedModelError, match="precision float, found int8"):
        amber.Engine(demo_model, kv_type="int8", precision="float")
    with pytest.raises(amber.UnsupportedModelError, match="precision float, found int8"):
        amber.memory_estimate(demo_model, kv_type="int8", precision="float")
    with amber.Engine(demo_model, precision="float") as engine:
        assert engine.info.kv_type == "f32"


# ---- commands ----


def command(module: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_run(demo_model: Path) -> None:
    args = ["demo", "-p", "Once upon a time", "--temp", "0", "-n", "16", "--kv-type", "int8"]
    done = command("amber", *args)
    with amber.Engine(demo_model, kv_type="int8") as engine:
        answer = engine.generate("Once upon a time", max_tokens=16, temperature=0).text
    assert done.returncode == 0 and done.stdout.removesuffix("\n") == answer
    info = command("amber", "demo", "--kv-type", "int8", "--info").stdout
    assert "KV cache" in info and "of int8" in info
    refused = command("amber", *args, "--precision", "float")
    assert refused.returncode == 1 and "leave kv_type out" in refused.stderr


def test_eval(demo_model: Path, tmp_path: Path) -> None:
    story = tmp_path / "story"
    story.write_text("Once upon a time there was a little girl who had a red ball. " * 20)
    done = command(
        "amber.eval", "demo", "--text", story, "--ctx", "64", "--chunks", "2", "--kv-type",
        "f16,int8", "--against", "off", "--json",
    )  # fmt: skip
    half, int8 = (json.loads(line) for line in done.stdout.splitlines())
    assert (half["kv_type"], int8["kv_type"]) == ("f16", "int8")
    assert half["kl_mean"] == pytest.approx(0, abs=1e-12)
    assert 0 < int8["kl_mean"] < 0.01
    refused = command("amber.eval", "demo", "--text", story, "--kv-type", "q8")
    assert refused.returncode == 2 and "expected f16 or int8, found 'q8'" in refused.stderr


def test_bench(demo_model: Path) -> None:
    done = command(
        "amber.bench", "demo", "-p", "16", "-n", "4", "-d", "70", "-r", "1", "-t", "1", "--json",
        "--kv-type", "f16,int8",
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["kv_type"] for r in rows] == ["f16"] * 2 + ["int8"] * 2
    assert len({r["logits_hash"] for r in rows}) == 4
    args = ["--kernels", "-p", "32", "-d", "8", "-r", "1", "--shapes", "64x64", "--sparse", "dense"]
    done = command("amber.bench", *args, "--kv-type", "f16,int8", "--json", "-q")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [r for r in rows if r["kernel"] == "attention"]
    assert [(r["rows"], r["kv_type"]) for r in rows] == [
        (rows, kv_type) for rows in (1, 32) for kv_type in ("f16", "int8")
    ]
    assert all(r["seconds"] > 0 for r in rows)
    refused = command("amber.bench", "demo", "--kv-type", "q8")
    assert refused.returncode == 2 and "expected f16 or int8" in refused.stderr

"""Sessions as files: what is saved goes on bit for bit, and what does not fit is refused."""

import json
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import amber
from amber import quantize

GOLDEN = Path(__file__).parent / "golden"  # made by tools/make_architectures.py
TEXT = "There was once a king who had three sons, and the youngest went into the wood. " * 4


@pytest.fixture(scope="module")
def saved(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "demo.session"
    with amber.Engine(demo_model) as engine, engine.session(n_ctx=200) as session:
        session.sync(engine.tokenize(TEXT)[:70])
        session.append(5)
        session.save(path)
    return path


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("sparse", ["off", "8:16x4t2@all"])
def test_it_goes_on_bit_for_bit(
    precision: str, sparse: str, demo_model: Path, tmp_path: Path
) -> None:
    """Tokens, cache and logits come back; another engine with other sizes computes the rest alone
    and gets the bits of a session that never stopped."""
    path = tmp_path / "s"
    with amber.Engine(demo_model, precision=precision, sparse=sparse) as engine:
        tokens = engine.tokenize(TEXT)
        with engine.session(n_ctx=300) as session:
            session.sync(tokens[:70])
            session.append(9)
            session.save(path)
            held, last = session.tokens, session.logits
            session.append(11)
            appended = session.logits
            session.sync(tokens[:120])
            expected = session.logits
    with (
        amber.Engine(demo_model, precision=precision, sparse=sparse) as engine,
        engine.session(n_ctx=130, n_batch=16) as session,
    ):
        session.sync(tokens[40:60])
        assert session.load(path) == 71
        assert session.tokens == held and np.array_equal(session.logits, last)
        session.append(11)
        assert np.array_equal(session.logits, appended)
        assert session.sync(tokens[:120]) == 70
        assert np.array_equal(session.logits, expected)


@pytest.mark.parametrize("name", ["gemma3", "cohere2", "qwen2moe"])
def test_windows(name: str, tmp_path: Path) -> None:
    """Rings of other sizes: what theirs has lost is computed again where it is needed."""
    rng = np.random.default_rng(4)
    with amber.Engine(GOLDEN / f"{name}.gguf", threads=1) as engine:
        tokens = rng.integers(3, 280, 600).tolist()
        for before, after in ((8, 128), (128, 8)):
            with engine.session(n_ctx=620, n_batch=before) as session:
                session.sync(tokens)
                session.save(tmp_path / "s")
                session.append(7)
                appended = session.logits
            with engine.session(n_ctx=620, n_batch=after) as session:
                assert session.load(tmp_path / "s") == 600
                session.append(7)
                assert np.array_equal(session.logits, appended)
                for keep in (590, 300, 3):
                    assert session.load(tmp_path / "s") == 600
                    other = [*tokens[:keep], 17, 18]
                    session.sync(other)
                    ours = session.logits
                    with engine.session(n_ctx=620, n_batch=64) as fresh:
                        fresh.sync(other)
                        assert np.array_equal(ours, fresh.logits), (before, after, keep)


def test_an_empty_session(demo_model: Path, tmp_path: Path) -> None:
    with amber.Engine(demo_model) as engine, engine.session() as session:
        session.save(tmp_path / "s")
        session.sync([1, 2, 3])
        assert session.load(tmp_path / "s") == 0
        assert session.tokens == [] and session.logits is None
        session.sync([1, 2, 3])


def test_the_file(saved: Path, demo_model: Path, tmp_path: Path) -> None:
    """Its size is what the format says; it is the owner's alone; nothing is left beside it, and a
    folder that is missing is an error of the file."""
    with amber.Engine(demo_model) as engine:
        info = engine.info
        cells = 2 * info.n_layer * info.n_head_kv * info.head_dim * 71
        assert saved.stat().st_size == 280 + 4 * 71 + 4 * info.n_vocab + 2 * cells
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]
        with engine.session() as session, pytest.raises(amber.FileError, match="cannot write"):
            session.save(tmp_path / "missing" / "s")


def damaged(saved: Path, out: Path, how: str) -> Path:
    data = bytearray(saved.read_bytes())
    if how == "short":
        data = data[:-1]
    elif how == "long":
        data += b"\0"
    elif how == "flip":
        data[-100] ^= 4
    elif how == "version":
        struct.pack_into("<I", data, 8, 2)
    elif how == "text":
        data = bytearray(b"Once upon a time " * 40)
    elif how == "stub":
        data = data[:40]
    elif how == "token":  # with the hash that belongs to it
        struct.pack_into("<i", data, 280, 1 << 20)
        value = 0xCBF29CE484222325
        body = bytes(data[280:]) + b"\0" * (-(len(data) - 280) % 8)
        for (word,) in struct.iter_unpack("<Q", body):
            value = (value ^ word) * 0x100000001B3 % 2**64
        struct.pack_into("<Q", data, 24, value)
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("short", amber.FileFormatError, "cut short"),
        ("long", amber.FileFormatError, "damaged"),
        ("flip", amber.FileFormatError, "damaged"),
        ("token", amber.FileFormatError, "token 0"),
        ("version", amber.UnsupportedModelError, "format 1, found 2"),
        ("text", amber.FileFormatError, "expected an Amber session file"),
        ("stub", amber.FileFormatError, "expected an Amber session file"),
    ],
)
def test_damaged_files(
    how: str, error: type, words: str, saved: Path, demo_model: Path, tmp_path: Path
) -> None:
    path = damaged(saved, tmp_path / "s", how)
    with amber.Engine(demo_model) as engine, engine.session(n_ctx=100) as session:
        session.sync([5, 6, 7])
        logits = session.logits
        with pytest.raises(error, match=words):
            session.load(path)
        assert session.tokens == [5, 6, 7] and np.array_equal(session.logits, logits)
        session.append(8)


def test_other_plans_models_and_sizes(saved: Path, demo_model: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str, error: type = ValueError, **options: object) -> None:
        n_ctx = options.pop("n_ctx", 100)
        with amber.Engine(path, **options) as engine, engine.session(n_ctx=n_ctx) as session:
            with pytest.raises(error, match=words):
                session.load(saved)
            assert len(session) == 0

    refused(demo_model, r"sparsity plan \(8:16 in 24/56 projections\), found another \(off\)",
            sparse="8:16")  # fmt: skip
    refused(demo_model, "of precision float, found one of precision int8", precision="float")
    refused(demo_model, "71 tokens, context is 40", amber.AmberError, n_ctx=40)
    refused(GOLDEN / "llama.gguf", "session of this model, llama.gguf, found one of demo.gguf")
    packed = tmp_path / "demo.gguf"
    assert quantize.main([str(demo_model), str(packed), "-q"]) == 0
    refused(packed, "found one of another demo.gguf")
    with amber.Engine(demo_model) as engine, pytest.raises(amber.FileError):
        engine.load_session(tmp_path / "none")


def test_what_tells_plans_apart(demo_model: Path, tmp_path: Path) -> None:
    """The rules, however they are written, and the tokens that stay dense; of one model file with
    another plan inside, the plan."""
    path, planned = tmp_path / "s", tmp_path / "planned.gguf"
    with amber.Engine(demo_model, sparse="8:16@q,gate,down") as engine:
        engine.generate(TEXT, max_tokens=1)
        engine.save_session(path)
    with amber.Engine(demo_model, sparse="8:16") as engine:
        assert engine.load_session(path) > 50
    with (
        amber.Engine(demo_model, sparse="8:16", sparse_first_n=4) as engine,
        pytest.raises(ValueError, match="sparsity plan"),
    ):
        engine.load_session(path)
    plain = tmp_path / "plain.gguf"
    assert quantize.main([str(demo_model), str(plain), "-q"]) == 0
    source = quantize.Source(str(plain))
    quantize.copy_with_keys(
        source, str(planned), quantize.base_keys(source) | {"amber.plan": "8:16@all"}
    )
    with amber.Engine(plain) as engine:
        engine.generate(TEXT, max_tokens=1)
        engine.save_session(path)
    with amber.Engine(planned, sparse="off") as engine:
        assert engine.load_session(path) > 50
    with amber.Engine(planned) as engine, pytest.raises(ValueError, match="sparsity plan"):
        engine.load_session(path)


def test_learned_vectors_count(demo_model: Path, tmp_path: Path) -> None:
    """The same rule with other vectors is another plan."""
    plain, paths = tmp_path / "plain.gguf", []
    assert quantize.main([str(demo_model), str(plain), "-q"]) == 0
    source = quantize.Source(str(plain))
    for value in (0.0, 0.5):
        shift = np.full(source.tensors["blk.0.ffn_down.score"].shape[0], value, np.float32)
        shift[:40] = 0  # the ends are the same
        shift[-40:] = 0
        paths.append(tmp_path / f"{value}.gguf")
        quantize.copy_with_keys(
            source, str(paths[-1]), quantize.base_keys(source) | {"amber.shift": "lpts"},
            {"blk.0.ffn_down.shift": shift},
        )  # fmt: skip
    with amber.Engine(paths[0], sparse="8:16/lpts@down#0") as engine:
        engine.generate(TEXT, max_tokens=1)
        engine.save_session(tmp_path / "s")
        assert engine.load_session(tmp_path / "s") > 50
    with (
        amber.Engine(paths[1], sparse="8:16/lpts@down#0") as engine,
        pytest.raises(ValueError, match="sparsity plan"),
    ):
        engine.load_session(tmp_path / "s")


# ---- amber-run ----


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "amber", *map(str, args)],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_command(demo_model: Path, tmp_path: Path) -> None:
    """The second run computes what the first did not, and answers as one run would."""
    path, greedy = tmp_path / "chat", ["--temp", "0", "-n", "8", "--json-timings"]
    first = run("demo", "-p", TEXT, *greedy, "--session", path)
    assert first.returncode == 0 and path.exists()
    longer = TEXT + first.stdout.removesuffix("\n") + " And then"
    second = run("demo", "-p", longer, *greedy, "--session", path)
    alone = run("demo", "-p", longer, *greedy)
    assert second.stdout == alone.stdout and "tokens need not be computed" in second.stderr
    timings = json.loads(second.stderr.splitlines()[-1])
    assert timings["cached_tokens"] > 60
    assert json.loads(alone.stderr.splitlines()[-1])["cached_tokens"] == 0
    other = run("demo", "-p", TEXT, *greedy, "--session", path, "--sparse", "8:16")
    assert other.returncode == 2 and "sparsity plan" in other.stderr and other.stdout == ""
    path.write_text("a story")
    broken = run("demo", "-p", TEXT, *greedy, "--session", path)
    assert broken.returncode == 1 and "expected an Amber session file" in broken.stderr
    assert path.read_text() == "a story"

"""Every architecture against transformers: tiny models of random weights in tests/golden, made by
tools/make_architectures.py, which says how."""

from pathlib import Path

import numpy as np
import pytest

import amber
import make_architectures as maker

GOLDEN = Path(__file__).parent / "golden"
# Float32 rounding of both sides, and the golden files' half precision (2^-11).
FLOAT_BOUND = 1e-3
# What rounding to INT8 costs these models, whose weights have no structure. Longrope from a context
# of 4 sharpens attention fourfold, and with it every error.
INT8_KL = {"phi3-long": 0.2}


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def golden(name: str) -> tuple[Path, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return GOLDEN / f"{name}.gguf", {k: file[k].astype(np.float64) for k in file.files}


def mixture(engine: amber.Engine, tokens: list[int]) -> np.ndarray:
    """Logits of the last token, from batches of several sizes and single tokens, with a rewind."""
    with engine.session(n_ctx=256, n_batch=16) as session:
        n = len(tokens)
        session.sync(tokens[: n // 2])
        for token in tokens[n // 2 : n - 1]:
            session.append(token)
        session.rewind(n // 3)
        session.sync(tokens[: n - 1])
        session.append(tokens[-1])
        return np.array(session.logits)


def kl(ours: np.ndarray, expected: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of our next-token distributions from the expected ones."""
    p, q = (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
        for x in (expected, ours.astype(np.float64))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", maker.CASES)
def test_float_logits(name: str) -> None:
    path, expected = golden(name)
    with amber.Engine(path, precision="float", n_ctx=256) as engine:
        for i, tokens in enumerate(maker.prompts(name)[:-1]):
            rows = maker.kept_rows(len(tokens))
            ours = engine.logits(tokens, all=True)[rows]
            assert relative(ours, expected[f"dense {i}"]) < FLOAT_BOUND, (i, len(tokens))
            last = expected[f"dense {i}"][-1]
            assert relative(mixture(engine, tokens), last) < FLOAT_BOUND, (i, len(tokens))


@pytest.mark.parametrize("name", maker.CASES)
@pytest.mark.parametrize("pattern", maker.PATTERNS)
def test_sparse_logits(name: str, pattern: str) -> None:
    """The paper's policy: q, gate and down, all layers, |x|."""
    path, expected = golden(name)
    rows = maker.kept_rows(maker.SPARSE_LENGTH)
    tokens = maker.prompts(name)[-1]
    with amber.Engine(path, precision="float", sparse=f"{pattern}/act", n_ctx=256) as engine:
        assert relative(engine.logits(tokens, all=True)[rows], expected[pattern]) < FLOAT_BOUND


@pytest.mark.parametrize("name", maker.CASES)
def test_int8_logits(name: str) -> None:
    path, expected = golden(name)
    rows = maker.kept_rows(maker.LENGTHS[-1])
    tokens = maker.prompts(name)[-2]
    with amber.Engine(path, n_ctx=256) as engine:
        ours = engine.logits(tokens, all=True)[rows]
    assert kl(ours, expected["dense 2"]) < INT8_KL.get(name, 0.05)


@pytest.mark.parametrize("name", maker.CASES)
def test_live(name: str, tmp_path: Path) -> None:
    """The same against transformers as it is installed, through the converter: prefill of several
    lengths, token by token, a mixture of both, and pruned."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from amber import convert

    model, expected = maker.make(name)
    maker.save(name, model, tmp_path / "folder")
    path = tmp_path / "model.gguf"
    convert.write_gguf(
        convert.Folder(str(tmp_path / "folder")),
        str(path),
        maker.CASES[name].kind,
        lambda _d, _t: None,
    )
    *dense, pruned = maker.prompts(name)
    with amber.Engine(path, precision="float", n_ctx=256) as engine:
        for i, tokens in enumerate(dense):
            ours = engine.logits(tokens, all=True)
            assert relative(ours, expected[f"dense {i}"]) < FLOAT_BOUND, len(tokens)
            last = mixture(engine, tokens)
            assert relative(last, expected[f"dense {i}"][-1]) < FLOAT_BOUND, len(tokens)
        with engine.session() as session:
            session.sync(dense[1][:1])
            for n, token in enumerate(dense[1][1:], 1):
                session.append(token)
                ours = np.array(session.logits)
                assert relative(ours, expected["dense 1"][n]) < FLOAT_BOUND, n
    for pattern in maker.PATTERNS:
        with amber.Engine(path, precision="float", sparse=f"{pattern}/act", n_ctx=256) as engine:
            ours = engine.logits(pruned, all=True)
            assert relative(ours, expected[pattern]) < FLOAT_BOUND, pattern

"""How far Amber is from what transformers computed, in golden files of tools/make_architectures.py:
for tests/test_architectures.py and tools/architecture_table.py."""

from pathlib import Path

import numpy as np

import amber
import make_architectures as maker

GOLDEN = Path(__file__).parent / "golden"
DECODED = 100  # longer prompts are not decoded token by token


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def golden(name: str) -> tuple[Path, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return GOLDEN / f"{name}.gguf", {k: file[k].astype(np.float64) for k in file.files}


def one_by_one(engine: amber.Engine, tokens: list[int]) -> np.ndarray:
    """Logits after every token, each of which is a step of decoding."""
    with engine.session() as session:
        session.sync(tokens[:1])
        rows = [np.array(session.logits)]
        for token in tokens[1:]:
            session.append(token)
            rows.append(np.array(session.logits))
    return np.array(rows)


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


def float_errors(name: str) -> dict[str, float]:
    """Relative errors in float mode: of prefill, of tokens one by one, of a mixture of both (its
    last token), each the largest of the prompts, and of pruned prefill by pattern."""
    path, expected = golden(name)
    errors = {"prefill": 0.0, "decode": 0.0, "mixture": 0.0}
    *dense, last = maker.prompts(name)
    with amber.Engine(path, precision="float", n_ctx=256) as engine:
        for i, tokens in enumerate(dense):
            want = expected[f"dense {i}"]
            ours = engine.logits(tokens, all=True)[maker.kept_rows(len(tokens))]
            errors["prefill"] = max(errors["prefill"], relative(ours, want))
            if len(tokens) < DECODED:
                ours = one_by_one(engine, tokens)[maker.kept_rows(len(tokens))]
                errors["decode"] = max(errors["decode"], relative(ours, want))
            errors["mixture"] = max(errors["mixture"], relative(mixture(engine, tokens), want[-1]))
    for pattern in maker.PATTERNS:
        with amber.Engine(path, precision="float", sparse=f"{pattern}/act", n_ctx=256) as engine:
            ours = engine.logits(last, all=True)[maker.kept_rows(len(last))]
            errors[pattern] = relative(ours, expected[pattern])
    return errors


def int8_divergences(name: str) -> dict[str, float]:
    """Mean KL divergence in INT8 mode: "dense", and pruned by pattern."""
    path, expected = golden(name)
    *_, dense, last = maker.prompts(name)
    found = {}
    for key, want, sparse, tokens in (
        ("dense", "dense 2", "off", dense),
        *((pattern, pattern, f"{pattern}/act", last) for pattern in maker.PATTERNS),
    ):
        with amber.Engine(path, sparse=sparse, n_ctx=256) as engine:
            ours = engine.logits(tokens, all=True)[maker.kept_rows(len(tokens))]
        found[key] = kl(ours, expected[want])
    return found

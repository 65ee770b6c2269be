"""Sparse prefill of whole models against an independent numpy implementation, and its promises."""

from pathlib import Path

import numpy as np
import pytest

import amber
from numpy_llama import NumpyLlama, Rule

ALL = ("q", "k", "v", "o", "gate", "up", "down")
POLICY = ("q", "gate", "down")

CASES = [
    ("2:4@all", Rule(2, 4), ALL),
    ("8:16", Rule(8, 16), POLICY),
    ("16:32@all", Rule(16, 32), ALL),
    ("3:4@o,up", Rule(3, 4), ("o", "up")),
    ("8:16x4", Rule(8, 16, block=4), POLICY),
    ("10:16x4t2@all", Rule(10, 16, block=4, tokens=2), ALL),
    ("8:16/norm@all", Rule(8, 16, criterion="norm"), ALL),
    ("8:16/amber@all", Rule(8, 16, criterion="amber"), ALL),
    ("2:4/amber-b", Rule(2, 4, criterion="amber-b"), POLICY),
    ("2:4/var@all", Rule(2, 4, var=True), ALL),
    ("2:4/dpts@all", Rule(2, 4, shift="mean"), ALL),
    ("8:16/dpts-median", Rule(8, 16, shift="median"), POLICY),
    ("8:16/amber/var/dpts@all", Rule(8, 16, criterion="amber", var=True, shift="mean"), ALL),
]


@pytest.fixture(scope="module")
def model(testdata: Path) -> Path:
    return testdata / "models" / "stories260K-f32.gguf"


@pytest.fixture(scope="module")
def oracle(model: Path) -> NumpyLlama:
    return NumpyLlama(model)


@pytest.fixture(scope="module")
def tokens(model: Path, testdata: Path) -> list[int]:
    text = (testdata / "text" / "tinystories-eval.txt").read_text()[:700]
    return amber.Tokenizer(model).encode(text)[:141]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("text", "rule", "scope"), CASES, ids=[case[0] for case in CASES])
def test_float_logits_equal_numpy(
    text: str,
    rule: Rule,
    scope: tuple[str, ...],
    model: Path,
    oracle: NumpyLlama,
    tokens: list[int],
) -> None:
    """Float32 against float64. Rounding alone stays near 1e-6. A mask differs only where two scores
    agree to the last bits of float32, which moves one row by the smallest kept value: hence the
    median over rows is held to 1e-5 and the whole to 1e-3."""
    rules = {(il, name): rule for il in range(oracle.layers) for name in scope}
    expected = oracle.logits(tokens, rules)
    with amber.Engine(model, precision="float", sparse=text) as engine:
        ours = engine.logits(tokens, all=True)
    rows = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(rows) < 1e-5
    assert relative(ours, expected) < 1e-3


@pytest.mark.parametrize(
    ("text", "rule", "scope"),
    [("off", None, ()), *CASES],
    ids=["off", *(case[0] for case in CASES)],
)
def test_int8_logits_equal_numpy(
    text: str, rule: Rule | None, scope: tuple[str, ...], model: Path, tokens: list[int]
) -> None:
    """INT8 with the rule's terms in the epilogue, against numpy with the same rounding: 1e-6 in
    most rows. Where float32 and float64 fall on two sides of a rounding step (1/127 of a row's
    largest value) or of a mask's threshold, a row goes its own way from there, and so do the later
    rows that attend to it: hence many short prompts, and the median over their rows. One wrong
    term in the epilogue moves every row by 0.1 and more."""
    oracle = NumpyLlama(model, int8=True)
    rules = {(il, name): rule for il in range(oracle.layers) for name in scope}
    rows = []
    with amber.Engine(model, sparse=text) as engine:
        for start in range(0, 120, 4):
            prompt = tokens[start : start + 5]
            expected, ours = oracle.logits(prompt, rules), engine.logits(prompt, all=True)
            distance = np.linalg.norm(ours - expected, axis=1)
            rows.extend(distance / np.linalg.norm(expected, axis=1))
    assert np.median(rows) < 1e-5


def test_inputs_of_projections(model: Path, oracle: NumpyLlama, tokens: list[int]) -> None:
    """What the linear layers read, whole and in batches, equals numpy's; q stands for k and v, gate
    for up. Nothing is seen of a decode step."""
    expected: dict[tuple[int, str], np.ndarray] = {}
    oracle.logits(tokens, {}, expected)
    with amber.Engine(model, precision="float", sparse="off") as engine:
        ours = engine.activations(tokens)
        assert set(ours) == {
            (il, p) for il in range(oracle.layers) for p in ("q", "o", "gate", "down")
        }
        for cell, rows in ours.items():
            assert rows.dtype == np.float32
            assert relative(rows, expected[cell]) < 1e-5, cell
        seen = []

        def tap(layer: int, projection: str, position: int, rows: np.ndarray) -> None:
            if (layer, projection) == (1, "q"):
                seen.append((position, rows))

        with engine.session(n_batch=64, tap=tap) as session:
            session.sync(tokens)
            session.append(tokens[0])
        assert len(seen) == 3
        assert seen[1][0] == len(seen[0][1])
        assert np.array_equal(np.concatenate([rows for _, rows in seen]), ours[1, "q"])


def test_broken_tap(demo_model: Path) -> None:
    def tap(*_: object) -> None:
        raise KeyError("mine")

    with (
        amber.Engine(demo_model) as engine,
        engine.session(tap=tap) as session,
        pytest.raises(KeyError, match="mine"),
    ):
        session.sync(engine.tokenize("The king and the queen"))


@pytest.mark.parametrize("sparse", ["8:16@all", "8:16x4t2@all", "2:4/var@all"])
def test_batches_and_caching_change_nothing(sparse: str, demo_model: Path) -> None:
    with amber.Engine(demo_model, sparse=sparse, n_ctx=256) as engine:
        tokens = engine.tokenize("There was once a king who had three sons. " * 8)[:101]
        expected = engine.logits(tokens)
        for n_batch in (2, 18, 64):
            with engine.session(n_batch=n_batch) as session:
                session.sync(tokens[:40])
                session.sync(tokens)
                assert np.array_equal(session.logits, expected)


def test_decode_is_dense(demo_model: Path) -> None:
    """The same tokens, appended one by one, give the dense model's bits whatever the plan."""
    logits = []
    for sparse in ("off", "2:4@all"):
        with amber.Engine(demo_model, sparse=sparse) as engine, engine.session() as session:
            for token in engine.tokenize("Once upon a time there was a fox"):
                session.append(token)
            logits.append(session.logits)
    assert np.array_equal(*logits)


def test_all_kept_is_dense(demo_model: Path) -> None:
    """N = M with a shift taken off and given back is the dense model up to INT8 rounding."""
    with amber.Engine(demo_model) as dense, amber.Engine(demo_model, sparse="4:4@all") as kept:
        tokens = dense.tokenize("The wolf knocked at the door of the little house.")
        assert np.array_equal(dense.logits(tokens), kept.logits(tokens))
    with (
        amber.Engine(demo_model, precision="float") as dense,
        amber.Engine(demo_model, precision="float", sparse="4:4/dpts/var@all") as kept,
    ):
        assert relative(kept.logits(tokens), dense.logits(tokens)) < 1e-5


def test_first_tokens_stay_dense(demo_model: Path) -> None:
    with (
        amber.Engine(demo_model) as dense,
        amber.Engine(demo_model, sparse="1:4@all", sparse_first_n=8) as mixed,
    ):
        tokens = dense.tokenize("The king rode out with all his men to the forest.")
        a, b = dense.logits(tokens, all=True), mixed.logits(tokens, all=True)
    assert np.array_equal(a[:8], b[:8])
    assert not np.array_equal(a[8], b[8])


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        ("9:8", ["9:8", "N <= M"]),
        ("2:4x3", ["2:4x3", "x4"]),
        ("8:16@head", ["head", "gate"]),
        ("8:16#99", ["99", "layers"]),
        ("8:16/clact", ["clact", "caching"]),
        ("8:16/magic", ["magic", "amber"]),
        ("sometimes", ["sometimes"]),
        ("missing.json", ["missing.json"]),
        ({"rules": []}, ["rules"]),
        ({"rules": [{"pattern": "2:4", "speed": 9}]}, ["speed", "pattern"]),
    ],
)
def test_bad_plans(sparse: object, words: list[str], demo_model: Path) -> None:
    with pytest.raises((amber.AmberError, ValueError)) as caught:
        amber.Engine(demo_model, sparse=sparse)
    assert all(word in str(caught.value) for word in words), caught.value


def test_plan_file(tmp_path: Path, demo_model: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(
        '{"rules": [{"pattern": "8:16", "criterion": "amber", "projections": ["q", "gate"],'
        ' "layers": "0-3"}, {"pattern": "2:4", "projections": ["down"], "layers": [1, 5]}]}'
    )
    with amber.Engine(demo_model, sparse=plan) as engine:
        assert engine.info.sparse == "mixed patterns in 10/56 projections"


def test_coverage_of_the_papers_models() -> None:
    """methods: 56.13 %, 57.59 % and 56.94 % of the multiplications for Llama-3.1-8B, Qwen2-7B and
    Qwen3-30B-A3B, from their shapes and skip lists (arXiv 2508.02128)."""

    def coverage(layers, skipped, width, q, kv, ff, experts=1):
        work = {"q": width * q, "k": width * kv, "v": width * kv, "o": width * q}
        work |= dict.fromkeys(("gate", "up", "down"), experts * width * ff)
        total = layers * sum(work.values())
        sparse = layers * work["down"] + (layers - skipped) * (work["q"] + work["gate"])
        return round(100 * sparse / total, 2)

    assert coverage(32, 5, 4096, 4096, 1024, 14336) == 56.13
    assert coverage(28, 5, 3584, 3584, 512, 18944) == 57.59
    assert coverage(48, 3, 2048, 4096, 512, 768, experts=8) == 56.94

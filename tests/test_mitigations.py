"""Methods whose vectors a file carries (S-PTS, L-PTS, LS, R-Sparse), and CLACT, against numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import amber
from amber import quantize
from numpy_llama import PROJECTIONS, NumpyLlama, Rule, round_rows, sparse_linear

ALL = tuple(PROJECTIONS)
RANK = 5


@pytest.fixture(scope="module")
def model(testdata: Path) -> Path:
    return testdata / "models" / "stories260K-f32.gguf"


@pytest.fixture(scope="module")
def tokens(model: Path, testdata: Path) -> list[int]:
    text = (testdata / "text" / "tinystories-eval.txt").read_text()[:700]
    return amber.Tokenizer(model).encode(text)[:141]


@pytest.fixture(scope="module")
def vectors(model: Path) -> dict[str, np.ndarray]:
    """Vectors large enough to matter for every projection of every layer."""
    oracle, rng = NumpyLlama(model), np.random.default_rng(3)
    made = {}
    for il in range(oracle.layers):
        for name in PROJECTIONS.values():
            stem = f"blk.{il}.{name}"
            n_out, n_in = oracle.t[f"{stem}.weight"].shape
            made[f"{stem}.shift"] = 0.2 * rng.standard_normal(n_in)
            made[f"{stem}.gain"] = 1 + 0.2 * rng.standard_normal(n_out)
            made[f"{stem}.offset"] = 0.1 * rng.standard_normal(n_out)
            made[f"{stem}.left"] = 0.2 * rng.standard_normal((n_out, RANK))
            made[f"{stem}.right"] = 0.2 * rng.standard_normal((RANK, n_in))
    return {name: values.astype(np.float32) for name, values in made.items()}


@pytest.fixture(scope="module")
def packed(model: Path, vectors: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    plain, out = folder / "plain.gguf", folder / "vectors.gguf"
    assert quantize.main([str(model), str(plain), "-q"]) == 0
    source = quantize.Source(str(plain))
    keys = quantize.base_keys(source) | {"amber.shift": "lpts"}
    quantize.copy_with_keys(source, str(out), keys, vectors)
    return out


PAIRS, AMBER = Rule(8, 16, block=4, tokens=2, var=True), Rule(2, 4, criterion="amber", shift="mean")
CASES = [
    ("8:16/lpts@all", Rule(8, 16), ("shift",)),
    ("2:4/ls@all", Rule(2, 4), ("gain", "offset")),
    ("2:4/rsparse:5@all", Rule(2, 4), ("left", "right")),
    ("8:16x4t2/lpts/ls/var@all", PAIRS, ("shift", "gain", "offset")),
    ("2:4/amber/dpts/ls/rsparse:5@all", AMBER, ("gain", "offset", "left", "right")),
]


REAL_LAYERS, SOURCES = (1, 6), {"k": "q", "v": "q", "up": "gate"}
CLACT = ("8:16/clact@all", Rule(8, 16, criterion="clact"), ())
REAL = [("int8", *case) for case in (*CASES, CLACT)]
REAL += [("float", *case) for case in (*CASES[:4], CLACT)]  # scores: of weights before rounding


def rules(oracle: NumpyLlama, rule: Rule, parts: tuple[str, ...], vectors: dict) -> dict:
    made = {}
    for il in range(oracle.layers):
        for name, tensor in PROJECTIONS.items():
            own = {p: vectors[f"blk.{il}.{tensor}.{p}"].astype(float) for p in parts}
            own = {"eta" if p == "shift" else p: v for p, v in own.items()}
            made[il, name] = replace(rule, **own)
    return made


@pytest.mark.parametrize(("text", "rule", "parts"), CASES, ids=[case[0] for case in CASES])
def test_int8_logits_equal_numpy(
    text: str, rule: Rule, parts: tuple, model: Path, packed: Path, tokens: list, vectors: dict
) -> None:
    """As in test_sparse_model: rounding steps send single rows their own way, so the median over
    the rows of many short prompts counts; a wrong term moves every row by 0.01 and more. Scores of
    an Amber GGUF come from the weights before rounding, as numpy's do."""
    oracle = NumpyLlama(model, int8=True)
    own = rules(oracle, rule, parts, vectors)
    rows = []
    with amber.Engine(packed, sparse=text) as engine:
        for start in range(0, 120, 4):
            prompt = tokens[start : start + 5]
            expected, ours = oracle.logits(prompt, own), engine.logits(prompt, all=True)
            distance = np.linalg.norm(ours - expected, axis=1)
            rows.extend(distance / np.linalg.norm(expected, axis=1))
    assert np.median(rows) < 1e-5


@pytest.mark.parametrize(("text", "rule", "parts"), CASES[:4], ids=[case[0] for case in CASES[:4]])
def test_float_logits_equal_numpy(
    text: str, rule: Rule, parts: tuple, model: Path, packed: Path, tokens: list, vectors: dict
) -> None:
    """The weights of an Amber GGUF multiplied out, in a long prompt and with protected tokens."""
    oracle = NumpyLlama(model)
    head = oracle.t["token_embd.weight"]
    linear = [
        n for n in oracle.t if n.removesuffix(".weight").split(".")[-1] in PROJECTIONS.values()
    ]
    oracle.t |= {name: round_rows(oracle.t[name]) for name in linear}
    oracle.t["output.weight"] = round_rows(head)
    expected = oracle.logits(tokens, rules(oracle, rule, parts, vectors))
    dense = oracle.logits(tokens, {})
    with amber.Engine(packed, precision="float", sparse=text) as engine:
        ours = engine.logits(tokens, all=True)
    distance = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(distance) < 2e-5
    with amber.Engine(packed, precision="float", sparse=text, sparse_first_n=6) as engine:
        mixed = engine.logits(tokens, all=True)
    assert np.allclose(mixed[:6], dense[:6], atol=1e-4)
    assert not np.allclose(mixed[6], dense[6], atol=1e-2)


# ---- on what the demo model's projections read ----


@pytest.fixture(scope="module")
def real(demo_model: Path) -> dict:
    """Inputs of the demo model's projections over a text of its own."""
    with amber.Engine(demo_model, sparse="off") as engine:
        story = engine.generate("Once upon a time", max_tokens=200, temperature=0.8, seed=1)
        return engine.activations(story.text)


@pytest.fixture(scope="module")
def demo(demo_model: Path, real: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(Amber GGUF, its vectors, weights by (layer, projection)): shifts are the channels' means,
    factors an SVD's, and what is learned is drawn at random."""
    folder = tmp_path_factory.mktemp("demo")
    plain, out = folder / "plain.gguf", folder / "demo.gguf"
    assert quantize.main([str(demo_model), str(plain), "-q"]) == 0
    oracle, rng, vectors, weights = NumpyLlama(demo_model), np.random.default_rng(4), {}, {}
    for il in REAL_LAYERS:
        for name, tensor in PROJECTIONS.items():
            stem = f"blk.{il}.{tensor}"
            w = weights[il, name] = oracle.t[f"{stem}.weight"]
            u, s, v = np.linalg.svd(w, full_matrices=False)
            vectors[f"{stem}.shift"] = real[il, SOURCES.get(name, name)].mean(axis=0)
            vectors[f"{stem}.gain"] = 1 + 0.2 * rng.standard_normal(len(w))
            vectors[f"{stem}.offset"] = 0.1 * rng.standard_normal(len(w))
            vectors[f"{stem}.left"] = u[:, :RANK] * s[:RANK]
            vectors[f"{stem}.right"] = v[:RANK]
    vectors = {name: values.astype(np.float32) for name, values in vectors.items()}
    source = quantize.Source(str(plain))
    keys = quantize.base_keys(source) | {"amber.shift": "lpts"}
    quantize.copy_with_keys(source, str(out), keys, vectors)
    return out, vectors, weights


@pytest.mark.parametrize(
    ("precision", "text", "rule", "parts"), REAL, ids=[f"{case[0]}-{case[1]}" for case in REAL]
)
def test_projections_of_real_activations(
    precision: str, text: str, rule: Rule, parts: tuple, real: dict, demo: tuple
) -> None:
    """As in test_sparse_model: single rows go their own way, hence the median of their errors. In
    float precision the weights are the file's, multiplied out."""
    int8 = precision == "int8"
    path, vectors, weights = demo
    source = quantize.Source(str(path))
    with (
        amber.Engine(path, precision=precision, sparse=text + "#1,6", evaluation=True) as engine,
        engine.session() as session,
    ):
        for (il, name), w in weights.items():
            x = real[il, SOURCES.get(name, name)]
            stem = f"blk.{il}.{PROJECTIONS[name]}"
            own = {p: vectors[f"{stem}.{p}"].astype(float) for p in parts}
            own = {"eta" if p == "shift" else p: v for p, v in own.items()}
            ours = session.project(il, name, x, len(w))
            held = w if int8 else source.unpacked(stem, *w.shape).astype(float)
            expected = sparse_linear(x.astype(float), held, replace(rule, **own), int8)
            rows = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert np.median(rows) < (5e-4 if int8 else 1e-5), (il, name)


# ---- promises ----


def test_decode_ignores_vectors(packed: Path, tokens: list) -> None:
    logits = []
    for sparse in ("off", "2:4/lpts/ls/rsparse:5@all"):
        with amber.Engine(packed, sparse=sparse) as engine, engine.session() as session:
            for token in tokens[:9]:
                session.append(token)
            logits.append(session.logits)
    assert np.array_equal(*logits)


def test_all_kept_with_a_shift_is_dense(packed: Path, tokens: list) -> None:
    """What a shift takes off comes back whole."""
    with (
        amber.Engine(packed, precision="float", sparse="off") as dense,
        amber.Engine(packed, precision="float", sparse="4:4/lpts/rsparse:5@all") as kept,
    ):
        ours, theirs = kept.logits(tokens), dense.logits(tokens)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_clact(model: Path, tokens: list) -> None:
    """The formula in full, row norms included, on the tokens of one batch."""
    oracle = NumpyLlama(model)
    own = dict.fromkeys([(il, name) for il in range(oracle.layers) for name in ALL])
    own = dict.fromkeys(own, Rule(8, 16, criterion="clact"))
    expected = oracle.logits(tokens, own)
    with amber.Engine(model, precision="float", sparse="8:16/clact@all", evaluation=True) as engine:
        ours = engine.logits(tokens, all=True)
        alone = engine.logits(tokens[:1])
    rows = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(rows) < 1e-5
    with amber.Engine(model, precision="float", sparse="8:16@all") as engine:
        assert not np.allclose(engine.logits(tokens), ours[-1], rtol=1e-2)
        # A lone token: |x| times its own norm ranks as |x| does.
        assert np.array_equal(engine.logits(tokens[:1]), alone)


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        ("8:16/spts@all", ["/lpts", "/spts"]),
        ("8:16/rsparse:6@all", ["right", "64 x 6", "64 x 5"]),
        ("8:16/rsparse:0", ["rsparse:R", "1-1024"]),
        ("8:16/lpts/dpts", ["lpts", "dpts", "both"]),
        ("8:16/clact", ["clact", "caching", "amber-eval"]),
    ],
)
def test_refused(sparse: str, words: list[str], packed: Path) -> None:
    with pytest.raises((amber.AmberError, ValueError)) as caught:
        amber.Engine(packed, sparse=sparse)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_plain_file_has_no_vectors(demo_model: Path) -> None:
    with pytest.raises(amber.UnsupportedModelError, match="amber-quantize --mitigation"):
        amber.Engine(demo_model, sparse="8:16/spts")

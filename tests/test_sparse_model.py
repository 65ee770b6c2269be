"""Sparse prefill of whole models against an independent numpy implementation, and its promises."""

from pathlib import Path

import numpy as np
import pytest

import amber
from amber.eval import evaluate
from amber.timing import PROJECTIONS
from gguf_bytes import F32, STRING, U32, Image, spm_vocabulary
from numpy_llama import PROJECTIONS as TENSORS
from numpy_llama import NumpyLlama, Rule, sparse_linear

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


def test_order_of_costs(demo_model: Path, testdata: Path) -> None:
    """What both papers found on large models, of the distance from the dense model: the larger the
    group, the less it costs, unstructured least; every projection costs far more than the policy's;
    under the policy Robust-Norm scores do not cost more (they gain nothing on this model)."""
    text = (testdata / "corpus" / "heldout.txt").read_text(encoding="utf-8")
    plans = ["top50%", "16:32", "8:16", "4:8", "2:4", "8:16/amber"]
    plans += [f"{plan}@all" for plan in plans[:5]]
    kl, cache = {}, {}
    with amber.Engine(demo_model, sparse="off") as dense:
        for plan in plans:
            with amber.Engine(demo_model, sparse=plan) as engine:
                figures = evaluate(engine, text, chunks=4, against=dense, cache=cache)
                kl[plan] = figures.kl_mean
    for scope in ("", "@all"):
        rising = [kl[plan + scope] for plan in plans[:5]]
        assert rising == sorted(rising), kl
    assert all(kl[f"{plan}@all"] > 4 * kl[plan] for plan in plans[:5])
    assert kl["8:16/amber"] < 1.05 * kl["8:16"]


def test_plan_file(tmp_path: Path, demo_model: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(
        '{"rules": [{"pattern": "8:16", "criterion": "amber", "projections": ["q", "gate"],'
        ' "layers": "0-3"}, {"pattern": "2:4", "projections": ["down"], "layers": [1, 5]}]}'
    )
    with amber.Engine(demo_model, sparse=plan) as engine:
        assert engine.info.sparse == "mixed patterns in 10/56 projections"
    with amber.Engine(demo_model, sparse="2:4/var/dpts/amber@q,o") as engine:
        assert engine.info.sparse == "2:4/amber/dpts/var in 16/56 projections"


SHAPES = {  # layers, width, heads, KV heads, head, feed-forward width, experts, used, their width
    "llama": (32, 4096, 32, 8, 128, 14336, 0, 0, 0),  # Llama-3.1-8B
    "qwen2": (28, 3584, 28, 4, 128, 18944, 0, 0, 0),  # Qwen2-7B
    "qwen3moe": (48, 2048, 32, 4, 128, 6144, 128, 8, 768),  # Qwen3-30B-A3B
}


def head_only(path: Path, arch: str) -> Path:
    """A file that says what shape its model has, and holds little of it."""
    layers, width, heads, kv_heads, head, ff, experts, used, expert_ff = SHAPES[arch]
    image = Image().key("general.architecture", STRING, arch)
    for name, value in (
        ("block_count", layers), ("context_length", 4096), ("embedding_length", width),
        ("feed_forward_length", ff), ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads), ("attention.key_length", head),
        ("attention.value_length", head), ("expert_count", experts), ("expert_used_count", used),
        ("expert_feed_forward_length", expert_ff),
    ):  # fmt: skip
        if value:
            image.key(f"{arch}.{name}", U32, value)
    image.key(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-6)
    spm_vocabulary(image)
    image.tensor("token_embd.weight", 1, (width, 264), bytes(2 * width * 264))
    for layer in range(layers if experts else 0):
        image.tensor(f"blk.{layer}.ffn_gate_inp.weight", 1, (1, 1), bytes(2))
    path.write_bytes(image.finish())
    return path


@pytest.mark.parametrize(
    ("arch", "paper", "everywhere"),
    [("llama", 56.13, 61.5), ("qwen2", 57.59, 63.8), ("qwen3moe", 56.94, 59.3)],
)
def test_coverage_of_the_papers_models(
    arch: str, paper: float, everywhere: float, tmp_path: Path
) -> None:
    """The engine's presets on Llama-3.1-8B, Qwen2-7B and Qwen3-30B-A3B, from their shapes alone
    (arXiv 2508.02128: 56.1 %, 57.6 % and 56.9 %), and the share without skipped layers."""
    path = head_only(tmp_path / "model.gguf", arch)
    preset = amber.memory_estimate(path, sparse="8:16").coverage
    assert round(100 * preset, 2) == paper
    without = amber.memory_estimate(path, sparse="8:16@q,gate,down").coverage
    assert round(100 * without, 1) == everywhere
    assert amber.memory_estimate(path, sparse="off").coverage == 0


# ---- single projections on what they really read ----


@pytest.fixture(scope="module")
def real(demo_model: Path) -> tuple[NumpyLlama, dict]:
    """The demo model's weights, and what its projections read of a story that it made up."""
    with amber.Engine(demo_model, sparse="off") as engine:
        story = engine.generate("Once upon a time", max_tokens=300, temperature=0.8, seed=1)
        return NumpyLlama(demo_model), engine.activations(story.text)


@pytest.mark.parametrize(("text", "rule", "scope"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_projections_of_real_activations(
    text: str, rule: Rule, scope: tuple[str, ...], precision: str, demo_model: Path, real: tuple
) -> None:
    """Every projection of three layers on the inputs that the demo model gives it, against numpy in
    float64 with the same roundings. A float32 score or rounding step that falls on the other side
    moves single rows, hence the median of the rows' errors. So does a weight that float32 rounds to
    the other side: 127 2^-24 of them, one or two in a matrix, move each row by 1e-4."""
    bound = 5e-4 if precision == "int8" else 1e-5
    oracle, inputs = real
    sources = {"k": "q", "v": "q", "up": "gate"}
    with amber.Engine(demo_model, precision=precision, sparse=text) as engine:
        matrices = engine.info.matrices
        with engine.session(n_batch=64) as session:
            for layer in (0, 4, 7):
                for name in scope:
                    x = inputs[layer, sources.get(name, name)]
                    w = oracle.t[f"blk.{layer}.{TENSORS[name]}.weight"]
                    assert matrices[layer][PROJECTIONS.index(name)] == w.shape
                    for pruned in (True, False):
                        ours = session.project(layer, name, x, len(w), pruned)
                        own = rule if pruned else None
                        expected = sparse_linear(x.astype(float), w, own, precision == "int8")
                        rows = np.linalg.norm(ours - expected, axis=1)
                        rows = rows / np.linalg.norm(expected, axis=1)
                        assert np.median(rows) < bound, (layer, name, pruned)


def test_project_leaves_the_session_alone(demo_model: Path) -> None:
    with amber.Engine(demo_model, sparse="8:16@all") as engine, engine.session() as session:
        tokens = engine.tokenize("The wolf and the fox went into the wood")
        session.sync(tokens)
        before, width = session.logits, engine.info.n_embd
        x = np.random.default_rng(0).standard_normal((700, width)).astype(np.float32)
        whole = session.project(1, "q", x, width)
        assert np.array_equal(whole[600:], session.project(1, "q", x[600:], width))
        assert np.array_equal(session.logits, before) and session.tokens == tokens
        assert session.sync([*tokens, 5]) == len(tokens)
        for layer, name, n_out, words in (
            (99, "q", width, "layer 0..7"),
            (0, "head", width, "q, k, v"),
            (0, "q", width + 1, f"{width} outputs"),
            (0, "down", width, f"{engine.info.n_ff} inputs"),
        ):
            with pytest.raises(ValueError, match=words):
                session.project(layer, name, x, n_out)

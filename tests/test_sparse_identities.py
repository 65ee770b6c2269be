"""What the papers' formulas imply, asked of the engine: no mask is computed here.

A model of one layer whose o and down are identity matrices, so that what comes out of them is what
pruning left of a row; the weights of the others are made for one property each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import amber
from gguf_bytes import F32, PIECES, STRING, U32, Image, spm_vocabulary

WIDTH, UNTIED = 128, 36  # channels; the first rows of x have no ties


def balanced(rng: np.random.Generator) -> np.ndarray:
    """As many 1 as -1 in every column: the same norm everywhere, and no mean."""
    signs = np.tile([1.0, -1.0], WIDTH // 2)
    return np.stack([rng.permutation(signs) for _ in range(WIDTH)], axis=1)


def levels(rng: np.random.Generator) -> np.ndarray:
    """Three values, each of them common, that columns have in different shares: no percentile cuts
    anything off, and norms differ."""
    shares = rng.dirichlet([2, 2, 2], WIDTH)
    return np.stack([rng.choice([-2.0, 0.5, 1.0], WIDTH, p=share) for share in shares], axis=1)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    heavy = rng.standard_t(2, (WIDTH, WIDTH)) * rng.lognormal(0, 0.4, WIDTH)
    return {
        "attn_q": heavy,
        "attn_k": -4 * heavy,
        "attn_v": balanced(rng),
        "attn_output": np.eye(WIDTH),
        "ffn_gate": levels(rng),
        "ffn_up": rng.standard_normal((WIDTH, WIDTH)),
        "ffn_down": np.eye(WIDTH),
    }


@pytest.fixture(scope="module")
def model(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = Image().key("general.architecture", STRING, "llama")
    for name, value in (
        ("block_count", 1), ("context_length", 64), ("embedding_length", WIDTH),
        ("feed_forward_length", WIDTH), ("attention.head_count", 4),
    ):  # fmt: skip
        image.key(f"llama.{name}", U32, value)
    image.key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5)
    spm_vocabulary(image)
    rng = np.random.default_rng(6)
    tensors = {"token_embd": rng.standard_normal((259 + len(PIECES), WIDTH))}
    tensors |= {"output_norm": np.ones(WIDTH)}
    tensors |= {"blk.0.attn_norm": np.ones(WIDTH), "blk.0.ffn_norm": np.ones(WIDTH)}
    tensors |= {f"blk.0.{name}": w for name, w in weights.items()}
    for name, w in tensors.items():
        image.tensor(f"{name}.weight", 0, w.shape[::-1], w.astype("<f4").tobytes())
    path = tmp_path_factory.mktemp("identity") / "identity.gguf"
    path.write_bytes(image.finish())
    return path


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Rows of three laws with unequal channels, off centre; ties and zeros in the last ones."""
    rng = np.random.default_rng(8)
    shape = (12, WIDTH)
    rows = [rng.standard_normal(shape), rng.laplace(size=shape), rng.standard_t(3, shape)]
    rows = np.concatenate(rows) * rng.lognormal(0, 0.5, WIDTH) + 0.2
    ties = rng.integers(-2, 3, (4, WIDTH))
    return np.concatenate([rows, ties]).astype(np.float32)


@contextmanager
def layer(model: Path, sparse: str, **options: object) -> Iterator:
    """layer(name, rows, pruned) of float32 results [rows, WIDTH]."""
    with (
        amber.Engine(model, precision="float", sparse=sparse, **options) as engine,
        engine.session() as session,
    ):
        yield lambda name, rows, pruned=True: session.project(0, name, rows, WIDTH, pruned)


def pruned(model: Path, pattern: str, name: str, rows: np.ndarray, **options: object) -> np.ndarray:
    with layer(model, f"{pattern}@all", **options) as product:
        return product(name, rows)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# ---- survivors ----


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "16:32", "1:4", "3:4", "6:8", "8:16x"])
def test_every_group_keeps_its_n_largest(pattern: str, model: Path, x: np.ndarray) -> None:
    """Unchanged, and N of every M; of equals the first."""
    n, m = map(int, pattern.removesuffix("x").split(":"))
    rows = np.where(x == 0, np.float32(1e-3), x)
    out = pruned(model, pattern, "o", rows)
    kept = out != 0
    assert np.array_equal(out[kept], rows[kept])
    groups = kept.reshape(-1, m)
    assert np.all(groups.sum(axis=1) == n)
    size = np.abs(rows).reshape(-1, m)
    assert np.all(np.where(groups, size, np.inf).min(1) >= np.where(groups, 0, size).max(1))
    equal = np.ones((1, WIDTH), np.float32)
    first = pruned(model, pattern, "o", equal).reshape(-1, m)
    assert np.array_equal(first, np.tile(np.arange(m) < n, (WIDTH // m, 1)))


# ---- invariances of masks ----


@pytest.mark.parametrize("criterion", ["act", "norm", "amber", "amber-b"])
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "8:16x4"])
def test_scaled_rows_have_the_same_masks(
    pattern: str, criterion: str, model: Path, x: np.ndarray
) -> None:
    factor = np.ldexp(1.0, np.arange(len(x)) % 13 - 6).astype(np.float32)[:, None]
    with layer(model, f"{pattern}/{criterion}@all") as product:
        for name in ("q", "o", "gate"):
            assert np.array_equal(product(name, x * factor), product(name, x) * factor)


@pytest.mark.parametrize("criterion", ["norm", "amber", "amber-b"])
def test_scaled_weights_have_the_same_masks(criterion: str, model: Path, x: np.ndarray) -> None:
    """k's weights are q's times -4; the factors do matter."""
    with layer(model, f"2:4/{criterion}@all") as product:
        ours = product("q", x)
        assert np.array_equal(product("k", x), -4 * ours)
    assert relative(pruned(model, "2:4", "q", x), ours) > 0.05


@pytest.mark.parametrize("criterion", ["norm", "amber", "amber-b"])
def test_equal_columns_rank_as_magnitude(criterion: str, model: Path, x: np.ndarray) -> None:
    ours = pruned(model, f"8:16/{criterion}", "v", x)
    assert np.array_equal(ours, pruned(model, "8:16", "v", x))


def test_variants_differ_by_outliers_alone(model: Path, x: np.ndarray) -> None:
    """Nothing of gate lies beyond its percentiles, a part of q does."""
    rows = {
        name: [pruned(model, f"2:4/{c}", name, x) for c in ("amber", "amber-b", "act")]
        for name in ("gate", "q")
    }
    assert np.array_equal(rows["gate"][0], rows["gate"][1])
    assert relative(rows["gate"][0], rows["gate"][2]) > 0.05
    assert relative(rows["q"][0], rows["q"][1]) > 0.05


def test_clact(model: Path, x: np.ndarray) -> None:
    """Ranks by |x| times the channel's norm over the call, as magnitude does after the channels are
    scaled by it; alone, a token is ranked by magnitude."""
    norm = np.linalg.norm(x.astype(float), axis=0)
    factor = np.exp2(np.rint(np.log2(norm)))  # exact in float32, and not quite the norms
    even = (x / norm * factor).astype(np.float32)  # now they are
    ours = pruned(model, "2:4/clact", "o", even, evaluation=True) != 0
    assert np.array_equal(ours, pruned(model, "2:4", "o", even * factor.astype(np.float32)) != 0)
    assert not np.array_equal(ours, pruned(model, "2:4", "o", even) != 0)
    for row in x:
        alone = pruned(model, "2:4/clact", "o", row[None], evaluation=True)
        assert np.array_equal(alone, pruned(model, "2:4", "o", row[None]))


# ---- what is given back ----


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "8:16x4t2", "2:4+r16"])
def test_var_keeps_each_rows_variance(pattern: str, model: Path, x: np.ndarray) -> None:
    """And nothing else: the survivors of a row all grow by one factor."""
    plain, scaled = (pruned(model, f"{pattern}{m}", "o", x) for m in ("", "/var"))
    variance = scaled.var(axis=1, dtype=float)
    assert np.abs(variance / x.var(axis=1, dtype=float) - 1).max() < 1e-5
    kept = plain != 0
    assert np.array_equal(scaled != 0, kept)
    for row, before, where in zip(scaled, plain, kept, strict=True):
        assert np.ptp(row[where] / before[where]) < 1e-5


@pytest.mark.parametrize("shift", ["dpts", "dpts-median"])
def test_a_tokens_shift_comes_back(shift: str, model: Path, x: np.ndarray) -> None:
    """What is dropped becomes the row's mean or median; the rank-1 term of the product is the
    product of rows with that filled in; nothing dropped, nothing changed."""
    eta = np.sort(x, axis=1)[:, [(WIDTH - 1) // 2]]  # the lower one of two
    if shift == "dpts":
        eta = x.mean(axis=1, keepdims=True, dtype=float)
    with layer(model, f"2:4/{shift}@all") as product:
        filled = product("o", x)
        close = np.abs(filled - x) < 1e-5 * np.abs(x).max(axis=1, keepdims=True)
        moved = ~close
        assert np.allclose(filled[moved], np.broadcast_to(eta, x.shape)[moved], atol=1e-5)
        # Two of four; the channel that is the median itself does not move.
        count = moved.reshape(len(x), -1, 4).sum(axis=2)
        assert np.all(count <= 2) and np.all((2 - count).sum(axis=1)[:UNTIED] <= 1)
        for name in ("q", "gate", "up"):
            assert relative(product(name, x), product(name, filled, False)) < 1e-5
    assert relative(pruned(model, f"4:4/{shift}/var", "q", x), pruned(model, "4:4", "q", x)) < 1e-5


# ---- phases ----


def test_decode_on_one_cache_is_dense(demo_model: Path) -> None:
    """A prompt that stays dense leaves the dense model's cache; what follows token by token has the
    dense model's bits, whatever the plan would do to a prompt."""
    logits = []
    for sparse in ("off", "2:4/amber/var@all", "8:16x4t2@all"):
        options = {} if sparse == "off" else {"sparse_first_n": 12}
        with amber.Engine(demo_model, sparse=sparse, **options) as engine:
            tokens = engine.tokenize("There was once a poor woodcutter who lived by a forest.")
            assert len(tokens) > 12
            with engine.session() as session:
                session.sync(tokens[:12])
                for token in tokens[12:]:
                    session.append(token)
                logits.append(session.logits)
            assert sparse == "off" or not np.array_equal(engine.logits(tokens * 2), logits[0])
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])

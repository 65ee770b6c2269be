"""Smoothing, static shifts and low-rank factors that amber-quantize folds into a file."""

from pathlib import Path

import numpy as np
import pytest

import amber
from amber import quantize
from numpy_llama import NumpyLlama

WINDOW = ["-c", "64", "--chunks", "2", "-q"]


@pytest.fixture(scope="module")
def model(testdata: Path) -> Path:
    return testdata / "models" / "stories260K-f32.gguf"


@pytest.fixture(scope="module")
def text(testdata: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((testdata / "text" / "tinystories-eval.txt").read_text()[:800])
    return path


def make(model: Path, out: Path, text: Path, *options: str) -> quantize.Source:
    assert quantize.main([str(model), str(out), "--calibrate", str(text), *WINDOW, *options]) == 0
    return quantize.Source(str(out))


def read(model: Path, text: Path) -> dict:
    """Inputs of every projection over the two windows of the calibration text."""
    oracle, inputs = NumpyLlama(model), {}
    tokens = amber.Tokenizer(model).encode(text.read_text(), add_special=True)
    for window in (tokens[:64], tokens[64:128]):
        seen: dict = {}
        oracle.logits([amber.Tokenizer(model).bos, *window[1:]], {}, seen)
        for cell, rows in seen.items():
            inputs.setdefault(cell, []).append(rows)
    return {cell: np.concatenate(rows) for cell, rows in inputs.items()}


@pytest.mark.parametrize("kind", ["smoothquant", "outstanding"])
def test_smoothed_model_is_the_same_function(
    kind: str, model: Path, text: Path, tmp_path: Path
) -> None:
    """As near to the float model as plain INT8 is; and the inputs of down and o are those of the
    source times max|X|^a / max|W|^(1-a) or by it, up to one factor per layer."""
    plain = make(model, tmp_path / "plain.gguf", text)
    smoothed = make(model, tmp_path / "s.gguf", text, "--smooth", kind, "--alpha", "0.25")
    tokens = amber.Tokenizer(model).encode(text.read_text())[:100]
    with amber.Engine(model, precision="float") as engine:
        truth = engine.logits(tokens, all=True)
    distance = {}
    for source in (plain, smoothed):
        with amber.Engine(source.path, sparse="off") as engine:
            ours = engine.logits(tokens, all=True)
            seen = engine.activations(tokens)
        distance[source.path] = np.linalg.norm(ours - truth) / np.linalg.norm(truth)
        if source is plain:
            before = seen
    assert distance[smoothed.path] < 2.5 * distance[plain.path]
    oracle, calibration = NumpyLlama(model), read(model, text)
    largest = np.abs(calibration[1, "down"]).max(axis=0)
    s = largest**0.25 / np.abs(oracle.t["blk.1.ffn_down.weight"]).max(axis=0) ** 0.75
    expected = s if kind == "outstanding" else 1 / s
    ratio = np.sqrt((seen[1, "down"] ** 2).sum(axis=0) / (before[1, "down"] ** 2).sum(axis=0))
    ratio = ratio / expected
    assert np.quantile(np.abs(ratio / np.median(ratio) - 1), 0.9) < 0.15


def test_scores_of_original_weights(model: Path, text: Path, tmp_path: Path) -> None:
    """Wanda's factor is of W' by default, of W by switch; |X'| f(W') ranks as |X| f(W) does."""
    options = ("--smooth", "outstanding")
    new = make(model, tmp_path / "new.gguf", text, *options)
    old = make(model, tmp_path / "old.gguf", text, *options, "--scores-from", "original")
    weight = NumpyLlama(model).t["blk.0.ffn_gate.weight"]
    norm = np.linalg.norm(weight, axis=0)
    name = "blk.0.ffn_gate.score"
    assert np.allclose(old.tensors[name].data[0], norm / norm.min(), rtol=1e-5)
    assert not np.allclose(new.tensors[name].data[0], norm / norm.min(), rtol=1e-2)


@pytest.mark.parametrize("method", ["spts", "spts-channel"])
def test_static_shifts(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Means over the calibration tokens of the medians, or channel by channel, up to what INT8
    does to the activations they are taken from."""
    made = make(model, tmp_path / "s.gguf", text, "--sparse", "8:16", "--mitigation", method)
    for (il, name), tensor in {(0, "q"): "attn_q", (2, "down"): "ffn_down"}.items():
        rows = read(model, text)[il, name]
        n = rows.shape[1]
        expected = (
            np.full(n, np.median(rows, axis=1).mean()) if method == "spts" else rows.mean(axis=0)
        )
        ours = np.asarray(made.tensors[f"blk.{il}.{tensor}.shift"].data)
        assert np.abs(ours - expected).max() < 0.05 * np.sqrt((rows**2).mean())
    assert made.reader.fields["amber.shift"].contents() == method
    with amber.Engine(made.path) as engine:  # the plan in the file finds its vectors
        assert "8:16" in engine.info.sparse


def test_factors_of_full_rank_give_back_everything(model: Path, text: Path, tmp_path: Path) -> None:
    """With the whole SVD, what pruning takes away comes back: the dense model up to INT8's rounding
    of the kept part."""
    made = make(model, tmp_path / "r.gguf", text, "--sparse", "1:4/rsparse:64@q,k,v,o,gate,up")
    tokens = amber.Tokenizer(model).encode(text.read_text())[:60]
    logits = {}
    for sparse in ("off", "auto", "1:4@q,k,v,o,gate,up"):
        with amber.Engine(made.path, precision="float", sparse=sparse) as engine:
            logits[sparse] = engine.logits(tokens, all=True)
    size = np.linalg.norm(logits["off"])
    assert np.linalg.norm(logits["auto"] - logits["off"]) < 1e-4 * size
    assert np.linalg.norm(logits["1:4@q,k,v,o,gate,up"] - logits["off"]) > 0.1 * size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--smooth", "outstanding", "--alpha", "7"], "expected a number from 0 to 1, found 7"),
        (["--alpha", "0.5"], "expected --smooth"),
        (["--sparse", "8:16/spts@q;8:16/spts-channel@down"], "one kind of static shift"),
        (["--sparse", "9:8"], "9:8"),
        (["--sparse", "2:4x3"], "2:4x3"),
        (["--sparse", "8:16@head"], "head"),
        (["--sparse", "8:16", "--chunks", "1", "-c", "4096"], "tokens for one window"),
    ],
)
def test_refused(
    options: list[str], words: str, model: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    short = tmp_path / "three.txt"
    short.write_text("Once upon a")
    own = short if "4096" in options else text
    code = quantize.main(
        [str(model), str(tmp_path / "x"), "--calibrate", str(own), *WINDOW, *options]
    )
    assert code in (1, 2)
    assert words in capsys.readouterr().err

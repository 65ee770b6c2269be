"""Context extension: every kind of RoPE scaling against numpy, on a model that gets its keys."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

import amber
from numpy_llama import NumpyLlama

N_CTX = 64  # of the "original" training: small, so that the prompt reaches far beyond it
HALF = 4  # stories260K: heads of 8
BASE = 10000.0


def with_keys(
    source: Path, out: Path, keys: dict[str, object], divisors: np.ndarray | None
) -> Path:
    """A copy of a model with more keys, and a rope_freqs tensor where given."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=kind)
    for name, value in keys.items():
        kind = {str: "STRING", float: "FLOAT32", int: "UINT32"}[type(value)]
        writer.add_key_value(f"llama.{name}", value, GGUFValueType[kind])
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def plain(base: float = BASE) -> np.ndarray:
    return base ** (-np.arange(HALF) / HALF)


def yarn(factor: float, fast: float = 32.0, slow: float = 1.0) -> np.ndarray:
    """YaRN (arXiv 2309.00071) as common implementations have it: the ramp between the pairs that
    turn `fast` and `slow` times within N_CTX is linear in the pair's index, its ends are whole."""

    def pair(turns: float) -> float:
        return 2 * HALF * np.log(N_CTX / (turns * 2 * np.pi)) / (2 * np.log(BASE))

    low, high = max(np.floor(pair(fast)), 0), min(np.ceil(pair(slow)), 2 * HALF - 1)
    ramp = np.clip((np.arange(HALF) - low) / max(high - low, 1e-3), 0, 1)
    return plain() * ((1 - ramp) + ramp / factor)


DIVISORS = np.array([1.0, 1.0, 3.5, 8.0])

CASES = {
    "none": ({}, None, plain(), 1.0),
    "base": ({"rope.freq_base": 500000.0}, None, plain(500000.0), 1.0),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        None,
        plain() / 4,
        1.0,
    ),
    "old linear key": ({"rope.scale_linear": 2.0}, None, plain() / 2, 1.0),
    "type none": (
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        None,
        plain(),
        1.0,
    ),
    "llama3": ({}, DIVISORS, plain() / DIVISORS, 1.0),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": N_CTX,
        },
        None,
        yarn(4.0),
        1 + 0.1 * np.log(4.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scaling(name: str, testdata: Path, tmp_path: Path) -> None:
    keys, divisors, freq, mscale = CASES[name]
    source = testdata / "models" / "stories260K-f32.gguf"
    path = with_keys(source, tmp_path / "scaled.gguf", keys, divisors)
    text = (testdata / "text" / "tinystories-eval.txt").read_text()[:700]
    tokens = amber.Tokenizer(source).encode(text)[:180]
    oracle = NumpyLlama(source)
    oracle.freq, oracle.mscale = freq, mscale
    expected = oracle.logits(tokens, {})
    with amber.Engine(path, precision="float") as engine:
        ours = engine.logits(tokens, all=True)
    # Float32 against float64, as in test_reference.py; a wrong frequency moves logits by 0.1.
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 5e-5


@pytest.mark.parametrize(
    ("keys", "divisors", "words"),
    [
        ({"rope.scaling.type": "dynamic"}, None, ["dynamic", "yarn"]),
        ({"rope.scaling.type": "longrope"}, None, ["longrope", "rope_factors_long"]),
        ({"rope.freq_base": 0.5}, None, ["freq_base", "0.5"]),
        ({}, np.array([1.0, 0.0, 1.0, 1.0]), ["rope_freqs", "> 0"]),
        ({}, np.ones(3), ["rope_freqs", "4"]),
    ],
)
def test_refused(keys, divisors, words, testdata: Path, tmp_path: Path) -> None:
    source = testdata / "models" / "stories260K-f32.gguf"
    path = with_keys(source, tmp_path / "bad.gguf", keys, divisors)
    with pytest.raises(amber.AmberError) as caught:
        amber.Engine(path)
    assert all(word in str(caught.value) for word in words), caught.value

"""The sampler against a twin in Python that sorts everything and has its own random numbers."""

import math
import struct

import numpy as np
import pytest

amber = pytest.importorskip("amber")
from amber._amber import ffi, lib  # noqa: E402

MASK = 2**64 - 1


class Xoshiro:
    """xoshiro256**, seeded by SplitMix64: https://prng.di.unimi.it"""

    def __init__(self, seed: int) -> None:
        self.s = []
        for _ in range(4):
            seed = (seed + 0x9E3779B97F4A7C15) & MASK
            z = seed
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
            self.s.append(z ^ (z >> 31))

    @staticmethod
    def rotl(x: int, k: int) -> int:
        return (x << k | x >> (64 - k)) & MASK

    def word(self) -> int:
        s = self.s
        result = self.rotl(s[1] * 5 & MASK, 7) * 9 & MASK
        t = s[1] << 17 & MASK
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = self.rotl(s[3], 45)
        return result

    def unit(self) -> float:
        return (self.word() >> 11) * 2.0**-53


def test_the_twins_generator():
    # SplitMix64 from 1234567 and the first outputs of xoshiro256** from state 1, 2, 3, 4, as
    # published with other implementations of these generators.
    assert Xoshiro(1234567).s == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
    ]  # fmt: skip
    twin = Xoshiro(0)
    twin.s = [1, 2, 3, 4]
    assert [twin.word() for _ in range(4)] == [11520, 0, 1509978240, 1215971899390074240]


class Twin:
    def __init__(self, seed: int, **options) -> None:
        self.rng, self.o, self.history = Xoshiro(seed), options, []

    def sample(self, raw: np.ndarray) -> int:
        o = self.o
        x = np.where(np.isnan(raw), np.float32(-np.inf), raw).astype(np.float32)
        for token, value in o.get("bias", {}).items():
            x[token] += np.float32(value)
        last_n = o.get("penalty_last_n", 64)
        window = self.history if last_n < 0 else self.history[len(self.history) - last_n :]
        if last_n:
            repeat = np.float32(o.get("repeat_penalty", 1))
            for token in set(window):
                x[token] = x[token] / repeat if x[token] > 0 else x[token] * repeat
                x[token] -= np.float32(window.count(token)) * np.float32(
                    o.get("frequency_penalty", 0)
                ) + np.float32(o.get("presence_penalty", 0))
        order = sorted((t for t in range(len(x)) if x[t] > -np.inf), key=lambda t: (-x[t], t))
        best = float(x[order[0]])
        if o["temperature"] <= 0:
            return order[0]
        top_k, top_p, min_p = o["top_k"], struct_float(o["top_p"]), struct_float(o["min_p"])
        if 0 < top_k < len(x):
            order = order[:top_k]
        kept = order
        if top_p < 1:
            total = math.fsum(math.exp(float(x[t]) - best) for t in order)
            mass, kept = 0.0, []
            for token in order:
                kept.append(token)
                mass += math.exp(float(x[token]) - best)
                if mass >= top_p * total:
                    break
        if min_p > 0:
            kept = [t for t in kept if float(x[t]) >= best + math.log(min_p)]
        # The order of the final draw is amber's own: by rank after top_k, else by id, and from the
        # least likely up after top_p alone.
        if not 0 < top_k < len(x):
            kept = kept[::-1] if top_p < 1 else sorted(kept)
        temperature = struct_float(o["temperature"])
        weights = [math.exp((float(x[t]) - best) / temperature) for t in kept]
        total = 0.0
        for weight in weights:
            total += weight
        drawn, passed = self.rng.unit() * total, 0.0
        for token, weight in zip(kept, weights, strict=True):
            passed += weight
            if drawn < passed:
                return token
        raise AssertionError("the draw fell off the end")

    def accept(self, token: int) -> None:
        self.history.append(token)


def struct_float(x: float) -> float:
    """x as a C float holds it."""
    return struct.unpack("f", struct.pack("f", x))[0]


def new_sampler(n_vocab: int, seed: int, bias: dict[int, float] | None = None, **options):
    c = ffi.new("amber_sampling *")
    lib.amber_sampling_defaults(c)
    for name, value in options.items():
        setattr(c, name, value)
    c.seed = seed
    bias = bias or {}
    tokens, values = ffi.new("int32_t[]", list(bias)), ffi.new("float[]", list(bias.values()))
    c.n_logit_bias, c.logit_bias_tokens, c.logit_bias_values = len(bias), tokens, values
    out, err = ffi.new("amber_sampler **"), ffi.new("amber_error *")
    assert lib.amber_sampler_new(c, n_vocab, out, err) == 0, ffi.string(err.msg)
    return ffi.gc(out[0], lib.amber_sampler_free)


CASES = [
    dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0),
    dict(temperature=1.5, top_k=0, top_p=1.0, min_p=0.1),
    dict(temperature=1.2, top_k=0, top_p=0.8, min_p=0.02),
    dict(temperature=2.0, top_k=3, top_p=1.0, min_p=0.0),
    dict(temperature=2.0, top_k=1000, top_p=0.99, min_p=0.0),
    dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.3,
         frequency_penalty=0.2, presence_penalty=0.1, penalty_last_n=16),
    dict(temperature=0.9, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=0.8, penalty_last_n=-1),
    dict(temperature=0.9, top_k=0, top_p=0.9, min_p=0.0, bias={3: 5.0, 7: -math.inf}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_same_tokens_as_the_twin(case):
    options = dict(CASES[case])
    n_vocab, seed = 700, 12345 + case
    c = new_sampler(n_vocab, seed, **options)
    twin = Twin(seed, **options)
    rng = np.random.default_rng(case)
    for step in range(60):
        logits = (3 * rng.standard_normal(n_vocab)).astype(np.float32)
        if step % 3 == 0:
            logits = np.round(logits * 2) / 2  # ties
        if step % 7 == 0:
            logits[rng.integers(n_vocab, size=50)] = [np.nan, -np.inf] * 25
        token = lib.amber_sampler_sample(c, ffi.from_buffer("float[]", logits))
        assert token == twin.sample(logits), (case, step)
        lib.amber_sampler_accept(c, token)
        twin.accept(token)


def test_random_seed_is_told_and_repeats():
    params = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    logits = np.zeros(1000, np.float32)
    first = new_sampler(1000, 2**64 - 1, **params)
    seed = lib.amber_sampler_seed(first)
    assert seed < 2**32
    again = new_sampler(1000, seed, **params)
    pointer = ffi.from_buffer("float[]", logits)
    draw = [[lib.amber_sampler_sample(s, pointer) for _ in range(50)] for s in (first, again)]
    assert draw[0] == draw[1]
    assert len(set(draw[0])) > 30


def test_wrong_values_name_themselves():
    for name, value in (("temperature", math.nan), ("top_p", 0.0), ("min_p", 2.0)):
        c = ffi.new("amber_sampling *")
        lib.amber_sampling_defaults(c)
        setattr(c, name, value)
        out, err = ffi.new("amber_sampler **"), ffi.new("amber_error *")
        assert lib.amber_sampler_new(c, 10, out, err) == lib.AMBER_ERR_ARGUMENT
        assert out[0] == ffi.NULL
        assert name in ffi.string(err.msg).decode()

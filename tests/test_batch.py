"""Several sequences at once: every bit as one by one, and what cannot be together is refused."""

from pathlib import Path

import numpy as np
import pytest

import amber

GOLDEN = Path(__file__).parent / "golden"  # made by tools/make_architectures.py
PROMPTS = [
    "Once upon a time",
    "The dog was",
    "A little girl named Lily went to the park with her mother and they",
    "One day, Tom saw a big",
    "There was",
]


def texts(count: int, n_vocab: int) -> list[list[int]]:
    """Token ids of different lengths, the same on every run."""
    rng = np.random.default_rng(count)
    return [rng.integers(3, n_vocab, 5 + 7 * i).tolist() for i in range(count)]


@pytest.mark.parametrize(
    ("model", "precision"),
    [(path.stem, "int8") for path in sorted(GOLDEN.glob("*.gguf"))]
    + [(name, "float") for name in ("llama", "gemma3", "gpt-oss")],
)
def test_steps_of_every_architecture(model: str, precision: str) -> None:
    """Three sessions at different positions, with caches of different sizes (rings, and rotations
    that depend on the context): logits of eight steps together and apart, and of what follows."""
    with amber.Engine(GOLDEN / f"{model}.gguf", precision=precision, threads=2, n_ctx=16) as engine:
        prompts = texts(3, engine.info.n_vocab)
        steps = np.random.default_rng(1).integers(3, engine.info.n_vocab, (8, 3)).tolist()
        apart, together = (
            [engine.session(n_ctx=n_ctx, n_batch=4) for n_ctx in (40, 60, 96)] for _ in range(2)
        )
        for alone, session, prompt in zip(apart, together, prompts, strict=True):
            alone.sync(prompt)
            session.sync(prompt)
        for step in steps:
            amber.append_each(together, step)
            for alone, session, token in zip(apart, together, step, strict=True):
                alone.append(token)
                assert np.array_equal(alone.logits, session.logits)
        for alone, session in zip(apart, together, strict=True):
            assert alone.tokens == session.tokens
            for both in (alone, session):
                both.sync(both.tokens + [7, 8, 9])
            assert np.array_equal(alone.logits, session.logits)


@pytest.mark.parametrize("count", [2, 6, 7, 12, 13, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number(count: int, threads: int, demo_model: Path) -> None:
    """On both sides of every border between the kernels for few rows."""
    with amber.Engine(demo_model, threads=threads) as engine:
        sessions = [engine.session(n_ctx=64) for _ in range(count)]
        for i, session in enumerate(sessions):
            session.sync([1, 5 + i, 9])
        amber.append_each(sessions, list(range(20, 20 + count)))
        with engine.session(n_ctx=64) as alone:
            for i, session in enumerate(sessions):
                alone.sync([1, 5 + i, 9])
                alone.append(20 + i)
                assert np.array_equal(alone.logits, session.logits)
                assert session.stats["decode_tokens"] == 1


def test_lost_ring() -> None:
    """A session that was rewound behind what its ring holds is computed again on the way."""
    with amber.Engine(GOLDEN / "gemma3.gguf") as engine:
        tokens = texts(40, engine.info.n_vocab)[-1]
        sessions = [engine.session(n_ctx=400, n_batch=8) for _ in range(3)]
        for session in sessions:
            session.sync(tokens)
            session.rewind(60)
        sessions[2].append(5)  # alone
        amber.append_each(sessions[:2], [5, 5])
        for session in sessions[:2]:
            assert np.array_equal(session.logits, sessions[2].logits)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_answers(batch: int, demo_model: Path) -> None:
    with amber.Engine(demo_model, n_ctx=60) as engine:
        alone = [engine.stream(prompt, max_tokens=50, seed=4).finish() for prompt in PROMPTS]
        together = engine.generate_batch(PROMPTS, batch=batch, max_tokens=50, seed=4)
        for one, other in zip(alone, together, strict=True):
            for name in (
                "text",
                "token_ids",
                "finish_reason",
                "stop_reason",
                "prompt_tokens",
                "seed",
            ):
                assert getattr(one, name) == getattr(other, name)
            assert other.decode_seconds > 0 and other.ttft > 0
        assert [result.text for result in engine.generate(PROMPTS, max_tokens=50, seed=4)] == [
            result.text for result in alone
        ]


def test_answers_end_differently(demo_model: Path) -> None:
    """Stop strings, no tokens at all, and penalties that each answer has for itself."""
    with amber.Engine(demo_model) as engine:
        for options in ({"stop": ["."]}, {"max_tokens": 0}, {"repeat_penalty": 1.5, "top_k": 3}):
            options = {"max_tokens": 30, "seed": 1} | options
            alone = [engine.stream(prompt, **options).finish() for prompt in PROMPTS]
            together = engine.generate_batch(PROMPTS, **options)
            assert [(r.text, r.finish_reason) for r in together] == [
                (r.text, r.finish_reason) for r in alone
            ]
        assert engine.generate_batch([]) == []


def test_cancelled(demo_model: Path) -> None:
    """A progress callback that stops one prefill stops them all; what is there stays."""
    calls = []

    def progress(phase: str, done: float, _total: float) -> bool:
        if phase == "prefill" and done == 0:
            calls.append(done)
        return len(calls) == 3

    with amber.Engine(demo_model, progress=progress) as engine:
        calls.clear()
        results = engine.generate_batch(PROMPTS, max_tokens=5)
        assert [len(result.token_ids) for result in results] == [1, 1, 0, 0, 0]
        assert {result.finish_reason for result in results} == {"cancelled"}


def test_refused(demo_model: Path) -> None:
    with amber.Engine(demo_model) as engine, amber.Engine(demo_model) as other:
        a, b, full = engine.session(n_ctx=8), engine.session(n_ctx=8), engine.session(n_ctx=2)
        for session in (a, b, full):
            session.sync([1, 2])
        with pytest.raises(ValueError, match="expected 2, one a session, found 1"):
            amber.append_each([a, b], [1])
        with pytest.raises(amber.AmberError, match="in use"):
            amber.append_each([a, a], [1, 1])
        with pytest.raises(amber.ArgumentError, match="of one engine, found another's at 1"):
            amber.append_each([a, other.session(n_ctx=8)], [1, 1])
        with pytest.raises(amber.AmberError, match="session 1 is full: 3 tokens, context is 2"):
            amber.append_each([a, full], [1, 1])
        with pytest.raises(
            amber.ArgumentError, match="token of session 1: expected 0..*, found -1"
        ):
            amber.append_each([a, b], [1, -1])
        few = [engine.session(n_ctx=4) for _ in range(5)]
        with pytest.raises(amber.ArgumentError, match="at most n_batch, 4, found 5"):
            amber.append_each(few, [1] * 5)
        with pytest.raises(amber.ArgumentError, match="expected 1 to 256, found 257"):
            amber.append_each([engine.session(n_ctx=1) for _ in range(257)], [1] * 257)
        with pytest.raises(ValueError, match="batch: expected 1 to 256, found 0"):
            engine.generate_batch(PROMPTS, batch=0)
        for session in (a, b):
            assert session.tokens == [1, 2] and session.logits is not None
        amber.append_each([], [])
        amber.append_each([a, b], [3, 3])
        assert np.array_equal(a.logits, b.logits)

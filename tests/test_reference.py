"""Float mode against reference outputs computed in float64 by an independent implementation.

The reference JSON of a model holds 64 greedy tokens after a prompt, and for each step the 8 largest
logits and the log-sum-exp.
"""

import json

import numpy as np
import pytest

import amber

# All of float mode is float32, the KV cache too. A sum of K <= 768 products is off by about
# sqrt(K) * 2^-24 = 2e-6 of its norm; some 45 such steps in a row add up like sqrt(45), to 1e-5. The
# file's own digits (1e-5 of logits around 10) add 1e-6. Relative to the largest logit of a step.
TOLERANCE = 5e-5

NAMES = [
    *(f"stories260K-{t}" for t in ("f32", "f16", "q8_0", "q4_0")),
    *(f"tinystories-656k-{t}" for t in ("f32", "f16", "q8_0", "q4_0")),
    *(f"stories3M-{t}" for t in
      ("f16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_0", "IQ4_NL", "Q4_K_M", "qwen2-f16")),
    *(f"stories3M-pad256-{t}" for t in ("f16", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ3_M")),
]  # fmt: skip


@pytest.fixture(params=NAMES)
def case(request, testdata):
    """(engine in float mode, reference)"""
    name = f"{request.param}.gguf"
    path = testdata / "reference" / f"{name}.reference.json"
    if not path.is_file():
        pytest.skip(f"no reference for {name}")
    with amber.Engine(testdata / "models" / name, precision="float") as engine:
        yield engine, json.loads(path.read_text())


def test_logits(case):
    engine, reference = case
    prompt, greedy, steps = (reference[k] for k in ("prompt_ids", "greedy_ids", "steps"))
    assert engine.tokenize(reference["prompt"]) == prompt
    with engine.session() as session:
        rows = session.score(prompt + greedy[:-1], len(prompt) - 1)
    assert rows.shape == (len(steps), engine.info.n_vocab)
    for row, step in zip(rows.astype(np.float64), steps, strict=True):
        expected = np.array(step["top_logits"])
        slack = TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(row[step["top_ids"]], expected, rtol=0, atol=slack)
        others = np.delete(row, step["top_ids"])
        assert others.max() <= expected[-1] + slack
        assert np.logaddexp.reduce(row) == pytest.approx(step["log_sum_exp"], abs=slack + 5e-5)


def test_greedy_text(case):
    """The same text, up to a step where two tokens were closer than the tolerance."""
    engine, reference = case
    result = engine.generate(reference["prompt"], max_tokens=64, temperature=0, ignore_eos=True)
    for ours, theirs, step in zip(
        result.token_ids, reference["greedy_ids"], reference["steps"], strict=False
    ):
        if ours != theirs:
            logits = dict(zip(step["top_ids"], step["top_logits"], strict=True))
            assert logits[theirs] - logits[ours] < 2 * TOLERANCE * step["top_logits"][0]
            return
    assert result.token_ids == reference["greedy_ids"]
    assert result.text == reference["greedy_text"]


def test_decode_equals_prefill(testdata):
    """One token at a time gives the logits of one batch (sums differ in order only)."""
    with amber.Engine(testdata / "models" / "stories260K-f32.gguf", precision="float") as engine:
        tokens = engine.tokenize("Once upon a time there was a dog. The dog was big and red.")
        rows = engine.logits(tokens, all=True)
        with engine.session() as session:
            session.sync(tokens[:1])
            for token, row in zip(tokens[1:], rows[1:], strict=True):
                session.append(token)
                slack = TOLERANCE * np.abs(row).max()
                np.testing.assert_allclose(session.logits, row, rtol=0, atol=slack)

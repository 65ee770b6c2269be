"""sparse="auto": dense below the prompt length at which this machine gains by a plan."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import amber
from amber import crossover
from amber.engine import NEVER_SPARSE

PLAN = "8:16x4t2@gate,up,down;2:4@q"


@pytest.fixture(scope="module")
def planned(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a plan inside."""
    from amber import quantize

    path = tmp_path_factory.mktemp("planned") / "planned.gguf"
    assert quantize.main([str(demo_model), str(path), "--sparse", PLAN, "-q"]) == 0
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("AMBER_SPARSE_MIN_TOKENS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "amber" / "crossover.json"


def ratios(*values: float) -> dict[int, float]:
    return dict(zip(crossover.ROWS, values, strict=True))


def test_least_batch_that_gains() -> None:
    slow = ratios(1.2, 1.1, 1.05, 0.99, 0.9, 0.8, 0.6)
    assert crossover.min_tokens({"a": 1.0}, {"a": slow}) == 64
    # A size that loses again counts, whatever smaller ones gain.
    assert crossover.min_tokens({"a": 1.0}, {"a": ratios(0.9, 0.9, 1.1, 0.9, 1, 0.8, 0.6)}) == 128
    assert crossover.min_tokens({"a": 0.2}, {"a": ratios(*[1.0] * 7)}) == NEVER_SPARSE
    assert crossover.min_tokens({"a": 0.2}, {"a": ratios(*[0.99] * 7)}) == 24
    # By what each pattern has of the work: 0.3 of -0.2 against 0.1 of 0.5.
    two = {"a": ratios(*[0.5] * 7), "b": ratios(*[1.2] * 7)}
    assert crossover.min_tokens({"a": 0.1, "b": 0.3}, two) == NEVER_SPARSE
    assert crossover.min_tokens({"a": 0.1, "b": 0.2}, two) == 24


def test_measured_once_and_then_read(
    planned: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = []

    def measure(pattern: str, isa: str, threads: int) -> dict[int, float]:
        measured.append((pattern, isa, threads))
        return ratios(1.5, 1.4, 1.3, 0.7, 0.6, 0.5, 0.5)

    monkeypatch.setattr(crossover, "measure", measure)
    with caplog.at_level(logging.INFO, "amber"), amber.Engine(planned, threads=2) as engine:
        isa, plan = engine.info.isa, engine.info.sparse
        assert engine.info.sparse_min == 64
    said = [r.message for r in caplog.records if "sparse auto" in r.message]
    assert len(said) == 1 and "under 64 tokens" in said[0] and plan in said[0]
    assert sorted(measured) == [("2:4", isa, 2), ("8:16x4t2", isa, 2)]
    (key,) = json.loads(cache.read_text())
    assert crossover.cpu_name() in key and isa in key and "2 threads" in key

    with amber.Engine(planned, threads=2) as engine:
        assert engine.info.sparse_min == 64 and len(measured) == 2
    with amber.Engine(planned, threads=1) as engine:  # another machine, so to say
        assert engine.info.sparse_min == 64 and len(measured) == 4
    assert len(json.loads(cache.read_text())) == 2

    for broken in ("{", "[]", json.dumps({key: {"2:4": {"24": -1}}}), json.dumps({key: 3})):
        cache.write_text(broken)
        with amber.Engine(planned, threads=2) as engine:
            assert engine.info.sparse_min == 64
        assert crossover.min_tokens({"2:4": 1}, {"2:4": ratios(*[0.5] * 7)}) == 24
    assert len(measured) == 4 + 2 * 4
    cache.unlink()
    os.chmod(cache.parent, 0o500)  # measured again each time, but not refused
    with amber.Engine(planned, threads=2) as engine:
        assert engine.info.sparse_min == 64
    os.chmod(cache.parent, 0o700)


def test_nothing_is_measured_without_need(
    demo_model: Path, planned: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "measure", None)
    for path, options in (
        (demo_model, {}),  # no plan
        (planned, {"sparse": "8:16"}),  # asked for
        (planned, {"sparse": "off"}),
        (planned, {"sparse_min_tokens": 0}),
        (planned, {"precision": "float"}),
        (planned, {"evaluation": True}),
    ):
        with amber.Engine(path, **options) as engine:
            assert engine.info.sparse_min == 0
    monkeypatch.setenv("AMBER_SPARSE_MIN_TOKENS", "40")
    with amber.Engine(planned) as engine:
        assert engine.info.sparse_min == 40
    with amber.Engine(planned, sparse_min_tokens=7) as engine:
        assert engine.info.sparse_min == 7
    monkeypatch.setenv("AMBER_SPARSE_MIN_TOKENS", "x")
    with pytest.raises(ValueError, match="AMBER_SPARSE_MIN_TOKENS"):
        amber.Engine(planned)
    with pytest.raises(ValueError, match="-1"):
        amber.Engine(planned, sparse_min_tokens=-1)
    assert not cache.exists()


def fresh(engine: amber.Engine, tokens: list[int]) -> np.ndarray:
    with engine.session() as session:
        session.sync(tokens)
        return session.logits


def test_short_prompts_run_dense(planned: Path) -> None:
    """To the bit, and by the size of a batch; and what ran is told."""
    tokens = [1] + list(range(50, 199))
    with (
        amber.Engine(planned, sparse_min_tokens=60, n_batch=100) as engine,
        amber.Engine(planned, sparse="off", n_batch=100) as dense,
        amber.Engine(planned, sparse_min_tokens=0, n_batch=100) as sparse,
    ):
        for n, like in ((1, dense), (59, dense), (60, sparse), (100, sparse), (101, dense),
                        (150, sparse)):  # fmt: skip
            ours = fresh(engine, tokens[:n])
            assert np.array_equal(ours, fresh(like, tokens[:n])), n
            assert np.array_equal(engine.logits(tokens[:n], all=True)[-1], ours), n
        assert not np.array_equal(fresh(dense, tokens[:60]), fresh(sparse, tokens[:60]))
        # What counts is what is new.
        with engine.session() as session:
            for n, ran in ((80, 1), (81, 0), (140, 0), (150, 0)):
                session.sync(tokens[:n])
                assert session.stats["prefill_sparse"] == ran, n
        assert engine.generate(tokens[:40], max_tokens=1).sparse == "off"
        assert engine.generate(tokens[::-1][:80], max_tokens=1).sparse == engine.info.sparse
        # A tap sees dense prefill too.
        assert len(engine.activations(tokens[:40])) == 4 * engine.info.n_layer


def test_measured_ratios(cache: Path) -> None:
    """Nothing about speed, but of whole products: what costs as much as dense gives about 1."""
    found = crossover.measure("16:16x4", "ref", 1)
    assert tuple(found) == crossover.ROWS and all(0.05 < ratio < 20 for ratio in found.values())

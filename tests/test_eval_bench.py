"""amber-eval and amber-bench: their arithmetic against slow twins, their figures against
llama.cpp's, their command lines."""

import csv
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import amber
from amber import bench, kernel_bench, plots, quantize, timing, weights
from amber import eval as evaluation
from numpy_llama import NumpyLlama, Rule, sparse_linear

TEXT = (
    "Once upon a time there was a small fox who lived at the edge of a wood. Every morning she "
    "walked to the river to look for her friends, and every evening she told them a story. "
) * 12

# Perplexity that llama-perplexity measured on text/tinystories-eval.txt, context 512, 40 windows
# (README of the test data).
LLAMA_CPP = {
    "stories260K-f32": 4.1317,
    "stories260K-f16": 4.1315,
    "tinystories-656k-f16": 35.9930,
    "stories3M-f16": 6.2470,
    "stories3M-qwen2-f16": 6.2471,
    "stories3M-pad256-f16": 6.2470,
    "stories3M-BF16": 6.2543,
    "stories3M-Q8_0": 6.2543,
    "stories3M-Q5_0": 6.5902,
    "stories3M-Q4_K_M": 6.5187,
    "stories3M-pad256-Q6_K": 6.3878,
    "stories3M-pad256-Q3_K_M": 9.6406,
}


def command(module, *args):
    return subprocess.run(
        [sys.executable, "-m", f"amber.{module}", *args],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    return str(path)


# ---- amber-eval ----


def test_perplexity_and_its_error():
    losses = [np.array([0.5, 1.5, 2.0]), np.array([4.0])]
    value, stderr = evaluation.perplexity(losses)
    assert value == pytest.approx(math.exp(2.0))
    variance = sum((x - 2.0) ** 2 for x in (0.5, 1.5, 2.0, 4.0)) / 4
    assert stderr == pytest.approx(math.exp(2.0) * math.sqrt(variance / 3))


def test_log_softmax():
    logits = np.array([[1.0, 2.0, 3.0], [1e4, -1e4, 0.0]], np.float32)
    expected = [1 - math.log(math.e + math.e**2 + math.e**3), -1e4]
    result = evaluation.log_softmax(logits)
    assert result[0, 0] == pytest.approx(expected[0], rel=1e-12)
    assert list(result[1]) == [0.0, -2e4, -1e4]


def test_evaluate_against_a_slow_twin(demo_model):
    ctx = 64
    with amber.Engine("demo") as engine, amber.Engine("demo", precision="float") as truth:
        result = evaluation.evaluate(engine, TEXT, ctx=ctx, chunks=3, against=truth)
        tokens = engine.tokenize(TEXT)
        losses, divergences, same = [], [], 0
        for start in (0, ctx, 2 * ctx):
            window = tokens[start : start + ctx]
            if engine.tokenizer.adds_bos:
                window[0] = engine.tokenizer.bos
            ours, theirs = engine.logits(window, all=True), truth.logits(window, all=True)
            for position in range(ctx // 2, ctx - 1):
                a = [float(x) for x in ours[position]]
                b = [float(x) for x in theirs[position]]
                log_a = math.log(math.fsum(math.exp(x) for x in a))
                log_b = math.log(math.fsum(math.exp(x) for x in b))
                losses.append(log_a - a[window[position + 1]])
                divergences.append(
                    math.fsum(
                        math.exp(y - log_b) * ((y - log_b) - (x - log_a))
                        for x, y in zip(a, b, strict=True)
                    )
                )
                same += a.index(max(a)) == b.index(max(b))
    assert result.tokens == len(losses) == 3 * 31
    assert result.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-9)
    assert result.kl_mean == pytest.approx(math.fsum(divergences) / len(losses), rel=1e-6, abs=1e-9)
    assert result.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-6, abs=1e-9)
    assert result.top1_agreement == pytest.approx(same / len(losses))
    assert 0 < result.kl_mean < 0.1 and result.chunks == 3


def test_blocks_change_nothing(demo_model, monkeypatch):
    with amber.Engine("demo") as engine:
        whole = evaluation.evaluate(engine, TEXT, ctx=64, chunks=2)
        monkeypatch.setattr(evaluation, "BLOCK_BYTES", 1)  # row by row
        assert evaluation.evaluate(engine, TEXT, ctx=64, chunks=2).perplexity == pytest.approx(
            whole.perplexity, rel=1e-12
        )


def measure(testdata, name, precision):
    text = evaluation.read_text(str(testdata / "text" / "tinystories-eval.txt"))
    with amber.Engine(testdata / "models" / f"{name}.gguf", precision=precision) as engine:
        return evaluation.evaluate(engine, text)


# Files without quantized weights: llama.cpp computes them in float as well. For the quantized ones
# it also rounds activations to 8 bits, which costs it up to 0.5 %.
@pytest.mark.parametrize("name", [n for n in LLAMA_CPP if n.endswith(("f32", "f16", "BF16"))])
def test_float_perplexity_is_llama_cpps(testdata, name):
    assert measure(testdata, name, "float").perplexity == pytest.approx(LLAMA_CPP[name], rel=1e-3)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_int8_perplexity_is_within_one_percent(testdata, name):
    assert measure(testdata, name, "int8").perplexity == pytest.approx(LLAMA_CPP[name], rel=1e-2)


def test_eval_command(demo_model, story):
    done = command("eval", "demo", "--text", story, "--ctx", "64", "--chunks", "2", "--json",
                   "--precision", "int8,float", "--against", "float", "-t", "1")  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    int8, exact = (json.loads(line) for line in done.stdout.splitlines())
    for key in ("perplexity", "perplexity_stderr", "kl_mean", "kl_p99", "top1_agreement", "tokens",
                "seconds", "tokens_per_second", "sparse", "threads", "isa"):  # fmt: skip
        assert key in int8
    assert (int8["precision"], exact["precision"]) == ("int8", "float")
    assert int8["tokens"] == 62 and int8["threads"] == 1
    assert exact["kl_mean"] == pytest.approx(0, abs=1e-12) and exact["top1_agreement"] == 1
    assert int8["reference_perplexity"] == exact["perplexity"]

    done = command("eval", "demo", "--text", story, "--ctx", "64", "--chunks", "2")
    assert done.returncode == 0
    assert f"perplexity {int8['perplexity']:.4f}" in done.stdout


def test_eval_of_sparse_against_dense(demo_model, story):
    done = command("eval", "demo", "--text", story, "--ctx", "64", "--chunks", "2", "--json",
                   "--sparse", "off", "--sparse", "8:16@all", "--against", "off")  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, sparse = (json.loads(line) for line in done.stdout.splitlines())
    assert dense["sparse"] == "off" and dense["coverage"] == 0
    assert dense["kl_mean"] == pytest.approx(0, abs=1e-12)
    assert "8:16" in sparse["sparse"] and sparse["coverage"] > 0.9
    assert sparse["kl_mean"] > 0 and sparse["reference_perplexity"] == dense["perplexity"]


def test_eval_command_refuses(demo_model, story, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for args, code, words in (
        (["demo", "--text", str(short)], 1, ["at least 512 tokens", "found"]),
        (["demo", "--text", str(tmp_path / "none")], 1, ["none"]),
        (["no-model", "--text", story], 1, ["no-model", "demo"]),
        (["demo", "--text", story, "--precision", "int4"], 2, ["int4", "int8"]),
        (["demo", "--text", story, "--ctx", "2"], 2, ["--ctx"]),
        (["demo", "--text", story, "--chunks", "-1"], 2, ["--chunks"]),
        (["demo"], 2, ["--text"]),
        (["demo", "--text", story, "--isa", "mmx"], 1, ["mmx", "ref"]),
        (["demo", "--text", story, "--sparse", "8:16", "--sparse", "99:16"], 2, ["99:16"]),
    ):
        done = command("eval", *args)
        assert done.returncode == code and done.stdout == "", (args, done.stderr)
        for word in words:
            assert word in done.stderr, (args, done.stderr)
        assert "Traceback" not in done.stderr


def test_clact_is_measured(demo_model, story):
    """The criterion that serving refuses."""
    done = command("eval", "demo", "--text", story, "--ctx", "64", "--chunks", "2", "--json",
                   "--sparse", "8:16@all", "--criterion", "clact", "--against", "off")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kl_mean"] > 0
    with pytest.raises(amber.AmberError, match="caching"):
        amber.Engine("demo", sparse="8:16/clact@all")


def test_kept_logits_change_nothing(demo_model):
    cache = {}
    with amber.Engine("demo", sparse="8:16@all") as engine, amber.Engine("demo") as dense:
        common = {"ctx": 64, "chunks": 3, "against": dense}
        first = evaluation.evaluate(engine, TEXT, **common)
        for _ in range(2):
            again = evaluation.evaluate(engine, TEXT, cache=cache, **common)
            assert (again.kl_mean, again.perplexity) == (first.kl_mean, first.perplexity)
            assert sorted(cache) == [0, 1, 2]


def test_pruned_weights(demo_model, tmp_path):
    """Against a sort row by row; the file keeps what it does not prune."""
    rng = np.random.default_rng(5)
    for n, m, width in ((2, 4, 64), (8, 16, 48), (1, 4, 10), (3, 3, 7)):
        rows = rng.integers(-3, 4, (5, width)).astype(np.float32)
        expected = np.zeros_like(rows)
        for i, first in itertools.product(range(5), range(0, width, m)):
            group = np.abs(rows[i, first : first + m])
            for place in sorted(range(len(group)), key=lambda p: (-group[p], p))[:n]:
                expected[i, first + place] = rows[i, first + place]
        assert np.array_equal(weights.prune(rows, n, m), expected), (n, m)
    path, out = str(demo_model), str(tmp_path / "out.gguf")
    plan = weights.plan_of("2:4@q,down#1-2", path)
    assert plan == {(1, "q"): "2:4", (2, "q"): "2:4", (1, "down"): "2:4", (2, "down"): "2:4"}
    assert len(weights.plan_of("8:16", path)) == 56
    weights.write_pruned(path, out, plan)
    before, after = quantize.Source(path), quantize.Source(out)
    for name, pruned in (("blk.1.attn_q", True), ("blk.0.attn_q", False), ("blk.1.ffn_up", False)):
        w = before.rows(f"{name}.weight")
        ours = after.unpacked(name, *w.shape)
        expected = weights.prune(w, 2, 4) if pruned else w
        assert np.abs(ours - expected).max() <= np.abs(w).max() / 254 * 1.001
        assert np.count_nonzero(ours.reshape(-1, 4), axis=1).max() == (2 if pruned else 4)


def test_weights_against_activations(demo_model, story):
    """The papers' comparison on one line each: pruned weights are another model altogether."""
    done = command("eval", "demo", "--text", story, "--ctx", "64", "--chunks", "3", "--json",
                   "--sparse", "2:4@all", "--prune-weights", "2:4", "--against", "off")  # fmt: skip
    assert done.returncode == 0, done.stderr
    activations, pruned = (json.loads(line) for line in done.stdout.splitlines())
    assert pruned["plan"] == "weights 2:4" and pruned["sparse"] == "off"
    assert pruned["coverage"] == activations["coverage"] == 1
    assert pruned["modelled_speedup"] == activations["modelled_speedup"] == 2
    assert pruned["kl_mean"] > 0 and pruned["kl_mean"] != activations["kl_mean"]


def test_sensitivity(demo_model, story, tmp_path):
    """e_q by numpy from the weights and the inputs of the dense model; KL as amber-eval measures it
    of that projection alone."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "map"
    args = ["demo", "--text", story, "--ctx", "64", "--chunks", "2", "--sparse", "2:4@k,down#3"]
    done = command("eval", *args, "--sensitivity", str(out), "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["layer"], r["projection"]) for r in rows] == [(3, "k"), (3, "down")]
    with open(f"{out}.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(r["kl"]) for r in table] == [r["kl"] for r in rows]
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    oracle = NumpyLlama(demo_model)
    with amber.Engine("demo", sparse="off") as engine:
        tokens = engine.tokenize(TEXT)
        lost = {}
        for start in (0, 64):
            window = tokens[start : start + 64]
            window[0] = engine.tokenizer.bos
            for key, name, tensor in (("q", "k", "attn_k"), ("down", "down", "ffn_down")):
                x = engine.activations(window)[3, key].astype(float)
                w = oracle.t[f"blk.3.{tensor}.weight"]
                y = sparse_linear(x, w, None, int8=True)
                sums = lost.setdefault(name, [0, 0])
                sums[0] += np.sum((sparse_linear(x, w, Rule(2, 4), int8=True) - y) ** 2)
                sums[1] += np.sum(y**2)
    for row in rows:
        a, b = lost[row["projection"]]
        assert row["e_q"] == pytest.approx(math.sqrt(a / b), rel=1e-3)
        cell = f"2:4@{row['projection']}#3"
        with amber.Engine("demo", sparse=cell) as engine, amber.Engine("demo") as dense:
            result = evaluation.evaluate(engine, TEXT, ctx=64, chunks=2, against=dense)
        # Another set of positions: here the last of a window predicts nothing.
        assert row["kl"] == pytest.approx(result.kl_mean, rel=1e-6)
    text = command("eval", *args, "--sensitivity", str(tmp_path / "only.csv")).stdout
    assert text.splitlines()[1].split() == ["layer", "k", "down", "k", "down"]
    assert not (tmp_path / "only.png").exists()


def test_pareto(demo_model, story, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "front"
    done = command("eval", "demo", "--text", story, "--ctx", "64", "--chunks", "2",
                   "--sparse", "8:16", "--sparse", "2:4@all", "--sparse", "off",
                   "--prune-weights", "2:4", "--pareto", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    with open(f"{out}.csv", newline="") as file:
        rows = {row["plan"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["8:16", "2:4@all", "off", "weights 2:4"]
    assert float(rows["off"]["modelled_speedup"]) == 1 and float(rows["off"]["kl_mean"]) == 0
    share = float(rows["8:16"]["coverage"])
    assert float(rows["8:16"]["modelled_speedup"]) == pytest.approx(1 / (1 - share / 2))
    assert [rows[p]["front"] for p in ("off", "8:16")] == ["True", "True"]
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    best = plots.front([{"x": 1, "y": 2}, {"x": 1, "y": 3}, {"x": 2, "y": 2}, {"x": 3, "y": 9}],
                       "x", "y")  # fmt: skip
    assert best == [{"x": 2, "y": 2}, {"x": 3, "y": 9}]


def test_studies_refuse(demo_model, story, tmp_path, monkeypatch, capsys):
    """And say what is missing before any work."""
    args = ["demo", "--text", story, "--ctx", "64", "--chunks", "1"]
    for more, code, words in (
        (["--sensitivity", "x.csv", "--precision", "float"], 2, "expected int8"),
        (["--pareto", "x.csv", "--precision", "int8,float"], 2, "one model"),
        (["--sensitivity", "x.csv", "--sparse", "2:4", "--sparse", "8:16"], 2, "one --sparse"),
        (["--sensitivity", "x.csv", "--sparse", "9:8"], 2, "9:8"),
        (["--prune-weights", "2:4x4"], 2, "expected N:M"),
        (["--prune-weights", "9:8"], 2, "9:8"),
        (["--times", story], 2, "amber-bench --kernels"),
    ):
        assert evaluation.main([*args, *more]) == code, more
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in ("--sensitivity", "--pareto"):
        assert evaluation.main([*args, option, str(tmp_path / "x")]) == 1
        assert "pip install 'amber-llm[plots]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [Path(story)]
    assert evaluation.main([*args, "--pareto", str(tmp_path / "x.csv"), "--sparse", "off"]) == 0


# ---- modelled time ----


def kernel_row(kernel, pattern, seconds, n_out, n_in, rows=512, isa="ref"):
    return {"kernel": kernel, "pattern": pattern, "rows": rows, "n_out": n_out, "n_in": n_in,
            "isa": isa, "seconds": seconds, "cpu": "a test"}  # fmt: skip


def test_modelled_time_of_a_table(tmp_path):
    """Nearest shapes, interpolation within a kind of pattern, inputs beside products."""
    rows = [
        kernel_row("gemm", "dense", 512.0, 100, 100),
        kernel_row("gemm", "8:16x4t2", 0.5 * 512, 100, 100),
        kernel_row("gemm", "12:16x4t2", 0.8 * 512, 100, 100),
        kernel_row("gemm", "dense", 3.0, 100, 100, rows=1),
        kernel_row("gemm", "dense", 9.0, 100, 100, isa="other"),
        kernel_row("gemm", "dense", 10 * 512.0, 100, 1000),
        kernel_row("attention", "dense", 1.0, 0, 0),
    ]
    path = tmp_path / "times"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = timing.TimeModel.read(path)
    assert "a test, ref, 1 threads, 512 rows" in times.name

    def one(method, work=10000, matrix=(100, 100), model=times):
        return model.projection(method, "q", work, matrix)

    assert one("dense") == pytest.approx(1) and one("dense", 20000) == pytest.approx(2)
    assert one("8:16x4t2/amber") == pytest.approx(0.5)
    assert one("10:16x4t2") == pytest.approx(0.65)
    assert one("4:16x4t2") == pytest.approx(0.2) and one("14:16x4t2") == pytest.approx(0.95)
    assert one("8:16") == one("2:4+r16") == pytest.approx(1)  # not measured: as dense
    assert one("8:16x4t2", 90000, (100, 900)) == pytest.approx(0.9 * 10)
    rows += [kernel_row("prepare", "dense", 0.3 * 512, 0, 100),
             kernel_row("prepare", "8:16x4t2", 0.6 * 512, 0, 100)]  # fmt: skip
    both = timing.TimeModel(rows, "rows")
    assert one("dense", model=both) == pytest.approx(1.1)  # q, k, v share it
    assert one("8:16x4t2", model=both) == pytest.approx(0.5 + 0.6)
    plain = timing.TimeModel.read(None)
    assert one("2:4", model=plain) == 5000 and one("dense", model=plain) == 10000
    assert one("2:4+r16", model=plain) == 6250 and one("top30%", model=plain) == 3000
    assert one("8:16x4t2", model=plain) == pytest.approx(5540)
    assert one("2:4/rsparse:8", model=plain) == 5000 + 8 * 200


@pytest.mark.parametrize(
    "content", ["{", "[1, 2]", '{"kernel": "gemm"}', "", '{"kernel": "attention"}']
)
def test_a_table_that_is_none(content, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="times.json: expected what amber-bench --kernels --json"):
        timing.TimeModel.read(path)


# ---- amber-bench ----


def test_fnv1a():
    # Test vectors of the algorithm's authors.
    assert bench.fnv1a(b"") == "cbf29ce484222325"
    assert bench.fnv1a(b"a") == "af63dc4c8601ec8c"
    assert bench.fnv1a(b"foobar") == "85944171f73967e8"


def test_work_counts_the_files_own_tensors(demo_model):
    reader = gguf.GGUFReader(str(demo_model))
    matrices = {t.name: t.n_elements for t in reader.tensors if len(t.shape) == 2}
    head = matrices.get("output.weight", matrices["token_embd.weight"])
    layers = sum(n for name, n in matrices.items() if name.startswith("blk."))
    with amber.Engine("demo") as engine:
        info = engine.info
        facts = {name: getattr(info, name) for name in info.__dataclass_fields__}
    assert bench.work(bench.Job("pp", 100), facts) == 2 * (100 * layers + head)
    # One byte a weight, and little more: scales, norms, padding.
    bytes_a_token = bench.work(bench.Job("tg", 2), facts) / 2
    assert layers + head < bytes_a_token < 1.1 * (layers + head)
    deeper = bench.work(bench.Job("tg", 2, 100), facts) / 2 - bytes_a_token
    batch = bench.work(bench.Job("tg", 2, 100, 3), facts) / 2
    assert batch == facts["token_bytes"] + 3 * (bytes_a_token + deeper - facts["token_bytes"])
    assert deeper == 100 * 2 * info.n_layer * info.n_head_kv * info.head_dim * 2


def test_peaks():
    ops, read = bench.peaks(1, amber.isa_list()[0])
    ref_ops, _ = bench.peaks(1, "ref")
    assert math.isfinite(ops) and math.isfinite(read)
    assert ops >= ref_ops > 1e8 and read > 1e8
    for threads, isa, error in ((0, "ref", ValueError), (1, "mmx", amber.DeviceError)):
        with pytest.raises(error):
            bench.peaks(threads, isa)


def test_bench_command(demo_model):
    args = ["demo", "-p", "16", "-n", "4", "-t", "1,2", "-r", "2", "-d", "0,8"]
    done = command("bench", *args, "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["threads"], r["test"]) for r in rows] == [
        (threads, test) for threads in (1, 2) for test in ("pp16", "tg4", "pp16 @ d8", "tg4 @ d8")
    ]
    for r in rows:
        assert tuple(r) == bench.KEYS
        assert r["tokens_per_second"] > 0 and r["stddev"] >= 0 and r["repeats"] == 2
        assert r["share_of_peak"] > 0 and r["load_seconds"] > 0
        assert 2**20 < r["peak_rss_bytes"] < 2**30
    # The number of threads changes no bit; another test or depth has other logits.
    hashes = [r["logits_hash"] for r in rows]
    assert hashes[:4] == hashes[4:] and len(set(hashes)) == 4

    table = command("bench", "demo", "-p", "16", "-n", "0", "-r", "1")
    assert table.returncode == 0
    assert table.stdout.startswith("| model") and "| pp16 " in table.stdout
    assert "peak of" in table.stdout

    args = ["demo", "-p", "0", "-n", "4", "-r", "1", "--batch", "1,3,8", "-d", "2", "--json"]
    rows = [json.loads(line) for line in command("bench", *args).stdout.splitlines()]
    assert [r["test"] for r in rows] == [f"tg4{batch} @ d2" for batch in ("", " b3", " b8")]
    assert len({r["logits_hash"] for r in rows}) == 1  # one sequence does not see the others
    refused = command("bench", "demo", "--batch", "257")
    assert refused.returncode == 2 and "--batch: expected at most 256" in refused.stderr

    text = command("bench", "demo", "-p", "0", "-n", "4", "-r", "1", "--csv").stdout
    (row,) = csv.DictReader(io.StringIO(text))
    assert tuple(row) == bench.KEYS and row["test"] == "tg4"


def test_bench_hash_is_that_of_the_logits(demo_model):
    done = command("bench", "demo", "-p", "16", "-n", "0", "-r", "1", "-t", "1", "--json")
    with amber.Engine("demo", threads=1) as engine:
        tokens = bench.sample_tokens(16, engine.info.n_vocab, engine.tokenizer.bos)
        assert len(tokens) == 16 and all(0 <= t < engine.info.n_vocab for t in tokens)
        name = bench.fnv1a(np.asarray(engine.logits(tokens)).tobytes())
    assert json.loads(done.stdout)["logits_hash"] == name


def test_bench_kernels():
    args = ["--kernels", "-p", "32", "-d", "8", "-r", "1", "-t", "1,2", "--isa", "ref"]
    args += ["--shapes", "64x96", "--sparse", "8:16x4t2"]
    done = command("bench", *args, "--json", "-q")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    few = [r for r in rows if r["kernel"] == "gemm" and r["rows"] <= 16]
    assert [(r["rows"], r["threads"]) for r in few] == [
        (n, t) for t in (1, 2) for n in (1, 4, 8, 16)
    ]
    assert {(r["n_out"], r["n_in"]) for r in few} == {(64, 96)}
    assert {r["kernel"] for r in rows} == {"gemm", "prepare", "attention"}
    for r in rows:
        assert tuple(r) == kernel_bench.KEYS
        assert 0 < r["seconds_min"] <= r["seconds"] and r["rate"] > 0
        if r["pattern"] == "dense":
            assert r["speedup"] == 1
        assert (r["share_of_peak"] is None) == (
            r["kernel"] == "prepare" or (r["kernel"] == "attention" and r["rows"] > 1)
        )


def test_kernel_work_counts():
    assert kernel_bench.Case("gemm", 512, 3, 5).work() == (512 * 15 / 1e9, "GMAC/s")
    assert kernel_bench.Case("gemm", 16, 3, 5).work() == (15 / 1e9, "GB/s")
    # One token behind 9 reads 10 keys and values of 2 bytes in each of 8 heads of 64.
    assert kernel_bench.Case("attention", 1, depth=9).work() == (10 * 8 * 64 * 4 / 1e9, "GB/s")
    # Three tokens behind 2 see 3 + 4 + 5 positions, with two products of 64 in each of 32 heads.
    macs, unit = kernel_bench.Case("attention", 3, depth=2).work()
    assert (macs, unit) == (pytest.approx(12 * 2 * 32 * 64 / 1e9), "GMAC/s")


def test_kernel_timer_refuses():
    for case, word in (
        (kernel_bench.Case("sort", 1, 16, 16), "sort"),
        (kernel_bench.Case("gemm", 0, 16, 16), "rows"),
        (kernel_bench.Case("gemm", 1, 16, 0), "16 x 0"),
        (kernel_bench.Case("gemm", 1, 16, 16, "8:4"), "pattern"),
        (kernel_bench.Case("attention", 1, depth=-1), "heads"),
    ):
        with pytest.raises(amber.AmberError, match=word):
            kernel_bench.Timer(case, "ref")


def test_bench_plot(demo_model, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.svg"
    args = ["demo", "-p", "16", "-n", "4", "-r", "2", "--plot", str(path)]
    done = command("bench", *args)
    assert done.returncode == 0 and "| pp16 " in done.stdout, done.stderr
    drawn = path.read_text()
    assert drawn.lstrip().startswith("<?xml") and "prefill" in drawn and "decode" in drawn


def test_bench_command_refuses(demo_model):
    for args, code, word in (
        ([], 2, "MODEL"),
        (["demo", "--kernels"], 2, "no model"),
        (["demo", "--plot", "a.txt"], 2, "a.txt"),
        (["demo", "--shapes", "16x16"], 2, "--kernels"),
        (["--kernels", "--shapes", "16x"], 2, "16x"),
        (["--kernels", "--sparse", "x", "--isa", "ref"], 2, "pattern"),
        (["no-model"], 1, "no-model"),
        (["demo", "-p", "x"], 2, "-p"),
        (["demo", "-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["demo", "-r", "0"], 2, "-r"),
        (["demo", "-t", "0"], 2, "-t"),
        (["demo", "--isa", "mmx"], 2, "mmx"),
        (["demo", "--precision", "int4"], 2, "int4"),
        (["demo", "-p", "300000000", "-n", "0"], 2, "expected"),
    ):
        done = command("bench", *args)
        assert done.returncode == code and done.stdout == "", (args, done.stderr)
        assert word in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)


# ---- tools/make_synthetic.py: the files that large measurements are made with ----


def make_synthetic(path, *args):
    tool = Path(__file__).resolve().parent.parent / "tools" / "make_synthetic.py"
    done = subprocess.run([sys.executable, tool, path, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16"])
def test_synthetic_model(tmp_path, kind):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    make_synthetic(path, "--shape", "tiny", "--type", kind)
    make_synthetic(again, "--shape", "tiny", "--type", kind)
    assert path.read_bytes() == again.read_bytes()
    for tensor in gguf.GGUFReader(str(path)).tensors:
        if len(tensor.shape) == 2:
            w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # A deviation of n normal values is off by 1/sqrt(2 n), here 0.5 % at most; 4-bit
            # rounding adds 1 % of variance.
            assert w.std() * math.sqrt(w.shape[1]) == pytest.approx(1, abs=0.025), tensor.name
    with amber.Engine(path) as engine:
        text = "Any text, even \u00fc and \U0001f600."
        assert engine.detokenize(engine.tokenize(text)) == text
        logits = np.asarray(engine.logits(text))
        # Rows of unit norm times an activation of norm sqrt(n): about unit variance.
        assert np.isfinite(logits).all() and 0.5 < logits.std() < 2


def test_synthetic_rope_factors(tmp_path, monkeypatch):
    """Llama 3's published rule, as loaders apply it, value by value."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "tools"))
    import make_synthetic as tool

    shape = tool.SHAPES["llama-3.2-1b"]
    factors = tool.rope_factors(shape)
    assert factors.shape == (32,)
    for i, factor in enumerate(factors):
        frequency = 500000.0 ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = 1.0
        elif wavelength > 8192 / 1:
            expected = 32.0
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = frequency / ((1 - smooth) * frequency / 32 + smooth * frequency)
        assert factor == pytest.approx(expected, rel=1e-6)

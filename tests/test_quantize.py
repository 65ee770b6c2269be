"""amber-quantize: Amber GGUFs against the files they came from, hostile ones, and their plans."""

import itertools
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

import amber
from amber import calibrate, permute, timing
from amber import quantize as q
from amber.eval import evaluate
from numpy_llama import PROJECTIONS, NumpyLlama, channel_factors, round_rows

TEXT = "There was once a king who had three sons, and the youngest went into the wood. " * 8
PLANS = ("off", "8:16", "2:4/norm@all", "8:16x4t2/amber/var@all", "8:16/amber-b/dpts@all")
MODELS = ("stories260K-f32", "stories260K-q4_0", "stories3M-BF16", "stories3M-IQ4_NL")
MODELS += ("stories3M-Q4_K_M", "stories3M-Q5_1", "stories3M-qwen2-f16", "stories3M-pad256-Q6_K")
MODELS += ("stories3M-pad256-Q2_K", "stories3M-pad256-IQ3_M", "tinystories-656k-q8_0")


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "amber.quantize", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def quantize(*args: object) -> dict:
    """The report of a run that must succeed."""
    return q.quantize(q.parser().parse_args(["-q", *map(str, args)]))


@pytest.fixture(scope="module")
def packed(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "demo.gguf"
    quantize(demo_model, out)
    return out


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT)
    return path


# ---- rounding and scores ----


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (17, 65), (40, 130)])
def test_pack_is_the_rule_of_kernels_h(n: int, k: int) -> None:
    """q = round-half-even(x * (127 / absmax)) + 128 in float32, laid out as kernels.h draws it."""
    rows = np.random.default_rng(n).standard_normal((n, k)).astype(np.float32)
    rows[0] = 0
    rows[n // 2] *= np.float32(1e-41)  # 127 / absmax overflows: a row of zeros
    panels, scale = q.pack(rows)
    k_pad = -(-k // 64) * 64
    assert panels.shape == (-(-n // 16), k_pad * 16) and scale.shape == (len(panels) * 16,)
    expected = np.full((len(panels), k_pad // 4, 16, 4), 128, np.uint8)
    scales = np.zeros(len(scale), np.float32)
    for o in range(n):
        absmax = np.abs(rows[o]).max()
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(127) / absmax
        if np.isinf(inverse):
            continue
        scales[o] = absmax / np.float32(127)
        for i in range(k):
            value = np.float32(rows[o, i] * inverse)
            expected[o // 16, i // 4, o % 16, i % 4] = round(float(value)) + 128
    assert np.array_equal(panels.ravel(), expected.ravel())
    assert np.array_equal(scale, scales)


def test_pack_refuses_what_is_not_finite() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        rows = np.ones((3, 8), np.float32)
        rows[2, 5] = bad
        with pytest.raises(amber.FileFormatError, match="layer: .*row 2"):
            q.pack(rows, "layer")


def test_percentiles_are_exact() -> None:
    """Both the plain way and the one by tails that large matrices take, with many ties too."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((1200, 1100)).astype(np.float32)
    for w in (normal, normal[:50, :70].copy(), np.rint(normal), np.zeros_like(normal)):
        ours = q.percentiles(w, 0.005, 0.995)
        expected = np.percentile(w.astype(np.float64), [0.5, 99.5])
        # Interpolated in float64, then rounded to float32: half an ulp.
        assert np.allclose(ours, expected, rtol=6e-8, atol=0)


def test_scores_equal_the_papers_formula() -> None:
    w = np.random.default_rng(1).standard_t(3, (300, 90)).astype(np.float32) * np.float32(0.1)
    for ours, criterion in zip(q.scores(w), ("norm", "amber", "amber-b"), strict=True):
        expected = channel_factors(w.astype(np.float64), criterion)
        assert np.allclose(ours, expected, rtol=1e-6), criterion
        assert abs(ours.min() - 1) <= 2**-24
    # A factor of the weights, exact in float32, changes no bit of them.
    assert np.array_equal(q.scores(w * np.float32(0.25)), q.scores(w))


# ---- the file ----


def same_logits(source: Path, ours: Path, sparse: str, **options: object) -> None:
    with (
        amber.Engine(source, sparse=sparse, n_ctx=128, **options) as a,
        amber.Engine(ours, sparse=sparse, n_ctx=128, **options) as b,
    ):
        tokens = a.tokenize(TEXT)[:101]
        assert tokens == b.tokenize(TEXT)[:101]
        assert np.array_equal(a.logits(tokens, all=True), b.logits(tokens, all=True)), sparse
        assert a.info.n_params == b.info.n_params
        assert a.info.sparse == b.info.sparse and a.info.coverage == b.info.coverage


@pytest.mark.parametrize("sparse", PLANS)
def test_same_bits_as_the_source(sparse: str, demo_model: Path, packed: Path) -> None:
    same_logits(demo_model, packed, sparse)


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_for_every_kind_of_source(name: str, testdata: Path, tmp_path: Path) -> None:
    source, out = testdata / "models" / f"{name}.gguf", tmp_path / "out.gguf"
    quantize(source, out)
    for sparse in ("off", "8:16/amber/dpts@all"):
        same_logits(source, out, sparse)


def test_same_bits_on_the_reference_kernels(demo_model: Path, packed: Path) -> None:
    same_logits(demo_model, packed, "2:4/amber@all", isa="ref")


def test_float_precision_multiplies_out(testdata: Path, tmp_path: Path) -> None:
    """Float32 of the rounded weights, against numpy float64 with weights rounded the same way.
    Rounding of float32 alone stays near 1e-6 (tests/test_sparse_model.py)."""
    source, out = testdata / "models" / "stories260K-f32.gguf", tmp_path / "out.gguf"
    quantize(source, out)
    oracle = NumpyLlama(source)
    for name, w in oracle.t.items():
        if q.LINEAR.fullmatch(name):
            oracle.t[name] = round_rows(w)
    with amber.Engine(out, precision="float") as engine:
        tokens = engine.tokenize(TEXT)[:60]
        ours = engine.logits(tokens, all=True)
    embedding = oracle.t["token_embd.weight"]
    hidden = oracle.logits(tokens, {})  # through the exact head: replaced by the rounded one
    state = np.linalg.lstsq(embedding, hidden.T, rcond=None)[0].T
    expected = state @ round_rows(embedding).T
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-5


def test_mapped_not_copied(demo_model: Path, packed: Path) -> None:
    with amber.Engine(packed) as engine, amber.Engine(demo_model) as source:
        # Norms: 2 of each layer and the last.
        assert engine.info.weight_bytes == (2 * 8 + 1) * 256 * 4
        assert source.info.weight_bytes > 7e6
    estimate = amber.memory_estimate(packed, sparse="off")
    assert estimate.weights_bytes == (2 * 8 + 1) * 256 * 4
    assert estimate.mapped_bytes > amber.memory_estimate(demo_model).mapped_bytes + 7e6
    floats = amber.memory_estimate(packed, precision="float")
    assert (
        floats.weights_bytes == amber.memory_estimate(demo_model, precision="float").weights_bytes
    )


def test_gguf_tools_read_it(demo_model: Path, packed: Path) -> None:
    ours, theirs = gguf.GGUFReader(packed), gguf.GGUFReader(demo_model)
    keys = {name: field.contents() for name, field in ours.fields.items()}
    for name, field in theirs.fields.items():
        if name.startswith(("llama.", "tokenizer.")) or name == "general.architecture":
            assert keys[name] == field.contents()
    assert keys["amber.format"] == 1 and keys["amber.layout"] == "p16k4o128"
    assert keys["amber.tied_output"] is True and keys["amber.source.name"] == "demo.gguf"
    assert keys["amber.source.size"] == str(demo_model.stat().st_size)
    tensors = {tensor.name: tensor for tensor in ours.tensors}
    assert all(tensor.data_offset % 64 == 0 for tensor in ours.tensors)
    down = tensors["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == "I8" and list(down.shape) == [768 // 64 * 64 * 16, 16]
    source = {tensor.name: tensor for tensor in theirs.tensors}["token_embd.weight"]
    assert tensors["token_embd.weight"].tensor_type == source.tensor_type
    assert np.array_equal(tensors["token_embd.weight"].data, source.data)


# ---- files that lie ----


def header_place(data: bytes, name: str) -> int:
    """Where what follows a key's or tensor's name begins."""
    raw = struct.pack("<Q", len(name)) + name.encode()
    assert data.count(raw) == 1, name
    return data.index(raw) + len(raw)


def damaged(packed: Path, tmp_path: Path, name: str, at: int, value: bytes) -> Path:
    data = bytearray(packed.read_bytes())
    place = header_place(data, name) + at
    data[place : place + len(value)] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("amber.format", 4, struct.pack("<I", 2), ["newer format 2", "update"]),
        ("amber.format", 4, struct.pack("<I", 0), ["amber.format", "0"]),
        ("amber.layout", 12, b"p32", ["amber.layout", "p16k4o128", "p32k4o128"]),
        ("blk.3.ffn_up.scale", -1, b"x", ["blk.3.ffn_up.scale", "not found"]),
        ("blk.3.ffn_up.weight", -1, b"x", ["blk.3.ffn_up.weight", "not found"]),
        ("blk.0.attn_q.weight", 4, struct.pack("<2Q", 2048, 32), ["blk.0.attn_q", "4096", "2048"]),
        ("output.scale", 4, struct.pack("<Q", 4095), ["output.scale", "4096 x 1", "4095"]),
        ("output.scale", 12, struct.pack("<I", 26), ["output.scale", "F32", "I32"]),
    ],
)
def test_wrong_headers(
    name: str, at: int, value: bytes, words: list[str], packed: Path, tmp_path: Path
) -> None:
    for precision in ("int8", "float"):
        with pytest.raises(amber.AmberError) as caught:
            amber.Engine(damaged(packed, tmp_path, name, at, value), precision=precision)
        assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("blk.2.ffn_down.scale", np.nan),
        ("blk.2.ffn_down.scale", np.inf),
        ("output.scale", -1.0),
        ("blk.1.attn_q.score", np.nan),
        ("blk.1.attn_q.score", 0.0),
    ],
)
def test_wrong_numbers(tensor: str, value: float, packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    place = next(t for t in gguf.GGUFReader(packed).tensors if t.name == tensor).data_offset
    data[place + 4 : place + 8] = struct.pack("<f", value)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(amber.FileFormatError, match=f"{tensor}: expected finite"):
        amber.Engine(path, sparse="8:16/norm@all")
    if "score" in tensor:
        amber.Engine(path, sparse="8:16@all").close()  # which has no use for it


def test_other_alignment(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool that rewrites the file with the usual 32 bytes would leave."""
    monkeypatch.setattr(q, "ALIGNMENT", 32)
    # An odd multiple of 32 bytes of header, or of an earlier tensor, puts a matrix off 64.
    for extra in ("", "x" * 32):
        source = q.Source(str(demo_model))
        q.write_packed(
            source, str(tmp_path / "m.gguf"), q.base_keys(source) | {"x": extra}, lambda *_: None
        )
        offsets = {t.data_offset % 64 for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        if 32 in offsets:
            break
    with pytest.raises(amber.FileFormatError, match="64 bytes"):
        amber.Engine(tmp_path / "m.gguf")


@pytest.mark.parametrize(("plan", "words"), [("9:8", "9:8"), ("8:16#99", "99"), ("", "found")])
def test_wrong_plan_in_the_file(plan: str, words: str, packed: Path, tmp_path: Path) -> None:
    source = q.Source(str(packed))
    path = tmp_path / "planned.gguf"
    q.copy_with_keys(source, str(path), q.base_keys(source) | {"amber.plan": plan})
    with pytest.raises(amber.FileFormatError, match="amber.plan") as caught:
        amber.Engine(path)
    assert words in str(caught.value)
    amber.Engine(path, sparse="off").close()


# ---- plans ----


def test_a_plan_is_stored_measured_and_used(
    demo_model: Path, packed: Path, text_file: Path, tmp_path: Path
) -> None:
    out, report_file = tmp_path / "planned.gguf", tmp_path / "report.json"
    done = command(
        demo_model, out, "--sparse", "8:16x4t2", "--criterion", "amber", "--calibrate", text_file,
        "-c", 64, "--report", report_file, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(report_file.read_text())
    assert report["plan"] == "8:16x4t2/amber@down#0-7;8:16x4t2/amber@q,gate#0-7" or report[
        "plan"
    ].startswith("8:16x4t2/amber@q,gate,down#0-7")
    # down and gate are as large; q is half of k and v together... counted from the shapes here.
    with amber.Engine(demo_model) as engine:
        i = engine.info
    size = {"q": i.n_head, "k": i.n_head_kv, "v": i.n_head_kv, "o": i.n_head}
    size = {name: heads * i.head_dim for name, heads in size.items()}
    size |= dict.fromkeys(("gate", "up", "down"), i.n_ff)
    share = (size["q"] + size["gate"] + size["down"]) / sum(size.values())
    assert report["coverage"] == pytest.approx(share)
    assert report["modelled_time"] == pytest.approx(1 - share * (1 - 0.074 - 0.48))
    assert [row["up"] for row in report["layers"]] == ["dense"] * 8

    with (
        amber.Engine(out) as planned,
        amber.Engine(out, sparse="off") as dense,
        amber.Engine(demo_model, sparse="8:16x4t2/amber") as asked,
        amber.Engine(demo_model) as plain,
    ):
        assert planned.info.sparse == "8:16x4t2/amber in 24/56 projections"
        assert plain.info.sparse == dense.info.sparse == "off"
        tokens = planned.tokenize(TEXT)[:99]
        assert np.array_equal(planned.logits(tokens), asked.logits(tokens))
        assert np.array_equal(dense.logits(tokens), plain.logits(tokens))
        result = evaluate(asked, TEXT, ctx=64, chunks=8, against=plain)
        for key in ("kl_mean", "perplexity", "kl_p99", "top1_agreement", "tokens"):
            assert report[key] == pytest.approx(getattr(result, key)), key
        assert float(planned.metadata["amber.plan.kl_mean"]) == report["kl_mean"]
    assert amber.memory_estimate(out).scratch_bytes > 0

    # Another plan for the same file, and none: the tensors are not made again.
    again, bare = tmp_path / "again.gguf", tmp_path / "bare.gguf"
    quantize(out, again, "--sparse", "2:4@down#1", "--calibrate", text_file, "-c", 64)
    with amber.Engine(again) as engine:
        assert engine.info.sparse == "2:4 in 1/56 projections"
        assert engine.metadata["amber.source.name"] == "demo.gguf"
    quantize(out, bare)
    assert bare.read_bytes() == packed.read_bytes()


def test_own_text(demo_model: Path, tmp_path: Path) -> None:
    a = quantize(demo_model, tmp_path / "a", "--sparse", "8:16", "-c", 64, "--chunks", 2)
    quantize(demo_model, tmp_path / "b", "--sparse", "8:16", "-c", 64, "--chunks", 2)
    assert a["calibration"] == "the model's own text"
    assert a["tokens"] == 2 * 31 and 0 < a["kl_mean"] < 10
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_skip(demo_model: Path, text_file: Path, tmp_path: Path) -> None:
    common = ("--sparse", "8:16", "--calibrate", text_file, "-c", 64, "--skip")
    given = quantize(demo_model, tmp_path / "a", *common, "0,6-7")
    assert given["skipped"] == [0, 6, 7]
    assert given["plan"] == "8:16@down#0-7;8:16@q,gate#1-5"
    auto = quantize(demo_model, tmp_path / "b", *common, "auto")
    worst = max(auto["sensitivity"], key=lambda row: row["kl"])
    assert auto["coverage"] >= calibrate.AUTO_COVERAGE
    if auto["skipped"]:
        assert worst["layers"][0] in auto["skipped"]


def test_budget(testdata: Path, tmp_path: Path) -> None:
    """The cost stays within the budget, a larger budget is faster, and at the same cost the choice
    is faster than one pattern for all."""
    model = testdata / "models" / "stories260K-f32.gguf"
    text = tmp_path / "text"
    text.write_text((testdata / "text" / "tinystories-eval.txt").read_text()[:20000])
    common = ("--calibrate", text, "-c", 128, "--chunks", 4)
    fixed = quantize(model, tmp_path / "fixed", "--sparse", "12:16x4t2@all", *common)
    small = quantize(model, tmp_path / "small", "--max-kl", fixed["kl_mean"] / 8, *common)
    same = quantize(model, tmp_path / "same", "--max-kl", fixed["kl_mean"], *common)
    assert small["kl_mean"] <= fixed["kl_mean"] / 8 and same["kl_mean"] <= fixed["kl_mean"]
    assert same["modelled_time"] < small["modelled_time"] < 1
    assert same["modelled_time"] < fixed["modelled_time"]
    with amber.Engine(tmp_path / "same") as engine:
        assert engine.info.coverage == pytest.approx(same["coverage"])
        assert engine.info.sparse == same["sparse"]
    only = quantize(
        model, tmp_path / "only", "--max-kl", 0.01, "--sparse", "8:16/norm@down,up", *common
    )
    assert {row["projection"] for row in only["sensitivity"]} == {"down", "up"}
    assert "/norm" in only["plan"] and "x4" not in only["plan"]


def test_other_budgets(testdata: Path, tmp_path: Path) -> None:
    """A rise of the perplexity, a speed at the least cost, a speed within a cost; by a table of
    times too. What cannot be had is said with the best that can."""
    model = testdata / "models" / "stories260K-f32.gguf"
    text = tmp_path / "text"
    text.write_text((testdata / "text" / "tinystories-eval.txt").read_text()[:20000])
    common = ("--calibrate", text, "-c", 128, "--chunks", 4)
    rise = quantize(model, tmp_path / "rise", "--max-ppl-increase", 3, *common)
    assert rise["perplexity"] / rise["dense_perplexity"] <= 1.03
    assert rise["modelled_time"] < 1 and rise["max_kl"] is None
    fast = quantize(model, tmp_path / "fast", "--min-speedup", 1.2, *common)
    more = quantize(model, tmp_path / "more", "--min-speedup", 1.3, *common)
    assert 1 / 1.3 < fast["modelled_time"] <= 1 / 1.2 and more["modelled_time"] <= 1 / 1.3
    assert 0 < fast["kl_mean"] < more["kl_mean"]
    both = ("--max-kl", fast["kl_mean"] / 4, "--min-speedup", 1.2)
    done = command(model, tmp_path / "both", *both, *common)
    assert done.returncode == 1 and "--min-speedup 1.2: the fastest plan" in done.stderr
    assert not (tmp_path / "both").exists()
    done = command(model, tmp_path / "both", "--min-speedup", 9, *common)
    assert done.returncode == 1 and "the fastest plan of 16x4t2 is" in done.stderr
    # Where only products of four times the width gain, only the wide inputs are pruned.
    table = tmp_path / "times"
    rows = [("dense", 64, 1.0), ("8:16x4t2", 64, 1.0), ("dense", 256, 4.0), ("8:16x4t2", 256, 2.0)]
    table.write_text("".join(
        json.dumps({"kernel": "gemm", "pattern": pattern, "rows": 512, "n_out": 64, "n_in": n_in,
                    "isa": "ref", "seconds": seconds}) + "\n"
        for pattern, n_in, seconds in rows
    ))  # fmt: skip
    report = tmp_path / "report.md"
    options = ("--min-speedup", 1.05, "--times", table, "--report", report)
    assert q.main(["-q", *map(str, (model, tmp_path / "table", *options, *common))]) == 0
    with amber.Engine(tmp_path / "table") as engine:
        plan = calibrate.expand(engine.metadata["amber.plan"], engine.info, ())
    assert {name for _, name in plan} == {"down"}
    lines = report.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| layer"))
    assert len(lines) == head + 2 + 5 and "16x4t2 0." in "\n".join(lines[head:])


def test_report_by_layer(demo_model: Path, text_file: Path, tmp_path: Path) -> None:
    """What the report says of a projection is what its parts measure."""
    report = quantize(
        demo_model, tmp_path / "out", "--sparse", "8:16@q,down#2", "--calibrate", text_file,
        "-c", 64, "--chunks", 2,
    )  # fmt: skip
    row = report["layers"][2]
    assert row["q"] == "8:16" and row["up"] == "dense" and row["kl"] == {"q": None, "down": None}
    assert row["time"] == {"q": 0.5, "down": 0.5} and set(row["e_q"]) == {"q", "down"}
    assert all(0.05 < error < 0.6 for error in row["e_q"].values())
    others = [r for r in report["layers"] if r["layer"] != 2]
    assert all(r["modelled_time"] == 1 and r["coverage"] == 0 and not r["e_q"] for r in others)


def test_a_budget_that_nothing_fits(testdata: Path, text_file: Path, tmp_path: Path) -> None:
    model, out = testdata / "models" / "stories260K-f32.gguf", tmp_path / "out.gguf"
    done = command(
        model, out, "--max-kl", 1e-9, "--sparse", "2:4@v", "--calibrate", text_file, "-c", 64
    )
    assert done.returncode == 0, done.stderr
    assert "the plan is dense" in done.stdout
    with amber.Engine(out) as engine:
        assert engine.info.sparse == "off" and engine.metadata["amber.plan"] == "off"


def test_plan_text_round_trip(demo_model: Path) -> None:
    with amber.Engine(demo_model) as engine:
        info = engine.info
    for text in (
        "8:16",
        "8:16/amber@q,gate#0-3,5; 2:4 @ down # 1,7",
        "2:4@all;dense@o,up#2-4;12:16x4t2/var@k",
    ):
        plan = calibrate.expand(text, info, ())
        assert calibrate.expand(calibrate.compact(plan), info, ()) == plan
        with (
            amber.Engine(demo_model, sparse=text) as a,
            amber.Engine(demo_model, sparse=calibrate.compact(plan)) as b,
        ):
            assert a.info.coverage == pytest.approx(calibrate.coverage(plan, info))
            assert np.array_equal(
                a.logits("The wolf and the fox"), b.logits("The wolf and the fox")
            )


def test_longest_start_that_fits() -> None:
    for count, limit, guess in itertools.product(range(1, 12), range(12), (0, 3, 20)):
        asked: list[int] = []

        def fits(n: int, asked: list[int] = asked, limit: int = limit) -> bool:
            asked.append(n)
            return n <= limit

        assert calibrate.longest(count, guess, fits) == min(count, limit)
        assert len(asked) == len(set(asked)) and all(0 < n <= count for n in asked)
        assert len(asked) <= 2 * math.ceil(math.log2(count + 1)) + 2


def test_steps_are_the_best_for_their_cost() -> None:
    """Every plan along the sequence is, for the cost that it has, the fastest of all combinations:
    the property of hulls, against trying all."""
    sizes = {"q": 4096, "k": 0, "v": 0, "o": 0, "gate": 0, "up": 6144, "down": 6144}
    info = SimpleNamespace(n_layer=1, work=[list(sizes.values())], matrices=[[(64, 64)] * 7])
    times = timing.TimeModel()
    rng = np.random.default_rng(2)
    patterns = calibrate.candidates(timing.read_pattern("8:16x4t2"))
    choices = []
    for name in ("q", "up", "down"):
        choice = calibrate.Choice([0], name, patterns, {})
        choice.kl = sorted(rng.exponential(1, len(patterns)), reverse=True)
        choices.append(choice)

    def took(name: str, method: str) -> float:
        return times.projection(method, name, sizes[name], (64, 64))

    options = [
        [(0.0, 0.0)]
        + [
            (took(c.projection, "dense") - took(c.projection, str(p)), kl)
            for p, kl in zip(patterns, c.kl, strict=True)
        ]
        for c in choices
    ]
    every = [tuple(map(sum, zip(*combination, strict=True))) for combination in
             itertools.product(*options)]  # fmt: skip
    saved = cost = 0.0
    for _, _, kl, time in calibrate.steps(choices, info, times):
        saved, cost = saved + time, cost + kl
        assert saved >= max(s for s, c in every if c <= cost + 1e-12) - 1e-9


# ---- the command ----


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--sparse", "9:8"], 2, "9:8"),
        (["--sparse", "8:16@head"], 2, "head"),
        (["--sparse", "auto"], 2, "auto"),
        (["--sparse", "missing.json"], 2, "missing.json"),
        (["--sparse", "8:16", "--skip", "77"], 2, "0-7"),
        (["--sparse", "8:16", "--skip", "some"], 2, "preset, auto"),
        (["--sparse", "8:16", "--calibrate", "missing.txt"], 1, "missing.txt"),
        (["--skip", "auto"], 2, "--sparse"),
        (["--criterion", "amber"], 2, "--sparse"),
        (["--sparse", "8:16", "--criterion", "clact"], 1, "clact"),
        (["--max-kl", "-1"], 2, "--max-kl"),
        (["--max-ppl-increase", "0"], 2, "--max-ppl-increase"),
        (["--min-speedup", "1"], 2, "above 1"),
        (["--times", "missing.json"], 2, "--sparse"),
        (["--permute-from", "weights"], 2, "--permute"),
        (["--sparse", "8:16", "--times", "missing.json"], 1, "missing.json"),
        (["--max-kl", "0.1", "--sparse", "2:4+r32"], 2, "2:4+r32"),
        (["--max-kl", "0.1", "--sparse", "8:16;2:4"], 2, "one pattern"),
        (["--chunks", "0"], 2, "--chunks"),
        (["--sparse", "8:16", "-c", "2"], 2, "--ctx"),
    ],
)
def test_bad_arguments(
    args: list[str], code: int, words: str, demo_model: Path, tmp_path: Path
) -> None:
    done = command(demo_model, tmp_path / "out.gguf", *args)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("amber-quantize: ") and words in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_short_text_and_bad_files(demo_model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "short.txt", tmp_path / "out.gguf"
    text.write_text("One two three.")
    done = command(demo_model, out, "--sparse", "8:16", "--calibrate", text)
    assert done.returncode == 1 and "512 tokens" in done.stderr
    done = command(text, out)
    assert done.returncode == 1 and "short.txt" in done.stderr
    done = command(tmp_path / "none.gguf", out)
    assert done.returncode == 1 and "none.gguf" in done.stderr
    (tmp_path / "same.gguf").write_bytes(demo_model.read_bytes())
    done = command(tmp_path / "same.gguf", tmp_path / "same.gguf")
    assert done.returncode == 1 and "another file" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["same.gguf", "short.txt"]


# ---- channel orders ----


@pytest.fixture(scope="module")
def source(testdata: Path) -> q.Source:
    return q.Source(str(testdata / "models" / "stories260K-f32.gguf"))


def random_orders(source: q.Source, residual: bool) -> permute.Orders:
    """Any order at all, for a model whose heads share values in groups."""
    f = permute.Forward(source)
    rng = np.random.default_rng(0)
    n_embd = int(source.tensors["token_embd.weight"].shape[0])
    n_ff = int(source.tensors["blk.0.ffn_up.weight"].shape[1])
    orders = permute.Orders(rng.permutation(n_embd) if residual else np.arange(n_embd))
    per_kv = f.n_head // f.n_head_kv
    for _ in range(f.n_layer):
        heads = [rng.permutation(f.head_dim) for _ in range(f.n_head_kv)]
        orders.values.append(np.concatenate([g * f.head_dim + p for g, p in enumerate(heads)]))
        orders.outputs.append(
            np.concatenate([h * f.head_dim + heads[h // per_kv] for h in range(f.n_head)])
        )
        orders.ffn.append(rng.permutation(n_ff))
    return orders


@pytest.mark.parametrize("name", ["stories260K-f32", "stories3M-qwen2-f16", "stories3M-Q8_0"])
def test_a_permuted_model_is_the_same_function(name: str, testdata: Path, tmp_path: Path) -> None:
    """INT8 and a float16 cache in both. Orders within heads and feed-forward change no bit. That of
    the residual stream changes roundings: of float sums, and for Q8_0 of the embedding to F16."""
    path = testdata / "models" / f"{name}.gguf"
    logits = []
    for orders in (None, False, True):
        source = q.Source(str(path))
        source.orders = None if orders is None else random_orders(source, residual=orders)
        out = tmp_path / "out.gguf"
        q.write_packed(source, str(out), q.base_keys(source), lambda *_: None)
        for precision in ("int8", "float"):
            with amber.Engine(out, precision=precision) as engine:
                logits.append(engine.logits(engine.tokenize(TEXT)[:60], all=True))
    plain, plain_float, inner, inner_float, every, every_float = logits

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.median(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)))

    if "Q8_0" not in name:  # whose embedding is F16 here as soon as there is any order
        assert np.array_equal(inner, plain)
        assert distance(inner_float, plain_float) < 1e-5
        assert distance(every_float, plain_float) < 1e-5
    # F16 rounds the embedding by 2^-12 on average; layers carry that on.
    assert distance(every_float, plain_float) < 2e-3
    # In INT8 both are roundings of that function, one as near to it as the other.
    assert distance(every, plain_float) < 1.5 * distance(plain, plain_float)


def test_forward_equals_the_oracle(source: q.Source) -> None:
    """The activations that choose an order, against numpy float64: rounding of float32."""
    oracle = NumpyLlama(Path(source.path))
    tokens = amber.Tokenizer(source.path).encode(TEXT)[:64]
    seen: dict[tuple[int, str], list[np.ndarray]] = {}
    forward = permute.Forward(source)
    forward._weighted = lambda x, *_: x.reshape(-1, x.shape[-1])
    forward.run(
        [tokens[:32], tokens[32:]],
        lambda il, what, rows: seen.setdefault((il, what), []).append(rows),
        lambda *_: None,
    )
    last = oracle.layers - 1
    for i, window in enumerate((tokens[:32], tokens[32:])):
        inputs: dict[str, np.ndarray] = {}
        x = oracle.t["token_embd.weight"][window]
        for il in range(oracle.layers):
            w = {k: oracle.t[f"blk.{il}.{n}.weight"] for k, n in PROJECTIONS.items()}
            z = inputs["attn"] = oracle.norm(x, f"blk.{il}.attn_norm.weight")
            z = inputs["heads"] = oracle.attention(*(z @ w[p].T for p in "qkv"))
            x = x + z @ w["o"].T
            z = inputs["residual"] = oracle.norm(x, f"blk.{il}.ffn_norm.weight")
            gate = z @ w["gate"].T
            z = inputs["ffn"] = gate / (1 + np.exp(-gate)) * (z @ w["up"].T)
            x = x + z @ w["down"].T
        for what, rows in (("heads", 0), ("residual", 1), ("ffn", 0)):
            ours = seen[last, what][rows][32 * i : 32 * i + 32]
            distance = np.linalg.norm(ours - inputs[what]) / np.linalg.norm(inputs[what])
            assert distance < 1e-4, what


@pytest.mark.parametrize("k", [4, 32, 64, 200, 288, 30])
def test_order_is_a_permutation_in_blocks(k: int) -> None:
    """And it finds what was hidden: channels that rise together, strewn about."""
    rng = np.random.default_rng(k)
    hidden = rng.permutation(k)
    loud = rng.exponential(1, (4000, -(-k // 4)))
    x = np.repeat(loud, 4, axis=1)[:, :k] * rng.uniform(0.9, 1.1, (4000, k))
    for centred in (True, False):
        order = permute.order(permute.together(x[:, hidden], centred))
        assert sorted(order) == list(range(k))
        if k % 4 == 0:
            assert all(len(set(block)) == 1 for block in (hidden[order] // 4).reshape(-1, 4))
        else:
            assert np.array_equal(order, np.arange(k))


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("2:4", permute.Layout(1, 4)),
        ("8:16x", permute.Layout(1, 16)),
        ("12:16x4t2", permute.Layout(4, 16)),
        ("8:32x4", permute.Layout(4, 32)),
        ("2:4+r32", permute.Layout(1, 32, True)),
        ("top30%", permute.Layout()),
    ],
)
def test_order_for_a_pattern(pattern: str, layout: permute.Layout) -> None:
    """Single channels of unequal size are spread over the groups, and in a window with relief the
    largest of four comes first."""
    assert permute.Layout.of(pattern) == layout
    if layout.block > 1:
        return
    order = permute.order(np.diag(np.arange(1.0, 257.0)), layout)
    assert sorted(order) == list(range(256))
    groups = 256 // layout.group
    # The channels come in rising size: of every stretch of as many as there are groups, each group
    # has one.
    assert (np.sort(order.reshape(groups, -1) // groups, axis=1) == np.arange(layout.group)).all()
    if layout.relief:
        assert (order.reshape(-1, 4).argmax(axis=1) == 0).all()


def test_permute_keeps_more(testdata: Path, tmp_path: Path) -> None:
    """Down and o, whose orders keep the most energy, cost less under the same block pattern, on
    text that did not choose the order. The dense perplexity moves by INT8 rounding alone."""
    model = testdata / "models" / "stories3M-f16.gguf"
    story = (testdata / "text" / "tinystories-eval.txt").read_text()
    ours, other = tmp_path / "ours.txt", story[60000:80000]
    ours.write_text(story[:30000])
    report = quantize(model, tmp_path / "new", "--permute", "--calibrate", ours, "-c", 128)
    assert report["permuted"] is True
    quantize(model, tmp_path / "old")
    cost = {}
    for name in ("old", "new"):
        with (
            amber.Engine(tmp_path / name, sparse="8:16x4t2@o,down") as sparse,
            amber.Engine(tmp_path / name, sparse="off") as dense,
        ):
            cost[name] = evaluate(sparse, other, ctx=128, chunks=12, against=dense)
    assert cost["new"].kl_mean < 0.95 * cost["old"].kl_mean
    change = cost["new"].reference_perplexity / cost["old"].reference_perplexity
    assert change == pytest.approx(1, abs=0.01)


def test_an_order_from_weights_alone(testdata: Path, tmp_path: Path) -> None:
    """No text is read, and down and o lose less than in the file's own order."""
    model = testdata / "models" / "stories3M-f16.gguf"
    other = (testdata / "text" / "tinystories-eval.txt").read_text()[60000:80000]
    options = ("--permute", "--permute-from", "weights", "--calibrate", tmp_path / "missing")
    assert quantize(model, tmp_path / "new", *options)["permuted"] is True
    quantize(model, tmp_path / "old")
    cost = {}
    for name in ("old", "new"):
        with (
            amber.Engine(tmp_path / name, sparse="8:16x4t2@o,down") as sparse,
            amber.Engine(tmp_path / name, sparse="off") as dense,
        ):
            cost[name] = evaluate(sparse, other, ctx=128, chunks=12, against=dense).kl_mean
    assert cost["new"] < 0.97 * cost["old"]


def test_norms_of_heads_in_statistics(tmp_path: Path) -> None:
    """Qwen 3's activations in numpy are the engine's."""
    path = GOLDEN / "qwen3.gguf"
    tokens = np.random.default_rng(1).integers(3, 280, 40).tolist()
    forward, seen = permute.Forward(q.Source(str(path))), {}
    forward._weighted = lambda x, *_: x.reshape(-1, x.shape[-1])
    forward.run(
        [tokens], lambda il, what, x: seen.setdefault((il, what), []).append(x), lambda *_: None
    )
    with amber.Engine(path, precision="float", n_ctx=64) as engine:
        ours, last = engine.activations(tokens), engine.info.n_layer - 1
    for what, rows, name in (("heads", 0, "o"), ("residual", 1, "gate"), ("ffn", 0, "down")):
        theirs = seen[last, what][rows]
        assert np.linalg.norm(ours[last, name] - theirs) < 1e-3 * np.linalg.norm(theirs), what


def test_permute_wants_a_source(packed: Path, text_file: Path, tmp_path: Path) -> None:
    done = command(packed, tmp_path / "x.gguf", "--permute", "--calibrate", text_file, "-c", 64)
    assert done.returncode == 1 and "--permute" in done.stderr


# ---- architectures ----

GOLDEN = Path(__file__).parent / "golden"  # made by tools/make_architectures.py


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda p: p.stem)
def test_every_architecture_is_packed(path: Path, tmp_path: Path) -> None:
    """The same weights, biases and scores to the last bit, projections that share a tensor too."""
    out = tmp_path / "packed.gguf"
    quantize(path, out)
    tokens = np.random.default_rng(1).integers(3, 280, 40).tolist()
    for plan in ("off", "8:16/amber@all"):
        logits = []
        for file in (path, out):
            with amber.Engine(file, sparse=plan, n_ctx=64, threads=1) as engine:
                logits.append(np.array(engine.logits(tokens, all=True)))
        assert np.array_equal(*logits)


def test_permute_knows_its_architectures(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    done = command(GOLDEN / "gemma2.gguf", tmp_path / "out.gguf", "--permute", "--calibrate", text)
    assert done.returncode == 1 and "expected a model of llama, qwen2, qwen3" in done.stderr
    assert not (tmp_path / "out.gguf").exists()

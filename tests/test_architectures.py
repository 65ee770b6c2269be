"""Every architecture against transformers: tiny models of random weights in tests/golden, made by
tools/make_architectures.py, which says how."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

import amber
import check_llama_cpp
import make_architectures as maker
from architecture_checks import (
    GOLDEN,
    float_errors,
    int8_divergences,
    kl,
    mixture,
    one_by_one,
    relative,
)

# Float32 rounding of both sides, and the golden files' half precision (2^-11).
FLOAT_BOUND = 1e-3
# What rounding to INT8 costs these models, whose weights have no structure: KL divergence, dense
# and pruned, about twice of what was measured (tools/architecture_table.py). Near ties change
# masks, which costs most where attention is sharp: longrope from a context of 4 sharpens it
# fourfold, and SmolLM3's layers without RoPE see far.
INT8_KL = {
    "llama": (0.003, 0.05),
    "mistral": (0.003, 0.07),
    "qwen2": (0.03, 0.5),
    "qwen3": (0.001, 0.02),
    "mixtral": (0.04, 0.06),
    "qwen2moe": (0.02, 0.06),
    "qwen3moe": (0.004, 0.03),
    "gemma": (0.002, 0.03),
    "gemma2": (0.001, 0.02),
    "gemma3": (0.002, 0.05),
    "phi3": (0.003, 0.07),
    "phi3-long": (0.3, 0.8),
    "phi3-short": (0.004, 0.05),
    "smollm3": (0.05, 2),
    "olmo2": (0.002, 0.05),
    "granite": (0.001, 0.001),
    "starcoder2": (0.005, 0.05),
    "stablelm": (0.002, 0.05),
    "stablelm-12b": (0.002, 0.02),
    "olmo3": (0.003, 0.05),
    "olmo": (0.001, 0.05),
    "olmoe": (0.001, 0.02),
    "granitemoe": (0.001, 0.001),
    "phi2": (0.001, 0.007),
    "command-r": (0.003, 0.06),
    "cohere2": (0.007, 0.1),
    "glm4": (0.003, 0.04),
    "ernie4_5": (0.02, 0.5),
    "seed_oss": (0.003, 0.06),
    "gpt-oss": (0.03, 0.3),
    "chatglm": (0.003, 0.07),
    "glm4moe": (0.003, 0.2),
    "ernie4_5-moe": (0.004, 0.2),
    "exaone4": (0.003, 0.1),
    "exaone4-small": (0.008, 0.3),
    "hunyuan-dense": (0.002, 0.04),
    "hunyuan-moe": (0.002, 0.04),
    "mistral3": (0.003, 0.05),
    "arcee": (0.002, 0.004),
    "nemotron": (0.002, 0.004),
    "exaone": (0.02, 0.3),
    "jais2": (0.002, 0.005),
    "dots1": (0.003, 0.2),
    "minimax-m2": (0.04, 0.03),
    "granite-hybrid": (0.001, 0.001),
    "gpt2": (0.006, 0.02),
    "starcoder": (0.004, 0.04),
    "gptneox": (0.001, 0.004),
    "gptneox-serial": (0.001, 0.01),
    "falcon": (0.006, 0.03),
    "falcon-40b": (0.005, 0.02),
    "qwen2vl": (0.003, 0.06),
    "qwen3vl": (0.002, 0.05),
    "qwen3vlmoe": (0.06, 0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", maker.CASES)
def test_float_logits(name: str) -> None:
    """Dense, and pruned by the paper's policy: q, gate and down, all layers, |x|."""
    errors = float_errors(name)
    assert max(errors.values()) < FLOAT_BOUND, errors


@pytest.mark.parametrize("name", maker.CASES)
def test_int8_logits(name: str) -> None:
    found = int8_divergences(name)
    dense, sparse = INT8_KL[name]
    assert found.pop("dense") < dense
    assert max(found.values()) < sparse, found


@pytest.mark.parametrize("name", maker.CASES)
def test_live(name: str, tmp_path: Path) -> None:
    """The same against transformers as it is installed, through the converter: prefill of several
    lengths, token by token, a mixture of both, and pruned."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from amber import convert

    model, expected = maker.make(name)
    maker.save(name, model, tmp_path / "folder")
    path = tmp_path / "model.gguf"
    convert.write_gguf(
        convert.Folder(str(tmp_path / "folder")),
        str(path),
        maker.CASES[name].kind,
        lambda _d, _t: None,
    )
    *dense, pruned = maker.prompts(name)
    with amber.Engine(path, precision="float", n_ctx=256) as engine:
        for i, tokens in enumerate(dense):
            ours = engine.logits(tokens, all=True)
            assert relative(ours, expected[f"dense {i}"]) < FLOAT_BOUND, len(tokens)
            last = mixture(engine, tokens)
            assert relative(last, expected[f"dense {i}"][-1]) < FLOAT_BOUND, len(tokens)
        with engine.session() as session:
            session.sync(dense[1][:1])
            for n, token in enumerate(dense[1][1:], 1):
                session.append(token)
                ours = np.array(session.logits)
                assert relative(ours, expected["dense 1"][n]) < FLOAT_BOUND, n
    for pattern in maker.PATTERNS:
        with amber.Engine(path, precision="float", sparse=f"{pattern}/act", n_ctx=256) as engine:
            ours = engine.logits(pruned, all=True)
            assert relative(ours, expected[pattern]) < FLOAT_BOUND, pattern


# ---- files that do not fit their architecture ----


def altered(
    source: Path,
    out: Path,
    keys: dict[str, object] | None = None,
    without: str = "",
    arch: str | None = None,
) -> Path:
    """A copy of a model with other keys (of the architecture), without a tensor, or under the name
    of another architecture."""
    reader = GGUFReader(source)
    old = reader.fields["general.architecture"].contents()
    arch = arch or old
    keys = {f"{arch}.{name}": value for name, value in (keys or {}).items()}
    writer = GGUFWriter(out, arch)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (*keys, "general.architecture"):
            continue
        kind = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        name = field.name.replace(f"{old}.", f"{arch}.", 1)
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    for name, value in keys.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            kind = {str: "STRING", float: "FLOAT32", int: "UINT32", bool: "BOOL"}[type(value)]
            writer.add_key_value(name, value, GGUFValueType[kind])
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen3moe", {"keys": {"expert_used_count": 99}}, ["expert_used_count", "1..16", "99"]),
        ("qwen3moe", {"keys": {"expert_used_count": 0}}, ["expert_used_count", "1..16", "0"]),
        ("qwen3moe", {"keys": {"expert_count": 8}}, ["ffn_gate_inp", "64 x 8", "64 x 16"]),
        ("qwen3moe", {"keys": {"expert_count": 5000}}, ["expert_count", "5000"]),
        ("qwen3moe", {"keys": {"expert_feed_forward_length": 64}}, ["ffn_gate_exps", "64 x 1024"]),
        ("qwen3moe", {"without": "blk.1.ffn_down_exps.weight"}, ["blk.1.ffn_down_exps", "split"]),
        ("qwen2moe", {"without": "blk.0.ffn_up_shexp.weight"}, ["blk.0.ffn_up_shexp"]),
        ("glm4moe", {"keys": {"expert_group_count": 2}}, ["experts in 2 groups", "one group"]),
        ("glm4moe", {"keys": {"expert_gating_func": 9}}, ["gating 9", "2 sigmoid"]),
        ("glm4moe", {"keys": {"nextn_predict_layers": 3}}, ["nextn_predict_layers", "0 to 2"]),
        ("gpt-oss", {"without": "blk.0.ffn_up_exps.weight"}, ["blk.0.ffn_up_exps", "split"]),
        ("gemma2", {"without": "blk.0.post_ffw_norm.weight"}, ["blk.0.post_ffw_norm.weight"]),
        ("gemma3", {"keys": {"attention.sliding_window_pattern": [True]}}, ["pattern", "6", "1"]),
        ("gemma3", {"keys": {"attention.sliding_window_pattern": ["x"] * 6}}, ["strings"]),
        ("gemma3", {"keys": {"attention.sliding_window": -1.0}}, ["sliding_window"]),
        ("gemma3", {"keys": {"attention.value_length": 8}}, ["32 keys", "8 values"]),
        ("granite", {"keys": {"residual_scale": float("nan")}}, ["residual_scale", "finite"]),
        ("phi3-long", {"without": "rope_factors_long.weight"}, ["longrope", "rope_factors_long"]),
        ("phi3", {"without": "blk.1.attn_qkv.weight"}, ["blk.1.attn_q", "not found"]),
        ("phi3", {"keys": {"feed_forward_length": 95}}, ["blk.0.ffn_gate", "not found"]),
        ("starcoder2", {"without": "output_norm.weight"}, ["output_norm.weight"]),
        ("stablelm", {"keys": {"attention.layer_norm_epsilon": "x"}}, ["layer_norm_epsilon"]),
        ("gpt2", {"without": "position_embd.weight"}, ["position_embd.weight", "not found"]),
        ("gpt2", {"keys": {"context_length": 512}}, ["position_embd.weight", "64 x 512"]),
        ("gptneox-serial", {"without": "blk.1.ffn_norm.weight"}, ["blk.1.ffn_norm", "not found"]),
        ("llama", {"arch": "minicpm"}, ["minicpm.embedding_scale", "incomplete"]),
        ("llama", {"arch": "baichuan", "keys": {"block_count": 40}}, ["40 layers", "ALiBi"]),
    ],
)
def test_refused(name: str, change: dict, words: list[str], tmp_path: Path) -> None:
    path = altered(GOLDEN / f"{name}.gguf", tmp_path / "bad.gguf", **change)
    with pytest.raises(amber.AmberError) as caught:
        amber.Engine(path)
    assert all(word in str(caught.value) for word in words), caught.value


# Architectures whose classes are not among transformers', and those that compute the same: their
# files differ in the name and the keys given here.
SAME = {
    "internlm2": ("llama", {}, {}),
    "xverse": ("llama", {}, {}),
    "baichuan": ("llama", {}, {}),
    "minicpm": ("granite", {}, {}),
    "pangu-embedded": ("qwen2", {}, {}),
    "qwen": ("qwen2", {"feed_forward_length": 192}, {}),
    "orion": ("stablelm", {}, {}),
    "codeshell": ("starcoder2", {}, {"attention.sliding_window": 0}),
    "deepseek": ("ernie4_5-moe", {}, {"expert_weights_norm": False}),
    "bailingmoe": ("ernie4_5-moe", {"expert_weights_norm": True}, {}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_as_another(name: str, tmp_path: Path) -> None:
    like, keys, others = SAME[name]
    path = altered(GOLDEN / f"{like}.gguf", tmp_path / "own.gguf", keys, arch=name)
    other = altered(GOLDEN / f"{like}.gguf", tmp_path / "other.gguf", others)
    tokens = maker.prompts(like)[1]
    for sparse in ("off", "2:4/act", "8:16/act"):
        with (
            amber.Engine(path, sparse=sparse) as theirs,
            amber.Engine(other, sparse=sparse) as ours,
        ):
            assert theirs.info.architecture == name
            assert np.array_equal(theirs.logits(tokens, all=True), ours.logits(tokens, all=True))


# As INT8_KL, dense.
LLAMA_CPP_KL = {
    "internlm2": 0.003, "xverse": 0.003, "baichuan": 0.001, "minicpm": 0.001,
    "pangu-embedded": 0.03, "qwen": 0.02, "orion": 0.002, "codeshell": 0.005, "deepseek": 0.006,
    "bailingmoe": 0.02, "maincoder": 0.002, "plamo": 0.002,
}  # fmt: skip


@pytest.mark.parametrize("name", check_llama_cpp.VARIANTS)
def test_llama_cpp_logits(name: str, tmp_path: Path) -> None:
    """Against what llama.cpp computes: prefill, a mixture with tokens one by one, and INT8."""
    path = tmp_path / "model.gguf"
    tokens = check_llama_cpp.write(name, path)
    with np.load(GOLDEN / f"{name}.npz") as file:
        expected = file["logits"].astype(np.float64)
    with amber.Engine(path, precision="float", n_ctx=256) as engine:
        assert relative(engine.logits(tokens, all=True), expected) < FLOAT_BOUND
        assert relative(one_by_one(engine, tokens), expected) < FLOAT_BOUND
        assert relative(mixture(engine, tokens), expected[-1]) < FLOAT_BOUND
    with amber.Engine(path, n_ctx=256) as engine:
        assert kl(engine.logits(tokens, all=True), expected) < LLAMA_CPP_KL[name]


def test_architectures_are_listed(tmp_path: Path) -> None:
    """What the error about an unknown architecture names is what the table has."""
    path = altered(GOLDEN / "llama.gguf", tmp_path / "unknown.gguf", arch="unknown")
    with pytest.raises(amber.UnsupportedModelError) as caught:
        amber.Engine(path)
    listed = re.sub(r"\(.*?\)|, and of models with vision the part on text:", "",
                    str(caught.value).split("runs: ")[1])  # fmt: skip
    assert set(listed.split()) == {case.arch for case in maker.CASES.values()} | set(
        check_llama_cpp.VARIANTS
    )


def test_context_beyond_learned_positions() -> None:
    """The table of positions ends where the context does."""
    with amber.Engine(GOLDEN / "gpt2.gguf") as engine:
        assert engine.info.n_ctx_train == 256
        tokens = [5] * 256
        with engine.session(n_ctx=256) as session:
            session.sync(tokens)
    with pytest.raises(amber.ArgumentError, match="n_ctx: expected at most 256.*found 257"):
        amber.Engine(GOLDEN / "gpt2.gguf", n_ctx=257)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(amber.UnsupportedModelError, match='"mamba".*llama.*qwen3moe.*gemma3'):
        amber.Engine(path)


def test_memory_of_a_long_prompt() -> None:
    """A prompt of 32768 tokens takes what the estimate says, windows included."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    done = subprocess.run(
        [sys.executable, Path(maker.__file__).with_name("check_memory.py"), "--shape",
         "small-windows"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_windowed_layers_hold_a_window() -> None:
    """A longer context costs cache only in the layers that see all of it."""
    sizes = {
        n: amber.memory_estimate(GOLDEN / "gemma3.gguf", n_ctx=n, n_batch=64).kv_bytes
        for n in (4096, 8192)
    }
    position = 2 * 2 * 2 * 32  # K and V of one position of one layer, two heads of 32, float16
    assert sizes[8192] - sizes[4096] == position * 4096
    assert sizes[4096] == position * (4096 + 5 * 192)  # 12 + 64 + 62 positions, in steps of 64


def test_info_tells_of_experts_and_windows() -> None:
    with amber.Engine(GOLDEN / "qwen2moe.gguf") as engine:
        info = engine.info
        assert (info.n_expert, info.n_expert_used, info.window) == (8, 3, 0)
    with amber.Engine(GOLDEN / "cohere2.gguf") as engine:
        info = engine.info
        assert (info.n_expert, info.n_expert_used, info.window) == (0, 0, 12)


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("plan", ["8:16x4@all", "4:16x4t2@all", "8:16x4/dpts/var@gate,down"])
def test_experts_rows_in_lists(name: str, plan: str) -> None:
    """Kernels that skip what is pruned give what plain ones give, whatever the threads."""
    tokens = (3 * maker.prompts(name)[-2])[:500]
    results = []
    for isa, threads in ((None, 1), (None, 2), ("ref", 2)):
        with amber.Engine(
            GOLDEN / f"{name}.gguf", sparse=plan, isa=isa, threads=threads, n_ctx=512
        ) as engine:
            results.append(engine.logits(tokens, all=True))
    assert np.array_equal(results[0], results[1])
    # Norms and softmax are summed in another order by every column; INT8 rounding then makes steps.
    assert kl(results[0], results[2].astype(np.float64)) < 1e-3


def test_work_of_a_mixture() -> None:
    """One token uses the attention, the router's choice of experts, and the shared one."""
    reader = GGUFReader(GOLDEN / "qwen2moe.gguf")
    count = {"exps": 0, "other": 0}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and "gate_inp" not in tensor.name:
            count["exps" if "_exps" in tensor.name else "other"] += (
                tensor.n_elements if len(tensor.shape) > 1 else 0
            )
    with amber.Engine(GOLDEN / "qwen2moe.gguf") as engine:
        assert engine.info.layer_multiplications == count["other"] + count["exps"] * 3 // 8
        one = engine.info.token_bytes
    head = 64 * 320
    assert engine.info.layer_multiplications + head < one
    with amber.Engine(GOLDEN / "qwen2moe.gguf", precision="float") as engine:
        assert engine.info.token_bytes == 4 * (engine.info.layer_multiplications + head)

"""Hugging Face folders: what is written against the files and configurations they came from."""

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers

import amber
import make_architectures as maker
import tokenizer_oracles as oracles
from amber import convert_tokenizer as ct
from amber import quantize as q
from amber.convert import Config, Folder, Rope, config_keys, write_gguf
from amber.safetensors import read_folder

HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


# ---- folders ----


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values (the rest is cut off)."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    kinds = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int8": "I8",
             "uint8": "U8"}  # fmt: skip
    header, data = {}, b""
    for name, values in tensors.items():
        begin = len(data)
        data += np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": kinds[values.dtype.name], "shape": list(values.shape),
                        "data_offsets": [begin, len(data)]}  # fmt: skip
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "vocab_size": 40,
}  # fmt: skip


def tiny(folder: Path, change: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Path:
    """A folder of a llama with one layer. change: other values of config.json; tensors: others by
    the last part of their module's name, None leaves one out."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG | (change or {}))
    rng = np.random.default_rng(5)
    shapes = {
        "model.embed_tokens": (40, 32), "model.norm": (32,), "lm_head": (40, 32),
        "model.layers.0.input_layernorm": (32,), "model.layers.0.post_attention_layernorm": (32,),
        "model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.self_attn.k_proj": (16, 32),
        "model.layers.0.self_attn.v_proj": (16, 32), "model.layers.0.self_attn.o_proj": (32, 32),
        "model.layers.0.mlp.gate_proj": (64, 32), "model.layers.0.mlp.up_proj": (64, 32),
        "model.layers.0.mlp.down_proj": (32, 64),
    }  # fmt: skip
    made = {}
    for name, shape in shapes.items():
        values = tensors.get(name.rsplit(".", 1)[-1], rng.standard_normal(shape).astype(np.float32))
        if values is not None:
            made[f"{name}.weight"] = values
    write_safetensors(folder / "model.safetensors", made)
    return folder


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and float32 tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as Hugging Face has them: of each head the even channels, then the odd."""
    size = len(rows) // heads
    order = [h * size + i for h in range(heads) for i in [*range(0, size, 2), *range(1, size, 2)]]
    return rows[order]


@pytest.fixture(scope="module")
def demo_folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as its makers would have published it: two files in float16 and float32, and a
    tokenizer.model."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    folder = tmp_path_factory.mktemp("demo")
    keys, tensors = contents(demo_model)
    arch = lambda name: keys[f"llama.{name}"]  # noqa: E731
    heads = {"attn_q": arch("attention.head_count"), "attn_k": arch("attention.head_count_kv")}
    parts: tuple[dict, dict] = ({}, {})
    for name, values in tensors.items():
        *layer, short = name.removesuffix(".weight").removeprefix("blk.").split(".")
        if short in heads:
            values = halves(values, heads[short])
        prefix = f"model.layers.{layer[0]}." if layer else ""
        exact = (values.astype(np.float16) == values).all()
        target = parts[len(name) % 2]
        target[f"{prefix}{HF_NAMES[short]}.weight"] = values.astype("f2") if exact else values
    places = {}
    for i, part in enumerate(parts):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(folder / file, part)
        places |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": arch("embedding_length"), "intermediate_size": arch("feed_forward_length"),
        "num_hidden_layers": arch("block_count"), "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"], "max_position_embeddings": arch("context_length"),
        "rms_norm_eps": arch("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
    })  # fmt: skip
    model = proto.ModelProto()
    names = ("tokens", "scores", "token_type")
    for text, score, kind in zip(*(keys[f"tokenizer.ggml.{n}"] for n in names), strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.normalizer_spec.add_dummy_prefix = keys.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


# ---- whole models ----


def test_demo_comes_back(demo_model: Path, demo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    write_gguf(demo_folder, out, "auto")
    keys, tensors = contents(out)
    wanted_keys, wanted = contents(demo_model)
    assert tensors.keys() == wanted.keys()
    assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)
    model = {k: v for k, v in wanted_keys.items() if k.startswith(("llama.", "tokenizer.ggml."))}
    assert {k: keys.get(k, v) for k, v in model.items()} == model
    assert keys["general.architecture"] == "llama" and keys["general.name"] == demo_folder.name
    with amber.Engine(demo_model) as one, amber.Engine(out) as two:
        prompt = "Once upon a time"
        options = {"temperature": 0, "max_tokens": 24}
        assert one.generate(prompt, **options).text == two.generate(prompt, **options).text


def test_quantized_folder_is_the_quantized_file(
    demo_model: Path, demo_folder: Path, tmp_path: Path
) -> None:
    one, two, plain = (tmp_path / f"{name}.gguf" for name in ("one", "two", "plain"))
    for source, out in ((demo_model, one), (demo_folder, two)):
        done = command(source, out, "--json", "-q")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["out_bytes"] == out.stat().st_size
    a, b = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (one, two)
    )
    embedding = "token_embd.weight"  # of another type
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a.keys() - {embedding})
    source = gguf.GGUFReader(two).fields["amber.source.name"].contents()
    assert source == demo_folder.name
    assert "bf16" in (done := command(demo_folder, plain, "--type", "bf16", "--json", "-q")).stdout
    assert done.returncode == 0
    assert contents(plain)[0]["general.file_type"] == int(gguf.LlamaFileType.MOSTLY_BF16)
    assert {p.name for p in tmp_path.iterdir()} == {"one.gguf", "two.gguf", "plain.gguf"}


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "amber.quantize", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_published_folder(testdata: Path, tmp_path: Path) -> None:
    """A real folder (tokenizer.json with SentencePiece pieces) and the file others made of it."""
    out = tmp_path / "model.gguf"
    write_gguf(testdata / "models" / "tinystories-656k-hf", out, "f32")
    theirs = testdata / "models" / "tinystories-656k-f32.gguf"
    keys, tensors = contents(out)
    wanted_keys, wanted = contents(theirs)
    assert tensors.keys() == wanted.keys()
    assert all(np.array_equal(tensors[name], wanted[name]) for name in wanted)
    assert keys["tokenizer.ggml.tokens"] == wanted_keys["tokenizer.ggml.tokens"]
    text = (testdata / "text" / "tinystories-eval.txt").read_text()[:50_000]
    assert amber.Tokenizer(out).encode(text) == amber.Tokenizer(theirs).encode(text)


# ---- types ----


def test_types(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    source = {name: t.bits() for name, t in read_folder(str(folder)).items()}
    out = tmp_path / "out.gguf"
    up = source["model.layers.0.mlp.up_proj.weight"]
    rounded = {
        "f32": up,
        "f16": up.astype(np.float16).astype(np.float32),
        "q8_0": gguf.quants.dequantize(
            gguf.quants.quantize(up, gguf.GGMLQuantizationType.Q8_0),
            gguf.GGMLQuantizationType.Q8_0,
        ),
    }
    for dtype, values in rounded.items():
        write_gguf(folder, out, dtype, synthetic_vocab=True)
        keys, tensors = contents(out)
        assert np.array_equal(tensors["blk.0.ffn_up.weight"], values)
        assert np.array_equal(
            tensors["blk.0.attn_norm.weight"], source["model.layers.0.input_layernorm.weight"]
        )
        assert len(keys["tokenizer.ggml.tokens"]) == 40
        assert np.array_equal(
            halves(tensors["blk.0.attn_q.weight"], 2).astype(np.float32),
            source["model.layers.0.self_attn.q_proj.weight"],
        ) == (dtype == "f32")

    write_gguf(folder, out, "bf16", synthetic_vocab=True)
    got, error = contents(out)[1]["blk.0.ffn_up.weight"], 2.0**-8 * np.abs(up)
    assert (np.abs(got - up) <= error).all() and (got != up).any()
    assert (got.view(np.uint32) & 0xFFFF == 0).all()


def test_stored_types(tmp_path: Path) -> None:
    """bfloat16, float64 and float16 in one folder; what a type cannot hold is refused."""
    rng = np.random.default_rng(1)
    up, gate = (rng.standard_normal((64, 32)).astype(np.float32) for _ in range(2))
    up = (up.view(np.uint32) & 0xFFFF0000).view(np.float32)
    down = rng.standard_normal((32, 64)).astype(np.float16)
    folder = tiny(tmp_path / "model", up_proj=bfloat16(up), gate_proj=gate.astype(np.float64),
                  down_proj=down)  # fmt: skip
    out = tmp_path / "out.gguf"
    for dtype in ("auto", "f32"):
        write_gguf(folder, out, dtype, synthetic_vocab=True)
        _, tensors = contents(out)
        assert np.array_equal(tensors["blk.0.ffn_up.weight"], up)
        assert np.array_equal(tensors["blk.0.ffn_gate.weight"], gate)
        assert np.array_equal(tensors["blk.0.ffn_down.weight"], down.astype(np.float32))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert set(kinds.values()) == {"F32"}
    gate[3, 4] = 1e6
    folder = tiny(tmp_path / "model", gate_proj=gate)
    with pytest.raises(amber.FileFormatError, match="f16 cannot hold"):
        write_gguf(folder, out, "f16", synthetic_vocab=True)
    assert not out.exists()
    write_gguf(folder, out, "bf16", synthetic_vocab=True)


def test_synthetic_vocabulary(tmp_path: Path) -> None:
    n = 300
    rows = np.ones((n, 32), np.float32)
    folder = tiny(tmp_path / "model", embed_tokens=rows, lm_head=rows)
    out = tmp_path / "out.gguf"
    with pytest.raises(amber.FileFormatError, match=r"tokenizer\.json"):
        write_gguf(folder, out)
    write_gguf(folder, out, "f32", synthetic_vocab=True)
    tokenizer = amber.Tokenizer(out)
    text = "Is this 日本?\n\0"
    assert len(tokenizer) == n and tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.adds_bos and tokenizer.is_eog(tokenizer.eos)


# ---- architectures ----

# config.json of published models, as far as the converter reads it, and keys that tell.
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict, dict]] = {
    "Llama-3.1-8B": ("llama", {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_scaling": _LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }, {"context_length": 131072, "embedding_length": 4096, "block_count": 32,
        "feed_forward_length": 14336, "attention.head_count": 32, "attention.head_count_kv": 8,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 128,
        "rope.freq_base": 500000.0}),
    "Mistral-7B-v0.1": ("llama", {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096,
    }, {"attention.sliding_window": 4096, "rope.freq_base": 10000.0}),
    "Mixtral-8x7B": ("llama", {
        "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": None, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }, {"expert_count": 8, "expert_used_count": 2, "feed_forward_length": 14336}),
    "Qwen2.5-7B": ("qwen2", {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "use_sliding_window": False,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    }, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32768, "rope.dimension_count": 128}),
    "Qwen3-30B-A3B": ("qwen3moe", {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "num_attention_heads": 32,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "head_dim": 128,
        "rope_theta": 1000000.0, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }, {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768,
        "attention.key_length": 128, "attention.value_length": 128, "expert_weights_norm": True}),
    "gemma-2b": ("gemma", {
        "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "hidden_size": 2048,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "head_dim": 256,
        "rope_theta": 10000.0,
    }, {"attention.head_count_kv": 1, "attention.key_length": 256}),
    "gemma-2-27b": ("gemma2", {
        "architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
        "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 10000.0,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 144,
    }, {"attention.scale": 144**-0.5, "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0}),
    # What its class has by default is left out, as in the file.
    "gemma-3-4b-it": ("gemma3", {
        "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
                        "model_type": "gemma3_text", "num_hidden_layers": 34,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152},
    }, {"embedding_length": 2560, "attention.head_count": 8, "attention.head_count_kv": 4,
        "attention.key_length": 256, "attention.scale": 1 / 16, "context_length": 131072,
        "attention.sliding_window": 1024, "attention.sliding_window_pattern": 6,
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0}),
    "gpt-oss-20b": ("gpt-oss", {
        "architectures": ["GptOssForCausalLM"], "hidden_act": "silu", "hidden_size": 2880,
        "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "sliding_window": 128, "rope_theta": 150000, "swiglu_limit": 7.0, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                         "original_max_position_embeddings": 4096, "truncate": False},
    }, {"expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 2880,
        "attention.sliding_window": 128, "attention.sliding_window_pattern": 2,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.freq_base": 150000.0}),
    "GLM-4.5-Air": ("glm4moe", {
        "architectures": ["Glm4MoeForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 10944, "max_position_embeddings": 131072, "num_attention_heads": 96,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "head_dim": 128,
        "partial_rotary_factor": 0.5, "rope_theta": 1000000, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 1, "rope_scaling": None,
    }, {"expert_count": 128, "expert_used_count": 8, "expert_shared_count": 1,
        "expert_shared_feed_forward_length": 1408, "expert_gating_func": 2,
        "leading_dense_block_count": 1, "block_count": 46, "rope.dimension_count": 64}),
    "Hunyuan-A13B": ("hunyuan-moe", {  # some values are told layer by layer
        "architectures": ["HunYuanMoEV1ForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 3072, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 3, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "head_dim": 128,
        "num_experts": 64, "moe_topk": [8] * 3, "moe_intermediate_size": [3072] * 3,
        "num_shared_expert": [1] * 3, "rope_theta": 10000.0,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
                         "mscale": 1.0, "mscale_all_dim": 0.0, "type": "dynamic"},
    }, {"expert_used_count": 8, "expert_shared_feed_forward_length": 3072,
        "rope.freq_base": 1e4 * 1000 ** (128 / 126)}),
    "Ministral-3-8B": ("mistral3", {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
        "text_config": {
            "model_type": "ministral3", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 262144, "head_dim": 128,
            "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "sliding_window": None,
            "rope_parameters": {
                "type": "yarn", "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0,
                "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    }, {"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 16384,
        "rope.scaling.attn_factor": 1 / (1 + 0.1 * np.log(16))}),
    "Mistral-Small-3.1": ("llama", {
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 5120,
            "intermediate_size": 32768, "max_position_embeddings": 131072, "head_dim": 128,
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None},
    }, {"rope.freq_base": 1e9, "attention.key_length": 128}),
    "EXAONE-4.0-32B": ("exaone4", {
        "architectures": ["Exaone4ForCausalLM"], "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 27392, "max_position_embeddings": 131072, "num_attention_heads": 40,
        "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "head_dim": 128,
        "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG",
        "rope_scaling": _LLAMA3 | {"factor": 16.0},
    }, {"attention.sliding_window": 4096, "attention.sliding_window_pattern": 4}),
    "MiniMax-M2": ("minimax-m2", {
        "architectures": ["MiniMaxM2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 1536, "max_position_embeddings": 196608, "num_attention_heads": 48,
        "num_hidden_layers": 62, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "head_dim": 128,
        "num_local_experts": 256, "num_experts_per_tok": 8, "rotary_dim": 64,
        "rope_theta": 5000000,
    }, {"rope.dimension_count": 64, "expert_feed_forward_length": 1536, "expert_gating_func": 2}),
    "SmolLM3-3B": ("smollm3", {
        "architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 11008, "max_position_embeddings": 65536, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0, "no_rope_layer_interval": 4, "use_sliding_window": False,
        "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36,
    }, {"rope.freq_base": 5e6, "rope.dimension_count": 128}),
    "granite-3.1-2b": ("granite", {
        "architectures": ["GraniteForCausalLM"], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 5000000.0, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 8.0,
    }, {"attention.scale": 0.015625, "embedding_scale": 12.0, "residual_scale": 0.22,
        "logit_scale": 8.0}),
    "starcoder2-3b": ("starcoder2", {
        "architectures": ["Starcoder2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072, "intermediate_size": 12288, "max_position_embeddings": 16384,
        "norm_epsilon": 1e-5, "num_attention_heads": 24, "num_hidden_layers": 30,
        "num_key_value_heads": 2, "rope_theta": 999999.4420358813, "sliding_window": 4096,
    }, {"attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 4096}),
    "stablelm-2-1_6b": ("stablelm", {
        "architectures": ["StableLmForCausalLM"], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "layer_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25, "rope_theta": 10000, "use_parallel_residual": False,
    }, {"rope.dimension_count": 16, "use_parallel_residual": False}),
    "llava-v1.6-mistral-7b": ("llama", {
        "architectures": ["LlavaNextForConditionalGeneration"], "text_config": {
            "architectures": ["MistralForCausalLM"], "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        }, "vision_config": {"hidden_size": 1024},
    }, {"attention.head_count_kv": 8, "rope.freq_base": 1e6}),
    "OLMo-7B": ("olmo", {
        "architectures": ["OlmoForCausalLM"], "clip_qkv": 8.0, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rope_theta": 10000.0,
    }, {"attention.clamp_kqv": 8.0, "attention.layer_norm_epsilon": 1e-5}),
    "gpt2": ("gpt2", {
        "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    }, {"context_length": 1024, "embedding_length": 768, "block_count": 12,
        "feed_forward_length": 3072, "attention.head_count": 12, "attention.head_count_kv": 12,
        "attention.layer_norm_epsilon": 1e-5}),
    "starcoderbase-1b": ("starcoder", {
        "architectures": ["GPTBigCodeForCausalLM"], "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5, "multi_query": True, "n_embd": 2048, "n_head": 16,
        "n_inner": 8192, "n_layer": 24, "n_positions": 8192, "scale_attn_weights": True,
    }, {"context_length": 8192, "feed_forward_length": 8192, "attention.head_count_kv": 1}),
    "pythia-160m": ("gptneox", {
        "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000,
        "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
    }, {"rope.dimension_count": 16, "rope.freq_base": 10000.0, "use_parallel_residual": True}),
    "falcon-7b": ("falcon", {
        "architectures": ["FalconForCausalLM"], "alibi": False, "bias": False,
        "hidden_size": 4544, "layer_norm_epsilon": 1e-5, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "parallel_attn": True,
    }, {"context_length": 2048, "feed_forward_length": 18176, "attention.head_count_kv": 1}),
    "falcon-40b": ("falcon", {
        "architectures": ["FalconForCausalLM"], "alibi": False, "bias": False,
        "hidden_size": 8192, "layer_norm_epsilon": 1e-5, "new_decoder_architecture": True,
        "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8,
        "parallel_attn": True,
    }, {"feed_forward_length": 32768, "attention.head_count_kv": 8}),
    "granite-4.0-micro": ("granite", {
        "architectures": ["GraniteMoeHybridForCausalLM"], "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 8192, "shared_intermediate_size": 8192,
        "layer_types": ["attention"] * 40, "max_position_embeddings": 131072,
        "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "num_local_experts": 0, "num_experts_per_tok": 0, "position_embedding_type": "rope",
        "rms_norm_eps": 1e-5, "rope_theta": 10000000, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 10,
    }, {"feed_forward_length": 8192, "attention.scale": 0.015625, "logit_scale": 10.0}),
    "Phi-3-mini-128k": ("phi3", {
        "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
    }, {"rope.scaling.original_context_length": 4096, "attention.sliding_window": 262144,
        "rope.scaling.attn_factor": (1 + np.log(32) / np.log(4096)) ** 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(tmp_path: Path, name: str) -> None:
    arch, values, expected = PUBLISHED[name]
    write_json(tmp_path / "config.json", values)
    config = Config(str(tmp_path))
    keys = config_keys(config, config.row, Rope(config))
    assert config.row.name == arch
    assert {key: keys.get(key) for key in expected} == pytest.approx(expected)
    windowed = {k for k in keys if "sliding" in k}
    assert windowed == {k for k in expected if "sliding" in k}
    # The same model in the newer spelling of RoPE's parameters.
    if name in ("Llama-3.1-8B", "Qwen2.5-7B"):
        scaling = values.pop("rope_scaling")
        kind = scaling.pop("type", None) or scaling.pop("rope_type")
        new = {"rope_parameters": scaling | {"rope_theta": values.pop("rope_theta"),
                                             "rope_type": kind}}  # fmt: skip
        write_json(tmp_path / "config.json", values | new)
        config = Config(str(tmp_path))
        assert config_keys(config, config.row, Rope(config)) == keys
    if name == "Llama-3.1-8B":  # "Llama 3.1" of the model card's reference code, wave by wave
        for i, divisor in enumerate(Rope(config).tensors()["rope_freqs.weight"]):
            wave = 2 * math.pi * 500000.0 ** (2 * i / 128)
            if wave < 8192 / 4:
                expected_divisor = 1.0
            elif wave > 8192:
                expected_divisor = 8.0
            else:
                smooth = (8192 / wave - 1) / 3
                expected_divisor = 1 / ((1 - smooth) / 8 + smooth)
            assert divisor == pytest.approx(expected_divisor)


def test_windows_layer_by_layer(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention"] * 2
    base = CONFIG | {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": types}
    for change, expected in (
        ({"architectures": ["MinistralForCausalLM"]}, [False, True, False, True]),
        ({"architectures": ["MistralForCausalLM"], "layer_types": None}, None),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu",
          "layer_types": types[::-1]}, 2),
        ({"architectures": ["Olmo3ForCausalLM"], "layer_types": None}, 4),
    ):  # fmt: skip
        write_json(tmp_path / "config.json", base | change)
        config = Config(str(tmp_path))
        keys = config_keys(config, config.row, Rope(config))
        assert keys["attention.sliding_window"] == 8
        assert keys.get("attention.sliding_window_pattern") == expected
    write_json(tmp_path / "config.json", base | {
        "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True})  # fmt: skip
    config = Config(str(tmp_path))
    with pytest.raises(amber.UnsupportedModelError, match="qwen2 with sliding windows"):
        config_keys(config, config.row, Rope(config))


def moe_layer(style: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three experts of width 48, one by one or all in one tensor."""
    gate, up = (rng.standard_normal((3, 48, 32)).astype(np.float32) for _ in range(2))
    down = rng.standard_normal((3, 32, 48)).astype(np.float32)
    names = ("w1", "w3", "w2") if style == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if style == "granite":
        stacked = {"block_sparse_moe.input_linear.weight": np.concatenate([gate, up], axis=1),
                   "block_sparse_moe.output_linear.weight": down}  # fmt: skip
    elif style == "together":
        stacked = {"mlp.experts.gate_up_proj": np.concatenate([gate, up], axis=1),
                   "mlp.experts.down_proj": down}  # fmt: skip
    else:
        module = "block_sparse_moe" if style == "mixtral" else "mlp"
        stacked = {f"{module}.experts.{e}.{name}.weight": values[e]
                   for name, values in zip(names, (gate, up, down), strict=True)
                   for e in (2, 0, 1)}  # fmt: skip
    router = {"mixtral": "block_sparse_moe.gate", "granite": "block_sparse_moe.router.layer"}
    stacked[f"{router.get(style, 'mlp.gate')}.weight"] = gate[:, 0].copy()
    return {f"model.layers.0.{name}": values for name, values in stacked.items()}


@pytest.mark.parametrize(
    ("style", "model"),
    [("mixtral", "Mixtral"), ("one by one", "Qwen3Moe"), ("together", "Qwen3Moe"),
     ("granite", "GraniteMoe")],
)  # fmt: skip
def test_experts(tmp_path: Path, style: str, model: str) -> None:
    change = {"architectures": [f"{model}ForCausalLM"], "num_local_experts": 3,
              "num_experts_per_tok": 2}  # fmt: skip
    folder = tiny(tmp_path / "model", change, gate_proj=None, up_proj=None, down_proj=None)
    layer = moe_layer(style, np.random.default_rng(3))
    (folder / "model.safetensors").rename(folder / "rest.safetensors")
    write_safetensors(folder / "experts.safetensors", layer)
    out = tmp_path / "out.gguf"
    write_gguf(folder, out, "f32", synthetic_vocab=True)
    keys, tensors = contents(out)
    assert keys[f"{keys['general.architecture']}.expert_count"] == 3
    rng = np.random.default_rng(3)
    for name in ("gate", "up", "down"):
        values = rng.standard_normal((3, 32, 48) if name == "down" else (3, 48, 32))
        assert np.array_equal(tensors[f"blk.0.ffn_{name}_exps.weight"], values.astype(np.float32))
    assert np.array_equal(
        tensors["blk.0.ffn_gate_inp.weight"], tensors["blk.0.ffn_gate_exps.weight"][:, 0]
    )
    if style == "one by one":
        del layer["model.layers.0.mlp.experts.1.up_proj.weight"]
        write_safetensors(folder / "experts.safetensors", layer)
        with pytest.raises(amber.FileFormatError, match="each expert once"):
            write_gguf(folder, out, "f32", synthetic_vocab=True)


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """As its makers publish it: experts in blocks of 32, gate and up taking turns row by row."""
    rng = np.random.default_rng(8)
    golden = Path(__file__).parent / "golden" / "gpt-oss.gguf"
    _, tensors = contents(golden)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "attn_sinks": "self_attn.sinks", "attn_norm": "input_layernorm",
             "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router",
             }  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    made, want = {}, {}
    for name, values in tensors.items():
        if "exps" in name:
            continue
        if name.startswith("blk."):
            _, layer, short, kind = name.split(".")
            end = "" if short == "attn_sinks" else f".{kind}"
            made[f"model.layers.{layer}.{names[short]}{end}"] = values
        else:
            made[f"{HF_NAMES[name.removesuffix('.weight')]}.weight"] = values
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for il in range(3):
        prefix = f"model.layers.{il}.mlp.experts"
        for leaf, rows, inputs in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            codes = rng.integers(0, 16, (8, rows, inputs // 32, 32))
            scales = rng.integers(118, 130, (8, rows, inputs // 32))
            pairs = codes[..., 0::2] | codes[..., 1::2] << 4
            made[f"{prefix}.{leaf}_blocks"] = pairs.astype(np.uint8)
            made[f"{prefix}.{leaf}_scales"] = scales.astype(np.uint8)
            values = (
                np.array([*grid, *(-v for v in grid)])[codes] * 2.0 ** (scales - 127)[..., None]
            )
            values = values.reshape(8, rows, inputs)
            if leaf == "down_proj":
                want[f"blk.{il}.ffn_down_exps.weight"] = values
            else:
                want[f"blk.{il}.ffn_gate_exps.weight"] = values[:, 0::2]
                want[f"blk.{il}.ffn_up_exps.weight"] = values[:, 1::2]
            made[f"{prefix}.{leaf}_bias"] = rng.standard_normal((8, rows)).astype(np.float32)
    write_safetensors(folder / "model.safetensors", made)
    config = {
        "architectures": ["GptOssForCausalLM"], "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 12,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    write_json(folder / "config.json", config)
    out = tmp_path / "out.gguf"
    write_gguf(folder, out, "auto", synthetic_vocab=True)
    _, found = contents(out)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], values) for name, values in want.items())
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == "BF16"
    bias = made["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert np.array_equal(found["blk.1.ffn_up_exps.bias"], bias[:, 1::2])
    with amber.Engine(out, n_ctx=64) as engine:
        assert np.isfinite(engine.logits([5, 6, 7])).all()
    del made["model.layers.1.mlp.experts.down_proj_scales"]
    write_safetensors(folder / "model.safetensors", made)
    with pytest.raises(amber.FileFormatError, match="down_proj_blocks: expected MXFP4.*none"):
        write_gguf(folder, out)
    config["quantization_config"]["quant_method"] = "fp8"
    write_json(folder / "config.json", config)
    with pytest.raises(amber.UnsupportedModelError, match="quantization_config 'fp8'"):
        write_gguf(folder, out)


def test_gpt2_without_its_prefix(tmp_path: Path) -> None:
    """GPT-2's first folders name tensors without "transformer.", and carry the causal masks."""
    rng = np.random.default_rng(3)
    shapes = {
        "wte": (40, 32), "wpe": (16, 32), "ln_f": (32,), "h.0.ln_1": (32,), "h.0.ln_2": (32,),
        "h.0.attn.c_attn": (32, 96), "h.0.attn.c_proj": (32, 32), "h.0.mlp.c_fc": (32, 128),
        "h.0.mlp.c_proj": (128, 32),
    }  # fmt: skip
    made = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    made |= {f"{n}.bias": made[f"{n}.weight"][-1].copy() for n in shapes if "attn" in n}
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_head": 2, "n_layer": 1,
              "n_positions": 16, "layer_norm_epsilon": 1e-5}  # fmt: skip
    masks = {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32),
             "h.0.attn.masked_bias": np.array([-1e4], np.float32)}  # fmt: skip
    folder, results = tmp_path / "gpt2", []
    folder.mkdir()
    write_json(folder / "config.json", config)
    for tensors in (made | masks, {f"transformer.{n}": v for n, v in made.items()}):
        write_safetensors(folder / "model.safetensors", tensors)
        write_gguf(folder, tmp_path / "out.gguf", "f32", synthetic_vocab=True)
        results.append(contents(tmp_path / "out.gguf")[1])
    assert len(results[0]) == len(made)
    assert np.array_equal(results[0]["blk.0.attn_qkv.weight"], made["h.0.attn.c_attn.weight"].T)
    assert np.array_equal(results[0]["position_embd.weight"], made["wpe.weight"])
    for name, values in results[0].items():
        assert np.array_equal(values, results[1][name]), name


def test_norms_of_gemma_hold_one_more(tmp_path: Path) -> None:
    change = {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}
    norm = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    folder = tiny(tmp_path / "model", change, norm=bfloat16(norm))
    write_gguf(folder, tmp_path / "out.gguf", "f16", synthetic_vocab=True)
    _, tensors = contents(tmp_path / "out.gguf")
    assert "output.weight" not in tensors  # tied, which its class has by default
    cut = (norm.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(tensors["output_norm.weight"], cut + np.float32(1))


# ---- tokenizers ----


def pre_tokenizer(steps: tuple[str, ...]) -> dict[str, Any]:
    """tokenizer.json's pre_tokenizer of some steps of PRETOKENIZERS."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    known = {
        ct.GPT2: byte_level | {"use_regex": True},
        ct.DIGIT: {"type": "Digits", "individual_digits": True},
        ct.DIGITS: {"type": "Digits", "individual_digits": False},
        ct.PUNCTUATION: {"type": "Punctuation", "behavior": "Contiguous"},
    }
    made = [
        known.get(step) or {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated",
                            "invert": False}
        for step in steps
    ]  # fmt: skip
    if ct.GPT2 not in steps:
        made.append(byte_level | {"use_regex": False})
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


def embedded(folder: Path, n_vocab: int) -> Path:
    rows = np.zeros((n_vocab, 32), np.float32)
    return tiny(folder, embed_tokens=rows, lm_head=rows)


@pytest.mark.parametrize(
    "steps", ct.PRETOKENIZERS, ids=lambda s: ct.PRETOKENIZERS[s][0] or "tekken"
)
@pytest.mark.parametrize("whole", [False, True])
def test_byte_level_tokenizer(tmp_path: Path, steps: tuple[str, ...], whole: bool) -> None:
    """Amber's ids with the converted vocabulary are those of the folder's tokenizer.json."""
    name = ct.PRETOKENIZERS[steps][1 if whole and ct.PRETOKENIZERS[steps][1] else 0]
    maker.write_bpe(tmp_path, "dbrx")
    path = tmp_path / "tokenizer.json"
    described = json.loads(path.read_text())
    described["pre_tokenizer"] = pre_tokenizer(steps)
    described["model"]["ignore_merges"] = whole
    write_json(path, described)
    folder = embedded(tmp_path, 320)
    if name is None:
        with pytest.raises(amber.UnsupportedModelError, match="a pre-tokenizer that is not known"):
            write_gguf(folder, tmp_path / "out.gguf")
        return
    write_gguf(folder, tmp_path / "out.gguf")
    tokenizer = amber.Tokenizer(tmp_path / "out.gguf")
    reference = tokenizers.Tokenizer.from_file(str(path))
    keys, _ = contents(tmp_path / "out.gguf")
    assert keys["tokenizer.ggml.pre"] == name
    texts = [*oracles.texts(150, seed=21), "'S <|turn|>the 1234'll\r\n\r\n  and"]
    # Words that only a merge of others gives, where a whole word is taken at once.
    if name in ("llama-bpe", "tekken", "dbrx", "gpt-2"):
        texts += ["the", " the", "and", "ing ing"]
    same = whole == (name in ("llama-bpe", "tekken"))
    for text in texts if same else ():
        want = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False, parse_special=True) == want, text
    # END and the turn's mark end a generation, as generation_config.json says.
    marks = [tokenizer.token_id(mark) for mark in (maker.END, "<|turn|>")]
    assert set(marks) <= set(tokenizer.eog_tokens())
    assert keys["tokenizer.chat_template"] == maker.TEMPLATE


@pytest.mark.parametrize("style", ["llama", "gemma", "metaspace"])
def test_pieces_in_tokenizer_json(tmp_path: Path, style: str) -> None:
    """A SentencePiece vocabulary in Hugging Face's file: its ids, and those of tokenizer.model."""
    pytest.importorskip("google.protobuf")
    folder = embedded(tmp_path, 320)
    maker.write_spm(folder)
    out, other = tmp_path / "json.gguf", tmp_path / "model.gguf"
    write_gguf(folder, other)
    keys, _ = contents(other)
    pieces, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    kinds = keys["tokenizer.ggml.token_type"]
    words = [i for i, kind in enumerate(kinds) if kind == 1]
    known = {pieces[i] for i in words}
    merges = [
        [pieces[i][:cut], pieces[i][cut:]]
        for i in sorted(words, key=lambda i: -scores[i])
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in known and pieces[i][cut:] in known
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    normalizer = {"llama": {"type": "Sequence", "normalizers": [prepend, space]}, "gemma": space}
    described = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for i in (0, 1, 2)],
        "normalizer": normalizer.get(style), "decoder": None, "post_processor": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "split": False,
                          "prepend_scheme": "always"} if style == "metaspace" else None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "merges": merges,
                  "vocab": {pieces[i]: i for i, kind in enumerate(kinds) if kind != 5}},
    }  # fmt: skip
    (folder / "tokenizer.model").unlink()
    write_json(folder / "tokenizer.json", described)
    write_gguf(folder, out)
    ours, of_model = amber.Tokenizer(out), amber.Tokenizer(other)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert contents(out)[0]["tokenizer.ggml.add_space_prefix"] == (style != "gemma")
    for text in ["The lost and the other", *oracles.texts(150, seed=22)]:
        text = text.replace("<s>", "")
        if style == "metaspace":  # puts no space in front of another, which SentencePiece does
            text = text.lstrip(" \u2581")
        want = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == want, text
        if style != "gemma":
            assert of_model.encode(text, add_special=False) == want


def test_special_tokens_and_flags(tmp_path: Path) -> None:
    """Who says what BOS and EOS are and whether they are added: tokenizer_config.json, then the
    post-processor; then config.json."""
    folder = embedded(tmp_path, 320)
    maker.write_bpe(folder, "llama-bpe")
    out = tmp_path / "out.gguf"
    described = json.loads((folder / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in described["added_tokens"]}
    begin, end, turn = maker.SPECIALS

    def converted(config: dict | None = None, **model: Any) -> tuple[dict, amber.Tokenizer]:
        if config is not None:
            write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "config.json", CONFIG | model)
        write_gguf(folder, out)
        keys, _ = contents(out)
        return {k.removeprefix("tokenizer."): v for k, v in keys.items()}, amber.Tokenizer(out)

    keys, tokenizer = converted()
    assert (keys["ggml.bos_token_id"], keys["ggml.eos_token_id"]) == (ids[begin], ids[end])
    assert keys["ggml.add_bos_token"] is True and keys["ggml.add_eos_token"] is False
    assert keys["ggml.eot_token_id"] == ids[turn]
    assert tokenizer.encode("a")[0] == ids[begin]
    keys, tokenizer = converted({"add_bos_token": False, "bos_token": begin, "eos_token": turn})
    assert keys["ggml.eos_token_id"] == ids[turn] and keys["ggml.add_bos_token"] is False
    assert {tokenizer.token_text(t) for t in tokenizer.eog_tokens()} >= {end, turn}
    (folder / "generation_config.json").unlink()
    keys, _ = converted({"bos_token": None}, bos_token_id=ids[begin],
                        eos_token_id=[ids[turn], ids[end]])  # fmt: skip
    assert keys["ggml.bos_token_id"] == ids[begin]
    assert (keys["ggml.eos_token_id"], keys["ggml.eot_token_id"]) == (ids[turn], ids[end])
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    keys, _ = converted({"chat_template": templates})
    assert (keys["chat_template"], keys["chat_template.tool_use"]) == ("a", "b")
    assert keys["chat_templates"] == ["tool_use"]
    (folder / "chat_template.jinja").write_text("c")
    assert converted()[0]["chat_template"] == "c"
    (folder / "chat_template.jinja").unlink()
    assert "chat_template" not in converted({})[0]


def test_special_tokens_that_swallow_space(tmp_path: Path) -> None:
    """Phi-3's, as its tokenizer.json says; readers know that by the model's name."""
    pytest.importorskip("google.protobuf")
    folder, out = embedded(tmp_path / "mini", 320), tmp_path / "out.gguf"
    maker.write_spm(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (place,) = config["added_tokens_decoder"]
    config["added_tokens_decoder"][place]["content"] = "<|end|>"
    write_json(folder / "tokenizer_config.json", config)
    for swallows, name in ((False, "mini"), (True, "Phi-3 mini")):
        added = {"id": int(place), "content": "<|end|>", "special": True, "rstrip": swallows}
        write_json(folder / "tokenizer.json", {"added_tokens": [added]})
        write_gguf(folder, out)
        assert contents(out)[0]["general.name"] == name
        tokenizer = amber.Tokenizer(out)
        with_space, without = (
            tokenizer.encode(text, parse_special=True) for text in ("a<|end|> \n t", "a<|end|>t")
        )
        assert (with_space == without) == swallows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(model={"type": "Unigram"}), "type Unigram"),
        (lambda d: d.update(model=None), "type None"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer.*Whitespace"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda d: d["model"].update(vocab=[1]), "expected token ids by text"),
        (lambda d: d["model"].update(vocab={"a": -1}), "expected token ids by text"),
        (lambda d: d["model"].update(merges={"a": 1}), "merges: expected a list"),
        (lambda d: d["model"].update(merges=["a b c"]), "expected pairs"),
        (lambda d: d["model"].update(merges=[7]), "not of the form"),
        (lambda d: d.update(added_tokens=[{"id": "x", "content": "y"}]), "added_tokens"),
        (lambda d: d.update(added_tokens=7), "not of the form"),
        (lambda d: d.update(post_processor=[1]), "not of the form|^$"),
        (lambda d: d["pre_tokenizer"].update(pretokenizers=[3]), "not of the form"),
    ],
)
def test_bad_tokenizers(tmp_path: Path, change: Any, words: str) -> None:
    folder = embedded(tmp_path, 320)
    maker.write_bpe(folder, "llama-bpe")
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    write_json(folder / "tokenizer.json", described)
    try:
        write_gguf(folder, tmp_path / "out.gguf")
    except (amber.FileFormatError, amber.UnsupportedModelError) as error:
        assert re.search(words, str(error))
    else:
        assert re.search(words, "")  # the value is not looked at


# ---- what cannot be converted ----


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"architectures": ["BertModel"]}, amber.UnsupportedModelError, "BertModel.*LlamaFor"),
        ({"architectures": None}, amber.UnsupportedModelError, "missing"),
        ({"hidden_size": None}, amber.FileFormatError, "hidden_size"),
        ({"hidden_size": "32"}, amber.FileFormatError, "expected a number, found '32'"),
        ({"num_hidden_layers": -1}, amber.FileFormatError, "num_hidden_layers"),
        ({"num_hidden_layers": 9999}, amber.FileFormatError, "at most"),
        ({"num_attention_heads": 4}, amber.FileFormatError, r"k_proj.*= \[8, 32\].*\[16, 32\]"),
        ({"intermediate_size": 96}, amber.FileFormatError, "gate_proj.*feed_forward_length"),
        ({"head_dim": 15, "num_attention_heads": 2}, amber.FileFormatError, "q_proj"),
        ({"rms_norm_eps": None}, amber.FileFormatError, "rms_norm_eps"),
        ({"rms_norm_eps": 1e300}, amber.FileFormatError, "rms_norm_eps"),
        ({"rope_theta": 1e300}, amber.FileFormatError, "rope_theta"),
        ({"quantization_config": {"quant_method": "fp8"}}, amber.UnsupportedModelError,
         "quantization_config"),
        ({"hidden_act": "relu"}, amber.UnsupportedModelError, "relu"),
        ({"rope_scaling": {"type": "ntk-by-parts"}}, amber.UnsupportedModelError, "ntk-by-parts"),
        ({"rope_scaling": 7}, amber.FileFormatError, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "linear"}}, amber.FileFormatError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, amber.FileFormatError, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, amber.FileFormatError, "low_freq"),
        ({"rope_scaling": {"type": "longrope"}}, amber.FileFormatError, "_factor"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
         amber.FileFormatError, "layer_types"),
        ({"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention", "mamba"]},
         amber.UnsupportedModelError, "layer_types: 'mamba'"),
        ({"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 62},
         amber.UnsupportedModelError, "num_local_experts 62"),
        ({"architectures": ["FalconForCausalLM"], "alibi": True}, amber.UnsupportedModelError,
         "alibi True: falcon needs False"),
        ({"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu_fast"},
         amber.UnsupportedModelError, "gelu_fast"),
    ],
)  # fmt: skip
def test_bad_configurations(
    tmp_path: Path, change: dict, error: type[Exception], words: str
) -> None:
    folder = tiny(tmp_path / "model", change)
    with pytest.raises(error, match=words):
        write_gguf(folder, tmp_path / "out.gguf", "f32", synthetic_vocab=True)
    assert not (tmp_path / "out.gguf").exists()


def test_bad_folders(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def refused(folder: Path, words: str, error: type[Exception] = amber.FileFormatError) -> None:
        with pytest.raises(error, match=words):
            write_gguf(folder, out, "f32", synthetic_vocab=True)
        assert not out.exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"config\.json.*not found")
    (empty / "config.json").write_text("{")
    refused(empty, "expected JSON")
    write_json(empty / "config.json", [1])
    refused(empty, "JSON object")
    write_json(empty / "config.json", CONFIG)
    refused(empty, r"expected \*\.safetensors")

    folder = tiny(tmp_path / "model", q_proj=np.zeros((32, 32), np.int8))
    refused(folder, "type I8 cannot be converted", amber.UnsupportedModelError)
    refused(tiny(folder, embed_tokens=None), "expected an embedding")
    refused(tiny(folder, {"num_hidden_layers": 0}), "num_hidden_layers")
    tiny(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged, words in (
        (b"", "expected a header"),
        (whole[:7], "expected a header"),
        (whole[:40], "expected a header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not fetched"),
        (whole[:-1], "cut short"),
        (struct.pack("<Q", 4) + b"[1 ]", "expected a JSON object"),
        (struct.pack("<Q", 4) + b"{{{{", "expected JSON"),
        (whole.replace(b"[64, 32]", b"[64, 33]"), "takes"),
        (whole.replace(b"[64, 32]", b"[-4, 32]"), "expected dtype, shape"),
        (whole.replace(b'"dtype": "F32"', b'"dtype": 12345'), "expected dtype, shape"),
        (whole.replace(b"mlp.up_proj", b"mlp.xx_proj"), "not a tensor of llama"),
        (whole.replace(b"layers.0.mlp.up", b"layers.7.mlp.up"), "not a tensor of llama"),
    ):
        file.write_bytes(damaged)
        unsupported = "not a tensor" in words
        refused(
            folder, words, amber.UnsupportedModelError if unsupported else amber.FileFormatError
        )
    file.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    for places, words in (
        ({"weight_map": 3}, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "in its folder"),
        ({"weight_map": {"a": "other.safetensors"}}, "not found"),
        ({"weight_map": {"a.weight": "model.safetensors"}}, r"a\.weight: expected by"),
    ):
        write_json(index, places)
        refused(folder, words)
    index.unlink()
    (folder / "copy.safetensors").write_bytes(whole)
    write_gguf(folder, out, "f32", synthetic_vocab=True)  # a copy beside it is not looked at
    out.unlink()
    file.rename(folder / "part.safetensors")
    refused(folder, "found in another file too")
    with pytest.raises(amber.ArgumentError, match="dtype"):
        write_gguf(folder, out, "int4")


def test_command_refuses(demo_model: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    for args, words, code in (
        ((demo_model, "out.gguf", "--type", "f16"), "expected a Hugging Face folder", 2),
        ((folder, "out.gguf", "--type", "f16", "--permute"), "--type", 2),
        ((folder, "out.gguf"), "tokenizer.json", 1),
        ((tmp_path, "out.gguf"), "config.json", 1),
    ):
        done = command(*args[:1], tmp_path / args[1], *args[2:])
        assert done.returncode == code and words in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    tiny(folder, {"num_hidden_layers": 2})
    with pytest.raises(amber.FileFormatError, match="layer 1: expected the tensors of layer 0"):
        write_gguf(folder, tmp_path / "out.gguf", synthetic_vocab=True)
    # The engine reads the header before the weights are written.
    tiny(folder, {"max_position_embeddings": 2**31 - 1})
    with pytest.raises(amber.AmberError, match=r"model: .*context_length"):
        write_gguf(folder, tmp_path / "out.gguf", synthetic_vocab=True,
                   check=lambda name: q._prove(name, str(folder)))  # fmt: skip
    assert Folder(str(folder)).name() == "model"

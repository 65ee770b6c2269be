"""Tiny models of every architecture, and what transformers computes with them.

    python tools/make_architectures.py tests/golden

makes a model of random weights for each case, writes it as GGUF through amber's own converter, and
stores beside it the logits that transformers computes in float64 from exactly those weights, dense
and with activations pruned N:M. tests/test_architectures.py compares Amber with these files, and
where torch and transformers are installed it makes them anew. Needs the extra `reference`.

Everything that a real model has is made to matter: norm weights and biases are random, windows and
the original context of RoPE scaling are shorter than the prompts, soft caps bend the logits.
Weights are values that Q8_0 holds, so that the small file is the model itself.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_VOCAB = 320
LENGTHS = (5, 37, 190)  # of the prompts
SPARSE_LENGTH = 64
PATTERNS = {"2:4": (2, 4), "8:16": (8, 16)}
KEPT = 24  # positions of a golden prompt whose logits are stored
# A choice (of a mask, of an expert) that hangs on less than this share of the values might fall
# otherwise in float32: such models are thrown away for others.
MARGIN = 2e-5

# ---- cases ----

BASE: dict[str, Any] = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


@dataclass(frozen=True)
class Case:
    """arch: GGUF's name; config: class of transformers; keys: what differs from BASE; tokenizer:
    "spm" or a name that pre_tokenizer knows; kind: of the weights in the file."""

    arch: str
    config: str
    tokenizer: str
    keys: dict[str, Any] = field(default_factory=dict)
    kind: str = "q8_0"


_LONGROPE = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.6 * i for i in range(8)],
}
CASES = {
    "llama": Case("llama", "LlamaConfig", "llama-bpe", {
        "rope_parameters": rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0,
                                high_freq_factor=4.0, original_max_position_embeddings=64)}),
    "mistral": Case("llama", "MistralConfig", "spm", {
        "head_dim": 32, "sliding_window": 12, "rope_parameters": rope()}),
    "qwen2": Case("qwen2", "Qwen2Config", "qwen2", {
        "tie_word_embeddings": True,
        "rope_parameters": rope("yarn", 1e4, factor=4.0, original_max_position_embeddings=64)}),
    "qwen3": Case("qwen3", "Qwen3Config", "qwen2", {
        "head_dim": 32, "rope_parameters": rope(theta=1e6)}),
    "mixtral": Case("llama", "MixtralConfig", "spm", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
        "rope_parameters": rope(theta=1e6)}),
    "qwen2moe": Case("qwen2moe", "Qwen2MoeConfig", "qwen2", {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64, "norm_topk_prob": False,
        "rope_parameters": rope(theta=1e6)}),
    "qwen3moe": Case("qwen3moe", "Qwen3MoeConfig", "qwen2", {
        "head_dim": 32, "num_local_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 32, "norm_topk_prob": True, "rope_parameters": rope(theta=1e6)}),
    "gemma": Case("gemma", "GemmaConfig", "spm", {
        "head_dim": 32, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": rope()}),
    "gemma2": Case("gemma2", "Gemma2Config", "spm", {
        "head_dim": 32, "num_hidden_layers": 3, "sliding_window": 12,
        "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0, "rope_parameters": rope()}),
    "gemma3": Case("gemma3", "Gemma3TextConfig", "spm", {
        "head_dim": 32, "num_hidden_layers": 6, "intermediate_size": 64, "sliding_window": 12,
        "query_pre_attn_scalar": 20, "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"full_attention": rope("linear", 1e6, factor=8.0),
                            "sliding_attention": rope()}}),
    "phi3": Case("phi3", "Phi3Config", "spm", {
        "num_key_value_heads": 4, "sliding_window": 12, "max_position_embeddings": 256,
        "original_max_position_embeddings": 256, "rope_parameters": rope()}),
    "phi3-long": Case("phi3", "Phi3Config", "gpt-4o", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "original_max_position_embeddings": 4,
        "rope_parameters": rope("longrope", partial_rotary_factor=0.5,
                                original_max_position_embeddings=4, **_LONGROPE)}),
    "phi3-short": Case("phi3", "Phi3Config", "gpt-4o", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "rope_parameters": rope("longrope", partial_rotary_factor=0.5,
                                original_max_position_embeddings=256, **_LONGROPE)}),
    "smollm3": Case("smollm3", "SmolLM3Config", "llama-bpe", {
        "num_hidden_layers": 5, "intermediate_size": 64, "rope_parameters": rope(theta=2e6)}),
    # Its first projections read the embedding as it is: Q8_0's steps would make ties.
    "olmo2": Case("olmo2", "Olmo2Config", "dbrx", {"rope_parameters": rope(theta=5e5)}, "f32"),
    "granite": Case("granite", "GraniteConfig", "starcoder", {
        "attention_multiplier": 0.4, "embedding_multiplier": 6.0, "residual_multiplier": 0.3,
        "logits_scaling": 4.0, "tie_word_embeddings": True, "rope_parameters": rope()}),
    "starcoder2": Case("starcoder2", "Starcoder2Config", "starcoder", {
        "sliding_window": 12, "rope_parameters": rope(theta=1e5)}),
    "stablelm": Case("stablelm", "StableLmConfig", "qwen2", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "use_qkv_bias": True,
        "rope_parameters": rope(partial_rotary_factor=0.25)}),
    "stablelm-12b": Case("stablelm", "StableLmConfig", "qwen2", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "qk_layernorm": True,
        "use_parallel_residual": True, "rope_parameters": rope(partial_rotary_factor=0.25)}),
    "olmo3": Case("olmo2", "Olmo3Config", "dbrx", {
        "num_hidden_layers": 4, "intermediate_size": 64, "sliding_window": 12,
        "rope_parameters": rope(theta=5e5)}, "f32"),
    # As olmo2.
    "olmo": Case("olmo", "OlmoConfig", "dbrx", {
        "intermediate_size": 32, "clip_qkv": 1.5, "rope_parameters": rope()}, "f32"),
    "olmoe": Case("olmoe", "OlmoeConfig", "dbrx", {
        "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32,
        "num_key_value_heads": 4, "norm_topk_prob": False, "rope_parameters": rope()}),
    "granitemoe": Case("granitemoe", "GraniteMoeConfig", "starcoder", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32,
        "attention_multiplier": 0.4, "embedding_multiplier": 6.0, "residual_multiplier": 0.3,
        "logits_scaling": 4.0, "tie_word_embeddings": True, "rope_parameters": rope()}),
    "phi2": Case("phi2", "PhiConfig", "starcoder", {
        "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_act": "gelu_new",
        "rope_parameters": rope(partial_rotary_factor=0.5)}),
    "command-r": Case("command-r", "CohereConfig", "llama-bpe", {
        "logit_scale": 0.3, "rope_parameters": rope(theta=1e4)}),
    "cohere2": Case("cohere2", "Cohere2Config", "llama-bpe", {
        "num_hidden_layers": 4, "intermediate_size": 64, "sliding_window": 12,
        "logit_scale": 0.3, "rope_parameters": rope(theta=5e4)}),
    "glm4": Case("glm4", "Glm4Config", "llama-bpe", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "attention_bias": True,
        "rope_parameters": rope(partial_rotary_factor=0.5)}),
    "ernie4_5": Case("ernie4_5", "Ernie4_5Config", "spm", {
        "head_dim": 32, "rope_parameters": rope(theta=5e5)}),
    "seed_oss": Case("seed_oss", "SeedOssConfig", "llama-bpe", {
        "head_dim": 32, "attention_bias": True, "rope_parameters": rope(theta=1e7)}),
    "gpt-oss": Case("gpt-oss", "GptOssConfig", "gpt-4o", {
        "num_hidden_layers": 3, "intermediate_size": 32, "num_local_experts": 8,
        "head_dim": 16, "num_experts_per_tok": 3, "sliding_window": 12,
        "rope_parameters": rope("yarn", 1.5e5, factor=32.0, beta_fast=32.0, beta_slow=1.0,
                                truncate=False, original_max_position_embeddings=64)}),
    "chatglm": Case("chatglm", "GlmConfig", "llama-bpe", {
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "rope_parameters": rope(partial_rotary_factor=0.5)}),
    "glm4moe": Case("glm4moe", "Glm4MoeConfig", "llama-bpe", {
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "attention_bias": True, "use_qk_norm": True, "moe_intermediate_size": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
        "rope_parameters": rope(partial_rotary_factor=0.5)}),
    "ernie4_5-moe": Case("ernie4_5-moe", "Ernie4_5_MoeConfig", "spm", {
        "num_hidden_layers": 3, "moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 3,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "tie_word_embeddings": False,
        "rope_parameters": rope(theta=5e5)}),
    # As olmo2.
    "exaone4": Case("exaone4", "Exaone4Config", "llama-bpe", {
        "num_hidden_layers": 4, "intermediate_size": 32, "sliding_window": 12,
        "sliding_window_pattern": 4, "rope_parameters": rope(theta=1e6)}, "f32"),
    "exaone4-small": Case("exaone4", "Exaone4Config", "llama-bpe", {
        "intermediate_size": 64, "sliding_window": None, "tie_word_embeddings": True,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": rope("llama3", 1e6, factor=16.0, low_freq_factor=1.0,
                                high_freq_factor=4.0, original_max_position_embeddings=64)}, "f32"),
    "hunyuan-dense": Case("hunyuan-dense", "HunYuanDenseV1Config", "dbrx", {
        "head_dim": 32, "rope_parameters": rope("dynamic", alpha=50.0, factor=1.0)}),
    "hunyuan-moe": Case("hunyuan-moe", "HunYuanMoEV1Config", "dbrx", {
        "head_dim": 16, "num_experts": 8, "moe_topk": 3, "intermediate_size": 32,
        "rope_parameters": rope("dynamic", alpha=50.0, factor=1.0)}),
    "mistral3": Case("mistral3", "Ministral3Config", "llama-bpe", {
        "head_dim": 32, "rope_parameters": rope(
            "yarn", 1e6, factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.3, original_max_position_embeddings=64)}),
    "arcee": Case("arcee", "ArceeConfig", "llama-bpe", {
        "rope_parameters": rope("yarn", 1e4, factor=4.0, original_max_position_embeddings=64)}),
    "nemotron": Case("nemotron", "NemotronConfig", "spm", {
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": rope(partial_rotary_factor=0.5)}),
    "exaone": Case("exaone", "ExaoneConfig", "llama-bpe", {
        "tie_word_embeddings": True,
        "rope_parameters": rope("llama3", 1e6, factor=8.0, low_freq_factor=1.0,
                                high_freq_factor=4.0, original_max_position_embeddings=64)}),
    "jais2": Case("jais2", "Jais2Config", "dbrx", {"rope_parameters": rope(theta=5e5)}),
    "dots1": Case("dots1", "Dots1Config", "qwen2", {
        "num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "sliding_window": None, "rope_parameters": rope()}),
    "minimax-m2": Case("minimax-m2", "MiniMaxM2Config", "gpt-4o", {
        "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32,
        "rope_parameters": rope(theta=5e6, partial_rotary_factor=0.5)}),
    "granite-hybrid": Case("granite", "GraniteMoeHybridConfig", "starcoder", {
        "attention_multiplier": 0.4, "embedding_multiplier": 6.0, "residual_multiplier": 0.3,
        "logits_scaling": 4.0, "tie_word_embeddings": True, "num_local_experts": 0,
        "shared_intermediate_size": 96, "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope", "rope_parameters": rope()}),
    "gpt2": Case("gpt2", "GPT2Config", "gpt-2", {"n_inner": 96, "num_key_value_heads": 4}),
    "starcoder": Case("starcoder", "GPTBigCodeConfig", "starcoder", {
        "n_inner": 96, "num_key_value_heads": 1}),
    "gptneox": Case("gptneox", "GPTNeoXConfig", "gpt-2", {
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": rope(partial_rotary_factor=0.25)}),
    "gptneox-serial": Case("gptneox", "GPTNeoXConfig", "gpt-2", {
        "num_attention_heads": 2, "num_key_value_heads": 2, "use_parallel_residual": False,
        "rope_parameters": rope(partial_rotary_factor=0.5)}),
    "falcon": Case("falcon", "FalconConfig", "falcon", {
        "ffn_hidden_size": 96, "rope_parameters": rope()}),
    "falcon-40b": Case("falcon", "FalconConfig", "falcon", {
        "ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2,
        "rope_parameters": rope()}),
    "qwen2vl": Case("qwen2vl", "Qwen2VLConfig", "qwen2", {
        "rope_parameters": rope(theta=1e6, mrope_section=[2, 3, 3]),
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}}),
    "qwen3vl": Case("qwen3vl", "Qwen3VLConfig", "qwen2", {
        "head_dim": 32, "rope_parameters": rope(theta=5e6, mrope_section=[6, 5, 5]),
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                          "out_hidden_size": 64, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0]}}),
    "qwen3vlmoe": Case("qwen3vlmoe", "Qwen3VLMoeConfig", "qwen2", {
        "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "rope_parameters": rope(theta=5e6, mrope_section=[6, 5, 5]),
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                          "out_hidden_size": 64, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0]}}),
}  # fmt: skip

# ---- vocabularies ----

MERGES = ("t h", "th e", "Ġ the", "e r", "i n", "o n", "a n", "an d", "Ġ and", "r e", "o u", "e n",
          "Ġ t", "Ġt o", "Ġ a", "Ġ w", "Ġw as", "i s", "Ġ b", "i t", "a s", "in g", "Ġ s", "e d",
          "1 2", "Ġ f", "a t", "h e", "l l", "o r", "Ġ o", "Ġo f", "v e", "' s")  # fmt: skip
END = "<|end_of_text|>"
SPECIALS = ("<|begin_of_text|>", END, "<|turn|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
TEXTS = (
    "the cat and the other one",
    "  It was 1234, or\n\nnot: naïve Straße 日本",
    "He's in <|turn|>",
)


def byte_letters() -> list[str]:
    """GPT-2's letters for the bytes 0 to 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def pre_tokenizer(name: str) -> dict[str, Any]:
    """tokenizer.json's pre_tokenizer of that name, as the model makers write them."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    cut, first = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"[^\r\n\p{L}\p{N}]?"
    cased = rf"{first}{upper}*{lower}+{cut}|{first}{upper}+{lower}*{cut}|"
    steps = {
        "llama-bpe": [split(words + r"\p{N}{1,3}" + rest)],
        "dbrx": [split(words + r"\p{N}{1,3}" + rest)],
        "qwen2": [split(words + r"\p{N}" + rest)],
        "gpt-4o": [split(cased + r"\p{N}{1,3}" + rest.replace(r"[\r\n]*", r"[\r\n/]*", 1))],
        "starcoder": [{"type": "Digits", "individual_digits": True}],
        "gpt-2": [],
        "falcon": [{"type": "Punctuation", "behavior": "Contiguous"}],
    }[name]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": name in ("starcoder", "gpt-2", "falcon")}  # fmt: skip
    digits = [split("[0-9][0-9][0-9]")] if name == "falcon" else []
    return {"type": "Sequence", "pretokenizers": [*steps, last, *digits]}


def write_bpe(folder: Path, name: str) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE vocabulary."""
    letters = byte_letters()
    tokens = [*sorted(letters), *(m.replace(" ", "") for m in MERGES)]
    parts = {t for m in MERGES for t in m.split()}
    merges = [m for m in MERGES if all(t in tokens for t in m.split())]
    tokens = [t for t in tokens if len(t) == 1 or any(t == m.replace(" ", "") for m in merges)]
    assert all(t in tokens for t in parts if t in tokens)
    added = [{"id": len(tokens) + i, "content": t, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": i < 2}
             for i, t in enumerate(SPECIALS)]  # fmt: skip
    begin = {"id": SPECIALS[0], "type_id": 0}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": begin}, text] if name == "llama-bpe" else [text]
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": pre_tokenizer(name),
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": [*single, text],
            "special_tokens": {SPECIALS[0]: {"id": SPECIALS[0], "ids": [len(tokens)],
                                             "tokens": [SPECIALS[0]]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": name == "llama-bpe",
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = {"bos_token": SPECIALS[0], "eos_token": {"content": END}, "chat_template": TEMPLATE,
              "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [len(tokens) + 1, len(tokens) + 2]}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def write_spm(folder: Path) -> None:
    """tokenizer.model, a SentencePiece BPE vocabulary, and tokenizer_config.json."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for text, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        model.pieces.add(piece=text, score=0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=6)
    letters = "\u2581etaoinshrdlu"
    words = [m.replace(" ", "").replace("Ġ", "\u2581") for m in MERGES]
    words = [w for w in words if all(c in letters for c in w)]
    for i, text in enumerate([*words, *letters]):
        model.pieces.add(piece=text, score=-float(i), type=1)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    n = len(model.pieces)
    added = {str(n): {"content": "<|turn|>", "special": True}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "add_bos_token": True, "add_eos_token": False, "chat_template": TEMPLATE,
              "added_tokens_decoder": added}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# ---- models ----


def round_to_q8_0(values: np.ndarray) -> np.ndarray:
    """The nearest values that Q8_0 holds, where rows divide into its blocks."""
    if values.ndim < 2 or values.shape[-1] % 32:
        return values
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = values.reshape(-1, values.shape[-1])
    stored = gguf.quants.quantize(np.ascontiguousarray(rows), kind)
    return gguf.quants.dequantize(stored, kind).reshape(values.shape)


EMBEDDINGS = ("embed_tokens", ".wte.", ".wpe.", "embed_in", "word_embeddings")
ROUTERS = ("mlp.gate.weight", "shared_expert_gate.weight", "router.weight", "gate.wg.weight")


def fill(model: Any, seed: int, kind: str) -> None:
    """Random weights of a size that keeps activations natural, and biases and norms that matter."""
    import torch

    rng = np.random.default_rng(seed)
    kind_of = type(model).__name__
    plus_one = "Gemma" in kind_of or "Nemotron" in kind_of
    biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, parameter in sorted([*model.named_parameters(), *biases]):
        shape = tuple(parameter.shape)
        conv = "GPT2" in kind_of and ".h." in name and len(shape) == 2
        turned = conv or ("GptOss" in kind_of and len(shape) == 3)  # inputs by outputs
        if turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        norm = "norm" in name or ".ln_" in name
        if norm and name.endswith("weight"):
            values = rng.uniform(0.5, 1.5, shape) - plus_one
        elif name.endswith("bias"):
            values = rng.normal(0, 0.2, shape)
        elif any(part in name for part in EMBEDDINGS):
            grown = "Gemma" in kind_of or "Granite" in kind_of
            values = rng.normal(0, 0.125 if grown else 1, shape)
        elif name.endswith("sinks"):
            values = rng.normal(0, 1.5, shape)
        else:
            router = name.endswith(ROUTERS)
            size = (
                1.0 if router else 4.0 if len(shape) == 3 and turned else 1.4
            )  # large enough for gpt-oss's clamps
            values = rng.normal(0, size / np.sqrt(shape[-1]), shape)
        values = values.astype(np.float32)
        whole = kind == "f32" or norm or ".wpe." in name or "gate.weight" in name
        kept = values if whole else round_to_q8_0(values)
        parameter.data.copy_(torch.from_numpy(kept.swapaxes(-2, -1) if turned else kept))


def build(name: str, seed: int = 0) -> Any:
    """The model of a case in float32, with eager attention."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    case = CASES[name]
    keys = BASE | case.keys
    if case.config == "Phi3Config":
        keys["pad_token_id"] = 0
    vision = keys.pop("vision_config", None)
    if vision:
        config = getattr(transformers, case.config)(text_config=keys, vision_config=vision)
    else:
        config = getattr(transformers, case.config)(**keys)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    maker = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = maker.from_config(config, attn_implementation="eager").eval()
    fill(model, seed * 1000 + sum(map(ord, name)), case.kind)
    return model


def save(name: str, model: Any, folder: Path, shard: str = "5GB") -> None:
    """The model as a Hugging Face folder with its vocabulary."""
    model.save_pretrained(folder, max_shard_size=shard)
    if CASES[name].tokenizer == "spm":
        write_spm(folder)
    else:
        write_bpe(folder, CASES[name].tokenizer)


def prompts(name: str) -> list[list[int]]:
    rng = np.random.default_rng(len(name))
    return [rng.integers(3, N_VOCAB - 40, n).tolist() for n in (*LENGTHS, SPARSE_LENGTH)]


# ---- what transformers computes ----


class Unsure(Exception):
    """A choice hung on too little."""


def prune(x: Any, n: int, m: int) -> Any:
    """x [..., k] with the n largest of every m neighbours kept."""
    import torch

    groups = x.reshape(*x.shape[:-1], -1, m)
    size = groups.abs()
    ordered = size.sort(dim=-1, descending=True).values
    gap = (ordered[..., n - 1] - ordered[..., n]) / ordered[..., n - 1]
    if (gap < MARGIN).any():
        raise Unsure
    rank = size.argsort(dim=-1, descending=True).argsort(dim=-1)
    return torch.where(rank < n, groups, 0).reshape(x.shape)


def _pruned_linear(module: Any, pattern: tuple[int, int], outputs: Any) -> Callable:
    """A linear layer some of whose outputs (an index) read pruned inputs."""
    dense = type(module).forward

    def forward(x: Any) -> Any:
        y = dense(module, x)
        y[..., outputs] = dense(module, prune(x, *pattern))[..., outputs]
        return y

    return forward


def _queries(config: Any, n_out: int) -> np.ndarray:
    """Which outputs of a query_key_value matrix are queries: those that share a key stand before
    it and its value."""
    heads, kv = config.num_attention_heads, config.num_attention_heads
    if config.model_type == "falcon":
        kv = config.num_kv_heads if config.new_decoder_architecture else 1
    place = np.arange(n_out) // (n_out // (heads + 2 * kv))  # of the head
    return np.flatnonzero(place % (heads // kv + 2) < heads // kv)


def _pruned_experts(module: Any, pattern: tuple[int, int]) -> Callable:
    """A layer's experts, one after the other, gate and down reading pruned inputs."""
    from torch.nn.functional import linear

    def forward(x: Any, chosen: Any, weights: Any) -> Any:
        out = x * 0
        half = module.gate_up_proj.shape[1] // 2
        sparse = prune(x, *pattern)
        for e in range(module.gate_up_proj.shape[0]):
            token, place = (chosen == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            w = module.gate_up_proj[e]
            hidden = module.act_fn(linear(sparse[token], w[:half])) * linear(x[token], w[half:])
            made = linear(prune(hidden, *pattern), module.down_proj[e])
            out.index_add_(0, token, made * weights[token, place, None])
        return out

    return forward


def _pruned_turned_experts(module: Any, pattern: tuple[int, int]) -> Callable:
    """The same for gpt-oss's experts, whose matrices have inputs by outputs, with biases."""
    from torch.nn.functional import linear

    def forward(x: Any, chosen: Any, weights: Any) -> Any:
        import torch

        out = x * 0
        sparse = prune(x, *pattern)
        for e in range(module.gate_up_proj.shape[0]):
            token, place = (chosen == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            w, bias = module.gate_up_proj[e].T, module.gate_up_proj_bias[e]
            both = linear(x[token], w, bias)
            gate = linear(sparse[token], w[::2], bias[::2])
            hidden = module._apply_gate(torch.stack((gate, both[:, 1::2]), -1).flatten(-2))
            made = linear(prune(hidden, *pattern), module.down_proj[e].T, module.down_proj_bias[e])
            out.index_add_(0, token, made * weights[token, place, None])
        return out

    return forward


# Linear layers all of whose outputs read pruned inputs.
WHOLE = ("q_proj", "gate_proj", "down_proj", "fc2", "dense_4h_to_h", "output_linear")


@contextmanager
def pruned(model: Any, pattern: tuple[int, int]) -> Iterator[None]:
    """Inputs of q, gate and down pruned, as arXiv 2508.02128 advises; of the experts of a
    mixture as well. A feed-forward without a gate has down alone."""
    config = model.config.get_text_config()
    changed = []
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "experts":
            turned = hasattr(module, "gate_up_proj_bias")
            new = (_pruned_turned_experts if turned else _pruned_experts)(module, pattern)
        elif leaf in WHOLE or name.endswith("mlp.c_proj"):
            new = _pruned_linear(module, pattern, slice(None))
        elif leaf in ("qkv_proj", "c_attn"):
            new = _pruned_linear(module, pattern, slice(config.hidden_size))
        elif leaf == "query_key_value":
            queries = _queries(config, module.weight.shape[0])
            new = _pruned_linear(module, pattern, queries)
        elif leaf in ("gate_up_proj", "input_linear"):
            new = _pruned_linear(module, pattern, slice(module.weight.shape[0] // 2))
        else:
            continue
        module.forward = new
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _check_routers(model: Any) -> list[Any]:
    """Hooks that notice experts chosen by a hair."""

    def check(module: Any, args: Any, result: Any) -> None:
        rank = result[0]
        if hasattr(module, "moe_statics"):
            rank = module.moe_statics(rank.softmax(-1))
        elif hasattr(module, "e_score_correction_bias"):
            rank = rank.sigmoid() + module.e_score_correction_bias
        elif len(args) > 1:
            rank = rank.sigmoid() + args[1]
        ordered = rank.sort(dim=-1, descending=True).values
        if (ordered[..., module.top_k - 1] - ordered[..., module.top_k] < MARGIN).any():
            raise Unsure

    return [
        module.register_forward_hook(check)
        for module in model.modules()
        if type(module).__name__.lower().endswith(("topkrouter", "moev1gate"))
    ]


def logits(model: Any, tokens: list[int]) -> np.ndarray:
    """[n, n_vocab] float64 after every token, in one pass without a cache."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].double().numpy()


def expected(name: str, model: Any) -> dict[str, np.ndarray]:
    """Logits of all prompts, "dense 0" to "dense 2", and pruned ones of the last, by pattern."""
    model = model.double()
    hooks = _check_routers(model)
    *dense, last = prompts(name)
    try:
        made = {f"dense {i}": logits(model, tokens) for i, tokens in enumerate(dense)}
        for text, pattern in PATTERNS.items():
            with pruned(model, pattern):
                made[text] = logits(model, last)
    finally:
        for hook in hooks:
            hook.remove()
    return made


def make(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A case's model and its logits: the first seed whose choices are all clear."""
    for seed in range(100):
        model = build(name, seed)
        try:
            result = expected(name, model)
        except Unsure:
            continue
        return model.float(), result
    raise RuntimeError(f"{name}: no seed with clear choices")


def kept_rows(n: int) -> np.ndarray:
    """Positions of a prompt whose logits are stored: all of a short one, else some of the whole."""
    return np.unique(np.linspace(0, n - 1, min(n, KEPT)).round().astype(int))


def write_golden(name: str, folder: Path, scratch: Path) -> int:
    """NAME.gguf and NAME.npz. Returns their bytes."""
    from amber import convert

    model, result = make(name)
    save(name, model, scratch)
    path = folder / f"{name}.gguf"
    convert.write_gguf(
        convert.Folder(str(scratch)), str(path), CASES[name].kind, lambda _d, _t: None
    )
    # Half precision adds 2^-12 to the tolerance's 1e-3.
    rows = {k: v[kept_rows(len(v))].astype(np.float16) for k, v in result.items()}
    np.savez_compressed(folder / f"{name}.npz", **rows)
    return path.stat().st_size + (folder / f"{name}.npz").stat().st_size


def main() -> int:
    import tempfile

    parser = argparse.ArgumentParser(description="Write the golden files of every architecture.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), help="some cases")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for name in args.only or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            size = write_golden(name, args.folder, Path(scratch) / name)
        print(f"{name}: {size:,} bytes", file=sys.stderr)
        total += size
    print(f"{total:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the architectures of Hugging Face folders need when they become GGUF files: one row each.

Keys and tensors' names are the same for all (convert.py); a row says what else differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SILU = frozenset({"silu", "swish"})
# The tanh form of GELU; "gelu" in the first Gemma's files means that one too.
GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
GEMMA = GELU | {"gelu"}
EXACT_GELU = frozenset({"gelu"})
RELU2 = frozenset({"relu2"})
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture needs beside names and keys."""

    name: str  # general.architecture
    classes: tuple[str, ...]  # of config.json's "architectures"
    # The file pairs RoPE's channels (2i, 2i + 1) where Hugging Face pairs (i, i + n/2): the rows
    # of Q and K change places.
    permuted: bool = False
    norm_plus_one: bool = False  # a norm's weight w stands for 1 + w
    layer_norm: bool = False  # LayerNorm in place of RMSNorm
    # With a sliding window in config.json: 1 where all layers have it, n where every nth layer sees
    # everything; 0 where readers know of no window.
    window_period: int = 0
    rope_every: int = 0  # every nth layer has no RoPE
    experts: bool = False
    expert_sigmoid: bool = False  # routers give sigmoids
    # Where experts are stored as inputs by outputs, how gate and up share a matrix: "halves", or
    # output by output in "turns".
    turned_experts: str = ""
    yarn_exact: bool = False  # YaRN's ramp is not rounded to whole pairs of channels
    turned: bool = False  # the layers' matrices are stored as inputs by outputs
    # One matrix has the queries that share a key and a value, then these, and so for all keys.
    grouped_qkv: bool = False
    # What "hidden_act" may be: another activation is another model.
    activations: frozenset[str] = SILU
    # Values of transformers' configuration class that config.json may leave out.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # What config.json may not say otherwise.
    fixed: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES = (
    Architecture(
        "llama",
        (
            "LlamaForCausalLM",
            "LLaMAForCausalLM",
            "MistralForCausalLM",
            "MinistralForCausalLM",
            "MixtralForCausalLM",
            "Mistral3ForConditionalGeneration",
        ),
        permuted=True,
        experts=True,
        window_period=1,
    ),
    Architecture(
        "mistral3",
        ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
        permuted=True,
        window_period=1,
    ),
    Architecture("qwen2", ("Qwen2ForCausalLM",)),
    Architecture(
        "qwen2vl", ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
    ),
    Architecture("qwen3vl", ("Qwen3VLForConditionalGeneration",)),
    Architecture(
        "qwen3vlmoe",
        ("Qwen3VLMoeForConditionalGeneration",),
        experts=True,
        turned_experts="halves",
    ),
    Architecture("qwen2moe", ("Qwen2MoeForCausalLM",), experts=True),
    Architecture("qwen3", ("Qwen3ForCausalLM",)),
    Architecture("qwen3moe", ("Qwen3MoeForCausalLM",), experts=True),
    Architecture(
        "gemma", ("GemmaForCausalLM",), norm_plus_one=True, activations=GEMMA, defaults=TIED
    ),
    Architecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        norm_plus_one=True,
        window_period=2,
        activations=GEMMA,
        defaults=TIED,
    ),
    Architecture(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        norm_plus_one=True,
        window_period=6,
        activations=GEMMA,
        defaults={
            **TIED,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    Architecture("phi3", ("Phi3ForCausalLM",), window_period=1),
    Architecture("smollm3", ("SmolLM3ForCausalLM",), permuted=True, rope_every=4),
    Architecture("olmo2", ("Olmo2ForCausalLM", "Olmo3ForCausalLM"), window_period=4),
    Architecture(
        "olmo",
        ("OlmoForCausalLM",),
        permuted=True,
        layer_norm=True,
        defaults={"layer_norm_eps": 1e-5},
    ),
    Architecture("olmoe", ("OlmoeForCausalLM",), experts=True),
    # Of the hybrid ones those that have attention in all layers.
    Architecture(
        "granite",
        ("GraniteForCausalLM", "GraniteMoeHybridForCausalLM"),
        permuted=True,
        fixed={"num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    Architecture("granitemoe", ("GraniteMoeForCausalLM",), permuted=True, experts=True),
    Architecture(
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        layer_norm=True,
        window_period=1,
        activations=GELU,
        defaults=TIED,
    ),
    Architecture("stablelm", ("StableLmForCausalLM",), layer_norm=True),
    Architecture("phi2", ("PhiForCausalLM",), layer_norm=True, activations=GELU),
    # These pair channels (2i, 2i + 1) in Hugging Face too.
    Architecture("command-r", ("CohereForCausalLM",), layer_norm=True, defaults=TIED),
    Architecture(
        "cohere2", ("Cohere2ForCausalLM",), layer_norm=True, window_period=4, defaults=TIED
    ),
    Architecture("chatglm", ("GlmForCausalLM",)),
    Architecture("glm4", ("Glm4ForCausalLM",)),
    Architecture("glm4moe", ("Glm4MoeForCausalLM",), experts=True, expert_sigmoid=True),
    Architecture("ernie4_5", ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")),
    Architecture("ernie4_5-moe", ("Ernie4_5_MoeForCausalLM",), experts=True, defaults=TIED),
    Architecture(
        "gpt-oss",
        ("GptOssForCausalLM",),
        window_period=2,
        experts=True,
        turned_experts="turns",
        yarn_exact=True,
    ),
    Architecture("exaone", ("ExaoneForCausalLM",)),
    Architecture("jais2", ("Jais2ForCausalLM",), layer_norm=True, activations=RELU2),
    Architecture("exaone4", ("Exaone4ForCausalLM",), window_period=4),
    Architecture("hunyuan-dense", ("HunYuanDenseV1ForCausalLM",)),
    Architecture(
        "hunyuan-moe",
        ("HunYuanMoEV1ForCausalLM",),
        experts=True,
        defaults={"num_shared_expert": 1},
    ),
    Architecture("arcee", ("ArceeForCausalLM",), permuted=True, activations=RELU2),
    Architecture(
        "nemotron",
        ("NemotronForCausalLM",),
        layer_norm=True,
        norm_plus_one=True,
        activations=RELU2,
    ),
    Architecture("dots1", ("Dots1ForCausalLM",), experts=True, expert_sigmoid=True),
    Architecture("minimax-m2", ("MiniMaxM2ForCausalLM",), experts=True, expert_sigmoid=True),
    Architecture("seed_oss", ("SeedOssForCausalLM",)),
    Architecture(
        "gpt2",
        ("GPT2LMHeadModel",),
        layer_norm=True,
        turned=True,
        activations=GELU,
        defaults=TIED,
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    Architecture(
        "starcoder",
        ("GPTBigCodeForCausalLM",),
        layer_norm=True,
        grouped_qkv=True,
        activations=GELU,
        defaults={**TIED, "multi_query": True},
        fixed={"scale_attn_weights": True},
    ),
    Architecture(
        "gptneox",
        ("GPTNeoXForCausalLM",),
        layer_norm=True,
        grouped_qkv=True,
        activations=EXACT_GELU,
        defaults={"partial_rotary_factor": 0.25},
    ),
    Architecture(
        "falcon",
        ("FalconForCausalLM", "RWForCausalLM"),
        layer_norm=True,
        grouped_qkv=True,
        activations=EXACT_GELU,
        defaults={**TIED, "multi_query": True, "max_position_embeddings": 2048},
        fixed={"alibi": False, "parallel_attn": True},
    ),
)

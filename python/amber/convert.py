"""Hugging Face folders (config.json, *.safetensors, tokenizer files) as GGUF files.

Tensors' names are those of the package `gguf`, keys are those that llama.cpp's converter writes;
what an architecture needs beside them is a row of ARCHITECTURES. Tensors are mapped and written one
after the other, so a folder may be larger than memory.

    from amber.convert import write_gguf

    write_gguf("Qwen2.5-0.5B-Instruct", "qwen.gguf", "f16")
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .architectures import ARCHITECTURES, Architecture
from .convert_tokenizer import read_vocabulary, synthetic_vocabulary
from .errors import AmberError, ArgumentError, FileFormatError, UnsupportedModelError
from .mxfp4 import Packed, unpacked
from .safetensors import Stored, read_folder, read_json

if TYPE_CHECKING:
    import numpy as np

CONFIG = "config.json"
LARGEST = 3.4e38  # of float32, the type of a GGUF file's real numbers
SLICE_VALUES = 1 << 24  # converted at once
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")  # auto: every tensor as it is stored
Progress = Callable[[int, int], Any]  # (bytes written, bytes in all)


LAYERS = ("num_hidden_layers", "num_layers")
# Names in older classes' config.json of what others call so.
RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "shared_intermediate_size": "intermediate_size",
    "activation": "hidden_act",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
}

# GGUF key -> names in config.json, the first that is there counts.
INTEGERS = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": LAYERS,
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
}
OPTIONAL_INTEGERS = {
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "expert_group_count": ("n_group",),
    "leading_dense_block_count": ("first_k_dense_replace", "moe_layer_start_index"),
    "interleave_moe_layer_step": ("moe_layer_interval",),
}
FLOATS = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "expert_weights_scale": ("routed_scaling_factor",),
    "attention.clamp_kqv": ("clip_qkv",),
}
BOOLEANS = {
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")

# Matrices whose shape config.json tells, in all architectures that have them. phi3's ffn_up holds
# the gate too.
SHAPES = {
    "output_norm.weight": ("embedding_length",),
    "attn_norm.weight": ("embedding_length",),
    "attn_q.weight": ("queries", "embedding_length"),
    "attn_k.weight": ("keys", "embedding_length"),
    "attn_v.weight": ("keys", "embedding_length"),
    "attn_output.weight": ("embedding_length", "queries"),
    "ffn_gate.weight": ("feed_forward_length", "embedding_length"),
    "ffn_down.weight": ("embedding_length", "feed_forward_length"),
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
# All experts in one tensor, with the gate above the up projection: the names that each half would
# have for one expert.
EXPERTS = {
    "experts.gate_up_proj": ("experts.gate_proj", "experts.up_proj"),
    "experts.down_proj": ("experts.down_proj",),
    "input_linear.weight": ("experts.w1", "experts.w3"),
    "output_linear.weight": ("experts.w2",),
}
STACKED = re.compile(r"(.*)\.(" + "|".join(map(re.escape, EXPERTS)) + ")")
HEAD_NORM = re.compile(r"(.*\.[qk]_layernorm)\.norms\.(\d+)\.weight")
LAYER, BLOCK = re.compile(r"\.(?:layers|h)\.(\d+)\."), re.compile(r"blk\.(\d+)\.")
# What files carry beside weights: buffers of older versions.
IGNORED = re.compile(r".*(rotary_emb\.inv_freq|(attention|\.attn)\.(masked_)?bias|self_attn\.bias)")
BARE = re.compile(r"(wte|wpe|h|ln_f)\.")  # without the model's own prefix
# A feed-forward half that hybrid models share among their kinds of layers: the gate above up.
SHARED_MLP = re.compile(r"(.*)\.shared_mlp\.(input|output)_linear\.weight")
VISION = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|vision_model|visual|audio_tower|"
    r"image_newline)(\..*)?"
)
# Experts whose matrices are inputs by outputs.
TURNED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?")
ROUTER_BIAS = re.compile(r"(.*\.e_score_correction)_bias")


# ---- config.json ----


class Config:
    """config.json with checked values; of a model with vision the part on text."""

    def __init__(self, folder: str) -> None:
        path = os.path.join(folder, CONFIG)
        if not os.path.isfile(path):
            raise FileFormatError(f"{folder}: expected {CONFIG}, not found (not a model's folder?)")
        whole = read_json(path)
        classes = whole.get("architectures")
        classes = classes if isinstance(classes, list) else []
        self.named = next((c for c in classes if isinstance(c, str)), None)
        text = whole.get("text_config")
        inner = text.get("architectures") if isinstance(text, dict) else None
        self.values: dict[str, Any] = {**whole, **text} if isinstance(text, dict) else whole
        if "tie_word_embeddings" in whole:  # the head belongs to the whole model
            self.values["tie_word_embeddings"] = whole["tie_word_embeddings"]
        self.row = self._row(inner if isinstance(inner, list) else [])
        for old, new in RENAMED.items():
            if self.values.get(old) is not None:
                self.values[new] = self.values[old]
        self.values = {**self.row.defaults, **self.values}
        if self.values.get("multi_query") and not self.values.get("new_decoder_architecture"):
            self.values["num_key_value_heads"] = 1
        if self.row.grouped_qkv or self.row.turned:
            self.values.setdefault("intermediate_size", 4 * (self.integer("hidden_size") or 0))
        self._check_fixed()

    def _check_fixed(self) -> None:
        for name, only in self.row.fixed.items():
            if self.values.get(name, only) not in (only, None):
                raise UnsupportedModelError(
                    f"{CONFIG}: {name} {self.values[name]!r:.40}: {self.row.name} needs {only!r}"
                )
        activation = self.get("hidden_activation", "hidden_act", "activation_function")
        if activation is not None and activation not in self.row.activations:
            raise UnsupportedModelError(
                f"{CONFIG}: hidden_act {activation!r:.60}; {self.row.name} has "
                f"{', '.join(sorted(self.row.activations))}"
            )
        kinds = self.values.get("layer_types")
        odd = {str(kind) for kind in kinds} if isinstance(kinds, list) else set()
        if odd := odd - {"attention", "full_attention", "sliding_attention"}:
            raise UnsupportedModelError(
                f"{CONFIG}: layer_types: {min(odd)!r:.40}: expected attention in all layers"
            )

    def _row(self, inner: Sequence[Any]) -> Architecture:
        """inner: the classes of the part on text, which tell where the whole is not known."""
        fitting = [row for row in ARCHITECTURES if self.named in row.classes]
        fitting = fitting or [row for row in ARCHITECTURES for name in inner if name in row.classes]
        if fitting:  # the last Mistral 3 is a class of the first with other positions
            return fitting[-1 if self.get("model_type") == "ministral3" else 0]
        known = ", ".join(row.classes[0] for row in ARCHITECTURES)
        raise UnsupportedModelError(
            f"{CONFIG}: architecture {self.named or 'missing'} cannot be converted; supported: "
            f"{known}"
        )

    def get(self, *names: str) -> Any:
        return next((self.values[n] for n in names if self.values.get(n) is not None), None)

    def number(self, kinds: Any, names: Sequence[str]) -> Any:
        """A number under one of the names; None where all are missing or null."""
        value = self.get(*names)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # layer by layer, the same in all
        if value is None:
            return None
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST:
            raise FileFormatError(f"{CONFIG}: {names[0]}: expected a number, found {value!r:.80}")
        return value

    def integer(self, *names: str) -> int | None:
        value = self.number(int, names)
        if value is not None and not 0 <= value < 1 << 31:
            raise FileFormatError(f"{CONFIG}: {names[0]}: expected 0..2^31, found {value}")
        return value

    def required(self, *names: str) -> int:
        value = self.integer(*names)
        if not value:
            raise FileFormatError(f"{CONFIG}: {names[0]}: expected a number above 0, found {value}")
        return value

    def real(self, *names: str) -> float | None:
        value = self.number((int, float), names)
        return None if value is None else float(value)

    def head_dim(self) -> int:
        return self.integer("head_dim") or (
            self.required("hidden_size") // self.required("num_attention_heads")
        )


def layer_types(config: Config, row: Architecture) -> list[bool]:
    """Which layers see only a window."""
    n, window = config.required(*LAYERS), config.integer("sliding_window")
    unknown = not row.window_period and not config.get("use_sliding_window")
    if not window or unknown or config.get("use_sliding_window") is False:
        return [False] * n
    types = config.get("layer_types")
    if isinstance(types, list):
        if len(types) != n:
            raise FileFormatError(f"{CONFIG}: layer_types: expected {n}, found {len(types)}")
        if odd := set(map(str, types)) - {"sliding_attention", "full_attention"}:
            raise UnsupportedModelError(f"{CONFIG}: layer_types: {min(odd)}")
        return [t == "sliding_attention" for t in types]
    if config.get("use_sliding_window"):
        full = config.integer("max_window_layers") or 0
        return [il >= full for il in range(n)]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str):  # "LLLG": local and global layers
        return [pattern[il % len(pattern)] == "L" for il in range(n)]
    period = config.integer("sliding_window_pattern", "_sliding_window_pattern")
    return by_period(period or row.window_period, n)


def by_period(period: int, n_layer: int) -> list[bool]:
    return [period == 1 or (il + 1) % period != 0 for il in range(n_layer)]


def window_keys(config: Config, row: Architecture) -> dict[str, Any]:
    windowed = layer_types(config, row)
    if not any(windowed):
        return {}
    if not row.window_period:
        raise UnsupportedModelError(f"{CONFIG}: {row.name} with sliding windows")
    keys: dict[str, Any] = {"attention.sliding_window": config.required("sliding_window")}
    if windowed != by_period(row.window_period, len(windowed)):
        keys["attention.sliding_window_pattern"] = windowed
    elif row.window_period > 1:
        keys["attention.sliding_window_pattern"] = row.window_period
    return keys


class Rope:
    """RoPE of the layers that see everything, and the base of windowed ones where they have their
    own. config.json spells it in two ways: rope_parameters, and the older rope_theta with
    rope_scaling."""

    def __init__(self, config: Config) -> None:
        new, old = config.get("rope_parameters"), config.get("rope_scaling")
        whole, local = self._object("rope_parameters", new), None
        if new is None:
            base = {"rope_theta": config.get("rope_theta")}
            whole = base | self._object("rope_scaling", old)
            local = config.real("rope_local_base_freq")
        elif "full_attention" in whole:
            windowed = self._object("rope_parameters", whole.get("sliding_attention"))
            whole = self._object("rope_parameters", whole["full_attention"])
            if windowed.get("rope_type", "default") != "default":
                raise UnsupportedModelError(f"{CONFIG}: RoPE scaling in windowed layers")
            local = windowed.get("rope_theta")
        self.values = whole
        self.local_base = None if local is None else self._checked("rope_theta", local)
        self.base = self.real("rope_theta")
        self.kind = self._kind()
        share = self.real("partial_rotary_factor") or config.real("partial_rotary_factor") or 1.0
        self.n_rot = config.integer("rotary_dim") or int(config.head_dim() * share)
        if alpha := self.real("alpha"):  # a base for a longer context (NTK-aware scaling)
            self.base = (self.base or 10000.0) * alpha ** (self.n_rot / (self.n_rot - 2))
        if (
            self.kind == "yarn"
            and self.values.get("truncate") is False
            and not config.row.yarn_exact
        ):
            raise UnsupportedModelError(f"{CONFIG}: YaRN without truncation in {config.row.name}")
        self.n_ctx = config.required("max_position_embeddings")
        self.n_ctx_orig = self.real("original_max_position_embeddings") or config.real(
            "original_max_position_embeddings"
        )

    @staticmethod
    def _object(name: str, value: Any) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            raise FileFormatError(f"{CONFIG}: {name}: expected an object, found {value!r:.80}")
        return dict(value or {})

    @staticmethod
    def _checked(name: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= LARGEST:
            raise FileFormatError(
                f"{CONFIG}: RoPE: {name}: expected a number above 0, found {value!r:.80}"
            )
        return float(value)

    def real(self, name: str) -> float | None:
        value = self.values.get(name)
        return None if value is None else self._checked(name, value)

    def required(self, name: str) -> float:
        value = self.real(name)
        if value is None:
            raise FileFormatError(f"{CONFIG}: RoPE scaling {self.kind}: {name}: expected, missing")
        return value

    def reals(self, name: str) -> list[float]:
        """One value for each pair of channels."""
        values, n = self.values.get(name), self.n_rot // 2
        if not isinstance(values, list) or len(values) != n:
            raise FileFormatError(f"{CONFIG}: RoPE: {name}: expected a list of {n} numbers")
        return [self._checked(name, v) for v in values]

    def _kind(self) -> str:
        kind = self.values.get("rope_type") or self.values.get("type") or "default"
        # Dynamic NTK changes nothing within the context that the model was made for.
        # Of several axes of positions, text has one.
        kind = {"su": "longrope", "dynamic": "default", "mrope": "default"}.get(kind, kind)
        if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
            raise UnsupportedModelError(
                f"{CONFIG}: RoPE scaling {kind!r:.60}; supported: default, linear, yarn, llama3, "
                "longrope"
            )
        return kind

    def keys(self) -> dict[str, Any]:
        """YaRN: arXiv 2309.00071; longrope: arXiv 2402.13753."""
        keys: dict[str, Any] = {"rope.dimension_count": self.n_rot}
        if self.base:
            keys["rope.freq_base"] = self.base
        if beta := self.real("llama_4_scaling_beta"):
            keys["attention.temperature_scale"] = beta
        sections = self.values.get("mrope_section")
        if isinstance(sections, list) and all(type(n) is int for n in sections):
            keys["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
        if self.local_base:
            keys["rope.freq_base_swa"] = self.local_base
        if self.kind == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": self.required("factor")}
        elif self.kind == "yarn":
            original = self.n_ctx_orig or self.n_ctx
            factor = self.real("factor") or self.n_ctx / original
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": factor,
                "rope.scaling.original_context_length": int(original),
            }
            for name in ("beta_fast", "beta_slow"):
                if value := self.real(name):
                    keys[f"rope.scaling.yarn_{name}"] = value
            attention = self._yarn_attention(factor)
            if attention is not None:  # the reader multiplies with YaRN's own
                keys["rope.scaling.attn_factor"] = attention / (1 + 0.1 * math.log(factor))
        elif self.kind == "longrope":
            if not self.n_ctx_orig:
                raise FileFormatError(
                    f"{CONFIG}: original_max_position_embeddings: expected, missing"
                )
            factor = self.real("factor") or self.n_ctx / self.n_ctx_orig
            attention = self.real("attention_factor") or (
                math.sqrt(1 + math.log(factor) / math.log(self.n_ctx_orig)) if factor > 1 else 1.0
            )
            keys |= {
                "rope.scaling.attn_factor": attention,
                "rope.scaling.original_context_length": int(self.n_ctx_orig),
            }
        return keys

    def _yarn_attention(self, factor: float) -> float | None:
        """The factor on cos and sin that the file asks for, where it is not YaRN's own."""
        if attention := self.real("attention_factor"):
            return attention
        scale, every = self.real("mscale"), self.real("mscale_all_dim")
        if scale and every:
            grown = 0.1 * math.log(factor)
            return (1 + scale * grown) / (1 + every * grown)
        return None

    def tensors(self) -> "dict[str, np.ndarray]":
        """Divisors of the frequencies, one for each pair of channels."""
        import numpy as np

        if self.kind == "llama3":
            # Waves longer than low turns of the original context are stretched by the factor, those
            # shorter than high turns stay, with a ramp between (the model card of Llama 3.1).
            n = self.n_rot // 2
            wave = 2 * np.pi * (self.base or 10000.0) ** (np.arange(n) / n)
            low, high = self.required("low_freq_factor"), self.required("high_freq_factor")
            turns = self.required("original_max_position_embeddings") / wave
            if high <= low:
                raise FileFormatError(
                    f"{CONFIG}: RoPE: expected low_freq_factor < high_freq_factor"
                )
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            return {"rope_freqs.weight": 1 / ((1 - smooth) / self.required("factor") + smooth)}
        if self.kind == "longrope":
            return {
                f"rope_factors_{n}.weight": np.array(self.reals(f"{n}_factor"))
                for n in ("long", "short")
            }
        return {}


def config_keys(config: Config, row: Architecture, rope: Rope) -> dict[str, Any]:
    """The model's own keys, without the prefix "<arch>."."""
    keys: dict[str, Any] = {key: config.required(*names) for key, names in INTEGERS.items()}
    for key, names in OPTIONAL_INTEGERS.items():
        value = config.integer(*names)
        if value and (row.experts or not key.startswith("expert")):
            keys[key] = value
    keys |= {key: v for key, names in FLOATS.items() if (v := config.real(*names)) is not None}
    if row.experts and row.name != "llama":
        keys.setdefault("expert_feed_forward_length", keys["feed_forward_length"])
        shared = keys.get("expert_shared_count", 0) * keys["expert_feed_forward_length"]
        if shared:
            keys.setdefault("expert_shared_feed_forward_length", shared)
    if row.expert_sigmoid:
        keys["expert_gating_func"] = 2
    keys |= {key: v for key, names in BOOLEANS.items()
             if isinstance(v := config.get(*names), bool)}  # fmt: skip
    scalar = config.real("query_pre_attn_scalar")
    if scalar:
        keys["attention.scale"] = scalar**-0.5
    epsilon = config.real(*EPSILONS)
    if epsilon is None:
        raise FileFormatError(f"{CONFIG}: {EPSILONS[0]}: expected, not found")
    kind = "layer_norm_epsilon" if row.layer_norm else "layer_norm_rms_epsilon"
    keys[f"attention.{kind}"] = epsilon
    if row.rope_every:
        used = config.get("no_rope_layers")  # in spite of its name: 1 where there is RoPE
        expected = [int((il + 1) % row.rope_every != 0) for il in range(keys["block_count"])]
        if used is not None and used != expected:
            raise UnsupportedModelError(
                f"{CONFIG}: no_rope_layers: supported is no RoPE in each {row.rope_every}th layer"
            )
    return keys | window_keys(config, row) | rope.keys()


# ---- tensors ----


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write. Its parts, one after the other along the first axis, are made when asked
    for. shape: slowest-varying first."""

    name: str
    kind: str  # of the parts' bits: "F32", "F16", "BF16", "F64"
    shape: tuple[int, ...]
    parts: "Sequence[Callable[[], np.ndarray]]"


def floats(bits: "np.ndarray") -> "np.ndarray":
    """float32 values of any stored type; uint16 are the bits of bfloat16."""
    import numpy as np

    if bits.dtype == np.uint16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def bfloat16(values: "np.ndarray") -> "np.ndarray":
    """float32 values rounded to the nearest bfloat16, ties to even, as bits."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def interleaved(rows: "np.ndarray", heads: int, n_rot: int) -> "np.ndarray":
    """Rows of Q or K, or their bias, in the order in which channel i of the first half of a head's
    rotated part is followed by channel i of the second."""
    import numpy as np

    size = len(rows) // heads
    order = np.arange(size)
    order[:n_rot] = np.arange(n_rot).reshape(2, n_rot // 2).T.ravel()
    return rows.reshape(heads, size, *rows.shape[1:])[:, order].reshape(rows.shape)


def ungrouped(rows: "np.ndarray", heads: int, kv: int) -> "np.ndarray":
    """Rows of all queries, then of all keys, then of all values, from rows in which the queries of
    each key are followed by it and its value."""
    import numpy as np

    parts = rows.reshape(kv, heads // kv + 2, -1, *rows.shape[1:])
    parts = (parts[:, :-2], parts[:, -2:-1], parts[:, -1:])
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


def is_turned(row: Architecture, tensor: Stored, width: int) -> bool:
    """Whether experts are stored as inputs by outputs. Where files of both kinds are about, the
    model's width tells: it is the gate's inputs and the down projection's outputs."""
    if row.turned_experts != "halves" or len(tensor.shape) != 3:
        return bool(row.turned_experts)
    return tensor.shape[2 if ".down_proj" in tensor.name else 1] == width


def members(
    row: Architecture, width: int, name: str, tensor: Stored
) -> Iterator[tuple[str, int, Stored]]:
    """What a stored tensor of a model of this width holds: names as if each tensor were one of its
    layer's, and the place among experts or heads, which GGUF stacks."""
    if found := EXPERT.fullmatch(name):
        yield f"{found[1]}.{found[3]}.weight", int(found[2]), tensor
    elif found := HEAD_NORM.fullmatch(name):
        yield f"{found[1]}.weight", int(found[2]), tensor
    elif is_turned(row, tensor, width) and (found := TURNED.fullmatch(name)):
        kind, half = "bias" if found[3] else "weight", tensor.shape[-1] // 2
        parts = {"down_proj": slice(None)}
        if found[2] == "gate_up_proj" and row.turned_experts == "turns":
            parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        elif found[2] == "gate_up_proj":
            parts = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
        for part, picked in parts.items():
            yield f"{found[1]}.{part}.{kind}", 0, tensor.turned(picked)
    elif found := ROUTER_BIAS.fullmatch(name):
        yield f"{found[1]}.bias", 0, tensor
    elif name.endswith(".sinks"):
        yield f"{name}.weight", 0, tensor
    elif found := SHARED_MLP.fullmatch(name):
        parts = ("gate_proj", "up_proj") if found[2] == "input" else ("down_proj",)
        for i, part in enumerate(parts):
            yield f"{found[1]}.mlp.{part}.weight", 0, tensor.rows(i, len(parts))
    elif found := STACKED.fullmatch(name):
        parts = EXPERTS[found[2]]
        if len(tensor.shape) != 3 or tensor.shape[1] % len(parts):
            raise FileFormatError(
                f"{tensor.name}: expected a matrix for each expert, found {list(tensor.shape)}"
            )
        for i, part in enumerate(parts):
            yield f"{found[1]}.{part}.weight", 0, tensor.slab(i, len(parts))
    else:
        yield name, 0, tensor


class Folder:
    """A model in a Hugging Face folder. Errors: FileFormatError, UnsupportedModelError."""

    def __init__(self, path: str) -> None:
        self.path, self.config = path, Config(path)
        self.row, self.rope = self.config.row, Rope(self.config)
        self.gguf = gguf_module()
        packing = self.config.get("quantization_config")
        method = packing.get("quant_method") if isinstance(packing, dict) else packing
        self.mxfp4 = method == "mxfp4" and self.row.turned_experts == "turns"
        if packing and not self.mxfp4:
            raise UnsupportedModelError(
                f"{CONFIG}: quantization_config {method!r:.40}: expected a checkpoint in float32, "
                "float16 or bfloat16, or gpt-oss in MXFP4 (fetch the original, or unpack this one)"
            )
        self.tensors = self._tensors()
        embedding = next((t for t in self.tensors if t.name == "token_embd.weight"), None)
        if embedding is None or len(embedding.shape) != 2:
            raise FileFormatError(f"{path}: expected an embedding model.embed_tokens, not found")
        self.n_vocab = embedding.shape[0]

    def name(self) -> str:
        """What the model is called."""
        return os.path.basename(os.path.abspath(self.path))

    def keys(self, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
        """All keys of the file but those on its types."""
        own = config_keys(self.config, self.row, self.rope)
        own["vocab_size"] = self.n_vocab
        name = self.name()
        # By the name a reader tells that Phi-3's special tokens swallow white space behind them.
        if vocabulary.pop("swallows_space", False) and not re.search("phi-?3", name.lower()):
            name = f"Phi-3 {name}"
        return {"general.type": "model", "general.name": name} | {
            f"{self.row.name}.{key}": value for key, value in own.items()
        } | {f"tokenizer.{key}": value for key, value in vocabulary.items()}  # fmt: skip

    def _tensors(self) -> list[Tensor]:
        import numpy as np

        names = self._names()
        stored: dict[str, Stored | Packed] = dict(read_folder(self.path))
        if self.mxfp4:
            stored = dict(unpacked(stored))
        self.files = {tensor.file for tensor in stored.values()}
        groups: dict[str, list[tuple[int, Stored | Packed]]] = {}
        width = self.config.required("hidden_size")
        plain_names = {
            n.removeprefix("language_model.").replace("model.language_model.", "model."): n
            for n in stored
        }
        plain_names = {
            f"transformer.{n}" if BARE.match(n) else n: of for n, of in plain_names.items()
        }
        embedded = any(names.get_name(n, (".weight",)) == "token_embd.weight" for n in plain_names)
        for name, tensor in ((n, stored[of]) for n, of in plain_names.items()):
            if IGNORED.fullmatch(name) or VISION.fullmatch(name):
                continue
            if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
                if embedded:
                    continue
                name = "model.embed_tokens.weight"  # of the two, one is saved
            layer = LAYER.search(name)
            if layer and int(layer[1]) >= self.n_layer and self._guesses():
                continue
            for plain, member, part in members(self.row, width, name, tensor):
                target = names.get_name(plain, (".weight", ".bias"))
                layer = LAYER.search(plain)
                if target is None or (layer and int(layer[1]) >= self.n_layer):
                    raise UnsupportedModelError(
                        f"{os.path.basename(tensor.file)}: {tensor.name}: not a tensor of "
                        f"{self.row.name} with {self.n_layer} layers"
                    )
                groups.setdefault(target, []).append((member, part))
        self._check_layers(groups)
        sizes = self._sizes()
        made: list[Tensor] = []
        for name, values in self.rope.tensors().items():  # first: a check of the header reads them
            data = values.astype(np.float32)
            made.append(Tensor(name, "F32", data.shape, [lambda data=data: data]))
        for target, group in groups.items():
            tensor = self._group(target, group)
            expected = SHAPES.get(BLOCK.sub("", tensor.name))
            if expected and tensor.shape != tuple(sizes[name] for name in expected):
                raise FileFormatError(
                    f"{group[0][1].name}: expected {' x '.join(expected)} = "
                    f"{[sizes[name] for name in expected]} by {CONFIG}, found {list(tensor.shape)}"
                )
            made.append(self._transformed(tensor))
        return made

    def _guesses(self) -> bool:
        """Whether layers behind the last guess further tokens: they are left out."""
        return bool(self.config.integer("num_nextn_predict_layers", "num_mtp_layers"))

    def _sizes(self) -> dict[str, int]:
        """The sizes that SHAPES names."""
        names = {key.rsplit(".", 1)[-1]: self.config.required(*names)
                 for key, names in INTEGERS.items()}  # fmt: skip
        head = self.config.head_dim()
        return names | {
            "queries": names["head_count"] * head,
            "keys": names["head_count_kv"] * head,
        }

    def _check_layers(self, names: Iterable[str]) -> None:
        """Every layer has the tensors of the first, or of the first with experts."""
        layers: list[set[str]] = [set() for _ in range(self.n_layer)]
        for name in names:
            if found := BLOCK.match(name):
                layers[int(found[1])].add(name[found.end() :])
        first: dict[bool, int] = {}
        for il, layer in enumerate(layers):
            like = first.setdefault("ffn_gate_inp.weight" in layer, il)
            if odd := layer ^ layers[like]:
                raise FileFormatError(
                    f"{self.path}: layer {il}: expected the tensors of layer {like}, found a "
                    f"difference "
                    f"in {min(odd)} (a file is missing, or {CONFIG} is another model's)"
                )

    def _names(self) -> Any:
        """Hugging Face's names of tensors -> GGUF's."""
        self.n_layer = self.config.required(*LAYERS)
        known = {n: a for a, n in self.gguf.MODEL_ARCH_NAMES.items()}
        if self.row.name not in known:
            raise AmberError(
                f"the installed gguf package does not know {self.row.name}: pip install -U gguf"
            )
        if self.n_layer > 4096:
            raise FileFormatError(f"{CONFIG}: num_hidden_layers: at most 4096")
        return self.gguf.get_tensor_name_map(known[self.row.name], self.n_layer)

    def _group(self, target: str, members: list[tuple[int, Stored]]) -> Tensor:
        """The GGUF tensor of one stored tensor, or of the experts or heads of a layer."""
        members.sort(key=lambda m: m[0])
        first = members[0][1]
        shape, kinds = first.shape, {t.kind for _, t in members}
        stacked = EXPERT.fullmatch(first.name) or HEAD_NORM.fullmatch(first.name)
        if [i for i, _ in members] != list(range(len(members))) or len(kinds) > 1:
            raise FileFormatError(f"{first.name}: expected each expert once, in one type")
        for _, t in members:
            if t.shape != shape:
                raise FileFormatError(
                    f"{t.name}: expected shape {list(shape)}, found {list(t.shape)}"
                )
        parts: list[Callable[[], np.ndarray]] = [t.bits for _, t in members]
        tensor = Tensor(target, first.kind, shape, parts)
        if stacked:
            parts = [lambda t=t: t.bits()[None] for _, t in members]
            tensor = replace(tensor, shape=(len(members), *shape), parts=parts)
        elif target.endswith(("_inp_shexp.weight", "exp_probs_b.bias")) and len(shape) == 2:
            # [1, n]: the file has a vector
            tensor = replace(tensor, shape=shape[-1:], parts=[lambda: first.bits()[0]])
        elif self.row.turned and BLOCK.match(target) and len(shape) == 2:
            tensor = replace(tensor, shape=shape[::-1], parts=[lambda: first.bits().T])
        return tensor

    def _transformed(self, tensor: Tensor) -> Tensor:
        """A tensor with what its architecture does to it."""
        import numpy as np

        row, make = self.row, tensor.parts[0]
        if row.norm_plus_one and tensor.name.endswith("norm.weight"):
            one = np.float32(1)
            return replace(tensor, kind="F32", parts=[lambda: floats(make()) + one])
        if row.grouped_qkv and ".attn_qkv." in tensor.name:
            heads, kv = (self.config.required(name)
                         for name in ("num_attention_heads", "num_key_value_heads"))  # fmt: skip
            if heads % kv or tensor.shape[0] % (heads + 2 * kv):
                raise FileFormatError(
                    f"{tensor.name}: {tensor.shape[0]} rows cannot be {heads} heads that share "
                    f"{kv} keys and values"
                )
            return replace(tensor, parts=[lambda: ungrouped(make(), heads, kv)])
        found = re.search(r"\.attn_([qk])\.(weight|bias)", tensor.name)
        if row.permuted and found:
            names = ("num_attention_heads",)
            heads = self.config.required(*(("num_key_value_heads", *names) if found[1] == "k"
                                           else names))  # fmt: skip
            n_rot = self.rope.n_rot
            if tensor.shape[0] % heads or n_rot % 2 or n_rot > tensor.shape[0] // heads:
                raise FileFormatError(
                    f"{tensor.name}: {tensor.shape[0]} rows cannot be {heads} heads of which RoPE "
                    f"turns {n_rot} channels"
                )
            return replace(tensor, parts=[lambda: interleaved(make(), heads, n_rot)])
        return tensor

    def stored_bytes(self) -> int:
        """Bytes of the files that hold the tensors."""
        return sum(os.path.getsize(file) for file in self.files)


# ---- writing ----


def gguf_module() -> Any:
    """The package `gguf`, with a word on where it comes from."""
    try:
        import gguf
    except ImportError as error:
        raise AmberError(
            f"this command needs numpy and gguf: pip install 'amber-llm[tools]' ({error})"
        ) from None
    return gguf


def target_kind(tensor: Tensor, dtype: str) -> str:
    """The type a tensor is written in: vectors, routers and positions always in F32, whole rows of
    32 in the wanted one, else F16."""
    kept = ("norm.weight", "_inp.weight", ".bias", "position_embd.weight")
    if len(tensor.shape) == 1 or tensor.name.endswith(kept):
        return "F32"
    if dtype == "auto":
        return "F32" if tensor.kind == "F64" else tensor.kind
    return "F16" if dtype == "q8_0" and tensor.shape[-1] % 32 else dtype.upper()


def encoded(gguf: Any, tensor: Tensor, kind: str) -> "Iterator[np.ndarray]":
    """A tensor's bytes in pieces of bounded size."""
    import numpy as np

    for part in tensor.parts:
        bits = part()
        rows = bits.reshape(-1, bits.shape[-1])
        step = max(1, SLICE_VALUES // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            if kind == tensor.kind:
                yield np.ascontiguousarray(piece)
                continue
            values = np.ascontiguousarray(floats(piece))
            if kind == "F16":
                with np.errstate(over="ignore"):
                    piece = values.astype(np.float16)
                if not np.isfinite(piece).all():
                    raise FileFormatError(
                        f"{tensor.name}: values that f16 cannot hold (write bf16 instead)"
                    )
                yield piece
            elif kind == "BF16":
                yield bfloat16(values)
            elif kind == "Q8_0":
                yield gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            else:
                yield values


def write_gguf(
    folder: "str | os.PathLike | Folder",
    out: str | os.PathLike,
    dtype: str = "f16",
    progress: Progress | None = None,
    *,
    synthetic_vocab: bool = False,
    check: Callable[[str], Any] | None = None,
) -> None:
    """Writes the model of a Hugging Face folder as a plain GGUF file, for any program that reads
    GGUF.

    dtype: of matrices, one of TYPES; vectors and routers are F32. progress: called with (bytes
    written, bytes in all). synthetic_vocab: for a folder without a tokenizer, a byte-level
    vocabulary as large as the model's (tests of random models). check: called with the file's name
    once it has its header and its length but no weights; what it raises ends the conversion.

    Errors: FileFormatError, UnsupportedModelError, AmberError without the packages numpy and gguf.
    A failed conversion leaves no file.
    """
    if dtype not in TYPES:
        raise ArgumentError(f"dtype: expected one of {', '.join(TYPES)}, found {dtype!r}")
    if not isinstance(folder, Folder):
        folder = Folder(os.fspath(folder))
    if synthetic_vocab:
        vocabulary = synthetic_vocabulary(folder.n_vocab)
    else:
        vocabulary = read_vocabulary(folder.path, folder.config.values, folder.n_vocab)
    plan = [(t, target_kind(t, dtype)) for t in folder.tensors]
    try:
        _write(folder, os.fspath(out), vocabulary, plan, check, progress or (lambda *_: None))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(out)
        raise


def _write(
    folder: Folder,
    out: str,
    vocabulary: dict[str, Any],
    plan: Sequence[tuple[Tensor, str]],
    check: Callable[[str], Any] | None,
    progress: Progress,
) -> None:
    import numpy as np

    gguf = folder.gguf
    writer = gguf.GGUFWriter(out, folder.row.name)
    try:
        for key, value in folder.keys(vocabulary).items():
            _add_key(writer, key, value)
        bulk: dict[str, int] = {}
        sizes = []
        for tensor, name in plan:
            kind = gguf.GGMLQuantizationType[name]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            sizes.append(math.prod(tensor.shape) // block * size)
            as_float = np.dtype(np.float32)  # the real type is the last argument
            writer.add_tensor_info(tensor.name, tensor.shape, as_float, sizes[-1], kind)
            bulk[name] = bulk.get(name, 0) + sizes[-1]
        most = max(bulk, key=lambda name: bulk[name])
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file, alignment = writer.fout[0], writer.data_alignment
        file.write(bytes(-file.tell() % alignment))
        end = file.tell() + sum(size + -size % alignment for size in sizes)
        total, done = sum(sizes), 0
        for (tensor, kind), size in zip(plan, sizes, strict=True):
            if check and not tensor.name.startswith("rope_"):
                file.flush()
                file.truncate(end)
                check(out)
                check = None
            written = 0
            for piece in encoded(gguf, tensor, kind):
                written += file.write(memoryview(piece).cast("B"))
                progress(done + written, total)
            if written != size:
                raise AssertionError(f"{tensor.name}: {written} bytes of {size}")
            file.write(bytes(-written % alignment))
            done += written
    finally:
        writer.close()


def _add_key(writer: Any, key: str, value: Any) -> None:
    """A key in the type that its value asks for: int as U32 in a scalar and I32 in a list."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

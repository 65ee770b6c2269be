"""Amber beside llama.cpp: logits of tiny models of every architecture, in float32 on both sides.

    python tools/check_llama_cpp.py > tools/results/llama-cpp.md
    python tools/check_llama_cpp.py --golden tests/golden

The models are those of tests/golden, whose reference is transformers, as files of float32. Some
architectures are not among transformers' classes: their files are made here from one that computes
the same, and llama.cpp is what they are held to. --golden stores its logits of these, for
tests/test_architectures.py. Needs the packages llama-cpp-python and gguf.
"""

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_architectures as maker

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    """A file like that of another case, under another architecture's name."""

    like: str
    keys: Mapping[str, Any] = field(default_factory=dict)  # other values
    without: tuple[str, ...] = ()  # parts of the names of keys and tensors that it lacks
    untied: bool = False  # the head is a tensor of its own
    layers: int = 0  # another number of layers: the same ones over and over
    first: int = 0  # the first of the layers that are taken
    biased: str = ""  # a projection of the layers that gets a bias
    fused: bool = False  # q, k and v in one matrix, with a key for every query


VARIANTS = {
    "internlm2": Variant("llama", without=("rope_freqs",)),
    "xverse": Variant("llama", without=("rope_freqs",)),
    # llama.cpp rotates in models of 32 layers alone.
    "baichuan": Variant("llama", without=("rope_freqs",), layers=32),
    "minicpm": Variant("granite", without=("attention.scale",)),
    "pangu-embedded": Variant("qwen2", untied=True, biased="attn_output"),
    "qwen": Variant("qwen2", {"feed_forward_length": 192, "attention.head_count_kv": 4},
                    untied=True, fused=True),
    "maincoder": Variant("qwen3"),
    "plamo": Variant("llama", without=("rope_freqs", "ffn_norm")),
    "orion": Variant("stablelm", {"rope.dimension_count": 32},
                     ("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    "codeshell": Variant("starcoder2", without=("sliding_window",), untied=True),
    "deepseek": Variant("ernie4_5-moe", {"expert_weights_scale": 1.5}, ("exp_probs_b",)),
    "bailingmoe": Variant("ernie4_5-moe",
                          {"expert_weights_scale": 1.5, "expert_weights_norm": True,
                           "leading_dense_block_count": 0},
                          ("exp_probs_b",), layers=2, first=1),
}  # fmt: skip

# Why some of the others differ, or are compared without a key: (part of a key's name, reason).
WITHOUT = {
    "mistral": ("sliding_window", "llama.cpp lets the models of this name see everything"),
    "starcoder2": ("sliding_window", "llama.cpp lets it see everything"),
    "phi3": ("sliding_window", "llama.cpp lets it see everything"),
    "exaone4": ("sliding_window", "llama.cpp knows windows of models with 64 layers"),
    "gemma2": ("attention.scale", "llama.cpp knows the factor by the number of layers"),
    "gemma3": ("attention.scale", "llama.cpp knows the factor by the number of layers"),
    "gpt-oss": ("rope.scaling", "llama.cpp rounds YaRN's ramp to pairs of channels"),
}


def of_layer(name: str) -> tuple[int, str]:
    """Layer and name in it; layer -1: in none."""
    if not name.startswith("blk."):
        return -1, name
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def changed(tensors: Tensors, variant: Variant, n_layer: int) -> Tensors:
    made = {n: v for n, v in tensors.items() if not any(part in n for part in variant.without)}
    if variant.untied and "output.weight" not in made:
        made["output.weight"] = made["token_embd.weight"].copy()
    if variant.fused:
        for il in range(n_layer):
            for kind in ("weight", "bias"):
                q, k, v = (made.pop(f"blk.{il}.attn_{which}.{kind}") for which in "qkv")
                heads = maker.BASE["num_attention_heads"]
                repeat = len(q) // len(k)
                k, v = (
                    np.repeat(x.reshape(heads // repeat, -1, *x.shape[1:]), repeat, 0)
                    for x in (k, v)
                )
                both = k.reshape(q.shape), v.reshape(q.shape)
                made[f"blk.{il}.attn_qkv.{kind}"] = np.concatenate([q, *both])
    if variant.biased:
        rng = np.random.default_rng(1)
        for il in range(n_layer):
            n = len(made[f"blk.{il}.{variant.biased}.weight"])
            made[f"blk.{il}.{variant.biased}.bias"] = rng.normal(0, 0.2, n).astype(np.float32)
    if not variant.layers:
        return made
    result = {n: v for n, v in made.items() if of_layer(n)[0] < 0}
    for il in range(variant.layers):
        source = variant.first + il % (n_layer - variant.first)
        # Many layers of random weights would blow each other up.
        size = np.float32(1 if variant.layers <= n_layer else 0.3)
        for name, values in made.items():
            layer, rest = of_layer(name)
            if layer == source:
                result[f"blk.{il}.{rest}"] = values * (size if values.ndim > 1 else 1)
    return result


def write(name: str, path: Path) -> list[int]:
    """A case or variant as a GGUF file of float32. Returns a prompt of its vocabulary."""
    variant = VARIANTS.get(name) or Variant(name, without=WITHOUT.get(name, ("\0",))[:1])
    arch = name if name in VARIANTS else maker.CASES[name].arch
    reader = GGUFReader(GOLDEN / f"{variant.like}.gguf")
    old = reader.fields["general.architecture"].contents()
    n_layer = reader.fields[f"{old}.block_count"].contents()
    keys = {f"{arch}.{key}": value for key, value in variant.keys.items()}
    if variant.layers:
        keys[f"{arch}.block_count"] = variant.layers
    writer = GGUFWriter(path, arch)
    writer.add_name("tiny")  # by some names llama.cpp expects special tokens
    for found in reader.fields.values():
        key = found.name.replace(f"{old}.", f"{arch}.", 1)
        left_out = key in keys or key in ("general.architecture", "general.name")
        if left_out or key.startswith("GGUF.") or any(part in key for part in variant.without):
            continue
        kind = found.types[-1] if found.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, found.contents(), found.types[0], sub_type=kind)
    for key, value in keys.items():
        kind = {bool: "BOOL", float: "FLOAT32", int: "UINT32"}[type(value)]
        writer.add_key_value(key, value, GGUFValueType[kind])
    tensors = {
        t.name: quants.dequantize(t.data, t.tensor_type)
        .reshape([int(n) for n in reversed(t.shape)])
        .astype(np.float32)
        for t in reader.tensors
    }
    for tensor, values in changed(tensors, variant, n_layer).items():
        writer.add_tensor(tensor, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return maker.prompts(variant.like)[1]


class Refused(Exception):
    """llama.cpp does not take a file."""


def theirs(path: Path, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits after every token, with a cache in float32."""
    import llama_cpp as lib

    said: list[str] = []
    log = lib.llama_log_callback(lambda _l, text, _u: said.append(text.decode(errors="replace")))
    lib.llama_log_set(log, None)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        errors = [line.strip() for line in said if "error" in line]
        raise Refused(errors[0].split(": ", 2)[-1] if errors else "not loaded")
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.type_k = options.type_v = 0  # float32
    options.flash_attn_type = 0
    options.swa_full = True
    options.n_threads = options.n_threads_batch = 1
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if lib.llama_decode(context, batch):
        raise Refused("llama_decode failed")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    at = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    made = np.ctypeslib.as_array(at, shape=(len(tokens), n_vocab)).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return made


def ours(path: Path, tokens: list[int]) -> np.ndarray:
    import amber

    with amber.Engine(path, precision="float", n_ctx=256) as engine:
        return engine.logits(tokens, all=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare logits with llama.cpp's.")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="store its logits there")
    args = parser.parse_args()
    worst = 0.0
    if not args.golden:
        import llama_cpp

        print(f"`python tools/check_llama_cpp.py`, llama-cpp-python {llama_cpp.__version__}\n\n"
              "Relative error of the logits of 37 tokens, float32 on both sides. llama.cpp reads "
              "GELU from a table in\nhalf precision, which is 3e-4 of them.\n\n"
              "| file | architecture | error | compared without |\n|---|---|---|---|",
              flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for name in VARIANTS if args.golden else [*maker.CASES, *VARIANTS]:
            tokens = write(name, path)
            try:
                expected = theirs(path, tokens)
            except Refused as error:
                print(f"| {name} | | | not taken: {error} |", flush=True)
                continue
            if args.golden:
                np.savez_compressed(args.golden / f"{name}.npz", logits=expected.astype(np.float16))
                continue
            error = np.linalg.norm(ours(path, tokens) - expected) / np.linalg.norm(expected)
            worst = max(worst, float(error))
            arch = name if name in VARIANTS else maker.CASES[name].arch
            what = ", ".join(WITHOUT.get(name, ())).replace(", ", ": ", 1)
            print(f"| {name} | {arch} | {error:.1e} | {what} |", flush=True)
    return int(worst > 1e-3)


if __name__ == "__main__":
    sys.exit(main())

"""Writes a GGUF file with random weights in the shape of a known model.

    python tools/make_synthetic.py /tmp/synthetic.gguf --shape llama-3.2-1b --type q8_0

For measuring speed and memory at a size for which no real file is at hand. The weights are normal
with standard deviation 1/sqrt(inputs), so activations keep a natural size; the text that comes out
means nothing. The same arguments write the same file. Needs numpy and gguf.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import numpy as np
from tqdm import tqdm


@dataclass(frozen=True)
class Shape:
    """What the model's own configuration file says."""

    arch: str
    layers: int
    embd: int
    heads: int
    heads_kv: int
    head_dim: int
    ff: int
    vocab: int
    context: int
    eps: float
    rope_base: float
    tied: bool  # the output head is the embedding
    qkv_bias: bool = False
    rope_factor: float = 0.0  # llama3 rope scaling, stretching a context of 8192
    window: int = 0  # of five layers in six, as gemma3 has it


SHAPES = {
    "tiny": Shape("llama", 2, 256, 4, 2, 64, 768, 1024, 2048, 1e-5, 10000.0, True),
    "small": Shape("llama", 2, 256, 4, 2, 64, 1024, 4096, 131072, 1e-5, 5e5, True),
    "small-windows": Shape(
        "gemma3", 6, 256, 4, 2, 64, 1024, 4096, 131072, 1e-6, 1e6, True, window=1024
    ),
    "qwen2.5-0.5b": Shape(
        "qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, 1e-6, 1e6, True, qkv_bias=True
    ),
    "llama-3.2-1b": Shape(
        "llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 1e-5, 5e5, True, rope_factor=32.0
    ),
    "llama-3.1-8b": Shape(
        "llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 1e-5, 5e5, False, rope_factor=8.0
    ),
}
TYPES = {
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
POOL_BLOCKS = 262139  # prime, so that no row length divides it and rows of a tensor differ


def rope_factors(shape: Shape) -> np.ndarray:
    """Divisors of the rotation frequencies by Llama 3's rule: low_freq_factor 1, high_freq_factor
    4, original context 8192. Returns [head_dim / 2] float32."""
    wavelength = 2 * math.pi * shape.rope_base ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / shape.rope_factor + smooth)).astype(np.float32)


class Weights:
    """Random weights in a file type, made once as blocks of unit variance and dealt out from
    random places."""

    def __init__(self, kind: gguf.GGMLQuantizationType, seed: int) -> None:
        self.kind = kind
        self.rng = np.random.default_rng(seed)
        unit = self.rng.standard_normal((POOL_BLOCKS, 32), dtype=np.float32)
        if kind == gguf.GGMLQuantizationType.F16:
            self.pool = unit
        else:
            self.pool = gguf.quants.quantize(unit, kind)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row; columns is a multiple of 32."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return columns // block * size

    def parts(self, rows: int, columns: int) -> Iterator[np.ndarray]:
        """The bytes of a [rows, columns] matrix, piece by piece."""
        scale = 1 / math.sqrt(columns)
        if self.kind == gguf.GGMLQuantizationType.F16:
            pool = (self.pool * np.float32(scale)).astype(np.float16).view(np.uint8)
        else:  # a float16 scale leads each block
            pool = self.pool.copy()
            leading = self.pool[:, :2].copy().view(np.float16).astype(np.float32) * scale
            pool[:, :2] = leading.astype(np.float16).view(np.uint8)
        left = rows * columns // 32
        while left:
            start = int(self.rng.integers(POOL_BLOCKS // 2))
            count = min(left, POOL_BLOCKS - start)
            yield pool[start : start + count]
            left -= count


def vocabulary(size: int) -> tuple[list[str], list[str], list[int]]:
    """Byte-level BPE tokens, merges and types: 256 bytes, strings of two, three and more lower-case
    letters as far as the size goes, and two control tokens, begin and end of text, at the end."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(0x100 + i) for i in range(256 - len(printable)))  # GPT-2's stand-ins
    tokens = [chr(byte) if byte in printable else next(others) for byte in range(256)]
    merges: list[str] = []
    letters = [chr(byte) for byte in range(ord("a"), ord("z") + 1)]
    longest = letters
    while len(tokens) < size - 2:
        longer = [(left, right) for left in longest for right in letters]
        longer = longer[: size - 2 - len(tokens)]
        merges += [f"{left} {right}" for left, right in longer]
        longest = [left + right for left, right in longer]
        tokens += longest
    types = [int(gguf.TokenType.NORMAL)] * len(tokens) + [int(gguf.TokenType.CONTROL)] * 2
    return [*tokens, "<|begin_of_text|>", "<|end_of_text|>"], merges, types


def matrices(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(name, outputs, inputs) of every matrix, in the file's order."""
    q, kv = shape.heads * shape.head_dim, shape.heads_kv * shape.head_dim
    yield "token_embd.weight", shape.vocab, shape.embd
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_q.weight", q, shape.embd
        yield f"blk.{layer}.attn_k.weight", kv, shape.embd
        yield f"blk.{layer}.attn_v.weight", kv, shape.embd
        yield f"blk.{layer}.attn_output.weight", shape.embd, q
        yield f"blk.{layer}.ffn_gate.weight", shape.ff, shape.embd
        yield f"blk.{layer}.ffn_up.weight", shape.ff, shape.embd
        yield f"blk.{layer}.ffn_down.weight", shape.embd, shape.ff
    if not shape.tied:
        yield "output.weight", shape.vocab, shape.embd


def vectors(shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of every vector."""
    ones = np.ones(shape.embd, np.float32)
    q, kv = shape.heads * shape.head_dim, shape.heads_kv * shape.head_dim
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", ones
        yield f"blk.{layer}.ffn_norm.weight", ones
        if shape.arch == "gemma3":
            for name in ("post_attention_norm", "post_ffw_norm"):
                yield f"blk.{layer}.{name}.weight", ones
            for name in ("attn_q_norm", "attn_k_norm"):
                yield f"blk.{layer}.{name}.weight", ones[: shape.head_dim]
        if shape.qkv_bias:
            for which, size in (("q", q), ("k", kv), ("v", kv)):
                yield f"blk.{layer}.attn_{which}.bias", np.zeros(size, np.float32)
    yield "output_norm.weight", ones
    if shape.rope_factor:
        yield "rope_freqs.weight", rope_factors(shape)


def add_keys(writer: gguf.GGUFWriter, name: str, shape: Shape, kind: str) -> None:
    """Everything a loader asks for."""
    writer.add_name(f"random weights in the shape of {name}")
    writer.add_file_type(
        {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
         "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}[kind]
    )  # fmt: skip
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embd)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.eps)
    if shape.window:
        writer.add_sliding_window(shape.window)
    writer.add_vocab_size(shape.vocab)
    tokens, merges, types = vocabulary(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if shape.arch == "qwen2" else "llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_bos_token_id(shape.vocab - 2)
    writer.add_eos_token_id(shape.vocab - 1)
    writer.add_add_bos_token(True)


def write(path: str, name: str, shape: Shape, kind: str, seed: int) -> None:
    """Writes the file, tensor by tensor; memory stays near 100 MB."""
    writer = gguf.GGUFWriter(path, shape.arch)
    add_keys(writer, name, shape, kind)
    weights = Weights(TYPES[kind], seed)
    sizes = {n: rows * weights.row_bytes(columns) for n, rows, columns in matrices(shape)}
    for n, rows, columns in matrices(shape):
        writer.add_tensor_info(n, (rows, columns), np.dtype(np.float32), sizes[n], TYPES[kind])
    for n, values in vectors(shape):
        writer.add_tensor_info(n, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]

    def pad() -> None:
        file.write(b"\0" * (-file.tell() % writer.data_alignment))

    pad()
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=path) as bar:
        for _, rows, columns in matrices(shape):
            for part in weights.parts(rows, columns):
                file.write(part.tobytes())
                bar.update(part.nbytes)
            pad()
        for _, values in vectors(shape):
            file.write(values.tobytes())
            pad()
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write a GGUF file with random weights in the shape of a known model."
    )
    parser.add_argument("out", help="file to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--type", choices=sorted(TYPES), default="q8_0")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers: expected 1 or more, found {args.layers}")
        shape = replace(shape, layers=args.layers)
    try:
        write(args.out, args.shape, shape, args.type, args.seed)
    except OSError as error:
        print(f"make_synthetic: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {os.path.getsize(args.out):,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

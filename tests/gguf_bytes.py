"""Writes small GGUF files byte by byte, with named places, so that tests can damage them anywhere.

Layout: the GGUF specification. Nothing is checked here: wrong files are the purpose.
"""

import struct
from collections.abc import Sequence

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q"}
_FORMATS |= {I64: "q", F64: "d"}


class Image:
    """A GGUF file under construction: keys first, then tensors, then finish()."""

    def __init__(self, version: int = 3, alignment: int = 32) -> None:
        self.data = bytearray(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        self.places = {"version": 4, "n_tensors": 8, "n_kv": 16}
        self.alignment = alignment
        self._blobs: list[bytes] = []
        self._offset = 0

    def _string(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.data += struct.pack("<Q", len(raw)) + raw

    def _count(self, place: str) -> None:
        at = self.places[place]
        struct.pack_into("<Q", self.data, at, struct.unpack_from("<Q", self.data, at)[0] + 1)

    def _begin(self, name: str, count: str) -> None:
        self._count(count)
        self.places[f"{name}:len"] = len(self.data)
        self.places[f"{name}:name"] = len(self.data) + 8
        self._string(name)

    def key(self, name: str, kind: int, value: int | float | str | bytes) -> "Image":
        self._begin(name, "n_kv")
        self.places[f"{name}:type"] = len(self.data)
        self.data += struct.pack("<I", kind)
        self.places[f"{name}:value"] = len(self.data)
        self._value(kind, value)
        return self

    def array(self, name: str, kind: int, values: Sequence) -> "Image":
        self._begin(name, "n_kv")
        self.places[f"{name}:type"] = len(self.data)
        self.data += struct.pack("<I", ARRAY)
        self.places[f"{name}:elem"] = len(self.data)
        self.data += struct.pack("<I", kind)
        self.places[f"{name}:count"] = len(self.data)
        self.data += struct.pack("<Q", len(values))
        self.places[f"{name}:first"] = len(self.data)
        for value in values:
            self._value(kind, value)
        return self

    def _value(self, kind: int, value: int | float | str | bytes) -> None:
        if kind == STRING:
            self._string(value)
        else:
            self.data += struct.pack("<" + _FORMATS[kind], value)

    def tensor(self, name: str, kind: int, shape: Sequence[int], blob: bytes) -> "Image":
        """shape: fastest-varying dimension first, as the file has it."""
        self._begin(name, "n_tensors")
        self.places[f"{name}:dims"] = len(self.data)
        self.data += struct.pack("<I", len(shape))
        self.places[f"{name}:ne0"] = len(self.data)
        self.data += struct.pack(f"<{len(shape)}Q", *shape)
        self.places[f"{name}:type"] = len(self.data)
        self.data += struct.pack("<I", kind)
        self.places[f"{name}:offset"] = len(self.data)
        self.data += struct.pack("<Q", self._offset)
        self._blobs.append(blob + b"\0" * (-len(blob) % self.alignment))
        self._offset += len(self._blobs[-1])
        return self

    def finish(self) -> bytes:
        self.places["header_end"] = len(self.data)
        if not self._blobs:
            return bytes(self.data)
        padding = b"\0" * (-len(self.data) % self.alignment)
        return bytes(self.data) + padding + b"".join(self._blobs)


PIECES = ("\u2581", "a", "b", "ab", "\u2581ab")


def spm_vocabulary(image: Image, pieces: Sequence[str] = PIECES) -> None:
    """A SentencePiece-style vocabulary: <unk>, <s>, </s>, 256 bytes, pieces."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + list(pieces)
    image.key("tokenizer.ggml.model", STRING, "llama")
    image.array("tokenizer.ggml.tokens", STRING, tokens)
    image.array("tokenizer.ggml.scores", F32, [-float(i) for i in range(len(tokens))])
    image.array("tokenizer.ggml.token_type", I32, [2, 3, 3] + [6] * 256 + [1] * len(pieces))
    image.key("tokenizer.ggml.bos_token_id", U32, 1)
    image.key("tokenizer.ggml.eos_token_id", U32, 2)


def bpe_vocabulary(image: Image, pre: str = "gpt-2") -> None:
    """A byte-level BPE vocabulary: letters in GPT-2's spelling, some merges, one special token."""
    letters = [chr(b) for b in range(33, 127)] + ["\u0120", "\u010a", "\u00c3", "\u00a4"]
    merges = ["t h", "th e", "\u0120 t", "\u0120t he", "e r", "\u00c3 \u00a4"]
    tokens = letters + [m.replace(" ", "") for m in merges] + ["<|end|>"]
    image.key("tokenizer.ggml.model", STRING, "gpt2")
    image.key("tokenizer.ggml.pre", STRING, pre)
    image.array("tokenizer.ggml.tokens", STRING, tokens)
    image.array("tokenizer.ggml.token_type", I32, [1] * (len(tokens) - 1) + [3])
    image.array("tokenizer.ggml.merges", STRING, merges)
    image.key("tokenizer.ggml.eos_token_id", U32, len(tokens) - 1)


def tiny_llama(version: int = 3) -> tuple[bytes, dict[str, int]]:
    """A whole model that opens: one layer, width 32. Returns the file and its places."""
    width, heads, ff, vocabulary = 32, 2, 64, 3 + 256 + len(PIECES)
    image = Image(version)
    image.key("general.architecture", STRING, "llama")
    image.key("general.alignment", U32, 32)
    image.key("llama.block_count", U32, 1)
    image.key("llama.context_length", U32, 64)
    image.key("llama.embedding_length", U32, width)
    image.key("llama.feed_forward_length", U32, ff)
    image.key("llama.attention.head_count", U32, heads)
    image.key("llama.attention.head_count_kv", U32, heads)
    image.key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5)
    spm_vocabulary(image)
    image.key("tokenizer.ggml.add_bos_token", BOOL, True)
    rng = np.random.default_rng(3)

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.1, shape[::-1]).astype(np.float32)
        image.tensor(name, 0, shape, values.tobytes())

    add("token_embd.weight", width, vocabulary)
    add("output_norm.weight", width)
    add("blk.0.attn_norm.weight", width)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}.weight", width, width)
    add("blk.0.ffn_norm.weight", width)
    add("blk.0.ffn_gate.weight", width, ff)
    add("blk.0.ffn_up.weight", width, ff)
    add("blk.0.ffn_down.weight", ff, width)
    return image.finish(), image.places

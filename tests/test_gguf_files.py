"""Damaged and foreign files through the Python package: a typed error that names the file, what was
expected and what to do; never a crash. test_gguf.c does the same exhaustively on the bare reader.
"""

import struct
from pathlib import Path

import pytest

from gguf_bytes import ARRAY, STRING, Image, tiny_llama

amber = pytest.importorskip("amber")

FORMAT, UNSUPPORTED = amber.FileFormatError, amber.UnsupportedModelError
HUGE = 2**64 - 1

# place, bytes from it on, format, value, error, words of its message
DAMAGES = [
    ("version", 0, "I", 0, FORMAT, "version 2 or 3, found 0"),
    ("version", 0, "I", 1, UNSUPPORTED, "version 1"),
    ("version", 0, "I", 4, UNSUPPORTED, "newer version 4"),
    ("version", 0, ">I", 3, UNSUPPORTED, "byte-swapped"),
    ("n_tensors", 0, "Q", HUGE, FORMAT, "tensors"),
    ("n_tensors", 0, "Q", 13, FORMAT, "tensor"),
    ("n_kv", 0, "Q", HUGE, FORMAT, "keys"),
    ("n_kv", 0, "Q", 2**60, FORMAT, "keys"),
    ("general.architecture:len", 0, "Q", HUGE, FORMAT, "key 1 of"),
    ("general.architecture:len", 0, "Q", 0, FORMAT, "name of 1 to"),
    ("general.architecture:name", 3, "B", 0, FORMAT, "clean UTF-8"),
    ("general.architecture:name", 3, "B", 0xFF, FORMAT, "clean UTF-8"),
    ("general.architecture:type", 0, "I", 13, FORMAT, "value type"),
    ("general.architecture:type", 0, "I", ARRAY, FORMAT, "general.architecture"),
    ("general.architecture:value", 0, "Q", HUGE, FORMAT, "general.architecture"),
    ("general.architecture:value", 0, "Q", 10**6, FORMAT, "general.architecture"),
    ("general.alignment:value", 0, "I", 0, FORMAT, "power of two"),
    ("general.alignment:value", 0, "I", 48, FORMAT, "power of two"),
    ("general.alignment:value", 0, "I", 4096, FORMAT, "multiple of 4096"),
    ("tokenizer.ggml.tokens:elem", 0, "I", ARRAY, FORMAT, "array of arrays"),
    ("tokenizer.ggml.tokens:elem", 0, "I", 99, FORMAT, "found 99"),
    ("tokenizer.ggml.tokens:count", 0, "Q", HUGE, FORMAT, "tokenizer.ggml.tokens"),
    ("tokenizer.ggml.tokens:count", 0, "Q", 2**61, FORMAT, "tokenizer.ggml.tokens"),
    ("tokenizer.ggml.tokens:first", 0, "Q", HUGE, FORMAT, "string 1 of"),
    ("tokenizer.ggml.scores:count", 0, "Q", 2**62 + 1, FORMAT, "tokenizer.ggml.scores"),
    ("tokenizer.ggml.add_bos_token:value", 0, "B", 7, FORMAT, "bool of 0 or 1, found 7"),
    ("token_embd.weight:len", 0, "Q", HUGE, FORMAT, "tensor 1 of"),
    ("token_embd.weight:name", 0, "B", 1, FORMAT, "clean UTF-8"),
    ("token_embd.weight:dims", 0, "I", 0, FORMAT, "1 to 4 dimensions"),
    ("token_embd.weight:dims", 0, "I", 5, FORMAT, "1 to 4 dimensions"),
    ("token_embd.weight:ne0", 0, "Q", 0, FORMAT, "from 1 on"),
    ("token_embd.weight:ne0", 0, "Q", HUGE, FORMAT, "below 2^63"),
    ("token_embd.weight:ne0", 0, "Q", 2**62, FORMAT, "below 2^63"),
    ("token_embd.weight:ne0", 8, "Q", 2**40, FORMAT, "incomplete download"),
    ("token_embd.weight:ne0", 8, "Q", 265, FORMAT, "inside"),
    ("token_embd.weight:type", 0, "I", 5000, UNSUPPORTED, "found number 5000"),
    ("token_embd.weight:type", 0, "I", 4, UNSUPPORTED, "Q4_2"),
    ("token_embd.weight:type", 0, "I", 14, FORMAT, "multiple of 256 values for Q6_K"),
    ("token_embd.weight:offset", 0, "Q", 8, FORMAT, "multiple of 32"),
    ("token_embd.weight:offset", 0, "Q", 2**64 - 32, FORMAT, "below 2^63"),
    ("blk.0.ffn_down.weight:offset", 0, "Q", 2**40, FORMAT, "incomplete download"),
    ("blk.0.ffn_down.weight:offset", 0, "Q", 0, FORMAT, "inside"),
]

KINDS = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "safetensors": (struct.pack("<Q", 64) + b'{"w":{"dtype":"F32"}}' + b" " * 43, "safetensors"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "zip"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 30, "gzip"),
    "ggml": (b"lmgg" + b"\0" * 30, "ggml"),
    "ggjt": (b"tjgg\x03\0\0\0", "ggjt"),
    "swapped": (b"FUGG\0\0\0\x03", "byte-swapped"),
    "json": (b'{"architectures": ["LlamaForCausalLM"]}', "JSON"),
    "zeros": (b"\0" * 5000, "zero bytes"),
    "text": (b"Once upon a time", "magic"),
    "empty": (b"", "empty"),
    "stub": (b"GG", "truncated"),
    "header": (b"GGUF\x03\0\0\0", "truncated"),
}


@pytest.fixture(scope="module")
def sound() -> tuple[bytes, dict[str, int]]:
    return tiny_llama()


@pytest.fixture
def write(tmp_path: Path):
    path = tmp_path / "some-model.gguf"

    def write_bytes(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    return write_bytes


def assert_refused(path: Path, error: type, words: str) -> None:
    for opener in (amber.Tokenizer, amber.Engine, amber.memory_estimate):
        with pytest.raises(error) as caught:
            opener(path)
        message = str(caught.value)
        assert path.name in message and words.lower() in message.lower(), message
        assert len(message) < 255 and message.endswith(")"), message


@pytest.mark.parametrize("version", [2, 3])
def test_the_sound_file_opens(version: int, write) -> None:
    path = write(tiny_llama(version)[0])
    tokenizer = amber.Tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("abba")) == "abba"
    with amber.Engine(path, threads=1) as engine:
        assert engine.generate("ab", max_tokens=3, temperature=0).token_ids


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: f"{d[0]}+{d[1]}={d[3]}")
def test_damaged_field(damage: tuple, sound, write) -> None:
    place, skip, form, value, error, words = damage
    data, places = bytearray(sound[0]), sound[1]
    struct.pack_into(form if form[0] == ">" else "<" + form, data, places[place] + skip, value)
    assert_refused(write(bytes(data)), error, words)


def test_repeated_names(sound, write) -> None:
    data, places = sound
    same_length = ("blk.0.attn_k.weight", "blk.0.attn_q.weight")
    at, other = (places[f"{name}:name"] for name in same_length)
    n = len(same_length[0])
    data = data[:at] + data[other : other + n] + data[at + n :]
    assert_refused(write(data), FORMAT, 'attn_q.weight" again')
    twice = Image().key("a.key", STRING, "x").key("a.key", STRING, "y").finish()
    assert_refused(write(twice), FORMAT, '"a.key" again')


def test_truncated_anywhere(sound, write) -> None:
    """Each of the first 2000 bytes, each place of the header, and around the end."""
    data, places = sound
    cuts = {*range(2000), *places.values(), *(p + 1 for p in places.values())}
    cuts |= {len(data) - n for n in (1, 2, 31, 32, 33, 4096)}
    for cut in sorted(cuts):
        path = write(data[:cut])
        with pytest.raises(FORMAT) as caught:
            amber.Tokenizer(path)
        assert path.name in str(caught.value)
        assert "download it again" in str(caught.value)


def test_truncation_states_both_sizes(sound, write) -> None:
    data = sound[0]
    assert_refused(write(data[:-100]), FORMAT, f"expected {len(data)} bytes by its header")
    assert_refused(write(data[:-100]), FORMAT, f"found {len(data) - 100}")


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_another_kind(kind: str, write) -> None:
    data, words = KINDS[kind]
    assert_refused(write(data), FORMAT, words)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        for opener in (amber.Tokenizer, amber.Engine):
            with pytest.raises(amber.FileError) as caught:
                opener(path)
            assert path.name in str(caught.value)
            assert isinstance(caught.value, OSError)


def test_unreadable_tensor_type_is_named(sound, write) -> None:
    """A sound file with a type that cannot be computed with: only the engine refuses it."""
    data, places = bytearray(sound[0]), sound[1]
    struct.pack_into("<I", data, places["output_norm.weight:type"], 26)  # I32, as long as F32
    path = write(bytes(data))
    assert amber.Tokenizer(path).encode("ab")
    with pytest.raises(UNSUPPORTED, match="output_norm.weight.*I32"):
        amber.Engine(path)

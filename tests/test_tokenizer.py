"""Tokenizers against their test vectors, sentencepiece and Hugging Face tokenizers.

AMBER_TOKENIZER_STRINGS sets how many random texts each vocabulary is compared on (1000).
"""

import os
import random
import struct
import subprocess
import threading
import time
import unicodedata

import pytest

import amber
import tokenizer_oracles as oracles
from amber._lib import ffi, lib
from gguf_bytes import BOOL, F32, I32, PIECES, STRING, U32, Image, bpe_vocabulary, spm_vocabulary

STRINGS = int(os.environ.get("AMBER_TOKENIZER_STRINGS", "1000"))
SPM = ["llama-spm", "mistral-v1", "mistral-v3", "phi-3", "stories260K-f16", "stories3M-f16"]
BPE = ["gpt-2", "llama-bpe", "qwen2", "deepseek-coder"]


def vocabulary_path(testdata, name):
    if name.startswith(("stories", "tinystories")):
        return testdata / "models" / f"{name}.gguf"
    return testdata / "vocab" / f"ggml-vocab-{name}.gguf"


def different(got, want, limit=3):
    """The first few texts whose ids differ, for a readable failure."""
    wrong = [(t, g, w) for (t, g), w in zip(got, want, strict=True) if g != w]
    return len(wrong), wrong[:limit]


def raw_encode(tokenizer, raw: bytes, cap: int = 4096) -> list[int]:
    """Bytes as C takes them, UTF-8 or not."""
    out = ffi.new("int32_t[]", cap)
    n = lib.amber_tokenize(tokenizer._pointer, raw, len(raw), 0, 0, out, cap, ffi.NULL)
    assert 0 <= n <= cap
    return list(out[0:n])


@pytest.fixture
def opened(tmp_path):
    """Opens a vocabulary that a function writes."""

    def open_image(fill, *args, **kwargs):
        image = Image()
        fill(image, *args, **kwargs)
        path = tmp_path / "vocabulary.gguf"
        path.write_bytes(image.finish())
        return amber.Tokenizer(path)

    return open_image


# ---- against other libraries ----


@pytest.mark.parametrize("name", ["llama-spm", "mistral-v1", "mistral-v3", "phi-3", *BPE])
def test_vectors(testdata, name):
    path = vocabulary_path(testdata, name)
    inputs = path.with_suffix(".gguf.inp").read_bytes().decode()
    texts = inputs.split("\n__ggml_vocab_test__\n")
    ids = [list(map(int, x.split())) for x in path.with_suffix(".gguf.out").read_text().split("\n")]
    tokenizer = amber.Tokenizer(path)
    assert len(texts) == len(ids) == 47  # 46 and what follows the last separator
    got = [(t, tokenizer.encode(t, add_special=False)) for t in texts]
    assert different(got, ids) == (0, [])


@pytest.mark.parametrize("name", SPM)
def test_equals_sentencepiece(testdata, name):
    pytest.importorskip("google.protobuf")
    path = vocabulary_path(testdata, name)
    tokenizer = amber.Tokenizer(path)
    reference = oracles.sentencepiece_model(oracles.read_vocabulary(path))
    texts = list(oracles.texts(STRINGS, seed=11))
    ids = reference.encode(texts)
    got = [(t, tokenizer.encode(t, add_special=False)) for t in texts]
    assert different(got, ids) == (0, [])
    assert [tokenizer.decode(x) for x in ids] == reference.decode(ids) == texts


@pytest.mark.parametrize("name", BPE)
def test_equals_hugging_face(testdata, name):
    path = vocabulary_path(testdata, name)
    tokenizer = amber.Tokenizer(path)
    reference = oracles.hf_tokenizer(path, name)
    texts = list(oracles.texts(STRINGS, seed=12))
    ids = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
    got = [(t, tokenizer.encode(t, add_special=False)) for t in texts]
    assert different(got, ids) == (0, [])
    assert [tokenizer.decode(x) for x in ids] == texts


@pytest.mark.parametrize("name", BPE)
def test_special_tokens_equal_hugging_face(testdata, name):
    path = vocabulary_path(testdata, name)
    tokenizer = amber.Tokenizer(path)
    reference = oracles.hf_tokenizer(path, name)
    marks = [t for t in oracles.special_tokens(path) if tokenizer.is_control(tokenizer.token_id(t))]
    texts = list(oracles.texts_with_marks(STRINGS // 2, 18, marks))
    for parse in (False, True):
        reference.encode_special_tokens = not parse
        try:
            ids = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
        finally:
            reference.encode_special_tokens = True
        got = [(t, tokenizer.encode(t, add_special=False, parse_special=parse)) for t in texts]
        assert different(got, ids) == (0, [])


def fuse_unknown(ids):
    """Both libraries make one <unk> of several in a row; Amber keeps one per character."""
    return [x for i, x in enumerate(ids) if x != 0 or i == 0 or ids[i - 1] != 0]


def test_vocabulary_without_bytes(testdata):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = amber.Tokenizer(vocabulary_path(testdata, "tinystories-656k-f16"))
    reference = tokenizers.Tokenizer.from_file(
        str(testdata / "models" / "tinystories-656k-hf" / "tokenizer.json")
    )
    stories = (testdata / "text" / "tinystories-eval.txt").read_text().split("\n")[:500]
    texts = [t for t in [*stories, *oracles.texts(STRINGS, seed=13)] if t]
    got = [(t, fuse_unknown(tokenizer.encode(t))) for t in texts]
    ids = [e.ids for e in reference.encode_batch(texts)]
    assert different(got, ids) == (0, [])
    assert tokenizer.encode("aé日😀b", add_special=False)[-4:-1] == [0, 0, 0]
    assert tokenizer.decode([0, *tokenizer.encode("Hello", add_special=False), 0]) == "Hello"


@pytest.mark.parametrize("name", oracles.EXPRESSIONS)
def test_pretokenizer_equals_regex(test_bin, name):
    texts = list(oracles.texts(STRINGS, seed=14))
    texts += [space * n + tail for n in (1, 2, 3, 4, 5, 9, 511, 512, 513, 514, 1030)
              for space in " \n\u3000" for tail in ("", "x", "1", ".", "\n")]  # fmt: skip
    data = b"".join(struct.pack("<I", len(b)) + b for b in (t.encode() for t in texts))
    lines = subprocess.run(
        [test_bin / "tool_pretok", name], input=data, capture_output=True, check=True
    ).stdout.decode()
    got = [(t, list(map(int, x.split()))) for t, x in zip(texts, lines.split("\n")[:-1],
                                                          strict=True)]  # fmt: skip
    split = oracles.hf_splitter(name).pre_tokenize_str
    want = [[len(piece.encode()) for piece, _ in split(t)] for t in texts]
    assert different(got, want) == (0, [])


def test_character_classes(test_bin):
    def tool(flag):
        done = subprocess.run([test_bin / "tool_pretok", flag], capture_output=True, check=True)
        return done.stdout

    flags = struct.unpack("<1114112H", tool("--flags"))
    bits = {"Lu": 1, "Ll": 2, "Lt": 4, "Lm": 8, "Lo": 16, "M": 32, "N": 64, "P": 128, "S": 256}
    version = tuple(map(int, tool("--version").decode().split(".")))
    changed = []
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        want = bits.get(category, bits.get(category[0], 0)) if category != "Cs" else 0
        if category != "Cn" and flags[code] & 511 != want:
            changed.append(code)
    if version == tuple(map(int, unicodedata.unidata_version.split("."))):
        assert changed == []
    # From one Unicode version to the next a handful of characters change their category.
    assert len(changed) < 40
    # PropList.txt: White_Space.
    spaces = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
              0x202F, 0x205F, 0x3000]  # fmt: skip
    assert [c for c in range(0x110000) if flags[c] & 512] == spaces
    assert all(flags[c] & 1024 for c in (0x4E00, 0x3007, 0x2E80, 0x20000))  # Scripts.txt: Han
    assert not any(flags[c] & 1024 for c in (0x41, 0x3042, 0xAC00, 0x3001))


# ---- decoding ----


@pytest.mark.parametrize("name", [*SPM, *BPE])
def test_decode_random_ids(testdata, name):
    path = vocabulary_path(testdata, name)
    tokenizer, vocabulary = amber.Tokenizer(path), oracles.read_vocabulary(path)
    if name in BPE:
        reference = oracles.hf_tokenizer(path, name)
    else:
        pytest.importorskip("google.protobuf")
        reference = oracles.sentencepiece_model(vocabulary)
    types = vocabulary["token_type"]
    plain = [i for i, kind in enumerate(types) if kind in (1, 6)]
    special = [i for i, kind in enumerate(types) if kind in (2, 3, 4)]
    r = random.Random(name)
    compared = 0
    for _ in range(STRINGS):
        ids = r.choices(plain, k=r.randint(0, 20))
        try:
            text = tokenizer.decode_bytes(ids).decode()
        except UnicodeDecodeError:
            pass  # how many U+FFFD stand for broken bytes is each library's own choice
        else:
            assert text == (reference.decode(ids) if ids else "")
            compared += 1
        ids = [r.choice(special) if r.random() < 0.2 else i for i in ids]
        check_stream(tokenizer, ids)
    assert compared > STRINGS / 20


def check_stream(tokenizer, ids):
    for keep in (False, True):
        with tokenizer.stream(keep_special=keep) as stream:
            pieces = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids, keep_special=keep)


def test_stream_holds_back_broken_utf8(opened):
    tokenizer = opened(spm_vocabulary)
    byte = lambda b: b + 3  # noqa: E731  (ids 0 to 2 are specials)
    with tokenizer.stream() as stream:
        euro = [stream.push(byte(b)) for b in "€".encode()]
        assert euro == ["", "", "€"]
        # E2 82 can no longer become valid once another letter comes: one U+FFFD for both.
        assert [stream.push(byte(b)) for b in b"\xe2\x82a"] == ["", "", "\ufffda"]
        assert [stream.push(byte(b)) for b in b"\xff\xf0\x9f\x98"] == ["\ufffd", "", "", ""]
        assert stream.push(10**6) == "" and stream.push(-1) == ""  # padding of a model's output
        assert stream.finish() == "\ufffd" and stream.finish() == ""
    r = random.Random(1)
    for _ in range(2000):
        ids = [
            byte(r.choice(b"\x80\xbf\xc3\xe2\x82\xac\xf0\x9f\x98\xed\xa0a\xff")) for _ in "12345"
        ]
        check_stream(tokenizer, ids)


def test_leading_space(opened):
    tokenizer = opened(spm_vocabulary)
    ids = tokenizer.encode("ab")
    assert ids == [1, tokenizer.token_id("▁ab")]
    assert tokenizer.decode(ids) == "ab" and tokenizer.decode(ids, keep_special=True) == "<s>ab"
    with tokenizer.stream(continues=True) as stream:
        assert [stream.push(i) for i in ids] == ["", " ab"]
    assert tokenizer.decode(tokenizer.encode("  ab ")) == "  ab "
    # The spelling of a special token, and the prefix behind it, come back as they were.
    for text in ("<s>ab", "a<s>ab</s>  b", "</s>", "ab</s>", " <s> <s>  "):
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert tokenizer.decode(ids, keep_special=True) == text
        assert tokenizer.encode(text, False, False) != ids

    def without_prefix(image):
        spm_vocabulary(image)
        image.key("tokenizer.ggml.add_space_prefix", BOOL, False)

    tokenizer = opened(without_prefix)
    assert tokenizer.encode("ab", add_special=False) == [tokenizer.token_id("ab")]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_buffers_too_small(opened):
    tokenizer = opened(spm_vocabulary)
    whole = tokenizer.encode("ab ab ab€")
    out = ffi.new("int32_t[3]", [-7, -7, -7])
    n = lib.amber_tokenize(tokenizer._pointer, b"ab ab ab\xe2\x82\xac", 11, 1, 0, out, 2, ffi.NULL)
    assert n == len(whole) and list(out) == [*whole[:2], -7]
    text = ffi.new("char[8]", b"#######")
    ids = ffi.new("int32_t[]", whole)
    n = lib.amber_detokenize(tokenizer._pointer, ids, len(whole), 0, text, 4, ffi.NULL)
    assert n == 11 and ffi.buffer(text)[:6] == b"ab a##"
    assert lib.amber_detokenize(tokenizer._pointer, ids, len(whole), 0, ffi.NULL, 0, ffi.NULL) == 11
    assert lib.amber_tokenize(tokenizer._pointer, ffi.NULL, 0, 1, 0, ffi.NULL, 0, ffi.NULL) == 1
    error = ffi.new("amber_error *")
    for call in (
        lambda: lib.amber_tokenize(tokenizer._pointer, b"a", -1, 1, 0, out, 2, error),
        lambda: lib.amber_tokenize(tokenizer._pointer, ffi.NULL, 1, 1, 0, out, 2, error),
        lambda: lib.amber_tokenize(tokenizer._pointer, b"a", 1, 1, 0, ffi.NULL, 2, error),
        lambda: lib.amber_detokenize(tokenizer._pointer, ids, -1, 0, text, 4, error),
        lambda: lib.amber_detokenize(tokenizer._pointer, out + 2, 1, 0, text, 4, error),
    ):
        error.code = 0
        assert call() == -lib.AMBER_ERR_ARGUMENT and error.code == lib.AMBER_ERR_ARGUMENT


# ---- special tokens ----

USER = {"<tool>": 4, "<tool_call>": 4, "<|im_end|>": 3, "<|im_start|>": 3, "word": 1, "▁▁▁": 4}


def spm_with(image, extra, **keys):
    """The small vocabulary and some tokens of given types behind it."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + list(PIECES)
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + list(extra.values())
    tokens += list(extra)
    image.key("tokenizer.ggml.model", STRING, "llama")
    image.array("tokenizer.ggml.tokens", STRING, tokens)
    image.array("tokenizer.ggml.scores", F32, [-float(i) for i in range(len(tokens))])
    image.array("tokenizer.ggml.token_type", I32, types)
    for key, value in keys.items():
        kind = BOOL if isinstance(value, bool) else STRING if isinstance(value, str) else U32
        image.key(f"tokenizer.ggml.{key}", kind, value)


def test_special_tokens_in_text(opened):
    tokenizer = opened(spm_with, USER, add_space_prefix=False)
    tool, tool_call = tokenizer.token_id("<tool>"), tokenizer.token_id("<tool_call>")
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    encode = lambda text, parse: tokenizer.encode(text, False, parse)  # noqa: E731
    ab = tokenizer.token_id("ab")
    for parse in (False, True):  # user-defined tokens always, the longest that fits
        assert encode("ab<tool>ab<tool_call><tool_", parse)[:4] == [ab, tool, ab, tool_call]
        assert encode("ab   ab", parse) == [ab, tokenizer.token_id("▁▁▁"), ab]
    assert encode("<|im_start|>ab<|im_end|>", True) == [start, ab, end]
    assert start not in encode("<|im_start|>ab", False)
    assert encode("<|im_start|", True) == encode("<|im_start|", False)
    assert encode("<unk><s>", True) == [0, 1]
    assert tokenizer.decode([ab, start, tool, ab]) == "ab<tool>ab"
    assert tokenizer.is_control(start) and not tokenizer.is_control(tool)


def test_many_special_tokens(opened):
    extra = {f"<|reserved_special_token_{i}|>": 3 for i in range(5000)}
    tokenizer = opened(spm_with, extra)
    text = "".join(f"<|reserved_special_token_{i}|>" for i in range(5000))
    ids = tokenizer.encode(text, False, True)
    assert ids == list(range(tokenizer.size - 5000, tokenizer.size))
    assert tokenizer.decode(ids, keep_special=True) == text
    begun = time.perf_counter()
    tokenizer.encode("<|reserved_special_token_" * 40_000, False, True)  # 1 MB of near misses
    assert time.perf_counter() - begun < 20


def test_bos_and_eos(opened):
    assert opened(spm_with, {}).encode("") == [1]  # SentencePiece models want BOS
    assert opened(spm_with, {}, add_bos_token=False).encode("") == []
    assert opened(spm_with, {}, add_eos_token=True).encode("") == [1, 2]
    assert opened(spm_with, {}, bos_token_id=2**32 - 1).bos is None
    assert opened(spm_with, {}, eos_token_id=5).eos == 5
    for pre, adds in (("gpt-2", False), ("qwen2", False), ("llama-bpe", True), ("tekken", True)):

        def fill(image, pre=pre):
            bpe_vocabulary(image, pre)
            image.key("tokenizer.ggml.bos_token_id", U32, 0)

        tokenizer = opened(fill)
        assert tokenizer.adds_bos == adds and tokenizer.encode("") == [0] * adds


def test_end_of_generation(opened, testdata):
    ends = lambda tokenizer: {tokenizer.token_text(i) for i in tokenizer.eog_tokens()}  # noqa: E731
    # A generated BOS ends a generation too: the stories models know no other end.
    assert ends(opened(spm_with, USER)) == {"<s>", "</s>", "<|im_end|>"}
    assert "<tool>" in ends(opened(spm_with, USER, eot_token_id=264))
    assert ends(opened(spm_with, {"<|end|>": 3, "<|return|>": 3, "<|call|>": 3})) == {
        "<s>", "</s>", "<|return|>", "<|call|>",
    }  # fmt: skip
    assert "</x>" not in ends(opened(spm_with, {"</x>": 3}))
    want = {
        "llama-bpe": {"<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
        "qwen2": {"<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"},
        "phi-3": {"<s>", "</s>", "<|endoftext|>", "<|end|>"},
        "gpt-2": {"<|endoftext|>"},
    }
    for name, tokens in want.items():
        assert ends(amber.Tokenizer(vocabulary_path(testdata, name))) == tokens
    # An end mark that a converter called plain text is a control token all the same.
    tokenizer = opened(spm_with, {"<|im_end|>": 1})
    assert tokenizer.is_control(264) and tokenizer.encode("<|im_end|>", False, True) == [264]


# ---- rules of SentencePiece that the test vocabularies do not use ----


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_normalizer_options(testdata, tmp_path, collapse, prefix):
    pytest.importorskip("google.protobuf")
    vocabulary = oracles.read_vocabulary(vocabulary_path(testdata, "stories3M-f16"))
    image = Image()
    image.key("tokenizer.ggml.model", STRING, "llama")
    image.array("tokenizer.ggml.tokens", STRING, vocabulary["tokens"])
    image.array("tokenizer.ggml.scores", F32, vocabulary["scores"])
    image.array("tokenizer.ggml.token_type", I32, vocabulary["token_type"])
    image.key("tokenizer.ggml.add_space_prefix", BOOL, prefix)
    image.key("tokenizer.ggml.remove_extra_whitespaces", BOOL, collapse)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(image.finish())
    tokenizer = amber.Tokenizer(path)
    reference = oracles.sentencepiece_model(
        vocabulary, add_dummy_prefix=prefix, remove_extra_whitespaces=collapse
    )
    texts = ["", " ", "   ", " a  b ", *oracles.texts(STRINGS, seed=15)]
    got = [(t, tokenizer.encode(t, add_special=False)) for t in texts]
    assert different(got, reference.encode(texts)) == (0, [])


def test_unused_pieces(testdata, tmp_path):
    """Merges go through an unused piece, but the result is cut back into its parts."""
    pytest.importorskip("google.protobuf")
    vocabulary = oracles.read_vocabulary(vocabulary_path(testdata, "stories3M-f16"))
    r = random.Random(2)
    types = [5 if k == 1 and len(t) > 2 and r.random() < 0.3 else k for t, k in
             zip(vocabulary["tokens"], vocabulary["token_type"], strict=True)]  # fmt: skip
    vocabulary = {**vocabulary, "token_type": types}
    image = Image()
    image.key("tokenizer.ggml.model", STRING, "llama")
    image.array("tokenizer.ggml.tokens", STRING, vocabulary["tokens"])
    image.array("tokenizer.ggml.scores", F32, vocabulary["scores"])
    image.array("tokenizer.ggml.token_type", I32, types)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(image.finish())
    tokenizer = amber.Tokenizer(path)
    story = (testdata / "text" / "tinystories-eval.txt").read_text()
    texts = [t for t in story.split("\n") if t][:500]
    got = [(t, tokenizer.encode(t, add_special=False)) for t in texts]
    assert different(got, oracles.sentencepiece_model(vocabulary).encode(texts)) == (0, [])


# ---- hostile input ----


ODD_BYTES = b"ab \x80\xbf\xc0\xc3\xe0\xe2\x82\xac\xed\xa0\xf0\x9f\x98\xf4\xff\0"


def test_invalid_utf8(opened):
    for fill in (spm_vocabulary, bpe_vocabulary):
        tokenizer = opened(fill)
        r = random.Random(3)
        for _ in range(3000):
            raw = bytes(r.choices(ODD_BYTES, k=r.randint(0, 12)))
            assert raw_encode(tokenizer, raw) == tokenizer.encode(
                raw.decode("utf-8", "replace"), add_special=False
            )
    tokenizer = opened(spm_vocabulary)
    assert tokenizer.decode(tokenizer.encode("a\0b\0")) == "a\0b\0"


WRONG_FILES = [
    # what is wrong, keys to change (None: leave out), error, part of its message
    ({"model": None}, amber.FileFormatError, "tokenizer.ggml.model"),
    ({"model": (STRING, "bert")}, amber.UnsupportedModelError, "bert"),
    ({"model": (STRING, "")}, amber.UnsupportedModelError, "llama"),
    ({"model": (U32, 3)}, amber.FileFormatError, "tokenizer.ggml.model"),
    ({"tokens": None}, amber.FileFormatError, "tokenizer.ggml.tokens"),
    ({"tokens": ([], STRING)}, amber.FileFormatError, "found 0"),
    ({"tokens": ([1, 2, 3], I32)}, amber.FileFormatError, "array of strings"),
    ({"tokens": (STRING, "text")}, amber.FileFormatError, "array of strings"),
    ({"scores": None}, amber.FileFormatError, "tokenizer.ggml.scores"),
    ({"scores": ([0.0, 1.0], F32)}, amber.FileFormatError, "expected 4 float32"),
    ({"scores": ([0, 1, 2, 3], I32)}, amber.FileFormatError, "expected 4 float32"),
    ({"token_type": ([1, 1], I32)}, amber.FileFormatError, "expected 4 integers"),
    ({"token_type": ([1.0] * 4, F32)}, amber.FileFormatError, "expected 4 integers"),
    ({"token_type": ([1, 2, 3, 7], I32)}, amber.FileFormatError, "expected 0 to 6, found 7"),
    ({"token_type": ([1, 2, 3, -1], I32)}, amber.FileFormatError, "found -1"),
    ({"token_type": ([2, 3, 3, 6], I32)}, amber.FileFormatError, "<0x00>"),
    ({"bos_token_id": (U32, 4)}, amber.FileFormatError, "expected an id below 4, found 4"),
    ({"eos_token_id": (I32, -2)}, amber.FileFormatError, "eos_token_id"),
    ({"eot_token_id": (STRING, "x")}, amber.FileFormatError, "eot_token_id"),
    ({"add_bos_token": (STRING, "x")}, amber.FileFormatError, "add_bos_token"),
    ({"add_space_prefix": (U32, 7)}, amber.FileFormatError, "add_space_prefix"),
]


@pytest.mark.parametrize("change, error, part", WRONG_FILES)
def test_wrong_spm_files(tmp_path, change, error, part):
    keys = {
        "model": (STRING, "llama"),
        "tokens": (["<unk>", "<s>", "</s>", "a"], STRING),
        "scores": ([0.0] * 4, F32),
        "token_type": ([2, 3, 3, 1], I32),
    }
    write_and_fail(tmp_path, keys | change, error, part)


@pytest.mark.parametrize(
    "change, error, part",
    [
        ({"merges": None}, amber.FileFormatError, "tokenizer.ggml.merges"),
        ({"merges": ([1, 2], I32)}, amber.FileFormatError, "array of strings"),
        ({"merges": (["a b", "ab"], STRING)}, amber.FileFormatError, '"ab" at 1'),
        ({"merges": (["", "ab"], STRING)}, amber.FileFormatError, "two parts"),
        ({"pre": (STRING, "no-such")}, amber.UnsupportedModelError, '"no-such".*llama-bpe.*qwen2'),
        ({"pre": (U32, 1)}, amber.FileFormatError, "tokenizer.ggml.pre"),
    ],
)
def test_wrong_bpe_files(tmp_path, change, error, part):
    keys = {
        "model": (STRING, "gpt2"),
        "tokens": (["a", "b", "ab"], STRING),
        "merges": (["a b"], STRING),
    }
    write_and_fail(tmp_path, keys | change, error, part)


def write_and_fail(tmp_path, keys, error, part):
    image = Image()
    for name, value in keys.items():
        if value is None:
            continue
        first, second = value
        if isinstance(first, list):
            image.array(f"tokenizer.ggml.{name}", second, first)
        else:
            image.key(f"tokenizer.ggml.{name}", first, second)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(image.finish())
    with pytest.raises(error, match=part):
        amber.Tokenizer(path)


SPECIALS = [b"<unk>", b"<s>", b"</s>"]


def test_odd_but_usable_files(tmp_path):
    """No types, NaN scores, invalid UTF-8, empty and doubled spellings, merges of unknown parts."""
    image = Image()
    image.key("tokenizer.ggml.model", STRING, "llama")
    tokens = [
        b"<unk>",
        b"<s>",
        b"</s>",
        b"",
        b"a",
        b"a",
        b"\xff\xe2\x82",
        b"aa",
        b"<0x62>",
        b"\xe2",
    ]
    image.array("tokenizer.ggml.tokens", STRING, tokens)
    scores = [0.0] * 4 + [float("nan"), float("inf"), -float("inf")] + [0.0] * 3
    image.array("tokenizer.ggml.scores", F32, scores)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(image.finish())
    tokenizer = amber.Tokenizer(path)
    assert tokenizer.encode("aaab", add_special=False) == [7, 5, 8]
    assert tokenizer.decode([6, 3, 9]) == "\ufffd\ufffd\ufffd" and len(tokenizer) == 10

    image = Image()
    image.key("tokenizer.ggml.model", STRING, "gpt2")
    image.array("tokenizer.ggml.tokens", STRING, ["a", "b", "ab", "é\u4e00", "x" * 100_000])
    image.array("tokenizer.ggml.merges", STRING, ["a b", "a b", "b a", "b zz", "q  q"])
    path.write_bytes(image.finish())
    tokenizer = amber.Tokenizer(path)  # and no pre-tokenizer named: the default one
    assert tokenizer.encode("abab?ba") == [2, 2, 1, 0]
    assert tokenizer.decode([3, 2]) == "\ufffd一ab"  # é spells byte E9; U+4E00 spells no byte
    assert tokenizer.decode([4]) == "x" * 100_000


@pytest.mark.parametrize("name", ["stories260K-f16", "gpt-2", "qwen2"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "😀", "ab", "<", "0", "\0"])
def test_no_quadratic_time(testdata, name, unit):
    """1 MB that is one word. Quadratic merging would take hours; this takes well under a second."""
    tokenizer = amber.Tokenizer(vocabulary_path(testdata, name))
    text = unit * (2**20 // len(unit.encode()))
    begun = time.perf_counter()
    ids = tokenizer.encode(text, add_special=False)
    assert time.perf_counter() - begun < 20
    assert tokenizer.decode(ids) == text


def test_threads_share_a_tokenizer(testdata):
    tokenizer = amber.Tokenizer(vocabulary_path(testdata, "qwen2"))
    texts = list(oracles.texts(300, seed=16))
    want = [tokenizer.encode(t) for t in texts]
    results = {}

    def work(number):
        results[number] = [tokenizer.encode(t) for t in texts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results.get(i) for i in range(6)] == [want] * 6

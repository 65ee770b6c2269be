"""What the tokenizer tests compare with: random texts, sentencepiece, Hugging Face tokenizers."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'RE", "'Ll", "'ſ", "'x", "'"]
EMOJI = ["👨‍👩‍👧‍👦", "👍🏽", "🇩🇪", "❤️", "🏴‍☠️", "1️⃣", "😀", "🧑🏿‍🚀"]
CODE = [
    "def f(x):\n    return x+1\n",
    "\t\tif (a->b[i] != 0) {\r\n",
    "#include <stdio.h>\n",
    "x = {'a': 1, \"b\": [2,3]}\n\n\n",
    "// ---- ====\n",
    "<|im_start|>",
    "<s>",
    "[INST]",
    "<0x0A>",
    "<|endoftext|>",
]
WORDS = [
    *("the", "of", "Hello", "world", "Once", "upon", "LITTLE", "Lily", "MacBook", "iPhone"),
    *("naïve", "Straße", "ПРИВЕТ", "мир", "Ελλάδα", "日本語", "テスト", "中文字符", "한국어"),
    *("สวัสดี", "हिन्दी", "עברית", "العربية", "ǅungla", "ﬁne", "𞤀𞤁𞤂", "ᲐᲑ"),
]
LONG = ["aehlnorst", "aa", " ", "ab", "é日", "=-", "的是一", "01"]
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NEWLINES = ["\n", "\r\n", "\n\n", " \n", "\t", "\n ", "  \n  "]


@cache
def characters() -> dict[str, list[str]]:
    """Characters by category: those whose category has not changed since Unicode 3.2, so that every
    library agrees on them whatever its own version. Private use but for a few is left out."""
    found: dict[str, list[str]] = {}
    for code in range(0x110000):
        char = chr(code)
        category = unicodedata.category(char)
        old = unicodedata.ucd_3_2_0.category(char)
        private = 0xE100 <= code < 0xF900 or code >= 0xF0000
        changed = code == 0x295  # lower case in older versions of Unicode, caseless in newer ones
        if old == category and category not in ("Cn", "Cs") and not private and not changed:
            found.setdefault(category, []).append(char)
    return found


def _piece(r: random.Random) -> str:
    by_category = characters()
    some = lambda categories, most: "".join(  # noqa: E731
        r.choice(by_category[r.choice(categories)]) for _ in range(r.randint(1, most))
    )
    every = list(by_category)
    kinds = [
        lambda: "".join(chr(r.randrange(32, 127)) for _ in range(r.randint(1, 11))),
        lambda: some(every, 5),
        lambda: r.choice(EMOJI) * r.randint(1, 2),
        lambda: "e" + some(["Mn"], 3),
        lambda: "".join(r.choice(SPACES) for _ in range(r.randint(1, 7))),
        lambda: " " * r.randint(1, 20),
        lambda: r.choice(NEWLINES) * r.randint(1, 3),
        lambda: "".join(chr(r.randrange(0x4E00, 0x9FA5)) for _ in range(r.randint(1, 9))),
        lambda: str(r.randrange(10 ** r.randint(1, 11))),
        lambda: r.choice(WORDS) + r.choice(CONTRACTIONS),
        lambda: r.choice(CODE),
        lambda: some(every, 1) * r.randint(1, 3),
        lambda: " " + r.choice(WORDS),
        lambda: r.choice(WORDS),
        lambda: " " + some(["Po", "Sm", "Sc", "Pd", "Ps", "Pe", "So"], 4),
        lambda: some(["Nd", "No", "Nl"], 4),
        lambda: some(["Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc"], 7),
        # One long word: merged with a heap, short ones are not.
        lambda: "".join(r.choices(r.choice(LONG), k=r.randint(1, 150))),
    ]
    return r.choice(kinds)()


def texts(count: int, seed: int) -> Iterator[str]:
    """Random texts: all scripts, emoji, marks, white space of all kinds, digits, code."""
    r = random.Random(seed)
    for _ in range(count):
        yield "".join(_piece(r) for _ in range(r.randint(1, 11)))


def texts_with_marks(count: int, seed: int, marks: list[str]) -> Iterator[str]:
    """Random texts with spellings of special tokens in them, whole and cut short."""
    r = random.Random(seed)
    for text in texts(count, seed):
        for _ in range(r.randint(1, 4)):
            mark = r.choice(marks)
            at = r.randint(0, len(text))
            text = text[:at] + mark[: r.choice((len(mark), len(mark), len(mark) - 1))] + text[at:]
        yield text


@cache
def read_vocabulary(path: Path) -> dict[str, list]:
    """The arrays of a GGUF vocabulary, read by the gguf package."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def array(name: str) -> list:
        field = fields.get(f"tokenizer.ggml.{name}")
        if field is None:
            return []
        if field.types[-1].name == "STRING":
            return [bytes(field.parts[i]).decode() for i in field.data]
        return [field.parts[i][0].item() for i in field.data]

    return {k: array(k) for k in ("tokens", "scores", "token_type", "merges")}


def sentencepiece_model(vocabulary: dict[str, list], **normalizer: bool) -> Any:
    """A sentencepiece BPE processor with the same pieces."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    types = vocabulary["token_type"]
    unknown = types.index(2)
    model = proto.ModelProto()
    for i, (text, score) in enumerate(zip(vocabulary["tokens"], vocabulary["scores"], strict=True)):
        # sentencepiece allows one unknown piece; a file may call added tokens so as well.
        kind = 3 if types[i] == 2 and i != unknown else types[i]
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = 6 in types
    model.trainer_spec.unk_id = unknown
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = normalizer.get("add_dummy_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = normalizer.get(
        "remove_extra_whitespaces", False
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


# The expressions of the models' tokenizer.json files, step by step.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ANY = r"[^\r\n\p{L}\p{N}]?"
_WHITE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
EXPRESSIONS: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [_GPT2],
    "llama-bpe": [rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}{_WHITE}"],
    "qwen2": [rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}|{_SYMBOLS}{_WHITE}"],
    "bailingmoe": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "qwen35": [
        rf"{_CUT}|{_ANY}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_WHITE}"
    ],
    "seed-coder": [rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_WHITE}"],
    "jais-2": [
        rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}\s*[\r\n]+|"
        + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
        + r"\s{1,2}(?!\S)|\s{1}"
    ],
    "tekken": [rf"{_ANY}{_UPPER}*{_LOWER}+|{_ANY}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}{_WHITE}"],
    "gpt-4o": [
        rf"{_ANY}{_UPPER}*{_LOWER}+{_CUT}?|{_ANY}{_UPPER}+{_LOWER}*{_CUT}?|\p{{N}}{{1,3}}|"
        rf"{_SLASHES}{_WHITE}"
    ],
    "kimi-k2": [
        rf"[\p{{Han}}]+|{_ANY}{_UPPER[:-1]}&&[^\p{{Han}}]]*{_LOWER[:-1]}&&[^\p{{Han}}]]+{_CUT}?|"
        rf"{_ANY}{_UPPER[:-1]}&&[^\p{{Han}}]]+{_LOWER[:-1]}&&[^\p{{Han}}]]*{_CUT}?|\p{{N}}{{1,3}}|"
        rf"{_SYMBOLS}{_WHITE}"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"],
    "deepseek-llm": [
        r"[\r\n]",
        "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
        "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
        "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲"
        "𑢠-𑣟𞤀-𞥃]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
        rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_WHITE}",
    ],
    "starcoder": [r"\p{N}", _GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"],
    "bloom": [_BLOOM],
    "viking": [_BLOOM, r"\p{N}"],
}


def hf_splitter(name: str) -> Any:
    """The pre-tokenizer as Hugging Face tokenizers runs it."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(e), "isolated") for e in EXPRESSIONS[name]]
    )


@cache
def hf_tokenizer(path: Path, name: str) -> Any:
    """A Hugging Face byte-level BPE tokenizer with the file's tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = read_vocabulary(path)
    tokens = {text: i for i, text in enumerate(vocabulary["tokens"])}
    merges = [tuple(m.split(" ")) for m in vocabulary["merges"]]
    whole = name in ("llama-bpe", "tekken")
    made = Tokenizer(models.BPE(vocab=tokens, merges=merges, ignore_merges=whole))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([hf_splitter(name), byte_level])
    made.decoder = decoders.ByteLevel()
    user = [t for t, kind in zip(vocabulary["tokens"], vocabulary["token_type"], strict=True)
            if kind == 4]  # fmt: skip
    made.add_tokens([AddedToken(t, normalized=False) for t in user])
    made.add_special_tokens([AddedToken(t, normalized=False, special=True)
                             for t in special_tokens(path)])  # fmt: skip
    made.encode_special_tokens = True  # as plain text, until the caller says otherwise
    return made


def special_tokens(path: Path) -> list[str]:
    """Spellings of the control tokens, which a text can name where that is asked for."""
    vocabulary = read_vocabulary(path)
    return [t for t, kind in zip(vocabulary["tokens"], vocabulary["token_type"], strict=True)
            if kind == 3 and t]  # fmt: skip

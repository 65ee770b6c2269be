"""The vocabulary of a Hugging Face folder as the keys of a GGUF file.

Two kinds of vocabulary exist among the models that Amber runs, byte-level BPE ("gpt2" in GGUF) and
SentencePiece BPE ("llama"). tokenizer.model is SentencePiece's own file and is preferred where it
is one; tokenizer.json is Hugging Face's and can hold either kind.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import AmberError, FileFormatError, UnsupportedModelError
from .safetensors import read_json

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "\u2581"  # SentencePiece's visible space
JSON, SPM = "tokenizer.json", "tokenizer.model"

# ---- pre-tokenizers ----

_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ANY = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS, _SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_WHITE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CL100K = r"[^\r\n\p{L}\p{N}]?+\p{L}+"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_WHITE}"
)
_CJK = ("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", "[一-龥ࠀ-一가-퟿]+")
GPT2, DIGIT, DIGITS, PUNCTUATION = "<gpt2>", "<digit>", "<digits>", "<punctuation>"

# The steps of tokenizer.json's pre_tokenizer -> the names that GGUF files have for them
# (engine/tok_pretok.c). Of two names the second is for vocabularies that take a whole word at once
# where it is a token (ignore_merges).
PRETOKENIZERS: dict[tuple[str, ...], tuple[str, str | None]] = {
    (GPT2,): ("gpt-2", None),
    (DIGIT, GPT2): ("starcoder", None),
    (rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_WHITE}",): ("dbrx", "llama-bpe"),
    (rf"'(?i:[sdmt]|ll|ve|re)|{_CL100K}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|"
     r"\s*[\r\n]|\s+(?!\S)|\s+",): ("dbrx", "llama-bpe"),
    (rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_WHITE}",): ("qwen2", None),
    (rf"{_CUT}|{_ANY}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_WHITE}",):
        ("qwen35", None),
    (rf"{_CUT}|{_ANY}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_WHITE}",):
        ("seed-coder", None),
    (rf"{_ANY}{_UPPER}*{_LOWER}+|{_ANY}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}|{_WHITE}",):
        (None, "tekken"),
    (rf"{_ANY}{_UPPER}*{_LOWER}+{_CUT}?|{_ANY}{_UPPER}+{_LOWER}*{_CUT}?|\p{{N}}{{1,3}}|"
     rf"{_SLASHES}|{_WHITE}",): ("gpt-4o", None),
    (PUNCTUATION, GPT2, DIGITS, "[0-9][0-9][0-9]"): ("falcon", None),
    (PUNCTUATION, GPT2, "[0-9][0-9][0-9]"): ("falcon", None),
    **{(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", cjk, DIGIT): ("deepseek-coder", None)
       for cjk in _CJK},
    **{(r"\p{N}{1,3}", cjk, _DEEPSEEK_WORDS): ("deepseek-v3", None)
       for cjk in ("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "[一-龥぀-ゟ゠-ヿ]+")},
}  # fmt: skip
PRE_NAMES = sorted({name for pair in PRETOKENIZERS.values() for name in pair if name})


def _steps(node: Any) -> list[str]:
    """A pre_tokenizer of tokenizer.json as the expressions it splits by, one after the other."""
    if node is None:
        return []
    kind = node.get("type")
    if kind == "Sequence":
        return [step for child in node.get("pretokenizers", ()) for step in _steps(child)]
    if kind == "ByteLevel" and node.get("add_prefix_space"):
        return ["<ByteLevel with a space in front>"]
    if kind == "ByteLevel":
        return [GPT2] if node.get("use_regex", True) else []
    if kind == "Digits":
        return [DIGIT if node.get("individual_digits") else DIGITS]
    if kind == "Punctuation":
        return [PUNCTUATION]
    if kind == "Split" and node.get("behavior") in ("Isolated", "Removed"):
        pattern = node.get("pattern", {})
        isolated = node["behavior"] == "Isolated" and not node.get("invert")
        kept = node["behavior"] == "Removed" and node.get("invert")
        if isolated or kept:
            return [pattern.get("Regex") or pattern.get("String", "")]
    return [f"<{kind}>"]


def pretokenizer_name(description: Any, takes_whole: bool) -> str:
    """The GGUF name of a byte-level BPE's pre_tokenizer. UnsupportedModelError where none fits."""
    steps = tuple(_steps(description))
    plain, whole = PRETOKENIZERS.get(steps, (None, None))
    name = whole if takes_whole and whole else plain
    if not name:
        shown = json.dumps(steps, ensure_ascii=False)
        raise UnsupportedModelError(
            f"{JSON}: a pre-tokenizer that is not known: {shown[:300]}; supported: "
            f"{', '.join(PRE_NAMES)}"
        )
    return name


# ---- vocabularies ----


@dataclass(slots=True)
class Vocabulary:
    """A vocabulary under construction. model: GGUF's name of its kind."""

    model: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    space_prefix: bool = False
    collapse_spaces: bool = False
    adds: tuple[bool, bool] | None = None  # whether BOS and EOS go around a text, where known

    def put(self, token: int, text: str, kind: int) -> None:
        """Writes one token, with room for those before it."""
        while len(self.tokens) <= token:
            self.tokens.append(f"[PAD{len(self.tokens)}]")
            self.types.append(UNUSED)
            if self.scores is not None:
                self.scores.append(-1e9)
        self.tokens[token], self.types[token] = text, kind

    def resize(self, n: int) -> None:
        """As many tokens as the model has rows."""
        if n > len(self.tokens):
            self.put(n - 1, f"[PAD{n - 1}]", UNUSED)
        del self.tokens[n:], self.types[n:]
        if self.scores is not None:
            del self.scores[n:]

    def find(self, text: str | None) -> int | None:
        return self.tokens.index(text) if text in self.tokens else None


def _sentencepiece(path: str) -> Vocabulary | None:
    """tokenizer.model; None where it is not SentencePiece's (Llama 3 has a list of that name)."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as error:
        raise AmberError(
            f"{SPM} needs sentencepiece and protobuf: pip install 'amber-llm[tools]' ({error})"
        ) from None
    from google.protobuf.message import DecodeError

    model = proto.ModelProto()
    try:
        with open(path, "rb") as file:
            model.ParseFromString(file.read())
    except DecodeError:
        return None
    if not model.pieces:
        return None
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE:
        raise UnsupportedModelError(
            f"{SPM}: a SentencePiece model of another kind than BPE (unigram); supported: BPE"
        )
    made = Vocabulary("llama", scores=[])
    for token, piece in enumerate(model.pieces):
        made.put(token, piece.piece, piece.type)
        made.scores[token] = piece.score
    made.space_prefix = model.normalizer_spec.add_dummy_prefix
    made.collapse_spaces = model.normalizer_spec.remove_extra_whitespaces
    made.adds = (True, False)
    return made


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges in either of tokenizer.json's spellings."""
    if not isinstance(merges, list):
        raise FileFormatError(f"{JSON}: model.merges: expected a list")
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    if any(len(p) != 2 or not all(isinstance(t, str) for t in p) for p in pairs):
        raise FileFormatError(f"{JSON}: model.merges: expected pairs of tokens")
    return pairs


def _huggingface(path: str) -> Vocabulary:
    """tokenizer.json"""
    whole = read_json(path)
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        found = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedModelError(
            f"{JSON}: a vocabulary of type {found}; supported: BPE, byte-level or SentencePiece"
        )
    vocab, pairs = model.get("vocab"), _pairs(model.get("merges"))
    if not isinstance(vocab, dict) or not all(
        type(i) is int and 0 <= i < 1 << 24 for i in vocab.values()
    ):
        raise FileFormatError(f"{JSON}: model.vocab: expected token ids by text")
    pieces = any(text.startswith(SPACE) for text in vocab) or model.get("byte_fallback")
    if pieces:
        made = _pieces(whole, model, vocab, pairs)
    else:
        made = Vocabulary("gpt2", merges=[" ".join(pair) for pair in pairs])
        _check_normalizer(whole.get("normalizer"), ("NFC",))
        made.pre = pretokenizer_name(whole.get("pre_tokenizer"), bool(model.get("ignore_merges")))
        for text, token in vocab.items():
            made.put(token, text, NORMAL)
    return made


def _pieces(
    whole: Mapping[str, Any],
    model: Mapping[str, Any],
    vocab: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
) -> Vocabulary:
    """SentencePiece pieces in tokenizer.json. Merges stand in the order of scores, so the place of
    a piece's first merge is as good as its score."""
    made = Vocabulary("llama", scores=[])
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, i)
    unknown = model.get("unk_token")
    for text, token in vocab.items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        made.put(token, text, UNKNOWN if text == unknown else BYTE if is_byte else NORMAL)
        made.scores[token] = -float(rank.get(text, len(pairs)))
    normalizer = whole.get("normalizer")
    _check_normalizer(normalizer, ("Prepend", "Replace"))
    kinds = {n.get("type") for n in _parts(normalizer, "normalizers")}
    made.space_prefix = "Prepend" in kinds or any(
        p.get("type") == "Metaspace" and p.get("prepend_scheme", "always") != "never"
        for p in _parts(whole.get("pre_tokenizer"), "pretokenizers")
    )
    return made


def _parts(node: Any, children: str) -> list[Mapping[str, Any]]:
    if not isinstance(node, dict):
        return []
    return node.get(children, []) if node.get("type") == "Sequence" else [node]


def _check_normalizer(node: Any, known: tuple[str, ...]) -> None:
    for part in _parts(node, "normalizers"):
        if part.get("type") not in known:
            raise UnsupportedModelError(
                f"{JSON}: normalizer {part.get('type')}; supported: {', '.join(known)}"
            )


def _adds(node: Any) -> tuple[bool, bool] | None:
    """Whether a post_processor puts a token before and behind a text."""
    for part in _parts(node, "processors"):
        if part.get("type") == "TemplateProcessing":
            single = part.get("single") or [{}]
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return (False, False) if node else None


# ---- the folder ----


def _optional(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else {}


def _added_tokens(folder: str, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens beside the vocabulary: id -> (text, special)."""
    found: dict[int, tuple[str, bool]] = {}
    for text, token in _optional(folder, "added_tokens.json").items():
        if type(token) is int:
            found[token] = (text, text.startswith("<") and text.endswith(">"))
    entries = [e for e in _optional(folder, JSON).get("added_tokens") or () if isinstance(e, dict)]
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries += [{"id": int(i), **e} for i, e in decoder.items() if i.isdigit()]
    for entry in entries:
        token, text = entry.get("id"), entry.get("content")
        if type(token) is not int or not 0 <= token < 1 << 24 or not isinstance(text, str):
            raise FileFormatError(f"{JSON}: added_tokens: expected an id and its content")
        found[token] = (text, bool(entry.get("special")))
    return found


def _spelling(value: Any) -> str | None:
    """A special token of tokenizer_config.json: a text, or an object that holds it."""
    return value.get("content") if isinstance(value, dict) else value


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if type(v) is int and v >= 0]


def _templates(folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; "default" is the one."""
    path = os.path.join(folder, "chat_template.jinja")
    found: Any = config.get("chat_template")
    if found is None:
        found = _optional(folder, "chat_template.json").get("chat_template")
    named = {"default": found} if isinstance(found, str) else {}
    if isinstance(found, list):
        named = {t["name"]: t["template"] for t in found}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            named["default"] = file.read()
    more = os.path.join(folder, "additional_chat_templates")
    for name in sorted(os.listdir(more)) if os.path.isdir(more) else ():
        if name.endswith(".jinja"):
            with open(os.path.join(more, name), encoding="utf-8") as file:
                named[name.removesuffix(".jinja")] = file.read()
    return {name: text for name, text in named.items() if isinstance(text, str) and text}


def byte_letters() -> list[str]:
    """The letters that stand for the bytes 0 to 255 in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def synthetic_vocabulary(n_vocab: int) -> dict[str, Any]:
    """A byte-level vocabulary of any size, for models that have none: a token for each byte, one
    merge, BOS and EOS as far as there is room, and unused tokens."""
    made = Vocabulary("gpt2", pre="gpt-2", merges=["Ġ t"])
    for text in (*byte_letters(), "Ġt"):
        made.put(len(made.tokens), text, NORMAL)
    for text in ("<|begin_of_text|>", "<|end_of_text|>"):
        made.put(len(made.tokens), text, CONTROL)
    n = len(made.tokens)
    made.resize(n_vocab)
    named = {"bos": n - 2, "eos": n - 1} if n_vocab >= n else {}
    return _keys(made, named, (False, False))


def _swallows_space(folder: str) -> bool:
    """Whether special tokens take the white space behind them, as Phi-3's do."""
    added = _optional(folder, JSON).get("added_tokens")
    marked = [t for t in added or () if isinstance(t, dict) and t.get("rstrip")]
    return any(t.get("content") == "<|end|>" for t in marked)


def read_vocabulary(folder: str, model_config: Mapping[str, Any], n_vocab: int) -> dict[str, Any]:
    """Keys of the GGUF file, without the prefix "tokenizer.": str, bool, int, and lists of them;
    and "swallows_space", where special tokens take the white space behind them.

    model_config: config.json; n_vocab: rows of the embedding. Errors: FileFormatError,
    UnsupportedModelError.
    """
    try:
        return _read_vocabulary(folder, model_config, n_vocab)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:
        if isinstance(error, AmberError):
            raise
        raise FileFormatError(
            f"{folder}: the tokenizer's files are not of the form that is expected ({error!r})"
        ) from error


def _read_vocabulary(folder: str, model_config: Mapping[str, Any], n_vocab: int) -> dict[str, Any]:
    config = _optional(folder, "tokenizer_config.json")
    spm, huggingface = os.path.join(folder, SPM), os.path.join(folder, JSON)
    made = _sentencepiece(spm) if os.path.exists(spm) else None
    if not made and os.path.exists(huggingface):
        made = _huggingface(huggingface)
    if not made:
        raise FileFormatError(f"{folder}: expected {JSON} or a SentencePiece {SPM}, found neither")
    for token, (text, special) in sorted(_added_tokens(folder, config).items()):
        old = made.types[token] if token < len(made.types) else NORMAL
        made.put(token, text, old if old == UNKNOWN else CONTROL if special else USER)
    made.resize(n_vocab)

    generation = _optional(folder, "generation_config.json")
    named: dict[str, int] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = made.find(_spelling(config.get(f"{name}_token")))
        if token is None:
            ids = _ids(model_config.get(f"{name}_token_id"))
            ids = ids or _ids(generation.get(f"{name}_token_id"))
            token = ids[0] if ids else None
        if token is not None and token < n_vocab:
            named[key] = token
    ends = [
        t
        for source in (generation, model_config)
        for t in _ids(source.get("eos_token_id"))
        if t < n_vocab and t != named.get("eos")
    ]
    named |= dict(zip(("eot", "eom"), dict.fromkeys(ends), strict=False))
    if "unknown" not in named and UNKNOWN in made.types:
        named["unknown"] = made.types.index(UNKNOWN)

    adds = _adds(_optional(folder, JSON).get("post_processor")) or made.adds
    flags = [config.get(f"add_{name}_token") for name in ("bos", "eos")]
    flags = [f if isinstance(f, bool) else adds[i] if adds else None for i, f in enumerate(flags)]
    keys = _keys(made, named, flags)
    templates = _templates(folder, config)
    if more := sorted(set(templates) - {"default"}):
        keys["chat_templates"] = more
    for name, text in templates.items():
        keys["chat_template" if name == "default" else f"chat_template.{name}"] = text
    if made.model == "llama" and _swallows_space(folder):
        keys["swallows_space"] = True
    return keys


def _keys(
    made: Vocabulary, named: Mapping[str, int], flags: Sequence[bool | None]
) -> dict[str, Any]:
    """named: token ids by key; flags: whether BOS and EOS go around a text, None where unknown."""
    keys: dict[str, Any] = {"ggml.model": made.model, "ggml.pre": made.pre}
    keys["ggml.tokens"], keys["ggml.token_type"] = made.tokens, made.types
    if made.scores is not None:
        keys["ggml.scores"] = made.scores
        keys["ggml.add_space_prefix"] = made.space_prefix
        keys["ggml.remove_extra_whitespaces"] = made.collapse_spaces
    if made.merges is not None:
        keys["ggml.merges"] = made.merges
    keys |= {f"ggml.{name}_token_id": token for name, token in named.items()}
    for name, flag in zip(("bos", "eos"), flags, strict=True):
        if flag is not None and (name in named or not flag):
            keys[f"ggml.add_{name}_token"] = flag
    return keys

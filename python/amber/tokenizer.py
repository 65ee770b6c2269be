"""Text <-> token ids."""

import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from ._lib import Handle, check, encode_text, ffi, lib, text
from .errors import AmberError
from .models import find_model


class Tokenizer:
    """The tokenizer of a GGUF file, which may hold a vocabulary and nothing else.

    Errors: FileError, FileFormatError, UnsupportedModelError.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        out, err = ffi.new("amber_tokenizer **"), ffi.new("amber_error *")
        check(lib.amber_tokenizer_open(os.fsencode(find_model(path)), out, err), err)
        self._handle = Handle(out[0], lib.amber_tokenizer_close, "tokenizer")
        weakref.finalize(self, self._handle.free).atexit = False
        self._pointer = out[0]
        self._read_constants()

    @classmethod
    def _of_engine(cls, handle: Handle) -> "Tokenizer":
        self = cls.__new__(cls)
        self._handle = handle
        with handle as engine:
            self._pointer = lib.amber_engine_tokenizer(engine)
        self._read_constants()
        return self

    def _read_constants(self) -> None:
        tok = self._pointer
        self.size: int = lib.amber_tokenizer_size(tok)
        self.bos: int | None = _or_none(lib.amber_tokenizer_bos(tok))
        self.eos: int | None = _or_none(lib.amber_tokenizer_eos(tok))
        self.adds_bos: bool = bool(lib.amber_tokenizer_adds_bos(tok))

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> "Tokenizer":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the vocabulary (an engine's own goes with the engine)."""
        if self._handle._free is lib.amber_tokenizer_close:
            self._handle.close()

    def encode(
        self, string: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        add_special puts BOS in front where the model wants it; parse_special reads spellings such
        as "<|im_end|>" inside the text as those tokens.
        """
        raw = encode_text(string)
        cap = len(raw) + 8
        err = ffi.new("amber_error *")
        with self._handle:
            while True:
                out = ffi.new("int32_t[]", cap)
                n = lib.amber_tokenize(
                    self._pointer, raw, len(raw), add_special, parse_special, out, cap, err
                )
                if n < 0:
                    check(-n, err)
                if n <= cap:
                    return ffi.unpack(out, n) if n else []
                cap = n

    def encode_prompt(self, string: str) -> list[int]:
        """Token ids of a raw prompt: special spellings are read, and BOS comes first exactly once
        (chat templates often write it themselves)."""
        ids = self.encode(string, add_special=False, parse_special=True)
        if self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def decode_bytes(self, ids: Sequence[int], keep_special: bool = False) -> bytes:
        """Bytes of some tokens; not always whole UTF-8. keep_special writes "<s>" and kin too."""
        tokens = ffi.new("int32_t[]", list(ids))
        cap = 8 * len(tokens) + 64
        err = ffi.new("amber_error *")
        with self._handle:
            while True:
                out = ffi.new("char[]", cap)
                n = lib.amber_detokenize(
                    self._pointer, tokens, len(tokens), keep_special, out, cap, err
                )
                if n < 0:
                    check(-n, err)
                if n <= cap:
                    return ffi.buffer(out, n)[:]
                cap = n

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of some tokens; broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, keep_special).decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of a token. IndexError where there is no such token."""
        length = ffi.new("int32_t *")
        with self._handle:
            spelling = lib.amber_token_text(self._pointer, token, length)
            if spelling == ffi.NULL:
                raise IndexError(f"token {token} is outside the vocabulary of {self.size}")
            return text(spelling, length[0])

    def token_id(self, spelling: str) -> int | None:
        """The id of an exact vocabulary entry such as "<|im_end|>"."""
        raw = encode_text(spelling)
        with self._handle:
            return _or_none(lib.amber_token_find(self._pointer, raw, len(raw)))

    def is_control(self, token: int) -> bool:
        """Whether a token is not text: "<s>", "<|im_end|>"."""
        return bool(self._flags(token) & lib.AMBER_TOKEN_CONTROL)

    def is_eog(self, token: int) -> bool:
        """Whether a token ends a generation: EOS, end of turn and their kin."""
        return bool(self._flags(token) & lib.AMBER_TOKEN_EOG)

    def eog_tokens(self) -> list[int]:
        """All tokens that end a generation."""
        return [token for token in range(self.size) if self.is_eog(token)]

    def _flags(self, token: int) -> int:
        with self._handle:
            return lib.amber_token_flags(self._pointer, token)

    def stream(self, keep_special: bool = False, continues: bool = False) -> "TextStream":
        """Token-by-token decoding; `continues` keeps a leading space, as after earlier text."""
        return TextStream(self, keep_special, continues)

    def decode_stream(self, ids: Iterable[int]) -> Iterable[str]:
        """Pieces of text as tokens come in; no piece ends inside a character."""
        with self.stream() as stream:
            for token in ids:
                yield stream.push(token)
            yield stream.finish()


class TextStream:
    """Text that grows token by token and never ends inside a UTF-8 sequence."""

    def __init__(self, tokenizer: Tokenizer, keep_special: bool, continues: bool) -> None:
        self._tokenizer = tokenizer
        with tokenizer._handle:
            pointer = lib.amber_text_stream_new(tokenizer._pointer, keep_special, continues)
        if pointer == ffi.NULL:
            raise MemoryError("text stream")
        self._pointer = ffi.gc(pointer, lib.amber_text_stream_free)
        self._length = ffi.new("int32_t *")

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._take(lib.amber_text_stream_push, token)

    def finish(self) -> str:
        """What was held back, as U+FFFD."""
        return self._take(lib.amber_text_stream_finish)

    def _take(self, function: Any, *args: int) -> str:
        if self._pointer is None:
            raise AmberError("this text stream is closed")
        with self._tokenizer._handle:
            piece = function(self._pointer, *args, self._length)
            if piece == ffi.NULL:
                raise MemoryError("text stream")
            return text(piece, self._length[0])

    def close(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None

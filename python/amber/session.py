"""One timeline of tokens with its KV cache."""

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ._lib import (
    PROJECTIONS,
    Callbacks,
    Progress,
    Tap,
    ffi,
    float_array,
    lib,
    new_struct,
    struct_fields,
)
from .errors import AmberError, ContextOverflowError
from .generate import Result, Stream
from .sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from .engine import Engine, Prompt

KV_TYPES = {"f16": lib.AMBER_KV_F16, "int8": lib.AMBER_KV_INT8}


class Session:
    """Holds up to n_ctx tokens. Every call takes the whole prompt; what the session already holds
    of it is not computed again. For one thread at a time.

    kv_type: "f16" (float32 with precision "float") or "int8", see Engine.
    tap: sees what the linear layers read in prefill, see amber.Tap; the engine must not be used
        from inside it.

    Errors: ContextOverflowError, OutOfMemoryError, AmberError where it is closed or in use.
    """

    def __init__(
        self,
        engine: "Engine",
        n_ctx: int | None = None,
        n_batch: int | None = None,
        progress: Progress | None = None,
        tap: Tap | None = None,
        kv_type: str = "f16",
    ) -> None:
        self.engine = engine
        self._handle = engine._handle
        self._callbacks = callbacks = Callbacks(progress, tap=tap)
        self._lock = threading.Lock()
        self._owner: object = None  # the Stream that may go on
        options = session_options(n_ctx, n_batch, kv_type)
        options.progress, options.progress_user = lib.amber_py_progress, callbacks.handle
        if tap is not None:
            options.tap, options.tap_user = lib.amber_py_tap, callbacks.handle
        out, err = ffi.new("amber_session **"), ffi.new("amber_error *")
        with self._handle as pointer:
            callbacks.check(lib.amber_session_new(pointer, options, out, err), err)
            self._pointer = out[0]
            # The closure keeps the callbacks for as long as C may call them.
            self._handle.children[out[0]] = lambda p, _=callbacks: lib.amber_session_free(p)
        # Runs once, at close() or when nothing refers to this: C may give the address out again.
        self._free = weakref.finalize(self, self._handle.free_child, out[0])
        self._free.atexit = False
        stats = self.stats
        self.n_ctx: int = stats["n_ctx"]
        self.n_batch: int = stats["n_batch"]
        self._kv_bytes: int = stats["kv_bytes"]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __bool__(self) -> bool:
        return True  # an empty session is a session, whatever its len()

    def close(self) -> None:
        """Frees the KV cache. May be called again."""
        if self._pointer is not None:
            with self._exclusive():
                self._pointer = None
                self._free()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise AmberError("session in use: by another thread, or from inside its own callback")
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _use(self) -> Iterator[Any]:
        """The C pointer, safe from other threads and from close()."""
        with self._exclusive(), self._handle:
            if self._pointer is None:
                raise AmberError("this session is closed")
            yield self._pointer

    # ---- answers ----

    def generate(
        self, prompt: "Prompt", params: SamplingParams | None = None, **overrides: Any
    ) -> Result:
        """As Engine.generate for one prompt, in this session."""
        return self.stream(prompt, params, **overrides).finish()

    def stream(
        self, prompt: "Prompt", params: SamplingParams | None = None, **overrides: Any
    ) -> Stream:
        """As Engine.stream, in this session. Any other use of the session ends the stream."""
        started = perf_counter()
        params = (params or SamplingParams()).merged(overrides)
        tokens = self.engine.encode_prompt(prompt)
        check_fits(tokens, self.n_ctx, self._kv_bytes)
        return Stream(nullcontext(self), tokens, params, started)

    # ---- tokens ----

    def sync(self, tokens: Sequence[int]) -> int:
        """Makes the session hold exactly these tokens; returns how many were already there.

        Ctrl-C and a progress callback stop it inside; a shorter consistent prefix then remains and
        a later call goes on from there.
        """
        self._owner = None
        return self._sync(tokens)

    def append(self, token: int) -> None:
        """Adds one token: a decode step."""
        self._owner = None
        self._append(token)

    def rewind(self, n: int) -> None:
        """Forgets all tokens from position n on."""
        self._owner = None
        err = ffi.new("amber_error *")
        with self._use() as pointer:
            self._callbacks.check(lib.amber_session_rewind(pointer, n, err), err)

    def score(self, tokens: Sequence[int], first: int = 0) -> Any:
        """float32 logits [len(tokens) - first, n_vocab] of positions first and on."""
        check_fits(tokens, self.n_ctx, self._kv_bytes)
        if not 0 <= first < len(tokens):
            raise ValueError(f"first: expected 0 to {len(tokens) - 1}, found {first}")
        self._owner = None
        shape = (len(tokens) - first, self.engine.info.n_vocab)
        raw, err = bytearray(4 * shape[0] * shape[1]), ffi.new("amber_error *")
        with self._use() as pointer:
            status = lib.amber_session_score(
                pointer, list(tokens), len(tokens), first, ffi.from_buffer("float[]", raw), err
            )
            self._callbacks.check(status, err)
        return float_array(raw, *shape)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokens it holds, their KV cache and its logits to a file. FileError where that
        fails; an older file then stays."""
        err = ffi.new("amber_error *")
        with self._use() as pointer:
            raw = os.fsencode(path)
            self._callbacks.check(lib.amber_session_save(pointer, raw, err), err)

    def load(self, path: str | os.PathLike) -> int:
        """Holds from now on what save() wrote; returns how many tokens that is. A later sync() or
        generate() computes only what its prompt has beyond them.

        Errors, which leave the session as it was: FileError, FileFormatError, ArgumentError where
        the file comes from another model, precision or sparsity plan, AmberError where it holds
        more tokens than n_ctx.
        """
        self._owner = None
        err = ffi.new("amber_error *")
        with self._use() as pointer:
            raw = os.fsencode(path)
            self._callbacks.check(lib.amber_session_load(pointer, raw, err), err)
            return lib.amber_session_length(pointer)

    def project(
        self, layer: int, projection: str, rows: Any, n_out: int, pruned: bool = True
    ) -> Any:
        """What one linear layer makes of rows [n, n_in] float32 as a tap shows them: [n, n_out]
        float32, as prefill does under the engine's plan for a prompt of these rows; without pruned,
        dense. The session's tokens stay. Needs numpy. ArgumentError where the layer has no such
        matrix, as for experts, or another shape."""
        import numpy as np

        if projection not in PROJECTIONS:
            raise ValueError(
                f"projection: expected one of {', '.join(PROJECTIONS)}, found {projection!r}"
            )
        x = np.ascontiguousarray(rows, np.float32)
        if x.ndim != 2:
            raise ValueError(f"rows: expected 2 dimensions, found {x.ndim}")
        out, err = np.empty((len(x), n_out), np.float32), ffi.new("amber_error *")
        with self._use() as pointer:
            status = lib.amber_session_project(
                pointer, layer, PROJECTIONS.index(projection), len(x), x.shape[1], n_out,
                ffi.from_buffer("float[]", x), pruned, ffi.from_buffer("float[]", out), err,
            )  # fmt: skip
            self._callbacks.check(status, err)
        return out

    @property
    def logits(self) -> Any:
        """A copy of the float32 logits [n_vocab] of the last token; None where there are none."""
        with self._use() as pointer:
            logits, n = lib.amber_session_logits(pointer), self.engine.info.n_vocab
            if logits == ffi.NULL:
                return None
            return float_array(bytearray(ffi.buffer(logits, 4 * n)), n)

    @property
    def tokens(self) -> list[int]:
        """The tokens it holds."""
        with self._use() as pointer:
            n = lib.amber_session_length(pointer)
            return ffi.unpack(lib.amber_session_tokens(pointer), n) if n else []

    def __len__(self) -> int:
        with self._use() as pointer:
            return lib.amber_session_length(pointer)

    @property
    def stats(self) -> dict[str, Any]:
        """Sizes in bytes, times in seconds: amber_session_stats of amber.h."""
        stats = new_struct("amber_session_stats")
        with self._use() as pointer:
            lib.amber_session_get_stats(pointer, stats)
        return struct_fields(stats)

    # ---- for Stream ----

    def _sync(self, tokens: Sequence[int]) -> int:
        check_fits(tokens, self.n_ctx, self._kv_bytes)
        err = ffi.new("amber_error *")
        with self._use() as pointer:
            self._callbacks.check(
                lib.amber_session_sync(pointer, list(tokens), len(tokens), err), err
            )
        return self.stats["cached_tokens"]

    def _append(self, token: int) -> None:
        err = ffi.new("amber_error *")
        with self._use() as pointer:
            self._callbacks.check(lib.amber_session_append(pointer, token, err), err)

    def _sample(self, sampler: Sampler) -> int:
        with self._use() as pointer:
            return sampler.sample(lib.amber_session_logits(pointer))


def session_options(n_ctx: int | None, n_batch: int | None, kv_type: str) -> Any:
    """amber_session_options. ValueError for an unknown kv_type."""
    if kv_type not in KV_TYPES:
        raise ValueError(f"kv_type: expected {' or '.join(KV_TYPES)}, found {kv_type!r}")
    options = new_struct("amber_session_options", lib.amber_session_options_defaults)
    options.n_ctx, options.n_batch = n_ctx or 0, n_batch or 0
    options.kv_type = KV_TYPES[kv_type]
    return options


def check_fits(tokens: Sequence[int], n_ctx: int, kv_bytes: int) -> None:
    """ContextOverflowError for a prompt longer than the context, ValueError for an empty one."""
    if not len(tokens):
        raise ValueError("prompt: expected at least one token, found none")
    if len(tokens) > n_ctx:
        raise ContextOverflowError(len(tokens), n_ctx, kv_bytes)

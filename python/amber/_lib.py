"""The seam to C: errors, callbacks, and the lifetime of what C owns."""

import threading
from collections.abc import Callable
from typing import Any

from . import errors
from ._amber import ffi, lib

SEED_RANDOM = 2**64 - 1  # AMBER_SEED_RANDOM

# Progress(phase, done, total): phase "load" counts bytes, "prefill" counts tokens (fractions
# too, it moves with every layer). A true return value cancels.
Progress = Callable[[str, float, float], Any]
Log = Callable[[str, str], None]  # (level, text)
# Tap(layer, projection, position, rows): rows [n, n_in] float32 are what projection "q" (with k and
# v), "o", "gate" (with up) or "down" reads in prefill for the tokens from `position` on.
Tap = Callable[[int, str, int, Any], Any]
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # in the order of amber_projection

LEVELS = ("error", "warning", "info", "debug")
_ERRORS = {
    lib.AMBER_ERR_ARGUMENT: errors.ArgumentError,
    lib.AMBER_ERR_IO: errors.FileError,
    lib.AMBER_ERR_FORMAT: errors.FileFormatError,
    lib.AMBER_ERR_UNSUPPORTED: errors.UnsupportedModelError,
    lib.AMBER_ERR_MEMORY: errors.OutOfMemoryError,
    lib.AMBER_ERR_CANCELLED: errors.Cancelled,
    lib.AMBER_ERR_DEVICE: errors.DeviceError,
}


def text(pointer: Any, length: int | None = None) -> str:
    """A C string as str; bytes that are not UTF-8 become U+FFFD."""
    raw = ffi.string(pointer) if length is None else ffi.buffer(pointer, length)[:]
    return raw.decode("utf-8", "replace")


def encode_text(string: str) -> bytes:
    """UTF-8, lone surrogates (undecodable command line bytes) included: C reads them as U+FFFD."""
    return string.encode("utf-8", "surrogatepass")


def new_struct(name: str, defaults: Callable[[Any], None] | None = None) -> Any:
    """An option struct with its `size` set, through its own defaults function where it has one."""
    struct = ffi.new(f"{name} *")
    struct.size = ffi.sizeof(name)
    if defaults:
        defaults(struct)
    return struct


def struct_fields(struct: Any) -> dict[str, Any]:
    """The members of a C struct by name, but for `size`; char arrays as str."""
    fields = ffi.typeof(struct).item.fields
    values = {name: getattr(struct, name) for name, _ in fields if name != "size"}
    return {k: text(v) if isinstance(v, ffi.CData) else v for k, v in values.items()}


def float_array(raw: bytearray, *shape: int) -> Any:
    """float32 values as a numpy array of this shape, as a memoryview where numpy is missing."""
    try:
        import numpy
    except ImportError:
        return memoryview(raw).cast("f", shape)
    return numpy.frombuffer(raw, numpy.float32).reshape(shape)


class Callbacks:
    """The Python ends of C's progress, log and tap pointers.

    An exception in one of them, KeyboardInterrupt above all, cannot cross C: it is kept, the C
    call is cancelled, and `check` raises it again.
    """

    def __init__(
        self, progress: Progress | None = None, log: Log | None = None, tap: Tap | None = None
    ) -> None:
        self.progress, self.log, self.tap = progress, log, tap
        self.error: BaseException | None = None
        self.handle = ffi.new_handle(self)

    def say(self, level: str, message: str) -> None:
        """One line of the log. level: one of LEVELS."""
        if self.log is not None:
            self.log(level, message)
        else:
            import logging

            getattr(logging.getLogger("amber"), level)("%s", message)

    def check(self, status: int, err: Any) -> None:
        """Raises what a callback raised, else what C reports in `err`."""
        error = self.error or _stray.pop(threading.get_ident(), None)
        self.error = None
        if error is not None:
            raise error
        check(status, err)


def check(status: int, err: Any) -> None:
    """Raises the AmberError of a failed C call (status not 0; amber_error pointer)."""
    if status:
        raise _ERRORS.get(abs(status), errors.AmberError)(text(err.msg))


# Exceptions that struck between the C call and a callback's `try`, by thread.
_stray: dict[int, BaseException] = {}


def _keep_stray(_kind: Any, error: BaseException, _trace: Any) -> None:
    _stray[threading.get_ident()] = error


@ffi.def_extern(error=1, onerror=_keep_stray)
def amber_py_progress(user: Any, phase: int, done: int, total: int) -> int:
    callbacks = ffi.from_handle(user)
    try:
        if callbacks.progress is None:
            return 0  # reached anyway: this is where Python notices Ctrl-C
        if phase == lib.AMBER_PHASE_LOAD:
            return 1 if callbacks.progress("load", done, total) else 0
        return 1 if callbacks.progress("prefill", done / 1000, total / 1000) else 0
    except BaseException as error:
        callbacks.error = error
        return 1


@ffi.def_extern(onerror=_keep_stray)
def amber_py_log(user: Any, level: int, message: Any) -> None:
    callbacks = ffi.from_handle(user)
    name = LEVELS[min(max(level, 0), 3)]
    try:
        callbacks.say(name, text(message))
    except BaseException as error:
        callbacks.error = error


@ffi.def_extern(onerror=_keep_stray)
def amber_py_tap(
    user: Any, layer: int, projection: int, pos: int, rows: int, n_in: int, x: Any
) -> None:
    callbacks = ffi.from_handle(user)
    try:
        if callbacks.error is None:
            raw = bytearray(ffi.buffer(x, 4 * rows * n_in))
            callbacks.tap(layer, PROJECTIONS[projection], pos, float_array(raw, rows, n_in))
    except BaseException as error:
        callbacks.error = error


class Handle:
    """A C object that several threads may use and one may close.

    `with handle as pointer:` keeps it alive for the length of a call; `close` waits for such calls
    to end. `children` (pointer -> free function) are freed before it, whatever order Python's
    collector finds: C wants sessions gone before their engine.
    """

    def __init__(self, pointer: Any, free: Callable[[Any], None], what: str) -> None:
        self._pointer, self._free, self._what = pointer, free, what
        self._condition = threading.Condition()
        self._users: list[int] = []  # thread ids of the calls under way
        self._closing = False
        self.children: dict[Any, Callable[[Any], None]] = {}

    @property
    def closed(self) -> bool:
        return self._closing or self._pointer is None

    def __enter__(self) -> Any:
        with self._condition:
            if self.closed:
                raise errors.AmberError(f"this {self._what} is closed")
            self._users.append(threading.get_ident())
            return self._pointer

    def __exit__(self, *_exc: object) -> None:
        with self._condition:
            self._users.remove(threading.get_ident())
            if not self._users:
                self._condition.notify_all()

    def free_child(self, child: Any) -> None:
        """Frees one child now; nothing where it is gone already."""
        free = self.children.pop(child, None)
        if free:
            free(child)

    def free(self) -> None:
        """Frees everything without waiting: for objects that nothing refers to any more."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            for child in list(self.children):
                self.free_child(child)
            self._free(pointer)

    def close(self) -> None:
        """Waits for calls under way, then frees. May be called again."""
        with self._condition:
            if threading.get_ident() in self._users:
                raise errors.AmberError(f"close() from inside a callback of this {self._what}")
            self._closing = True  # no new calls
            self._condition.wait_for(lambda: not self._users)
            self.free()

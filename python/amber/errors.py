"""Everything Amber raises on its own account is an AmberError; most are a builtin kind as well."""


class AmberError(Exception):
    """Base of Amber's errors."""


class ArgumentError(AmberError, ValueError):
    """A value is out of range."""


class FileError(AmberError, OSError):
    """A file cannot be opened or mapped."""


class ModelNotFoundError(FileError, FileNotFoundError):
    """Neither a file nor a built-in model has this name."""


class FileFormatError(AmberError):
    """A file is damaged, or is not GGUF."""


class UnsupportedModelError(AmberError):
    """A sound file that this version cannot run."""


class ContextOverflowError(AmberError):
    """A prompt has more tokens than the context holds: see `prompt_tokens` and `n_ctx`."""

    def __init__(self, prompt_tokens: int, n_ctx: int, kv_bytes: int = 0) -> None:
        enough = 1 << prompt_tokens.bit_length()  # a power of two, with room for an answer
        more = kv_bytes * (enough - n_ctx) // max(n_ctx, 1) / 2**20
        price = f" (KV cache +{more:.0f} MiB)" if more >= 1 else ""
        super().__init__(
            f"prompt has {prompt_tokens} tokens, context is {n_ctx}; "
            f"use -c {enough}{price}, in Python n_ctx={enough}, or shorten it"
        )
        self.prompt_tokens, self.n_ctx = prompt_tokens, n_ctx


class OutOfMemoryError(AmberError, MemoryError):
    """An allocation failed."""


class DeviceError(AmberError):
    """A device or instruction set that was asked for is missing."""


class ChatTemplateError(AmberError):
    """A chat template is missing, broken, refuses the messages, or takes too long."""


class Cancelled(AmberError):
    """A progress callback asked to stop."""

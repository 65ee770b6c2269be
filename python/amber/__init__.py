"""Amber: GGUF language models with INT8 prefill.

>>> with amber.Engine("demo") as engine:
...     print(engine.generate("Once upon a time", max_tokens=64))
"""

from ._amber import ffi as _ffi
from ._amber import lib as _lib_c
from ._lib import Progress, Tap
from .batch import append_each
from .engine import Engine, EngineInfo, MemoryEstimate, device_list, isa_list, memory_estimate
from .errors import (
    AmberError,
    ArgumentError,
    Cancelled,
    ChatTemplateError,
    ContextOverflowError,
    DeviceError,
    FileError,
    FileFormatError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from .generate import Chunk, Result, Stream
from .models import find_model
from .sampling import SamplingParams
from .session import Session
from .tokenizer import TextStream, Tokenizer

__version__: str = _ffi.string(_lib_c.amber_version()).decode()

__all__ = [
    "AmberError",
    "ArgumentError",
    "Cancelled",
    "ChatTemplateError",
    "Chunk",
    "ContextOverflowError",
    "DeviceError",
    "Engine",
    "EngineInfo",
    "FileError",
    "FileFormatError",
    "MemoryEstimate",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "Progress",
    "Result",
    "SamplingParams",
    "Session",
    "Stream",
    "Tap",
    "TextStream",
    "Tokenizer",
    "UnsupportedModelError",
    "append_each",
    "find_model",
    "device_list",
    "isa_list",
    "memory_estimate",
]

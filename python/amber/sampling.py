"""How the next token is chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ._lib import SEED_RANDOM, check, ffi, lib, new_struct
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. Errors: ValueError or TypeError, naming the parameter."""

    max_tokens: int | None = 256  # None: until the model ends or the context is full
    temperature: float = 0.8  # 0: greedy
    top_k: int = 40  # 0: all
    top_p: float = 0.95  # 1: all
    min_p: float = 0.05  # 0: all
    repeat_penalty: float = 1.0  # 1: none
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64  # tokens the penalties look back at; -1: all
    logit_bias: Mapping[int | str, float] | None = None  # token id or spelling -> added; -inf bans
    stop: str | Sequence[str] = ()  # texts that end the answer; not part of it
    seed: int | None = None  # None: random, see Result.seed
    ignore_eos: bool = False  # never end before max_tokens or the context does

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(item, str) for item in stop):
            raise TypeError("stop: expected a str or a list of str")
        object.__setattr__(self, "stop", tuple(item for item in stop if item))
        if self.max_tokens is not None and self.max_tokens < 0:
            object.__setattr__(self, "max_tokens", None)
        _need("temperature", self.temperature, 0, 1e6)
        _need("top_p", self.top_p, 0, 1)
        _need("min_p", self.min_p, 0, 1)
        _need("repeat_penalty", self.repeat_penalty, 1e-3, 1e3)
        _need("frequency_penalty", self.frequency_penalty, -1e3, 1e3)
        _need("presence_penalty", self.presence_penalty, -1e3, 1e3)
        for name in ("max_tokens", "top_k", "penalty_last_n"):
            value = getattr(self, name)
            if value is not None:
                _need(name, value, -1, 2**31 - 1, int)
        if self.seed is not None:
            _need("seed", self.seed, 0, SEED_RANDOM - 1, int)

    def merged(self, overrides: Mapping[str, Any]) -> "SamplingParams":
        """These parameters with some replaced. TypeError names the nearest of an unknown one."""
        names = [field.name for field in fields(self)]
        for name in overrides:
            if name not in names:
                import difflib

                near = difflib.get_close_matches(name, names, 1, 0.4)
                hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
                raise TypeError(f"unknown sampling parameter '{name}'; {hint}")
        return replace(self, **overrides)


def _need(name: str, value: Any, low: float, high: float, kind: type = float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise TypeError(f"{name}: expected {kind.__name__}, found {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low:g} to {high:g}, found {value}")


def logit_bias(params: SamplingParams, tokenizer: Tokenizer) -> dict[int, float]:
    """Token id -> bias. A str key is a vocabulary entry or a text of one token; ValueError else."""
    bias: dict[int, float] = {}
    for key, value in (params.logit_bias or {}).items():
        token = key
        if isinstance(key, str):
            token = tokenizer.token_id(key)
            if token is None:
                ids = tokenizer.encode(key, add_special=False)
                if len(ids) != 1:
                    raise ValueError(f"logit_bias: {key!r} is {len(ids)} tokens, expected one")
                token = ids[0]
        if not isinstance(token, int) or not 0 <= token < tokenizer.size:
            raise ValueError(f"logit_bias: {key!r} is outside the vocabulary of {tokenizer.size}")
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"logit_bias: {key!r} has the bias {value}")
        bias[token] = bias.get(token, 0.0) + value
    if params.ignore_eos:
        bias.update(dict.fromkeys(tokenizer.eog_tokens(), -math.inf))
    return bias


class Sampler:
    """Logits -> token, with its own random state and penalty window."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer, n_vocab: int) -> None:
        c = new_struct("amber_sampling", lib.amber_sampling_defaults)
        for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty",
                     "frequency_penalty", "presence_penalty", "penalty_last_n"):  # fmt: skip
            setattr(c, name, getattr(params, name))
        c.seed = SEED_RANDOM if params.seed is None else params.seed
        bias = logit_bias(params, tokenizer)
        tokens, values = ffi.new("int32_t[]", list(bias)), ffi.new("float[]", list(bias.values()))
        c.n_logit_bias, c.logit_bias_tokens, c.logit_bias_values = len(bias), tokens, values
        out, err = ffi.new("amber_sampler **"), ffi.new("amber_error *")
        check(lib.amber_sampler_new(c, n_vocab, out, err), err)
        self._pointer = ffi.gc(out[0], lib.amber_sampler_free)

    @property
    def seed(self) -> int:
        """The seed in use."""
        return lib.amber_sampler_seed(self._pointer)

    def accept(self, token: int) -> None:
        """Makes a token count for the penalties."""
        lib.amber_sampler_accept(self._pointer, token)

    def sample(self, logits: Any) -> int:
        """The next token from float32 logits [n_vocab], a C pointer. ValueError: none is finite."""
        token = lib.amber_sampler_sample(self._pointer, logits)
        if token < 0:
            raise ValueError("sampler: no logit is finite (is every token banned by logit_bias?)")
        return token

"""The answer loop: prefill, then sample, decode, and watch for the end."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from .channels import AnswerText
from .errors import AmberError, Cancelled
from .sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from .session import Session


@dataclass(slots=True)
class Chunk:
    """A piece of an answer. Several tokens, where their text had to be held back together."""

    text: str
    token_ids: list[int]

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Result:
    """An answer and how it came about. str() gives the text."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # all that were sampled but the EOS
    finish_reason: str = "cancelled"  # "stop" | "length" | "cancelled"
    stop_reason: str | None = None  # the stop string, or the spelling of the EOS token
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: not computed again
    prefill_seconds: float = 0.0
    ttft: float = 0.0  # seconds from the call to the first token
    decode_seconds: float = 0.0  # for all tokens after the first
    seed: int = 0
    sparse: str = "off"  # what ran sparse in prefill

    def __str__(self) -> str:
        return self.text

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first."""
        return _rate(len(self.token_ids) - 1, self.decode_seconds)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


class StopStrings:
    """Finds stop strings in text that comes in pieces, across their borders."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was reached or None).

        Text that may be the beginning of a stop string is held back until it is decided.
        """
        piece = self._held + piece
        found = [(at, stop) for stop in self._stops if (at := piece.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return piece[:at], stop
        keep = max((_overlap(piece, stop) for stop in self._stops), default=0)
        self._held = piece[len(piece) - keep :]
        return piece[: len(piece) - keep], None

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(piece: str, stop: str) -> int:
    """Length of the longest end of `piece` that is a beginning of `stop`."""
    longest = min(len(piece), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if piece.endswith(stop[:n])), 0)


class Stream:
    """Iterator over the Chunks of one answer. `result` grows with it and is final at its end;
    leaving the loop early, `close()` or `with` stop the engine and keep the partial result."""

    def __init__(
        self,
        lease: AbstractContextManager["Session"],
        tokens: list[int],
        params: SamplingParams,
        started: float,
    ) -> None:
        self.result = Result(prompt_tokens=len(tokens))
        self._chunks = self._run(lease, tokens, params, started)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the answer here."""
        self._chunks.close()

    def finish(self) -> Result:
        """Runs to the end."""
        for _ in self._chunks:
            pass
        return self.result

    def _run(
        self,
        lease: AbstractContextManager["Session"],
        tokens: list[int],
        params: SamplingParams,
        started: float,
    ) -> Iterator[Chunk]:
        result = self.result
        fresh: list[int] = []  # tokens whose text has not been handed out
        limit = float("inf") if params.max_tokens is None else params.max_tokens

        def chunk(piece: str) -> Chunk:
            nonlocal fresh
            result.text += piece
            out, fresh = Chunk(piece, fresh), []
            return out

        with lease as session:
            tokenizer = session.engine.tokenizer
            sampler = Sampler(params, tokenizer, session.engine.info.n_vocab)
            result.seed = sampler.seed
            result.sparse = session.engine.info.sparse
            begun = perf_counter()
            session._owner = self
            try:
                result.cached_tokens = session._sync(tokens)
            except Cancelled:
                return
            finally:
                result.prefill_seconds = perf_counter() - begun
            if not session.stats["prefill_sparse"]:
                result.sparse = "off"
            for token in tokens:
                sampler.accept(token)
            stops = StopStrings(params.stop)
            with AnswerText(tokenizer) as decoder:
                while len(result.token_ids) < limit:
                    begun = perf_counter()
                    if result.token_ids:
                        if len(session) >= session.n_ctx:
                            break
                        if session._owner is not self:
                            raise AmberError("stream: its session was used for something else")
                        session._append(token)
                    token = session._sample(sampler)
                    now = perf_counter()
                    if result.token_ids:
                        result.decode_seconds += now - begun
                    else:
                        result.ttft = now - started
                    if tokenizer.is_eog(token):
                        result.finish_reason = "stop"
                        result.stop_reason = tokenizer.token_text(token)
                        break
                    sampler.accept(token)
                    result.token_ids.append(token)
                    fresh.append(token)
                    piece, stop = stops.push(decoder.push(token))
                    if stop is not None:
                        result.finish_reason, result.stop_reason = "stop", stop
                        yield chunk(piece)
                        return
                    if piece:
                        yield chunk(piece)
                if result.finish_reason != "stop":
                    result.finish_reason = "length"
                piece, stop = stops.push(decoder.finish())
                if stop is not None:
                    result.finish_reason, result.stop_reason = "stop", stop
                else:
                    piece += stops.finish()
                if piece or fresh:
                    yield chunk(piece)

"""The answer loop: prefill, then sample, decode, and watch for the end."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

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


class Answer:
    """One answer on its way: takes token after token from the logits of its session, which somebody
    else moves on, and makes of them text and the fields of its result."""

    def __init__(
        self, session: "Session", params: SamplingParams, result: Result, started: float
    ) -> None:
        engine = session.engine
        self.session, self.result = session, result
        self.last = -1  # the token that the session does not hold yet
        self._started = started
        self._limit = float("inf") if params.max_tokens is None else params.max_tokens
        self._sampler = Sampler(params, engine.tokenizer, engine.info.n_vocab)
        self._stops = StopStrings(params.stop)
        self._decoder = AnswerText(engine.tokenizer)
        self._fresh: list[int] = []  # tokens whose text has not been handed out
        self._ended = self._stopped = False  # by any token; by a stop string
        result.seed, result.sparse = self._sampler.seed, engine.info.sparse

    def __enter__(self) -> "Answer":
        self._decoder.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._decoder.__exit__(*exc)

    def prefill(self, tokens: list[int]) -> bool:
        """Whether it was not cancelled."""
        begun = perf_counter()
        try:
            self.result.cached_tokens = self.session._sync(tokens)
        except Cancelled:
            return False
        finally:
            self.result.prefill_seconds = perf_counter() - begun
        if not self.session.stats["prefill_sparse"]:
            self.result.sparse = "off"
        for token in tokens:
            self._sampler.accept(token)
        return True

    @property
    def goes_on(self) -> bool:
        """Whether there is room and wish for one more token."""
        if self._ended or len(self.result.token_ids) >= self._limit:
            return False
        return not self.result.token_ids or len(self.session) < self.session.n_ctx

    def sample(self, begun: float | None = None) -> Chunk | None:
        """Takes the next token. begun: when the step that led to it did; None for the first token,
        which prefill led to."""
        token = self.session._sample(self._sampler)
        now, result = perf_counter(), self.result
        if begun is None:
            result.ttft = now - self._started
        else:
            result.decode_seconds += now - begun
        tokenizer = self.session.engine.tokenizer
        if tokenizer.is_eog(token):
            result.finish_reason, result.stop_reason = "stop", tokenizer.token_text(token)
            self._ended = True
            return None
        self._sampler.accept(token)
        self.last = token
        result.token_ids.append(token)
        self._fresh.append(token)
        piece, stop = self._stops.push(self._decoder.push(token))
        if stop is not None:
            result.finish_reason, result.stop_reason = "stop", stop
            self._ended = self._stopped = True
        return self._chunk(piece) if piece or self._stopped else None

    def finish(self) -> Chunk | None:
        """What is left when it does not go on."""
        result = self.result
        if self._stopped:
            return None
        if not self._ended:
            result.finish_reason = "length"
        piece, stop = self._stops.push(self._decoder.finish())
        if stop is not None:
            result.finish_reason, result.stop_reason = "stop", stop
        else:
            piece += self._stops.finish()
        return self._chunk(piece) if piece or self._fresh else None

    def _chunk(self, piece: str) -> Chunk:
        self.result.text += piece
        out, self._fresh = Chunk(piece, self._fresh), []
        return out


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
        with lease as session, Answer(session, params, result, started) as answer:
            session._owner = self
            if not answer.prefill(tokens):
                return
            while answer.goes_on:
                begun = None
                if result.token_ids:
                    if session._owner is not self:
                        raise AmberError("stream: its session was used for something else")
                    begun = perf_counter()
                    session._append(answer.last)
                if chunk := answer.sample(begun):
                    yield chunk
            if chunk := answer.finish():
                yield chunk

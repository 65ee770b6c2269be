"""Several timelines at once: a decode step reads each weight once for all of them."""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

from ._lib import ffi, lib
from .generate import Answer, Result
from .sampling import SamplingParams
from .session import Session

MOST = lib.AMBER_SESSIONS_MAX


def append_each(sessions: Sequence[Session], tokens: Sequence[int]) -> None:
    """Adds tokens[i] to sessions[i], different sessions of one engine, in one decode step. Each
    then holds the same bits as after an append() of its own.

    Errors: ValueError where the lengths differ, ArgumentError for more sessions than MOST or than
    the largest n_batch among them, UnsupportedModelError for several sessions on a GPU, AmberError
    where a context is full; no session has gained a token then.
    """
    if len(sessions) != len(tokens):
        raise ValueError(f"tokens: expected {len(sessions)}, one a session, found {len(tokens)}")
    if not sessions:
        return
    err = ffi.new("amber_error *")
    with ExitStack() as stack:
        pointers = [stack.enter_context(session._use()) for session in sessions]
        for session in sessions:
            session._owner = None
        status = lib.amber_sessions_append(pointers, list(tokens), len(tokens), err)
        for session in sessions:  # one that had to be computed again may have been interrupted
            session._callbacks.check(0, err)
        sessions[0]._callbacks.check(status, err)


def answer_all(
    sessions: Sequence[Session],
    prompts: Sequence[list[int]],
    params: SamplingParams,
    started: float,
) -> list[Result]:
    """Answers prompts, as many at a time as there are sessions: one decode step for all of them.
    The session of an answer that is over takes the next prompt. Where a progress callback asks to
    stop, the answers are what they are by then."""
    results = [Result(prompt_tokens=len(tokens)) for tokens in prompts]
    waiting = deque(zip(prompts, results, strict=True))
    idle, live = list(sessions), []
    with ExitStack() as stack:
        while waiting or live:
            while waiting and idle:
                tokens, result = waiting.popleft()
                answer = Answer(idle.pop(), params, result, started)
                live.append(stack.enter_context(answer))
                if not answer.prefill(tokens):
                    return results
                if answer.goes_on:
                    answer.sample()
            for answer in [answer for answer in live if not answer.goes_on]:
                answer.finish()
                live.remove(answer)
                idle.append(answer.session)
            if live:
                begun = perf_counter()
                step = [answer.session for answer in live]
                append_each(step, [answer.last for answer in live])
                for answer in live:
                    answer.sample(begun)
    return results

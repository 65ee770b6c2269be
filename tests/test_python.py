"""The Python package on the demo model: answers, errors, lifetimes, threads."""

import random
import subprocess
import sys
import threading

import numpy as np
import pytest

import amber
from amber.generate import StopStrings

PROMPT = "Once upon a time there was a little"
LONG = "The old king went to the forest and met a fox. " * 30  # some 350 tokens


@pytest.fixture(scope="module")
def engine(demo_model):
    with amber.Engine("demo", n_ctx=1024) as opened:
        yield opened


# ---- answers ----


def test_result(engine):
    result = engine.generate(PROMPT, max_tokens=12, seed=7)
    assert str(result) == result.text != ""
    assert len(result.token_ids) == 12 and result.finish_reason == "length"
    assert result.prompt_tokens == len(engine.tokenize(PROMPT))
    assert result.seed == 7 and result.sparse == "off" and result.stop_reason is None
    assert 0 < result.prefill_seconds <= result.ttft and result.decode_tps > 0
    assert engine.detokenize(engine.tokenize(PROMPT) + result.token_ids) == PROMPT + result.text


def test_kinds_of_prompt(engine):
    greedy = {"temperature": 0, "max_tokens": 8}
    one, other = engine.generate(PROMPT, **greedy), engine.generate("The king", **greedy)
    assert [r.text for r in engine.generate([PROMPT, "The king"], **greedy)] == [
        one.text, other.text
    ]  # fmt: skip
    assert engine.generate(engine.tokenize(PROMPT), **greedy).text == one.text
    assert engine.generate([], **greedy) == []
    with pytest.raises(amber.ChatTemplateError, match="no chat template"):
        engine.generate([{"role": "user", "content": "Hi"}])
    for wrong in (3, None, b"bytes", ["text", 3], [{"role": "user"}, "text"], [None]):
        with pytest.raises(TypeError, match="prompt"):
            engine.generate(wrong)
    with pytest.raises(ValueError, match="vocab|token"):
        engine.generate([1, engine.info.n_vocab])
    with pytest.raises(ValueError, match="vocab|token"):
        engine.generate([1, -1])


def test_bos_comes_once(engine):
    bos = engine.tokenizer.token_text(engine.tokenizer.bos)
    assert engine.encode_prompt(PROMPT) == engine.tokenize(PROMPT)
    assert engine.encode_prompt(bos + "x")[:2].count(engine.tokenizer.bos) == 1


def test_same_seed_same_text(engine):
    first = engine.generate(PROMPT, max_tokens=40)  # a random seed, reported
    again = engine.generate(PROMPT, max_tokens=40, seed=first.seed)
    assert again.token_ids == first.token_ids
    seeds = {engine.generate(PROMPT, max_tokens=2).seed for _ in range(4)}
    assert len(seeds) == 4
    texts = {engine.generate(PROMPT, max_tokens=40, seed=seed).text for seed in range(4)}
    assert len(texts) > 1


def test_params_and_overrides(engine):
    params = amber.SamplingParams(temperature=0, max_tokens=5)
    assert len(engine.generate(PROMPT, params).token_ids) == 5
    assert len(engine.generate(PROMPT, params, max_tokens=3).token_ids) == 3
    assert params.max_tokens == 5
    assert engine.generate(PROMPT, max_tokens=0).text == ""


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temprature", 1, "TypeError.*'temperature'"),
        ("max_token", 1, "TypeError.*'max_tokens'"),
        ("temperature", -1, "ValueError.*temperature"),
        ("temperature", float("nan"), "ValueError.*temperature"),
        ("top_p", 1.5, "ValueError.*top_p"),
        ("min_p", -0.1, "ValueError.*min_p"),
        ("top_k", 2.5, "TypeError.*top_k"),
        ("repeat_penalty", 0, "ValueError.*repeat_penalty"),
        ("seed", -1, "ValueError.*seed"),
        ("seed", 2**64 - 1, "ValueError.*seed"),
        ("stop", [3], "TypeError.*stop"),
        ("logit_bias", {10**6: 1.0}, "ValueError.*logit_bias"),
        ("logit_bias", {"two words at least": 1.0}, "ValueError.*logit_bias"),
    ],
)
def test_wrong_parameter_is_named(engine, name, value, error):
    with pytest.raises((TypeError, ValueError)) as caught:
        engine.generate(PROMPT, **{name: value})
    import re

    assert re.search(error, f"{caught.typename}: {caught.value}")


def test_logit_bias(engine):
    plain = engine.generate(PROMPT, temperature=0, max_tokens=6)
    banned = {token: -np.inf for token in plain.token_ids}
    other = engine.generate(PROMPT, temperature=0, max_tokens=6, logit_bias=banned)
    assert not set(other.token_ids) & set(plain.token_ids)
    spelling = engine.tokenizer.token_text(plain.token_ids[0])
    other = engine.generate(PROMPT, temperature=0, max_tokens=3, logit_bias={spelling: 1000.0})
    assert other.token_ids == [plain.token_ids[0]] * 3


def test_end_of_generation_token(engine):
    eos = engine.tokenizer.eog_tokens()[0]
    force = {eos: 1000.0}
    result = engine.generate(PROMPT, max_tokens=5, logit_bias=force)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")
    assert result.stop_reason == engine.tokenizer.token_text(eos)
    result = engine.generate(PROMPT, max_tokens=5, logit_bias=force, ignore_eos=True)
    assert len(result.token_ids) == 5 and result.finish_reason == "length"


# ---- stop strings ----


def test_stop_string(engine):
    plain = engine.generate(PROMPT, temperature=0, max_tokens=40)
    stop = plain.text[17:26]  # somewhere inside, across tokens
    for stops in (stop, [stop], ["never in it", stop]):
        with engine.stream(PROMPT, temperature=0, max_tokens=40, stop=stops) as stream:
            shown = "".join(chunk.text for chunk in stream)
        assert shown == stream.result.text == plain.text[: plain.text.index(stop)]
        assert stream.result.finish_reason == "stop" and stream.result.stop_reason == stop
    # A beginning of a stop string at the very end is text after all.
    never = plain.text[-3:] + "\x00"
    result = engine.generate(PROMPT, temperature=0, max_tokens=40, stop=never)
    assert result.text == plain.text and result.finish_reason == "length"


def test_stop_strings_however_text_is_cut():
    dice = random.Random(1)
    for _ in range(3000):
        text = "".join(dice.choices("ab", k=dice.randrange(30)))
        stops = ["".join(dice.choices("ab", k=dice.randrange(1, 6))) for _ in range(2)]
        cuts = sorted(dice.choices(range(len(text) + 1), k=5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        finder, shown, hit = StopStrings(stops), "", None
        for piece in pieces:
            part, hit = finder.push(piece)
            shown += part
            assert text.startswith(shown)
            if hit:
                break
        shown += finder.finish()
        # The oracle: the prefix of the text in which a stop string is first complete, cut there.
        ends = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
        if not ends:
            assert (shown, hit) == (text, None)
        else:
            # Within one piece several may be complete; then the one that starts first counts.
            seen = next(n for n in (*cuts, len(text)) if n >= ends[0])
            assert shown == text[: min(text[:seen].find(s) for s in stops if s in text[:seen])]
            assert hit in stops


# ---- streams and sessions ----


def test_stream(engine):
    stream = engine.stream(PROMPT, temperature=0, max_tokens=20)
    chunks = list(stream)
    plain = engine.generate(PROMPT, temperature=0, max_tokens=20)
    assert "".join(chunk.text for chunk in chunks) == plain.text == stream.result.text
    assert [token for chunk in chunks for token in chunk.token_ids] == plain.token_ids


def test_leaving_a_stream(engine):
    stream = engine.stream(PROMPT, temperature=0, max_tokens=100)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.result.text == first.text and stream.result.finish_reason == "cancelled"
    never_begun = engine.stream(PROMPT)
    never_begun.close()
    assert never_begun.result.finish_reason == "cancelled"
    assert engine.generate(PROMPT, temperature=0, max_tokens=3).text


def test_two_streams_at_once(engine):
    greedy = {"temperature": 0, "max_tokens": 10}
    prompts = [PROMPT, "The king and the queen"]
    expected = [r.text for r in engine.generate(prompts, **greedy)]
    streams = [engine.stream(p, **greedy) for p in prompts]
    while [next(s, None) for s in streams] != [None, None]:
        pass
    assert [s.result.text for s in streams] == expected


def test_second_turn_is_cached(engine):
    first = engine.generate(LONG, temperature=0, max_tokens=8)
    longer = engine.generate(LONG + first.text + " And then", temperature=0, max_tokens=2)
    assert longer.cached_tokens >= first.prompt_tokens - 1
    with engine.session() as session:
        assert session.generate(LONG, max_tokens=2).cached_tokens == 0
        assert session.generate(LONG, max_tokens=2).cached_tokens >= first.prompt_tokens - 1


def test_session_tokens(engine):
    tokens = engine.tokenize(LONG)
    with engine.session() as session:
        assert len(session) == 0 and session.logits is None and session.tokens == []
        assert session.sync(tokens) == 0
        assert session.tokens == tokens and len(session) == len(tokens)
        logits = session.logits
        assert logits.shape == (engine.info.n_vocab,) and logits.dtype == np.float32
        session.rewind(10)
        assert session.tokens == tokens[:10] and session.logits is None
        assert session.sync(tokens) == 10
        # Reuse does not change a bit: the same rows meet the same kernels.
        np.testing.assert_array_equal(session.logits, logits)
        session.append(5)
        assert session.tokens == [*tokens, 5]
        with pytest.raises(ValueError):
            session.rewind(10**6)
        with pytest.raises(ValueError):
            session.append(10**6)
        with pytest.raises(ValueError, match="one token"):
            session.sync([])
    with pytest.raises(amber.AmberError, match="closed"):
        session.sync(tokens)
    session.close()


def test_stream_of_a_session_used_otherwise(engine):
    with engine.session() as session:
        stream = session.stream(PROMPT, max_tokens=50, temperature=0)
        next(stream)
        session.generate("The king", max_tokens=2)
        with pytest.raises(amber.AmberError, match="something else"):
            list(stream)


def test_logits(engine):
    tokens = engine.tokenize(PROMPT)
    rows, last = engine.logits(PROMPT, all=True), engine.logits(tokens)
    assert rows.shape == (len(tokens), engine.info.n_vocab)
    np.testing.assert_allclose(rows[-1], last, rtol=0, atol=1e-3 * np.abs(last).max())
    best = engine.generate(PROMPT, temperature=0, max_tokens=1).token_ids
    assert best == [int(last.argmax())]


def test_logits_without_numpy(engine, monkeypatch):
    expected = engine.logits(PROMPT, all=True)
    monkeypatch.setitem(sys.modules, "numpy", None)
    rows = engine.logits(PROMPT, all=True)
    assert isinstance(rows, memoryview) and rows.shape == expected.shape
    assert rows.tolist() == expected.tolist()


# ---- limits ----


def test_prompt_too_long(engine):
    tokens = [5] * 3000
    for call in (engine.generate, engine.stream, engine.logits):
        with pytest.raises(amber.ContextOverflowError, match="3000 tokens.* 1024.*4096") as caught:
            call(tokens)
        assert (caught.value.prompt_tokens, caught.value.n_ctx) == (3000, 1024)


def test_context_runs_full(engine):
    with engine.session(n_ctx=32) as session:
        result = session.generate(PROMPT, max_tokens=None, ignore_eos=True, temperature=0)
        assert result.finish_reason == "length"
        # The last token is sampled from a full context and need not be in it.
        assert result.prompt_tokens + len(result.token_ids) == session.n_ctx + 1
        exact = session.generate([5] * 32, max_tokens=None, ignore_eos=True)
        assert len(exact.token_ids) == 1 and exact.finish_reason == "length"


def test_context_sizes(demo_model, engine):
    assert engine.info.n_ctx == 1024
    with amber.Engine("demo", n_ctx=0) as trained:
        assert trained.info.n_ctx == trained.info.n_ctx_train
    with amber.Engine("demo", n_ctx=64) as small:
        assert small.info.n_ctx == 64 and small.info.kv_bytes < engine.info.kv_bytes
        with small.session(n_ctx=128) as session:
            assert session.n_ctx == 128


# ---- progress and cancellation ----


def test_progress_reaches_its_end(demo_model):
    seen = []
    with amber.Engine("demo", progress=lambda *args: seen.append(args) and None) as engine:
        loads = [args for args in seen if args[0] == "load"]
        assert loads and loads[-1][1] == loads[-1][2] > 1e6
        seen.clear()
        tokens = engine.tokenize(LONG)
        engine.logits(tokens)
    assert {phase for phase, _, _ in seen} == {"prefill"}
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][2] == len(tokens)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_exception_in_progress(engine, error):
    tokens = engine.tokenize(LONG)
    calls = 0

    def progress(phase, done, total):
        nonlocal calls
        calls += 1
        if calls == 12:  # with n_batch 32: inside the second batch
            raise error("stop")

    expected = engine.logits(tokens)
    with engine.session(n_batch=32, progress=progress) as session:
        with pytest.raises(error):
            session.sync(tokens)
        held = session.tokens
        assert len(held) < len(tokens) and held == tokens[: len(held)]
        assert session.sync(tokens) == len(held)  # goes on from there
        np.testing.assert_allclose(
            session.logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max()
        )


def test_progress_cancels(engine):
    with engine.session(progress=lambda *_: True) as session:
        result = session.generate(LONG)
        assert result.finish_reason == "cancelled" and result.text == ""
        with pytest.raises(amber.Cancelled):
            session.sync(engine.tokenize(LONG))
    with pytest.raises(amber.Cancelled):
        amber.Engine("demo", progress=lambda *_: True)

    def fail(*_args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        amber.Engine("demo", progress=fail)


def test_callback_cannot_use_its_own_session(engine):
    caught = []

    def progress(*_args):
        for call in (lambda: session.rewind(0), session.close, engine.close):
            try:
                call()
            except amber.AmberError as error:
                caught.append(str(error))
        return True

    session = engine.session(progress=progress)
    with pytest.raises(amber.Cancelled):
        session.sync(engine.tokenize(LONG))
    session.close()
    assert len(caught) == 3 and "callback" in caught[0] and "callback" in caught[2]


# ---- the engine ----


def test_info(engine):
    info = engine.info
    assert info.architecture == "llama" and info.precision == "int8" and info.device == "cpu"
    assert info.isa in amber.isa_list() and info.threads >= 1 and info.n_ctx == 1024
    assert info.n_params > 1e6 and info.file_bytes > 1e6 and info.kv_bytes > 0
    assert "Q8_0" in info.weight_types and not info.has_chat_template
    assert engine.metadata["general.architecture"] == "llama"
    assert engine.metadata["tokenizer.ggml.tokens"].endswith(f"x {info.n_vocab}]")


def test_memory_estimate(engine):
    estimate = amber.memory_estimate("demo", n_ctx=1024)
    assert estimate.kv_bytes == engine.info.kv_bytes
    assert estimate.weights_bytes == pytest.approx(engine.info.weight_bytes, rel=0.05)
    assert estimate.total_bytes >= estimate.kv_bytes + estimate.weights_bytes
    assert amber.memory_estimate("demo", n_ctx=2048).kv_bytes == 2 * estimate.kv_bytes


def test_every_isa_and_thread_count_agree(engine):
    text = LONG[:500]
    expected = engine.logits(text)
    for isa in amber.isa_list():
        for threads in (1, 2):
            with amber.Engine("demo", isa=isa, threads=threads) as other:
                assert (other.info.isa, other.info.threads) == (isa, threads)
                # Integer sums are exact; float sums of other orders may move a rounding to int8,
                # each by half a step of 1/127 of a row's largest value.
                assert np.abs(other.logits(text) - expected).max() < 0.05 * np.abs(expected).max()


def test_after_close(demo_model):
    engine = amber.Engine("demo")
    tokenizer, session, stream = engine.tokenizer, engine.session(), engine.stream(PROMPT)
    running = engine.stream(PROMPT)
    next(running)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate(PROMPT),
        lambda: engine.tokenize("x"),
        lambda: engine.session(),
        lambda: engine.metadata,
        lambda: session.sync([1]),
        lambda: tokenizer.decode([1]),
        lambda: next(stream),
        lambda: next(running),
    ):
        with pytest.raises(amber.AmberError, match="closed"):
            call()
    session.close()


def test_objects_outlive_each_other(demo_model):
    """Whatever order they go in, and whatever is left at exit: no crash, no word on stderr."""
    code = """if True:
        import amber, gc
        session = amber.Engine("demo").session()
        print(session.generate("The king", max_tokens=3).text != "")
        del session
        engine = amber.Engine("demo")
        stream, session = engine.stream("The king"), engine.session()
        next(stream)
        del engine
        next(stream)
        print(session.generate("The king", max_tokens=3).text != "")
        tokenizer = amber.Engine("demo").tokenizer
        gc.collect()
        try:
            tokenizer.encode("x")
        except amber.AmberError:
            print("closed")
        cycle = [amber.Engine("demo")]
        cycle += [cycle, cycle[0].session()]
        del cycle
        gc.collect()
        left = amber.Engine("demo"), amber.Tokenizer("demo")
        left = left, left[0].stream("The king"), left[0].session()
        next(left[1])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "True\nTrue\nclosed\n"


def test_closed_session_leaves_its_address_alone(engine):
    """A closed session that is collected late must not free a new one at the same address."""
    old = engine.session()
    old.close()
    new = [engine.session() for _ in range(4)]
    del old
    for session in new:
        assert session.generate(PROMPT, temperature=0, max_tokens=2).text
        assert session._pointer in session._handle.children
        session.close()


def test_memory_comes_back_without_close(demo_model):
    """No reference cycle holds an engine: its finalizer runs as its last reference goes."""
    import gc

    gc.disable()
    try:
        engine = amber.Engine("demo")
        engine.generate(PROMPT, max_tokens=2)
        handle = engine._handle
        del engine
        assert handle.closed
    finally:
        gc.enable()


def test_threads(engine):
    prompts = [PROMPT, "The king", "A fox said", LONG]
    greedy = {"temperature": 0, "max_tokens": 12}
    expected = [r.text for r in engine.generate(prompts, **greedy)]
    found = [""] * len(prompts)

    def work(i):
        for _ in range(3):
            found[i] = engine.generate(prompts[i], **greedy).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_close_waits_for_other_threads(demo_model):
    """close() during another thread's prefill: that call ends first, the next one says closed."""
    begun, errors = threading.Event(), []
    engine = amber.Engine("demo", progress=lambda phase, *_: phase == "prefill" and begun.set())

    def work():
        try:
            while True:
                engine.logits(LONG, all=True)
        except amber.AmberError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(30)
    engine.close()
    thread.join(30)
    assert len(errors) == 1 and "closed" in errors[0]


def test_gil_is_released(engine):
    """Another thread runs Python while prefill is in C, between two progress calls."""
    counts, count, stop = [], 0, False

    def spin():
        nonlocal count
        while not stop:
            count += 1

    old = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only a released GIL lets the other thread in
    try:
        thread = threading.Thread(target=spin, daemon=True)
        with engine.session(progress=lambda *_: counts.append(count)) as session:
            # The spinning thread gives the GIL back only when this one asks after the interval,
            # so let it come in late: it starts from inside the C call.
            sys.setswitchinterval(0.005)
            thread.start()
            session.sync(engine.tokenize(LONG))
    finally:
        stop = True
        sys.setswitchinterval(old)
        thread.join()
    assert len(set(counts)) > 2


# ---- errors on opening ----


def test_missing_model(tmp_path):
    for path in ("no-such-model", tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(FileNotFoundError, match="demo") as caught:
            amber.Engine(path)
        assert isinstance(caught.value, amber.AmberError)
    with pytest.raises(amber.AmberError):
        amber.Tokenizer("no-such-model")


def test_wrong_file(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html></html>" * 10)
    for opener in (amber.Engine, amber.Tokenizer, amber.memory_estimate):
        with pytest.raises(amber.FileFormatError, match="HTML"):
            opener(path)


def test_wrong_options():
    with pytest.raises(amber.DeviceError, match="device cuda:999"):
        amber.Engine("demo", device="cuda:999")
    with pytest.raises(ValueError, match="device"):
        amber.Engine("demo", device="tpu")
    with pytest.raises(ValueError, match="precision"):
        amber.Engine("demo", precision="int4")
    with pytest.raises(amber.AmberError, match="no-such"):
        amber.Engine("demo", isa="no-such")
    with pytest.raises(ValueError):
        amber.Engine("demo", threads=-1)
    with pytest.raises(ValueError):
        amber.Engine("demo", n_ctx=-5)


def test_log_callback(demo_model, caplog):
    seen = []
    with amber.Engine("demo", log=lambda level, text: seen.append((level, text))):
        pass
    assert all(level in ("error", "warning", "info", "debug") and text for level, text in seen)


# ---- tokenizer ----

TEXTS = ["", "Hello", " two  spaces ", "naïve café – “quotes”", "漢字 😀 👩‍👩‍👧", "a\tb\nc", "\x00"]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_stream(engine, text):
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_half_a_character(engine):
    tokenizer = engine.tokenizer
    ids = tokenizer.encode("😀", add_special=False)
    assert len(ids) >= 4  # byte tokens
    with tokenizer.stream() as stream:
        assert "".join(stream.push(token) for token in ids[:-1]).strip() == ""
        assert stream.finish() == "\ufffd"
    assert tokenizer.decode(ids[:-1]).strip() == "\ufffd"
    assert tokenizer.decode_bytes(ids).strip() == "😀".encode()


def test_tokenizer_facts(engine):
    tokenizer = engine.tokenizer
    assert len(tokenizer) == engine.info.n_vocab
    bos = tokenizer.token_text(tokenizer.bos)
    assert tokenizer.token_id(bos) == tokenizer.bos and tokenizer.is_control(tokenizer.bos)
    assert tokenizer.encode(bos, add_special=False, parse_special=True)[-1] == tokenizer.bos
    assert tokenizer.bos not in tokenizer.encode(bos, add_special=False)
    assert tokenizer.decode([tokenizer.bos]) == ""
    assert tokenizer.decode([tokenizer.bos], keep_special=True) == bos
    assert tokenizer.is_eog(tokenizer.eos) and tokenizer.token_id("no such token") is None
    with pytest.raises(IndexError):
        tokenizer.token_text(len(tokenizer))
    with pytest.raises(ValueError):
        tokenizer.decode([len(tokenizer)])
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("a\udc80b"))  # a lone surrogate


def test_vocabulary_only_file(testdata):
    tokenizer = amber.Tokenizer(testdata / "vocab" / "ggml-vocab-llama-spm.gguf")
    assert tokenizer.encode("Hello") == [1, 15043]
    assert tokenizer.encode("Hello", add_special=False) == [15043]
    assert tokenizer.encode("</s>", add_special=False, parse_special=True)[-1] == 2
    tokenizer.close()
    with pytest.raises(amber.AmberError, match="closed"):
        tokenizer.encode("Hello")

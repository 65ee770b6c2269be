"""A loaded model."""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

from ._lib import (
    PROJECTIONS,
    Callbacks,
    Handle,
    Log,
    Progress,
    Tap,
    check,
    encode_text,
    ffi,
    lib,
    new_struct,
    struct_fields,
    text,
)
from .channels import CHANNEL, without_thoughts
from .chat import Messages, apply_template
from .chat_families import FAMILIES, recognize
from .errors import ChatTemplateError, OutOfMemoryError, UnsupportedModelError
from .generate import Result, Stream
from .models import find_model
from .sampling import SamplingParams
from .session import Session, check_fits, session_options
from .sparse import Sparse, plan_text
from .tokenizer import Tokenizer

Prompt = str | Messages | Sequence[int]  # raw text | chat | token ids
NEVER_SPARSE = 2**31 - 1
PRECISIONS = {"int8": lib.AMBER_PRECISION_INT8, "float": lib.AMBER_PRECISION_FLOAT}


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded, and on what it runs."""

    path: str
    architecture: str
    name: str
    weight_types: str  # of the file, most bytes first
    precision: str  # "int8" | "float"
    kv_type: str  # what keys and values are kept as: "f16" | "int8"; "f32" with precision "float"
    device: str  # "cpu", or "cuda:0 NVIDIA H100"
    device_bytes: int  # memory of the GPU held for weights
    isa: str  # kernel column in use
    threads: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    n_ctx: int
    n_params: int
    file_bytes: int
    weight_bytes: int  # memory for weights beside the mapped file
    kv_bytes: int
    scratch_bytes: int
    load_seconds: float
    has_chat_template: bool
    sparse: str  # what runs sparse in prefill, or "off"
    coverage: float  # share of the layers' multiplications that have a sparse operand
    skipped: float  # share of them that this machine's kernels leave out in a long prompt
    n_expert: int  # 0: no mixture of experts
    n_expert_used: int
    window: int  # positions that windowed layers see; 0: no such layers
    work: tuple[tuple[int, ...], ...]  # multiplications by layer and projection, for one token
    matrices: tuple[tuple[tuple[int, int], ...], ...]  # (n_out, n_in) of their weights; an expert's
    layer_multiplications: int  # of the layers' projections, for one token
    token_bytes: int  # of weight matrices that one token's decoding reads
    sparse_min: int  # prompts with fewer new tokens run dense; NEVER_SPARSE: all of them


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a model and one session would take."""

    weights_bytes: int
    mapped_bytes: int
    kv_bytes: int
    scratch_bytes: int
    total_bytes: int
    coverage: float  # as EngineInfo.coverage, of the plan


class Engine:
    """A model, open for as long as the `with` block or until close().

    path: a GGUF file or a built-in name ("demo").
    n_ctx: tokens that prompt and answer may have together. None: min(4096, trained); 0: trained.
    threads: None: $AMBER_THREADS, else the physical cores.
    precision: "int8", or "float" (float32 throughout: the slow reference).
    isa: kernel column, see isa_list(). None: $AMBER_ISA, else the best.
    n_batch: rows of one prefill batch.
    kv_type: what keys and values are kept as: "f16", or "int8" (a scale per position and head),
        about half the memory; on the CPU, and not with precision "float", which keeps float32.
    progress: called as progress(phase, done, total), see amber.Progress; a true result cancels.
    log: called as log(level, text); None: the logger "amber" of `logging`.
    device: "cpu", "cuda" (the first NVIDIA GPU that can be used), "cuda:N", or "auto": a GPU where
        there is one that can run the model, else the CPU; see device_list(). None: $AMBER_DEVICE,
        else "cpu".
    sparse: activation sparsity in prefill: "off", "auto" (what the file carries, else dense), a
        pattern such as "8:16" or "8:16@all", a plan file; see amber.sparse.plan_text.
    criterion, mitigation: how channels are ranked ("act", "norm", "amber", "amber-b") and what is
        given back for the pruned ones ("none", "var", "dpts", "dpts-median", and where the file
        carries their vectors "spts", "spts-channel", "lpts", "ls", "rsparse:R").
    sparse_first_n: the first tokens of a session that stay dense.
    sparse_min_tokens: prompts with fewer new tokens run dense. None: $AMBER_SPARSE_MIN_TOKENS, else
        with sparse="auto" as many as this machine needs to gain by the plan, which may be more than
        any prompt has (measured once per machine, see crossover.py), with anything else none.
    chat_template: Jinja text in place of the file's own, or the name of a family ("chatml",
        "llama3", ...: chat_families.FAMILIES). A file without one is recognized by its special
        tokens where it can be; chat_template_source says what came of it.
    evaluation: the engine only measures: the criterion "clact", which ranks a token's channels by
        the other tokens of its batch, is allowed.

    Errors: ModelNotFoundError, FileFormatError, UnsupportedModelError, OutOfMemoryError,
    DeviceError, ValueError.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        n_ctx: int | None = None,
        threads: int | None = None,
        precision: str = "int8",
        isa: str | None = None,
        n_batch: int | None = None,
        kv_type: str = "f16",
        progress: Progress | None = None,
        log: Log | None = None,
        device: str | None = None,
        sparse: Sparse = "auto",
        criterion: str | None = None,
        mitigation: str | None = None,
        sparse_first_n: int = 0,
        sparse_min_tokens: int | None = None,
        chat_template: str | None = None,
        evaluation: bool = False,
    ) -> None:
        self.path = find_model(path)
        callbacks = Callbacks(progress, log)
        plan = plan_text(sparse, criterion, mitigation)
        options, keep = _options(precision, threads, isa, plan, sparse_first_n, device)
        options.evaluation = evaluation
        options.progress, options.progress_user = lib.amber_py_progress, callbacks.handle
        options.log, options.log_user = lib.amber_py_log, callbacks.handle
        out, err = ffi.new("amber_engine **"), ffi.new("amber_error *")
        status = lib.amber_engine_open(os.fsencode(self.path), options, out, err)
        del keep
        # The closure keeps the callbacks for as long as C may call them.
        self._handle = Handle(out[0], lambda p, _=callbacks: lib.amber_engine_close(p), "engine")
        try:
            callbacks.check(status, err)
        except BaseException:
            self._handle.free()
            raise
        weakref.finalize(self, self._handle.free).atexit = False

        self._progress, self._n_batch, self._kv_type = progress, n_batch, kv_type
        self.tokenizer = Tokenizer._of_engine(self._handle)
        self._choose_template(chat_template)
        c_info = new_struct("amber_engine_info")
        with self._handle as pointer:
            lib.amber_engine_get_info(pointer, c_info)
        c_info.sparse_min = self._sparse_min(
            sparse_min_tokens, plan == "auto" and not evaluation, c_info, callbacks
        )
        with self._handle as pointer:
            lib.amber_engine_set_sparse_min(pointer, c_info.sparse_min)
            work, matrices = _projections(pointer, c_info.n_layer)
        self._n_ctx = c_info.n_ctx_train if n_ctx == 0 else n_ctx
        # Sessions for generate() and kin, kept for their prefix. They see the engine through a
        # proxy: a cycle would hold its memory until the collector comes by.
        self._idle = [self._new_session()]
        stats = self._idle[0].stats
        facts = struct_fields(c_info) | {
            "path": self.path,
            "precision": precision,
            "kv_type": "f32" if precision == "float" else kv_type,
            "has_chat_template": self.chat_template is not None,
            "work": work,
            "matrices": matrices,
            **{name: stats[name] for name in ("n_ctx", "kv_bytes", "scratch_bytes")},
        }
        self.info = EngineInfo(**facts)

    def _sparse_min(
        self, given: int | None, measured: bool, info: Any, callbacks: Callbacks
    ) -> int:
        """New tokens of a prompt below which it runs dense."""
        if given is None and (own := os.environ.get("AMBER_SPARSE_MIN_TOKENS")):
            if not own.isdecimal():
                raise ValueError(f"AMBER_SPARSE_MIN_TOKENS: expected a number, found {own!r}")
            given = int(own)
        if given is not None:
            if given < 0:
                raise ValueError(f"sparse_min_tokens: expected 0 or more, found {given}")
            return min(given, NEVER_SPARSE)
        shares = self._plan_shares()
        on_cpu = text(info.device) == "cpu"  # what it would measure
        if not (measured and shares and on_cpu and info.precision == lib.AMBER_PRECISION_INT8):
            return 0
        from .crossover import machine_min_tokens  # which times kernels of this library

        found = machine_min_tokens(shares, text(info.isa), info.threads)
        which = "all prompts" if found == NEVER_SPARSE else f"prompts under {found} tokens"
        callbacks.say(
            "info",
            f"sparse auto: {text(info.sparse)}; {which} run dense, as is faster on this machine",
        )
        return found

    def _plan_shares(self) -> dict[str, float]:
        """By pattern of the plan: the share of the layers' multiplications that it prunes."""
        shares: dict[str, float] = {}
        share = ffi.new("double *")
        with self._handle as pointer:
            while True:
                index = len(shares)
                pattern = _grow(
                    lambda buf, cap, i=index: lib.amber_engine_pattern(pointer, i, buf, cap, share)
                )
                if pattern is None:
                    break
                shares[pattern] = share[0]
        return shares

    def _choose_template(self, given: str | None) -> None:
        """Sets chat_template, the Jinja text or None, and where it comes from: "file", "given",
        "given: chatml", "recognized: chatml", or "none"."""
        own = self._meta("tokenizer.chat_template")
        if given in FAMILIES:
            self.chat_template = FAMILIES[given].template
            self.chat_template_source = f"given: {given}"
        elif given or own:
            self.chat_template = given or own
            self.chat_template_source = "given" if given else "file"
        elif name := recognize(self.tokenizer):
            self.chat_template = FAMILIES[name].template
            self.chat_template_source = f"recognized: {name}"
        else:
            self.chat_template, self.chat_template_source = None, "none"

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model and its sessions, after calls under way in other threads have ended.
        May be called again."""
        self._handle.close()

    # ---- answers ----

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Result | list[Result]:
        """Answers a prompt, or a list of prompts: on the CPU as generate_batch(), on a GPU one
        after the other.

        prompt: a str is raw text (the model's BOS is added, spellings of special tokens are read);
            a list of {"role", "content"} is a chat, put into the model's template; a list of int is
            token ids; a list of any of these but int is a batch and gives a list.
        params, overrides: SamplingParams, and fields of it by name (max_tokens=64, seed=1).

        Errors: ContextOverflowError where the prompt does not fit; TypeError for an unknown name;
        KeyboardInterrupt comes through at once, from inside prefill too.
        """
        if _is_batch(prompt):
            if self.info.device == "cpu":
                return self.generate_batch(prompt, params, **overrides)
            return [self.generate(one, params, **overrides) for one in prompt]
        return self.stream(prompt, params, **overrides).finish()

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        batch: int = 8,
        **overrides: Any,
    ) -> list[Result]:
        """Answers prompts, up to `batch` of them at a time: a decode step reads each weight once
        for all of them, which is where decoding spends its time. An answer that is over makes room
        for the next prompt. The answers are those of generate() for each prompt alone; each has a
        KV cache of its own, and memory for fewer than `batch` of them means fewer at a time. A
        step's time counts in full for every answer in it.

        Errors: as generate(); UnsupportedModelError on a GPU.
        """
        from .batch import MOST, answer_all

        started = perf_counter()
        if self.info.device != "cpu" and batch > 1:
            raise UnsupportedModelError(
                f"generate_batch: several prompts at once run on the CPU only, this model is on "
                f"{self.info.device} (use generate(), one after the other, or device cpu)"
            )
        if not 1 <= batch <= MOST:
            raise ValueError(f"batch: expected 1 to {MOST}, found {batch}")
        params = (params or SamplingParams()).merged(overrides)
        tokens = [self.encode_prompt(prompt) for prompt in prompts]
        for one in tokens:
            check_fits(one, self.info.n_ctx, self.info.kv_bytes)
        with ExitStack() as stack:
            sessions: list[Session] = []
            most = min(batch, len(tokens))
            while len(sessions) < most:
                try:
                    sessions.append(stack.enter_context(self._lease()))
                except OutOfMemoryError:
                    if not sessions:
                        raise
                    break
                most = min(most, sessions[0].n_batch)
            return answer_all(sessions, tokens, params, started)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> Stream:
        """As generate() for one prompt, but an iterator over Chunks; `.result` at its end."""
        started = perf_counter()
        params = (params or SamplingParams()).merged(overrides)
        tokens = self.encode_prompt(prompt)
        check_fits(tokens, self.info.n_ctx, self.info.kv_bytes)
        return Stream(self._lease(), tokens, params, started)

    def session(
        self,
        n_ctx: int | None = None,
        n_batch: int | None = None,
        progress: Progress | None = None,
        tap: Tap | None = None,
        kv_type: str | None = None,
    ) -> Session:
        """A timeline of its own, with this engine's settings where nothing is said."""
        return Session(
            self, n_ctx or self._n_ctx, n_batch or self._n_batch, progress or self._progress, tap,
            kv_type or self._kv_type,
        )  # fmt: skip

    def save_session(self, path: str | os.PathLike) -> None:
        """Writes what generate() and kin last held, prompt and answer, to a file: Session.save."""
        with self._lease() as session:
            session.save(path)

    def load_session(self, path: str | os.PathLike) -> int:
        """Lets the next generate() go on from what save_session() wrote: of its prompt, the tokens
        that the file holds too are not computed again. Returns how many the file holds. Errors: as
        Session.load."""
        with self._lease() as session:
            return session.load(path)

    def _new_session(self) -> Session:
        return Session(
            weakref.proxy(self), self._n_ctx, self._n_batch, self._progress, kv_type=self._kv_type
        )

    @contextmanager
    def _lease(self) -> Iterator[Session]:
        """A session for one answer: an idle one, a new one where all are at work."""
        try:
            session = self._idle.pop()
        except IndexError:
            session = self._new_session()
        try:
            yield session
        finally:
            if self._idle or self._handle.closed:
                session.close()
            else:
                self._idle.append(session)

    # ---- tokens ----

    def tokenize(
        self, string: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text, see Tokenizer.encode."""
        return self.tokenizer.encode(string, add_special, parse_special)

    def detokenize(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of some tokens, see Tokenizer.decode."""
        return self.tokenizer.decode(ids, keep_special)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt as generate() takes it."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt)
        if _is_batch(prompt):
            raise TypeError("prompt: expected one prompt, found a list of them")
        if prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.encode_prompt(self.apply_chat_template(prompt))
        return list(prompt)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text that the model's chat template makes of messages; generate() takes it as it is.

        continue_final_message ends it inside the last message, whose text the answer goes on with.
        tools: JSON schemas. Other variables go to the template (enable_thinking=False,
        documents=[...]). Errors: ChatTemplateError.
        """
        template = self.chat_template
        if template is None:
            raise ChatTemplateError(
                "this model has no chat template, and its special tokens are of no known family: "
                "give the prompt as one str, or a chat_template (Jinja, or one of "
                f"{', '.join(FAMILIES)})"
            )
        if tools and template == self._meta("tokenizer.chat_template"):
            template = self._meta("tokenizer.chat_template.tool_use") or template
        if CHANNEL in template:
            messages = [without_thoughts(message) for message in messages]
        return apply_template(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(self._special_tokens() | variables),
        )

    def _special_tokens(self) -> dict[str, str]:
        """Spellings that templates read."""
        found = {"bos_token": "", "eos_token": ""}
        ids = {"bos_token": self.tokenizer.bos, "eos_token": self.tokenizer.eos}
        for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
            value = self._meta(f"tokenizer.ggml.{key}_token_id")
            ids[name] = int(value) if value and value.isdigit() else None
        for name, token in ids.items():
            if token is not None and token < self.tokenizer.size:
                found[name] = self.tokenizer.token_text(token)
        return found

    def logits(self, prompt: Prompt, all: bool = False) -> Any:
        """float32 logits [n_vocab] after the last token of a prompt; with all, [n, n_vocab] after
        every token. A numpy array, a memoryview where numpy is missing."""
        tokens = self.encode_prompt(prompt)
        with self._lease() as session:
            if all:
                return session.score(tokens)
            session.sync(tokens)
            return session.logits

    def activations(self, prompt: Prompt) -> dict[tuple[int, str], Any]:
        """What the linear layers read in prefill of a prompt: {(layer, projection): float32
        [tokens, n_in]}, before pruning and quantization, for the projections "q" (k and v read the
        same), "o", "gate" (up reads the same) and "down". Needs numpy."""
        import numpy as np

        tokens = self.encode_prompt(prompt)
        parts: dict[tuple[int, str], list[Any]] = {}

        def tap(layer: int, projection: str, _position: int, rows: Any) -> None:
            parts.setdefault((layer, projection), []).append(rows)

        with self.session(n_ctx=max(len(tokens), 1), tap=tap) as session:
            session.score(tokens)
        return {key: np.concatenate(rows) for key, rows in parts.items()}

    # ---- the file ----

    @cached_property
    def metadata(self) -> dict[str, str]:
        """All keys of the file with their values as text; arrays as "[type x count]"."""
        keys: list[str] = []
        with self._handle as pointer:
            while (key := _grow(lib.amber_engine_meta_key, pointer, len(keys))) is not None:
                keys.append(key)
        return {key: self._meta(key) or "" for key in keys}

    def _meta(self, key: str) -> str | None:
        with self._handle as pointer:
            return _grow(lib.amber_engine_meta, pointer, encode_text(key))


def memory_estimate(
    path: str | os.PathLike,
    *,
    n_ctx: int | None = None,
    n_batch: int | None = None,
    precision: str = "int8",
    sparse: Sparse = "auto",
    evaluation: bool = False,
    kv_type: str = "f16",
) -> MemoryEstimate:
    """What a model would take, from the head of its file. Errors: as Engine."""
    options, _keep = _options(precision, None, None, plan_text(sparse))
    options.evaluation = evaluation
    memory, err = new_struct("amber_memory"), ffi.new("amber_error *")
    raw = os.fsencode(find_model(path))
    session = session_options(n_ctx, n_batch, kv_type)
    check(lib.amber_memory_estimate(raw, options, session, memory, err), err)
    return MemoryEstimate(**struct_fields(memory))


def isa_list() -> list[str]:
    """Kernel columns that this CPU can run, best first."""
    return text(lib.amber_isa_list()).split()


def device_list() -> list[str]:
    """A line for each device that a model can run on, and for GPUs that cannot be used the reason:
    "cpu  avx512vnni avx2 ref", "cuda:0  NVIDIA H100, 85.0 GB, 84.1 GB free"."""
    size = lib.amber_device_list(ffi.new("char[1]"), 1) + 1
    buffer = ffi.new("char[]", size)
    lib.amber_device_list(buffer, size)
    return ffi.string(buffer).decode(errors="replace").splitlines()


def _options(
    precision: str,
    threads: int | None,
    isa: str | None,
    plan: str,
    sparse_first_n: int = 0,
    device: str | None = None,
) -> tuple[Any, Any]:
    """(amber_engine_options, what must outlive it)."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(PRECISIONS)}, found {precision!r}")
    options = new_struct("amber_engine_options", lib.amber_engine_options_defaults)
    options.precision, options.threads = PRECISIONS[precision], threads or 0
    c_isa = ffi.new("char[]", isa.encode()) if isa else ffi.NULL
    options.isa = c_isa
    options.sparse = c_plan = ffi.new("char[]", plan.encode())
    options.sparse_first_n = sparse_first_n
    options.device = c_device = ffi.new("char[]", device.encode()) if device else ffi.NULL
    return options, (c_isa, c_plan, c_device)


def _projections(pointer: Any, n_layer: int) -> tuple[Any, Any]:
    """EngineInfo.work and EngineInfo.matrices."""
    work, matrices, matrix = [], [], ffi.new("int32_t[2]")
    for layer in range(n_layer):
        row = []
        for i in range(len(PROJECTIONS)):
            count = lib.amber_engine_work(pointer, layer, i, matrix)
            row.append((count, (matrix[0], matrix[1])))
        counts, shapes = zip(*row, strict=True)
        work.append(counts)
        matrices.append(shapes)
    return tuple(work), tuple(matrices)


def _is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts, not one. TypeError where it is neither."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        kinds = {_kind(item) for item in prompt}
        if len(kinds) <= 1 and None not in kinds:
            return kinds not in ({"message"}, {"token"})
    raise TypeError("prompt: expected a str, messages (dicts), token ids (ints), or a list of such")


def _kind(item: Any) -> str | None:
    if isinstance(item, Mapping):
        return "message"
    if hasattr(item, "__index__"):
        return "token"
    return "prompt" if isinstance(item, Sequence) else None


def _grow(function: Any, *args: Any) -> str | None:
    """A text from a C function that returns its full length, or -1."""
    cap = 256
    while True:
        out = ffi.new("char[]", cap)
        length = function(*args, out, cap)
        if length < 0:
            return None
        if length < cap:
            return text(out)
        cap = length + 1

"""One-line summaries that amber-run and its REPL print to stderr."""

import os
from typing import Any

from . import __version__
from .engine import NEVER_SPARSE, Engine, EngineInfo
from .generate import Result


def human(count: float) -> str:
    """7340032 -> "7.3M"."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            value = count / limit
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
    return f"{count:.0f}"


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def sparse_line(info: EngineInfo) -> str:
    """What runs sparse in prefill, and whether that saves time on this machine."""
    if info.skipped:
        saved = f"{100 * info.skipped:.0f} % of the work skipped"
    else:
        saved = f"no time saved: {info.isa} has no kernel that skips this pattern"
    dense = ""
    if info.sparse_min == NEVER_SPARSE:
        dense = "; no gain on this machine: all prompts run dense"
    elif info.sparse_min > 0:
        dense = f"; prompts under {info.sparse_min} tokens run dense"
    return f"{info.sparse} ({100 * info.coverage:.0f} %; {saved}{dense})"


def model_line(engine: Engine) -> str:
    """amber 0.1.0  demo: llama 7.3M Q8_0 -> int8  ctx 1024  cpu avx512vnni 2 threads"""
    info = engine.info
    name = os.path.basename(info.path).removesuffix(".gguf")
    types = [kind for kind in info.weight_types.split() if kind != "F32"] or ["F32"]
    threads = f"{info.threads} thread{'s' if info.threads != 1 else ''}"
    sparse = f"  sparse {sparse_line(info)}" if info.coverage else ""
    return (
        f"amber {__version__}  {name}: {info.architecture} {human(info.n_params)} "
        f"{'+'.join(types)} -> {info.precision}  ctx {info.n_ctx}  "
        f"{info.device} {info.isa} {threads}{sparse}"
    )


def info_lines(engine: Engine) -> list[str]:
    """What --info and /show info print."""
    info = engine.info
    experts = f", {info.n_expert_used} of {info.n_expert} experts" if info.n_expert else ""
    window = f", sliding window {info.window}" if info.window else ""
    weights = mib(info.weight_bytes)
    if info.device_bytes:
        weights = f"{mib(info.device_bytes)} on the GPU and {weights} beside it"
    return [
        f"path          {info.path}",
        f"name          {info.name or '-'}",
        f"architecture  {info.architecture}, {human(info.n_params)} parameters",
        f"shape         {info.n_layer} layers, width {info.n_embd}, feed-forward {info.n_ff}, "
        f"{info.n_head} heads x {info.head_dim}, {info.n_head_kv} key/value heads{experts}",
        f"vocabulary    {info.n_vocab}",
        f"weights       {info.weight_types} -> {info.precision}",
        f"context       {info.n_ctx} (trained {info.n_ctx_train}{window})",
        f"device        {info.device}, {info.isa}, {info.threads} threads",
        f"memory        weights {weights}, KV cache {mib(info.kv_bytes)} of {info.kv_type}, "
        f"scratch {mib(info.scratch_bytes)}, file {mib(info.file_bytes)}",
        f"sparse        {sparse_line(info) if info.coverage else 'off'}",
        f"chat template {template_line(engine)}",
        f"load          {info.load_seconds:.2f} s",
    ]


def template_line(engine: Engine) -> str:
    """Where the chat template comes from."""
    source = engine.chat_template_source
    if source.startswith("recognized"):
        return f"{source} by its special tokens (the file has none)"
    return {"file": "the file's own", "none": "no (prompts are taken raw)"}.get(source, source)


def result_line(result: Result) -> str:
    """Timings of one answer."""
    cached = f", {result.cached_tokens} cached" if result.cached_tokens else ""
    rate = f", {result.prefill_tps:.1f} tok/s" if result.prefill_tps else ""
    line = (
        f"prompt {result.prompt_tokens} tok{cached}{rate}  first token {result.ttft:.2f} s  "
        f"decode {len(result.token_ids)} tok"
    )
    if result.decode_tps:
        line += f", {result.decode_tps:.1f} tok/s"
    return line + f"  ({result.finish_reason})"


def result_json(engine: Engine, result: Result) -> dict[str, Any]:
    """The object that --json-timings prints."""
    info = engine.info
    return {
        "model": info.path,
        "precision": info.precision,
        "kv_type": info.kv_type,
        "device": info.device,
        "isa": info.isa,
        "threads": info.threads,
        "n_ctx": info.n_ctx,
        "load_seconds": info.load_seconds,
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "prefill_seconds": result.prefill_seconds,
        "prefill_tokens_per_second": result.prefill_tps,
        "first_token_seconds": result.ttft,
        "generated_tokens": len(result.token_ids),
        "decode_seconds": result.decode_seconds,
        "decode_tokens_per_second": result.decode_tps,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "seed": result.seed,
        "sparse": result.sparse,
    }

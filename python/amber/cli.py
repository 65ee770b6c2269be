"""amber-run: one answer, or a conversation.

stdout carries the answer and nothing else; talk goes to stderr. Exit codes: 0 done, 1 failure,
2 usage, 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import __version__
from .chat import Messages, OverLimit, Thinking, fold_system
from .chat_families import FAMILIES
from .command import INTERRUPTED, UsageError
from .engine import PRECISIONS, Engine, device_list, isa_list
from .errors import AmberError, ChatTemplateError
from .generate import Stream
from .models import built_in_models
from .progress import Bars
from .report import info_lines, model_line, result_json, result_line, template_line
from .sampling import SamplingParams
from .session import KV_TYPES
from .sparse import CRITERIA, MITIGATIONS


def parser() -> argparse.ArgumentParser:
    """The command line. Defaults of sampling are those of SamplingParams."""
    default = SamplingParams()
    top = argparse.ArgumentParser(
        "amber-run",
        usage="amber-run MODEL [-p TEXT | -f FILE | < stdin] [options]",
        description="Runs a GGUF language model. Without a prompt, on a terminal: a conversation.",
        epilog=f"Built-in models: {', '.join(built_in_models()) or 'none'}.",
        allow_abbrev=False,
    )
    top.add_argument("positional", nargs="?", metavar="MODEL", help="GGUF file or built-in name")
    top.add_argument("-m", "--model", help="the same as an option")
    top.add_argument("--version", action="store_true", help="version and instruction sets")
    top.add_argument("--list-devices", action="store_true", help="what --device can name")

    prompt = top.add_argument_group("prompt")
    which = prompt.add_mutually_exclusive_group()
    which.add_argument("-p", "--prompt", metavar="TEXT", help="one user turn; raw on a base model")
    which.add_argument("-f", "--file", help="prompt from a file, - for stdin")
    prompt.add_argument("-sys", "--system", metavar="TEXT", help="system prompt")
    prompt.add_argument("--raw", action="store_true", help="prompt as it is, without chat template")
    prompt.add_argument(
        "--chat-template",
        metavar="FILE|NAME",
        help=f"Jinja, or {', '.join(FAMILIES)}; for the model's own",
    )
    prompt.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""variables for it, such as '{"enable_thinking": false}'""",
    )
    prompt.add_argument(
        "--hide-thinking", action="store_true", help="show answers without their thinking block"
    )
    prompt.add_argument("--dump-tokens", action="store_true", help="print the prompt's tokens only")
    prompt.add_argument(
        "--session",
        metavar="FILE",
        help="keep the KV cache of prompt and answer in a file: a later run computes only what its "
        "prompt has beyond it",
    )

    model = top.add_argument_group("model")
    model.add_argument("-c", "--ctx", type=int, help="context; 0: the model's (min(4096, that))")
    model.add_argument("-b", "--batch", type=int, help="rows of one prefill batch (512)")
    model.add_argument("-t", "--threads", type=int, help="threads (physical cores)")
    model.add_argument("--precision", choices=PRECISIONS, default="int8", help="(int8)")
    model.add_argument(
        "--kv-type", choices=KV_TYPES, default="f16", help="what keys and values are kept as (f16)"
    )
    model.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:N, auto ($AMBER_DEVICE or cpu)"
    )
    model.add_argument("--isa", help=f"kernel column of {', '.join(isa_list())} (the first)")
    model.add_argument("--info", action="store_true", help="describe the model and end")

    sparse = top.add_argument_group("activation sparsity in prefill")
    sparse.add_argument(
        "--sparse",
        default="auto",
        metavar="S",
        help="off; auto: as the file says, where that is faster here; a pattern (8:16, 2:4@all, "
        "8:16x4t2@q,gate,down) or a plan file (auto)",
    )
    sparse.add_argument("--criterion", help=f"{', '.join(CRITERIA)}: how channels are ranked (act)")
    sparse.add_argument("--mitigation", help=f"{', '.join(MITIGATIONS)}; several with + (none)")
    sparse.add_argument(
        "--sparse-first-n", type=int, default=0, metavar="N", help="first tokens kept dense (0)"
    )
    sparse.add_argument(
        "--sparse-min-tokens",
        type=int,
        metavar="N",
        help="prompts with fewer new tokens run dense (with auto, as many as this machine needs to "
        "gain, measured once; else 0)",
    )

    sample = top.add_argument_group("sampling")
    sample.add_argument("-n", "--max-tokens", type=int, help="most tokens (until EOS or context)")
    sample.add_argument("-s", "--seed", type=int, help="(random, printed)")
    for flag, name, kind, text in (
        ("--temp", "temperature", float, "0: greedy"),
        ("--top-k", "top_k", int, "0: all"),
        ("--top-p", "top_p", float, "1: all"),
        ("--min-p", "min_p", float, "0: all"),
        ("--repeat-penalty", "repeat_penalty", float, "1: none"),
        ("--frequency-penalty", "frequency_penalty", float, "0: none"),
        ("--presence-penalty", "presence_penalty", float, "0: none"),
        ("--repeat-last-n", "penalty_last_n", int, "penalty window; -1: all"),
    ):
        value = getattr(default, name)
        sample.add_argument(
            flag, dest=name, type=kind, default=value, metavar="X", help=f"{text} ({value:g})"
        )
    sample.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end there")
    sample.add_argument(
        "--logit-bias", action="append", default=[], metavar="TOKEN=BIAS", help="id or spelling"
    )
    sample.add_argument("--ignore-eos", action="store_true", help="go on to -n or the context")

    talk = top.add_argument_group("talk on stderr")
    talk.add_argument("--json-timings", action="store_true", help="timings as one JSON object")
    talk.add_argument("-q", "--quiet", action="store_true", help="errors only")
    talk.add_argument("-v", "--verbose", action="store_true", help="details of loading")
    return top


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    bias: dict[int | str, float] = {}
    for item in args.logit_bias:
        token, _, value = item.rpartition("=")
        try:
            bias[int(token) if token.isdecimal() else token] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias {item}: expected TOKEN=NUMBER") from None
    names = set(SamplingParams.__dataclass_fields__) - {"logit_bias"}
    chosen = {name: value for name, value in vars(args).items() if name in names}
    try:
        return SamplingParams(**chosen, logit_bias=bias)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt, or None for a conversation. A stdin that is no terminal never starts one."""
    if args.prompt is not None:
        return args.prompt
    piped = args.file == "-" or args.file is None and not sys.stdin.isatty()
    if args.file is not None and not piped:
        with open(args.file, encoding="utf-8", errors="replace") as file:
            return file.read().removesuffix("\n")
    if piped:
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
        if not prompt:
            raise UsageError("no prompt: stdin is empty (give -p TEXT or -f FILE)")
        return prompt
    if not sys.stdout.isatty():
        raise UsageError("no prompt, and no terminal to talk to (give -p TEXT or -f FILE)")
    return None


def log_to_stderr(args: argparse.Namespace):
    shown = ("error",) if args.quiet else ("error", "warning")
    if args.verbose:
        shown += ("info", "debug")

    def log(level: str, text: str) -> None:
        if level in shown:
            print(f"amber: {text}", file=sys.stderr)

    return log


def say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr, flush=True)


def template_variables(args: argparse.Namespace) -> dict[str, Any]:
    try:
        made = json.loads(args.chat_template_kwargs or "{}")
    except json.JSONDecodeError:
        made = None
    if not isinstance(made, dict) or "messages" in made:
        raise UsageError(
            "--chat-template-kwargs: expected a JSON object without messages, found "
            f"{args.chat_template_kwargs}"
        )
    return made


def chat_prompt(engine: Engine, messages: Messages, variables: Mapping[str, Any]) -> str:
    """The prompt of a chat. Where the template refuses a system message, the first user turn begins
    with its text."""
    try:
        return engine.apply_chat_template(messages, **variables)
    except ChatTemplateError as error:
        folded = None if isinstance(error, OverLimit) else fold_system(messages)
        if folded is None:
            raise
        with contextlib.suppress(ChatTemplateError):
            return engine.apply_chat_template(folded, **variables)
        raise


def write_answer(stream: Stream, bars: Bars | None, thinking: Thinking | None = None) -> int:
    """Prints an answer as it comes, ends its last line; thinking leaves its block out. Returns the
    exit code."""
    code, last = 0, "\n"

    def write(text: str) -> None:
        nonlocal last
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            last = text[-1]

    try:
        for chunk in stream:
            write(thinking.push(chunk.text) if thinking else chunk.text)
        if thinking:
            write(thinking.finish())
    except KeyboardInterrupt:
        stream.close()
        code = INTERRUPTED
    if bars:
        bars.close()
    if last != "\n":
        print(flush=True)
    return code


def run(args: argparse.Namespace) -> int:
    if args.version:
        print(f"amber {__version__}  cpu: {' '.join(isa_list())}")
        return 0
    if args.list_devices:
        print("\n".join(device_list()))
        return 0
    if args.model and args.positional:
        raise UsageError(f"two models: {args.positional} and -m {args.model}")
    model = args.model or args.positional
    if not model:
        raise UsageError('no model; try: amber-run demo -p "Once upon a time"')
    params = sampling_params(args)
    prompt = None if args.info else read_prompt(args)
    template = args.chat_template
    if template and template not in FAMILIES:
        if not os.path.exists(template):
            raise UsageError(
                f"--chat-template {template}: no such file, and no family of that name (known: "
                f"{', '.join(FAMILIES)})"
            )
        with open(template, encoding="utf-8") as file:
            template = file.read()
    variables = template_variables(args)

    bars = None if args.quiet else Bars()
    try:
        engine = Engine(
            model,
            n_ctx=args.ctx,
            threads=args.threads,
            precision=args.precision,
            isa=args.isa,
            n_batch=args.batch,
            kv_type=args.kv_type,
            device=args.device,
            sparse=args.sparse,
            criterion=args.criterion,
            mitigation=args.mitigation,
            sparse_first_n=args.sparse_first_n,
            sparse_min_tokens=args.sparse_min_tokens,
            progress=bars,
            log=log_to_stderr(args),
            chat_template=template,
        )
        with engine:
            if args.info:
                print("\n".join(info_lines(engine)))
                return 0
            raw = args.raw or engine.chat_template is None
            if raw and args.system is not None:
                raise UsageError(
                    "-sys needs a chat template, and this model has none or --raw (--chat-template "
                    "chooses one)"
                )
            if engine.chat_template_source.startswith("recognized") and not raw:
                say(args, f"chat template {template_line(engine)}; --raw or --chat-template choose")
            if args.session and os.path.exists(args.session):
                held = engine.load_session(args.session)
                say(args, f"{args.session}: {held} tokens need not be computed")
            if prompt is None:
                from .repl import Repl

                say(args, model_line(engine))
                talk = Repl(engine, params, args.system, raw, bars, variables, args.hide_thinking)
                code = talk.run()
                if args.session:
                    engine.save_session(args.session)
                return code
            if not raw:
                system = [{"role": "system", "content": args.system}] if args.system else []
                turn = {"role": "user", "content": prompt}
                prompt = chat_prompt(engine, [*system, turn], variables)
            return answer(args, engine, params, prompt, bars)
    finally:
        if bars:
            bars.close()


def answer(
    args: argparse.Namespace,
    engine: Engine,
    params: SamplingParams,
    prompt: str,
    bars: Bars | None,
) -> int:
    """One prompt, one answer, one exit code."""
    if args.dump_tokens:
        for token in engine.encode_prompt(prompt):
            print(f"{token:8d}  {engine.tokenizer.token_text(token)!r}")
        return 0
    say(args, model_line(engine))
    stream = engine.stream(prompt, params)
    code = write_answer(stream, bars, Thinking(prompt) if args.hide_thinking else None)
    result = stream.result
    if args.session:
        engine.save_session(args.session)
    if args.json_timings:
        print(json.dumps(result_json(engine, result)), file=sys.stderr)
    else:
        seed = "" if args.seed is not None else f"  seed {result.seed}"
        full = "" if result.finish_reason != "length" or args.max_tokens else "  context full"
        say(args, f"load {engine.info.load_seconds:.2f} s  {result_line(result)}{full}{seed}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The command amber-run. Returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        return run(parser().parse_args(argv))
    except UsageError as error:
        print(f"amber-run: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:  # a value that only the engine or the vocabulary could judge
        print(f"amber-run: {error}", file=sys.stderr)
        return 2
    except (AmberError, OSError, MemoryError) as error:
        print(f"amber-run: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

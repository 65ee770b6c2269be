"""Chat templates: messages -> prompt text, through the Jinja text that a model file carries.

Rendering happens in a second process with limits on time and memory (_template_worker.py says why).
It is started at the first use and serves until the program ends.
"""

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from .errors import ChatTemplateError

Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "..."}]

SECONDS = 10.0  # for one rendering; a usual one takes a millisecond
MEMORY = 512 << 20  # bytes for the worker process
MAX_CHARS = 64 << 20  # of the rendered text


class OverLimit(ChatTemplateError):
    """A template used up its time or memory: to try it again would be in vain."""


class ChatTemplate:
    """A Jinja chat template as Hugging Face writes them."""

    def __init__(self, template: str) -> None:
        self.template = template

    def render(self, **variables: Any) -> str:
        """The prompt text. variables: messages, add_generation_prompt, tools, bos_token,
        eos_token, and whatever else the template reads; JSON values only.

        Errors: ChatTemplateError with the template's line where it is known, TypeError where a
        variable is not JSON.
        """
        request = {
            "template": self.template,
            "variables": variables,
            "seconds": SECONDS,
            "memory": MEMORY,
            "max_chars": MAX_CHARS,
        }
        answer = _worker.ask(request)
        if "text" in answer:
            return answer["text"]
        line = f", line {answer['line']}" if answer.get("line") else ""
        raise ChatTemplateError(f"chat template{line}: {answer['error']}")


# ---- messages ----

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of it in messages
_CUT = "<|amber: the message goes on here|> "


def apply_template(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt of a chat, as transformers' apply_chat_template makes it.

    Keys of a message that are None are left out, and its reasoning is found under the names that
    templates use. continue_final_message ends the prompt inside the last message, so that its text
    is gone on with. Errors: ChatTemplateError.
    """
    plain = [_plain(message) for message in messages]
    if continue_final_message:
        if not plain or not isinstance(plain[-1].get("content"), str):
            raise ChatTemplateError(
                "continue_final_message: expected a last message with text in its content"
            )
        plain[-1]["content"] += _CUT
        add_generation_prompt = False
    text = ChatTemplate(template).render(
        messages=plain,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        **variables,
    )
    if not continue_final_message:
        return text
    at = text.rfind(_CUT.strip())
    if at < 0:
        raise ChatTemplateError("continue_final_message: the template leaves out the last message")
    # Where the template trimmed the mark's space away, it trims the message's too.
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in message.items() if value is not None}
    reasoning = next((made[name] for name in REASONING if name in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning} | made | {"reasoning_content": reasoning}
    return made


def fold_system(messages: Messages) -> list[dict[str, Any]] | None:
    """Messages with the system's text at the beginning of the first user turn, for templates that
    refuse a system role. None where there is nothing to fold."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = dict(messages[1])
    first["content"] = f"{messages[0]['content']}\n\n{first['content']}"
    return [first, *map(dict, messages[2:])]


# ---- thinking ----

THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)


class Thinking:
    """Leaves a thinking block out of an answer that comes in pieces.

    A block stands at the answer's beginning, or the prompt has opened it. Tags elsewhere are text.
    """

    def __init__(self, prompt: str = "") -> None:
        end = prompt.rstrip()
        self._close = next((close for tag, close in THINKING if end.endswith(tag)), "")
        self._state = "inside" if self._close else "start"  # then "gap", then "answer"
        self._held = ""

    @property
    def inside(self) -> bool:
        return self._state == "inside"

    def push(self, piece: str) -> str:
        """The text to show, as far as it is decided."""
        if self._state == "answer":
            return piece
        text, self._held = self._held + piece, ""
        if self._state == "start":
            begin = text.lstrip()
            found = next((pair for pair in THINKING if begin.startswith(pair[0])), None)
            if found is None:
                if any(tag.startswith(begin) for tag, _ in THINKING):
                    self._held = text
                    return ""
                self._state = "answer"
                return text
            self._state, self._close, text = "inside", found[1], begin[len(found[0]) :]
        if self._state == "inside":
            _, closed, rest = text.partition(self._close)
            if not closed:
                self._held = text[-len(self._close) :]  # it may hold the tag's beginning
                return ""
            self._state, text = "gap", rest
        text = text.lstrip()
        if text:
            self._state = "answer"
        return text

    def finish(self) -> str:
        """What was held back at the answer's end."""
        return self._held if self._state == "start" else ""


# ---- the process ----


class _Worker:
    """The rendering process. One request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._parent = 0  # a fork must not talk into its parent's pipe

    def start(self) -> None:
        """Starts the process unless it runs."""
        if self._process and self._process.poll() is None and self._parent == os.getpid():
            return
        folders = []
        for package in ("jinja2", "markupsafe"):
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.origin:
                raise ChatTemplateError(f"chat templates need {package}: pip install {package}")
            folders.append(os.path.dirname(os.path.dirname(spec.origin)))
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_template_worker.py")
        self._process = subprocess.Popen(
            # -I -S: nothing of the user's environment, and no time spent on site-packages.
            [sys.executable, "-I", "-S", script, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        self._parent = os.getpid()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            self.start()
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                return json.loads(self._read_line(monotonic() + request["seconds"]))
            except TimeoutError:
                self.stop()
                raise OverLimit(
                    f"chat template: not done after {request['seconds']:g} seconds"
                ) from None
            except (OSError, EOFError):
                self.stop()
                raise OverLimit(
                    f"chat template: its process ended, beyond {MEMORY >> 20} MiB perhaps"
                ) from None
            except BaseException:  # Ctrl-C: an answer would be left in the pipe
                self.stop()
                raise

    def _read_line(self, deadline: float) -> bytes:
        fd, pieces = self._process.stdout.fileno(), []
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not pieces or not pieces[-1].endswith(b"\n"):
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise TimeoutError
                pieces.append(os.read(fd, 1 << 16))
                if not pieces[-1]:
                    raise EOFError
        return b"".join(pieces)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process and self._parent == os.getpid():
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


_worker = _Worker()
atexit.register(_worker.stop)


def warm_up() -> None:
    """Starts the rendering process ahead of its first use: it is ready while a model loads."""
    with _worker._lock:
        _worker.start()

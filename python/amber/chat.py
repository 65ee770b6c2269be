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
from time import monotonic
from typing import Any

from .errors import ChatTemplateError

SECONDS = 10.0  # for one rendering; a usual one takes a millisecond
MEMORY = 512 << 20  # bytes for the worker process
MAX_CHARS = 64 << 20  # of the rendered text


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
                raise ChatTemplateError(
                    f"chat template: not done after {request['seconds']:g} seconds"
                ) from None
            except (OSError, EOFError):
                self.stop()
                raise ChatTemplateError(
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

"""The conversation of amber-run: a prompt line, commands with a slash, answers that stream."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from . import chat
from .chat import Thinking
from .cli import chat_prompt, write_answer
from .command import INTERRUPTED
from .engine import Engine
from .errors import AmberError
from .progress import Bars
from .report import info_lines, result_line
from .sampling import SamplingParams

ALIASES = {"temp": "temperature", "n": "max_tokens", "repeat_last_n": "penalty_last_n"}


class Repl:
    """A conversation: turns of user text and answer. A turn that fails or is stopped leaves no
    trace in it. In raw mode (a base model) the turns are one running text.
    """

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None,
        raw: bool,
        bars: Bars | None,
        variables: Mapping[str, Any] | None = None,
        hide_thinking: bool = False,
    ) -> None:
        self.engine, self.params, self.system, self.raw = engine, params, system, raw
        self.bars, self.variables, self.hide_thinking = bars, dict(variables or {}), hide_thinking
        self.turns: list[tuple[str, str]] = []  # (user, answer)
        self.stats = True
        self.commands = {
            "/help": (self.help, "this list"),
            "/set": (self.set, "NAME VALUE: a sampling parameter, such as temperature 0.5"),
            "/show": (self.show, "[info|params|system|template|history]"),
            "/system": (self.set_system, "[TEXT]: system prompt; without text, none"),
            "/thinking": (self.set_thinking, "show|hide: the thinking block of answers"),
            "/var": (self.set_variable, "NAME [JSON]: a variable of the chat template"),
            "/clear": (self.clear, "forget the conversation"),
            "/regen": (self.regen, "answer the last turn again"),
            "/read": (self.read, "FILE: send a file's text"),
            "/save": (self.save, "FILE: write the conversation as JSON"),
            "/load": (self.load, "FILE: go on with a saved one"),
            "/stats": (self.set_stats, "on|off: timings after each answer"),
            "/exit": (None, "leave; so do /bye, /quit and Ctrl-D"),
        }

    def run(self) -> int:
        """Reads lines until the user leaves. Returns the exit code."""
        if self.raw:
            print("No chat template: the model continues your text. /clear starts a new one.")
            if self.engine.chat_template is None:
                print("To chat with it, choose a template: amber-run --chat-template NAME.")
        else:
            chat.warm_up()
        print('/help lists commands, """ begins and ends several lines, Ctrl-C stops an answer.')
        lines = PromptSession(
            history=_history(), completer=_Commands(self.commands), complete_while_typing=False
        )
        leaving = False
        while True:
            try:
                text = self.read_input(lines)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                half_typed = bool(lines.default_buffer.text)  # dropped, and that is all
                if leaving and not half_typed:
                    return INTERRUPTED
                leaving = not half_typed
                if leaving:
                    print("(Ctrl-C again, or /exit, to leave)")
                continue
            leaving = False
            if text in ("/exit", "/bye", "/quit"):
                return 0
            try:
                if text.strip():
                    self.handle(text)
            except KeyboardInterrupt:
                print("\n(stopped; nothing has changed)")
            except (AmberError, OSError, ValueError, TypeError) as error:
                print(f"error: {error}", file=sys.stderr)

    @staticmethod
    def read_input(lines: PromptSession) -> str:
        text = lines.prompt("> ")
        if text.startswith('"""'):
            text = text[3:]
            while '"""' not in text:
                text += "\n" + lines.prompt(". ")
            return text.partition('"""')[0]
        while text.endswith("\\"):
            text = text[:-1] + "\n" + lines.prompt(". ")
        return text

    def handle(self, text: str) -> None:
        """One line of input: a command or a turn."""
        if not text.startswith("/"):
            return self.take_turn(text)
        name, _, rest = text.partition(" ")
        if name not in self.commands:
            raise ValueError(f"{name}: no such command (/help lists them)")
        self.commands[name][0](rest.strip())

    # ---- turns ----

    def prompt(self, user: str) -> str:
        """The whole conversation with a new turn at its end."""
        if self.raw:
            return "".join(text for turn in self.turns for text in turn) + user
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": user})
        return chat_prompt(self.engine, messages, self.variables)

    def take_turn(self, user: str) -> None:
        prompt = self.prompt(user)
        stream = self.engine.stream(prompt, self.params)
        thinking = Thinking(prompt) if self.hide_thinking and not self.raw else None
        stopped = write_answer(stream, self.bars, thinking)
        result = stream.result
        if thinking and thinking.inside:
            print("(it was still thinking; /thinking show lets you see that)")
        if stopped:
            print("(stopped; this turn is forgotten)")
        else:
            # A base model that ended its text goes on in a new line.
            end = "\n" if self.raw and result.finish_reason == "stop" else ""
            self.turns.append((user, result.text + end))
        if self.stats:
            print(f"[{result_line(result)}]", file=sys.stderr)

    def regen(self, _rest: str) -> None:
        if not self.turns:
            raise ValueError("/regen: no turn to answer again")
        last, count = self.turns.pop(), len(self.turns)
        try:
            self.take_turn(last[0])
        finally:
            if len(self.turns) == count:
                self.turns.append(last)

    def read(self, path: str) -> None:
        with open(os.path.expanduser(path), encoding="utf-8", errors="replace") as file:
            self.take_turn(file.read().removesuffix("\n"))

    # ---- settings ----

    def help(self, _rest: str) -> None:
        for name, (_, text) in self.commands.items():
            print(f"{name:8}  {text}")

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = ALIASES.get(name, name)
        if not value.strip():
            raise ValueError("/set: expected NAME VALUE (/show params lists them)")
        try:
            parsed = None if value in ("none", "off", "random") else json.loads(value)
        except json.JSONDecodeError:
            parsed = value  # a bare word
        self.params = self.params.merged({name: parsed})
        print(f"{name} = {getattr(self.params, name)}")

    def show(self, what: str) -> None:
        parts = {
            "info": lambda: info_lines(self.engine),
            "params": lambda: [
                f"{name:18}{getattr(self.params, name)}"
                for name in SamplingParams.__dataclass_fields__
            ],
            "system": lambda: [self.system or "(no system prompt)"],
            "template": lambda: [self.engine.chat_template or "(no chat template)"],
            "history": lambda: [
                f"user: {user}\nassistant: {answer}" for user, answer in self.turns
            ],
        }
        if what and what not in parts:
            raise ValueError(f"/show: expected one of {', '.join(parts)}, found {what}")
        for name in [what] if what else ("info", "params", "system"):
            print("\n".join(parts[name]()))

    def set_system(self, text: str) -> None:
        if self.raw:
            raise ValueError("/system: there is no chat template to put it in")
        self.system = text or None

    def set_thinking(self, word: str) -> None:
        if word not in ("show", "hide"):
            raise ValueError("/thinking: expected show or hide")
        self.hide_thinking = word == "hide"

    def set_variable(self, rest: str) -> None:
        if self.raw:
            raise ValueError("/var: there is no chat template to read it")
        name, _, value = rest.partition(" ")
        if not name.isidentifier():
            raise ValueError("/var: expected NAME VALUE, such as enable_thinking false")
        if value.strip():
            try:
                self.variables[name] = json.loads(value)
            except json.JSONDecodeError:
                self.variables[name] = value.strip()  # a bare word
            print(f"{name} = {json.dumps(self.variables[name])}")
        else:
            self.variables.pop(name, None)
            print(f"{name} is not set")

    def set_stats(self, word: str) -> None:
        if word not in ("on", "off"):
            raise ValueError("/stats: expected on or off")
        self.stats = word == "on"

    def clear(self, _rest: str) -> None:
        self.turns = []

    # ---- files ----

    def save(self, path: str) -> None:
        if not path:
            raise ValueError("/save: expected a file name")
        with open(os.path.expanduser(path), "w", encoding="utf-8") as file:
            json.dump({"system": self.system, "turns": self.turns}, file, indent=1)

    def load(self, path: str) -> None:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            saved = json.load(file)
        try:
            turns = [(str(user), str(answer)) for user, answer in saved["turns"]]
            system = saved["system"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"/load: {path} is not a conversation that /save wrote") from None
        self.turns, self.system = turns, system
        print(f"{len(turns)} turns")


class _Commands(Completer):
    """Tab completion: command names, then paths."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names, self._paths = list(names), PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        line = document.text_before_cursor
        name, space, rest = line.partition(" ")
        if not space and line.startswith("/"):
            for known in self._names:
                if known.startswith(line):
                    yield Completion(known, -len(line))
        elif name in ("/read", "/save", "/load"):
            yield from self._paths.get_completions(Document(rest), complete_event)


def _history() -> History:
    """$XDG_STATE_HOME/amber/history; in memory where AMBER_NOHISTORY is set or no file can be."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = os.path.join(state, "amber", "history")
    try:
        if os.environ.get("AMBER_NOHISTORY"):
            return InMemoryHistory()
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path, "a", encoding="utf-8"):
            os.chmod(path, 0o600)
        return FileHistory(path)
    except OSError:
        return InMemoryHistory()

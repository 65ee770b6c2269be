"""The text of an answer from its tokens, with thoughts marked alike in all models.

Most models write their thoughts between tags, which are text or tokens of their own. gpt-oss (by
OpenAI's "harmony" format) writes messages, each with a channel in its header:

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

What stands in other channels than "final" comes out as one block between <think> and </think>, and
the header of a message to a tool as it is spelled, so that a caller can take it apart.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .chat import THINKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

OPEN, CLOSE = "<think>\n", "\n</think>\n\n"
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
ENDS = ("<|start|>", "<|end|>")  # of a message


class AnswerText:
    """Decodes an answer token by token."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._stream = tokenizer.stream(continues=True)
        control = {}
        for spelling in (CHANNEL, MESSAGE, *ENDS, *(tag for pair in THINKING for tag in pair)):
            token = tokenizer.token_id(spelling)
            if token is not None and tokenizer.is_control(token):
                control[token] = spelling
        self._tags = {t: s for t, s in control.items() if s not in (CHANNEL, MESSAGE, *ENDS)}
        has_channels = {CHANNEL, MESSAGE} <= set(control.values())
        self._marks = {t: s for t, s in control.items() if t not in self._tags and has_channels}
        self._header: str | None = None  # of the message that begins, as far as it is there
        self._thinks = False
        self._body = False  # something of the message is there

    def __enter__(self) -> "AnswerText":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stream.close()

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        text = self._stream.push(token)
        if tag := self._tags.get(token):
            return self._shown(text) + self._shown(tag)
        mark = self._marks.get(token)
        if mark is None:
            return self._shown(text)
        text = self._shown(text)
        if mark == MESSAGE and self._header is not None:
            return text + self._begin(self._header)
        # What comes after a message's end is the next one's header, which begins with its role.
        if mark == CHANNEL:
            self._header = (self._header or "") + CHANNEL
        elif mark in ENDS:
            self._header = ""
        return text

    def finish(self) -> str:
        """What was held back."""
        return self._shown(self._stream.finish())

    def _shown(self, text: str) -> str:
        if self._header is None:
            self._body |= bool(text)
            return text
        self._header += text
        return ""

    def _begin(self, header: str) -> str:
        """The text between the message before and one of this header."""
        self._header = None
        role, _, channel = header.rpartition(CHANNEL)
        named = channel.split()[:1]
        thinks = bool(named) and named[0] != "final" and "to=" not in header
        text = ""
        if thinks and self._thinks:
            text = "\n\n"
        elif thinks:
            text = OPEN
        elif self._thinks:
            text = CLOSE
        elif self._body:
            text = "\n\n"
        self._thinks = thinks
        if "to=" in header:
            text += f"{role}{CHANNEL}{channel}{MESSAGE}"
        return text


def without_thoughts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message for a template that writes channels: an answer's block of thoughts becomes its
    "thinking"."""
    text = message.get("content")
    if message.get("role") != "assistant" or not isinstance(text, str) or OPEN not in text[:8]:
        return message
    thoughts, _, rest = text.partition(OPEN)[2].partition(CLOSE.rstrip())
    return {"thinking": thoughts, **message, "content": rest.lstrip()}

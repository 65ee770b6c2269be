"""What transformers makes of chats with the templates in tests/chat.

    python tools/make_chat_golden.py

writes tests/chat/expected.json: for each template and each scenario the text that transformers'
apply_chat_template returns, or null where it raises. tests/test_chat.py compares Amber with the
file, and where transformers is installed makes it anew. Needs the extra `reference`.
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "chat"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

_SYSTEM = {"role": "system", "content": " Be brief, <b> & 'polite'. "}
_USER = {"role": "user", "content": "Hi <b> & 'you' 漢字 😀\n"}
_ANSWER = {"role": "assistant", "content": "Hello.\n"}
_AGAIN = {"role": "user", "content": "  And now?  \nSecond line, a longer one.  "}
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.\nOf a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where: é"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
                "box": {"type": "object", "properties": {"w": {"type": ["number", "null"]}}},
            },
            "required": ["place"],
        },
        "return": {"type": "string"},
    },
}
_CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "id": "abcdef123",
            "function": {"name": "weather", "arguments": {"place": "Zürich", "unit": "C"}},
        }
    ],
}
_TWO_CALLS = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [
        *_CALL["tool_calls"],
        {
            "type": "function",
            "id": "abcdef124",
            "function": {"name": "clock", "arguments": {}},
        },
    ],
}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "22 °C"}
_THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
_REASONED = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm,\nindeed."}
_PARTS = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": " What is this? "}],
}

# Arguments of apply_chat_template.
SCENARIOS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [_SYSTEM, _USER, _ANSWER, _AGAIN], "add_generation_prompt": True},
    "no system": {"messages": [_USER, _ANSWER, _AGAIN], "add_generation_prompt": True},
    "closed": {"messages": [_USER, _ANSWER]},
    "one turn": {"messages": [_USER], "add_generation_prompt": True},
    "system alone": {"messages": [_SYSTEM]},
    "two users": {"messages": [_USER, _USER]},
    "tools": {"messages": [_SYSTEM, _AGAIN], "tools": [_WEATHER, _CLOCK],
              "add_generation_prompt": True},
    "tool call": {"messages": [_USER, _CALL, _RESULT], "tools": [_WEATHER],
                  "add_generation_prompt": True},
    "two tool calls": {"messages": [_USER, _TWO_CALLS, _RESULT, _RESULT, _ANSWER, _AGAIN],
                       "tools": [_WEATHER, _CLOCK], "add_generation_prompt": True},
    "tools up front": {"messages": [_SYSTEM, _USER], "tools": [_WEATHER],
                       "tools_in_user_message": False, "builtin_tools": ["code_interpreter", "web"],
                       "add_generation_prompt": True},
    "thoughts": {"messages": [_USER, _THOUGHT, _AGAIN], "add_generation_prompt": True},
    "last thought": {"messages": [_USER, _THOUGHT]},
    "reasoning": {"messages": [_USER, _REASONED, _AGAIN, _REASONED]},
    "no thinking": {"messages": [_USER], "enable_thinking": False, "reasoning_effort": "low",
                    "add_generation_prompt": True},
    "thinking": {"messages": [_USER], "enable_thinking": True, "add_generation_prompt": True},
    "parts": {"messages": [_PARTS, _ANSWER], "add_generation_prompt": True},
    "documents": {"messages": [_USER], "documents": [{"title": "a tale", "text": "Once."},
                                                     {"doc_id": 7, "text": "Twice."}],
                  "date_string": "1 Jan 2030", "controls": {"citations": True},
                  "add_generation_prompt": True},
    "go on": {"messages": [_USER, {"role": "assistant", "content": "It is "}],
              "continue_final_message": True},
}  # fmt: skip


# These show pieces of the last message, and what a message that goes on would look like in them is
# nobody's business.
APART = {("strings", "go on"), ("tests", "go on")}


def scenarios(name: str) -> dict[str, dict[str, Any]]:
    """The scenarios for a template."""
    return {key: value for key, value in SCENARIOS.items() if (name, key) not in APART}


def templates() -> dict[str, str]:
    """tests/chat/*.jinja, and the families that Amber knows by name."""
    from amber.chat_families import FAMILIES

    found = {p.stem: p.read_text(encoding="utf-8") for p in sorted(FOLDER.glob("*.jinja"))}
    return found | {f"family {name}": family.template for name, family in FAMILIES.items()}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)


def theirs(of: Any, template: str, scenario: dict[str, Any]) -> str | None:
    """The text that transformers makes; None where it raises."""
    arguments = dict(scenario)
    messages = arguments.pop("messages")
    try:
        return of.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    except Exception:
        return None


def main() -> int:
    of = tokenizer()
    expected = {
        name: {key: theirs(of, text, scenario) for key, scenario in scenarios(name).items()}
        for name, text in templates().items()
    }
    text = json.dumps(expected, ensure_ascii=False, indent=1)
    (FOLDER / "expected.json").write_text(text + "\n", encoding="utf-8")
    refused = sum(value is None for found in expected.values() for value in found.values())
    print(f"{len(expected)} templates, {len(SCENARIOS)} scenarios, {refused} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())

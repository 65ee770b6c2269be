"""Chat formats by name, for files that carry no template of their own.

A family is recognized by special tokens that its models alone have. The formats are those that the
models' makers document.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Family:
    """marks: tokens that all must be in the vocabulary; without any, it must be chosen by name."""

    marks: tuple[str, ...]
    template: str


# Models that were not taught a system role read its text at the beginning of the first user turn.
_FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] | trim + '\n\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
)


def _marked(before: str, after: str, bos: str = "", answer: str | None = None) -> str:
    """Every turn between marks. before and after are Jinja expressions that may read m."""
    opening = before.replace("m['role']", "'assistant'") if answer is None else answer
    return (
        f"{bos}{{%- for m in messages -%}}{{{{- {before} + m['content'] | trim + {after} -}}}}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{- {opening} -}}}}{{%- endif -%}}"
    )


_MISTRAL = (
    "{{- bos_token -}}" + _FOLD + "{%- for m in turns -%}{%- if m['role'] == 'user' -%}"
    "{{- '[INST] ' + (system if loop.first else '') + m['content'] | trim + '[/INST]' -}}"
    "{%- else -%}{{- ' ' + m['content'] | trim + eos_token -}}{%- endif -%}{%- endfor -%}"
)
_MISTRAL_V7 = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '[INST]' + m['content'] + '[/INST]' -}}"
    "{%- else -%}{{- m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)
_LLAMA2 = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}"
    "{%- set turns = messages -%}{%- endif -%}{%- for m in turns -%}"
    "{%- if m['role'] == 'user' -%}{{- bos_token + '[INST] ' + (system if loop.first else '') + "
    "m['content'] | trim + ' [/INST]' -}}{%- else -%}"
    "{{- ' ' + m['content'] | trim + ' ' + eos_token -}}{%- endif -%}{%- endfor -%}"
)
_GEMMA = (
    "{{- bos_token -}}" + _FOLD + "{%- for m in turns -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{- '<start_of_turn>' + role + '\n' + (system if loop.first else '') + "
    "m['content'] | trim + '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
_DEEPSEEK = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{{- m['content'] -}}{%- elif m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}"
    "{%- else -%}{{- '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"
)
_VICUNA = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{{- m['content'] | trim + '\n\n' -}}{%- elif m['role'] == 'user' -%}"
    "{{- 'USER: ' + m['content'] | trim + '\n' -}}{%- else -%}"
    "{{- 'ASSISTANT: ' + m['content'] | trim + eos_token + '\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
_ALPACA = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
    "{{- m['content'] | trim + '\n\n' -}}{%- elif m['role'] == 'user' -%}"
    "{{- '### Instruction:\n' + m['content'] | trim + '\n\n' -}}{%- else -%}"
    "{{- '### Response:\n' + m['content'] | trim + eos_token + '\n\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}"
)

# Of several whose marks are there, the first is taken.
FAMILIES = {
    "phi4": Family(
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        _marked("'<|im_start|>' + m['role'] + '<|im_sep|>'", "'<|im_end|>'"),
    ),
    "chatml": Family(
        ("<|im_start|>", "<|im_end|>"),
        _marked("'<|im_start|>' + m['role'] + '\n'", "'<|im_end|>\n'"),
    ),
    "llama3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _marked(
            "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'",
            "'<|eot_id|>'",
            "{{- bos_token -}}",
        ),
    ),
    "gemma": Family(("<start_of_turn>", "<end_of_turn>"), _GEMMA),
    "mistral-v7": Family(("[INST]", "[/INST]", "[SYSTEM_PROMPT]"), _MISTRAL_V7),
    "mistral": Family(("[INST]", "[/INST]"), _MISTRAL),
    "deepseek": Family(("<｜User｜>", "<｜Assistant｜>"), _DEEPSEEK),
    "command-r": Family(
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        _marked(
            "'<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}"
            ".get(m['role'], '<|CHATBOT_TOKEN|>')",
            "'<|END_OF_TURN_TOKEN|>'",
            "{{- bos_token -}}",
            "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'",
        ),
    ),
    "granite": Family(
        ("<|start_of_role|>", "<|end_of_role|>"),
        _marked(
            "'<|start_of_role|>' + m['role'] + '<|end_of_role|>'",
            "'<|end_of_text|>\n'",
        ),
    ),
    "glm4": Family(
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        _marked("'<|' + m['role'] + '|>\n'", "''", "[gMASK]<sop>"),
    ),
    "phi3": Family(
        ("<|user|>", "<|assistant|>", "<|end|>"),
        _marked("'<|' + m['role'] + '|>\n'", "'<|end|>\n'"),
    ),
    "zephyr": Family(
        ("<|user|>", "<|assistant|>"),
        _marked("'<|' + m['role'] + '|>\n'", "eos_token + '\n'"),
    ),
    "llama2": Family((), _LLAMA2),
    "vicuna": Family((), _VICUNA),
    "alpaca": Family((), _ALPACA),
}


def recognize(tokenizer: "Tokenizer") -> str | None:
    """The name of the family whose marks a vocabulary has, or None."""
    for name, family in FAMILIES.items():
        if family.marks and all(tokenizer.token_id(mark) is not None for mark in family.marks):
            return name
    return None

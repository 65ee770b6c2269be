"""Chat templates: equal to plain jinja2, and harmless whatever is in them."""

import json
import struct
import time

import pytest

import amber
from amber import chat
from amber.chat import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b> & 'you' 漢字 😀"},
    {"role": "assistant", "content": "Hello.\n"},
    {"role": "user", "content": "  And now?  "},
]

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
"""
# What widely used templates do: BOS, macros, namespaces, loop controls, slices, tojson.
BUSY = """{{ bos_token }}{% macro turn(role, text) %}[{{ role|upper }}]{{ text }}{{ eos_token }}
{% endmacro %}{% set ns = namespace(count=0) %}
{%- if messages[0].role == 'system' %}{{ turn('system', messages[0].content) }}
    {%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{% for m in rest %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ turn(m['role'], m['content'].strip()) }}{% endgeneration %}
    {% if loop.last and add_generation_prompt %}go {{ ns.count }}{% break %}{% endif %}
{% endfor %}
{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{{ messages | tojson }} {{ extra | default('no extra') }} {{ undefined_name }}"""


def reference(template, **variables):
    """The same by jinja2 in this process, set up as the Hugging Face documentation says."""
    jinja2 = pytest.importorskip("jinja2")
    from jinja2.ext import loopcontrols

    plain = template.replace("{% generation %}", "{% if true %}")
    plain = plain.replace("{% endgeneration %}", "{% endif %}")
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return env.from_string(plain).render(**variables)


@pytest.mark.parametrize("template", [CHATML, BUSY])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [{"name": "clock", "parameters": {"zone": "<UTC>"}}]])
def test_equals_plain_jinja(template, add_generation_prompt, tools):
    variables = {
        "messages": MESSAGES,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    assert ChatTemplate(template).render(**variables) == reference(template, **variables)


@pytest.mark.parametrize("template", [CHATML, BUSY])
def test_equals_transformers(template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for add in (False, True):
        ours = ChatTemplate(template).render(
            messages=MESSAGES,
            add_generation_prompt=add,
            tools=None,
            bos_token="<s>",
            eos_token="</s>",
        )
        theirs, _ = utils.render_jinja_template(
            [MESSAGES], chat_template=template, add_generation_prompt=add,
            bos_token="<s>", eos_token="</s>",
        )  # fmt: skip
        assert ours == theirs[0]


def test_template_of_a_real_file(testdata):
    """Qwen2.5's own, out of its GGUF file."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    raw = (testdata / "vocab" / "ggml-vocab-qwen2.gguf").read_bytes()
    key = b"tokenizer.chat_template"
    kind, length = struct.unpack_from("<IQ", raw, at := raw.index(key) + len(key))
    assert kind == 8  # a string, after the GGUF specification
    template = raw[at + 12 : at + 12 + length].decode()
    for messages in (MESSAGES, MESSAGES[1:]):
        theirs, _ = utils.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True
        )
        ours = ChatTemplate(template).render(
            messages=messages, add_generation_prompt=True, tools=None
        )
        assert ours == theirs[0]
        assert "<|im_start|>assistant\n" in ours


def test_helpers():
    def render(text, **variables):
        return ChatTemplate(text).render(**variables)

    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{{ x|tojson }}", x={"b": "<é>", "a": None}) == '{"b": "<é>", "a": null}'
    assert render("{{ x }}", x="\udc80") == "\udc80"
    with pytest.raises(amber.ChatTemplateError, match="chat template.*roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TypeError):
        render("{{ x }}", x=object())


@pytest.mark.parametrize(
    ("template", "line", "words"),
    [
        ("ok\n{% for %}", 2, "Expected"),
        ("ok\n\n{{ 1 / 0 }}", 3, "ZeroDivisionError"),
        ("{{ none.x.y }}", 1, "has no attribute"),
        ("\n{% include 'x' %}", 2, ""),
        ("{{ messages.append(1) }}", 1, "unsafe"),
    ],
)
def test_broken_template(template, line, words):
    with pytest.raises(amber.ChatTemplateError, match=f"line {line}.*({words})"):
        ChatTemplate(template).render(messages=[])


HOSTILE = {
    "reach for the interpreter": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr filter": "{{ messages|attr('__class__')|attr('__mro__') }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**12)|list|length }}",
    "power": "{{ 10**(10**10) }}",
    "long string": "{{ 'x' * 10**10 }}",
    "doubled string": "{% set n = namespace(s='xx') %}{% for i in range(99) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s|length }}",
    "doubled list": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}"
    "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "much output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(90) }}",
    "padding": "{{ 'x'|center(10**11) }}",
    "format width": "{{ '%099999999999d' % 1 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name, monkeypatch):
    """Ends with an error in good time, and the next template is served."""
    monkeypatch.setattr(chat, "SECONDS", 3.0)
    begun = time.monotonic()
    try:
        text = ChatTemplate(HOSTILE[name]).render(messages=[])
        assert text == ""  # what the sandbox hides is undefined, and prints as nothing
    except amber.ChatTemplateError:
        pass
    assert time.monotonic() - begun < 15
    assert ChatTemplate("{{ x }}").render(x="still here") == "still here"


def test_worker_cannot_write_files(tmp_path):
    """A second fence: even code that got out of the sandbox could not fill the disk."""
    resource = pytest.importorskip("resource")
    ChatTemplate("x").render()
    pid = chat._worker._process.pid
    assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
    assert resource.prlimit(pid, resource.RLIMIT_DATA)[0] == chat.MEMORY


def test_ctrl_c_while_rendering(monkeypatch):
    """The late answer of an interrupted rendering is not taken for the next one's."""

    def interrupt(_deadline):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat._worker, "_read_line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate("one").render()
    assert ChatTemplate("two").render() == "two"


# ---- in the engine ----


@pytest.fixture(scope="module")
def engine(demo_model):
    template = "{{ bos_token }}" + CHATML
    with amber.Engine("demo", chat_template=template) as opened:
        yield opened


def test_messages(engine):
    assert engine.info.has_chat_template
    text = engine.apply_chat_template(MESSAGES)
    bos = engine.tokenizer.token_text(engine.tokenizer.bos)
    assert text == bos + reference(CHATML, messages=MESSAGES, add_generation_prompt=True)
    ids = engine.encode_prompt(MESSAGES)
    assert ids.count(engine.tokenizer.bos) == 1 and ids[0] == engine.tokenizer.bos
    greedy = {"temperature": 0, "max_tokens": 8}
    result = engine.generate(MESSAGES, **greedy)
    assert result.text == engine.generate(text, **greedy).text
    batch = engine.generate([MESSAGES[:2], MESSAGES], **greedy)
    assert [len(r.token_ids) for r in batch] == [8, 8] and batch[1].text == result.text


def test_second_turn_is_cached(engine):
    messages = [{"role": "user", "content": "Tell me of the old king and the fox."}]
    first = engine.generate(messages, temperature=0, max_tokens=8)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And then?"},
    ]
    second = engine.generate(messages, temperature=0, max_tokens=8)
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert second.prompt_tokens > second.cached_tokens


def test_variables_and_removal(engine):
    assert engine.apply_chat_template([], add_generation_prompt=False) != ""
    old = engine.chat_template
    try:
        engine.chat_template = "{{ enable_thinking }}"
        assert engine.apply_chat_template([], enable_thinking=False) == "False"
        engine.chat_template = None
        with pytest.raises(amber.ChatTemplateError, match="no chat template"):
            engine.generate(MESSAGES)
    finally:
        engine.chat_template = old

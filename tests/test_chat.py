"""Chat templates: equal to plain jinja2, and harmless whatever is in them."""

import json
import struct
import time

import pytest

import amber
import make_chat_golden as maker
from amber import chat
from amber.channels import AnswerText, without_thoughts
from amber.chat import ChatTemplate, Thinking, apply_template, fold_system
from amber.chat_families import FAMILIES, recognize
from amber.cli import chat_prompt
from gguf_bytes import BOOL, F32, I32, STRING, Image

EXPECTED = json.loads((maker.FOLDER / "expected.json").read_text(encoding="utf-8"))
SPECIAL = maker.SPECIAL

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


def render(template, scenario):
    """What Amber makes of a scenario of make_chat_golden; None where it raises."""
    try:
        return apply_template(template, **{"add_generation_prompt": False, **scenario, **SPECIAL})
    except amber.ChatTemplateError:
        return None


@pytest.mark.parametrize("name", EXPECTED)
def test_equals_transformers(name):
    """Templates that use what published ones use, on chats with tools, parts, thoughts, documents:
    the texts that transformers' apply_chat_template made, and its errors."""
    template = maker.templates()[name]
    for key, scenario in maker.scenarios(name).items():
        assert render(template, scenario) == EXPECTED[name][key], key


def test_golden_texts_are_those_of_transformers():
    pytest.importorskip("transformers")
    of, templates = maker.tokenizer(), maker.templates()
    assert templates.keys() == EXPECTED.keys()
    for name, template in templates.items():
        for key, scenario in maker.scenarios(name).items():
            assert maker.theirs(of, template, scenario) == EXPECTED[name][key], (name, key)
    # What stays out of the file: today's date.
    today = "{{ strftime_now('%d %B %Y') }}"
    assert render(today, {"messages": []}) == maker.theirs(of, today, maker.SCENARIOS["chat"])


def file_template(path):
    """The chat template in a GGUF file, read by place; None where there is none."""
    raw = path.read_bytes()
    key = b"tokenizer.chat_template"
    if key not in raw:
        return None
    kind, length = struct.unpack_from("<IQ", raw, at := raw.index(key) + len(key))
    assert kind == 8  # a string, after the GGUF specification
    return raw[at + 12 : at + 12 + length].decode()


def test_templates_of_real_files(testdata):
    pytest.importorskip("transformers")
    of, compared = maker.tokenizer(), 0
    for path in sorted((testdata / "vocab").glob("*.gguf")):
        template = file_template(path)
        for key, scenario in maker.SCENARIOS.items() if template else ():
            assert render(template, scenario) == maker.theirs(of, template, scenario), (path, key)
            compared += 1
    assert compared >= len(maker.SCENARIOS)


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
    "undefined function": "{{ no_such_function(messages) }}",
    "undefined filter": "{{ messages | no_such_filter }}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "namespace in two steps": "{% set n = namespace() %}{% set n.__init__ = 1 %}",
    "dict": "{{ dict.__base__.__subclasses__() }}",
    "itself": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "map attribute": "{{ ['x']|map(attribute='__class__')|join }}",
    "sort attribute": "{{ [raise_exception]|map(attribute='__globals__')|join }}",
    "format map": "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "generator": "{{ (messages|map('upper')).gi_frame }}",
    "environment": "{{ raise_exception.__self__ }}{{ loop }}{{ environment }}",
    "deep nesting": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "long chain": "{{ 1" + " + 1" * 50000 + " }}",
    "many blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "endless sum": "{{ range(10**5) | map('string') | join | length * 10**12 }}"
    "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "format width": "{{ '%099999999999d' % 1 }}",
}  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ messages['__class__'] }}",
        "{{ messages | attr('__class__') }}",
        "{{ [1] | map(attribute='__class__') | list }}",
        "{{ [1] | map('attr', '__class__') | list }}",
        "{{ [1] | selectattr('__class__') | list }}",
        "{{ [1] | groupby('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ joiner.__init__ }}",
        "{% if ''.join.__class__ is defined %}a{% endif %}",
        "{% for x in [1] %}{{ loop._iterator }}{% endfor %}",
        "{{ (messages | map('list')).gi_frame }}",
        "{{ joiner.mro }}",
    ],
)
def test_inner_attributes_are_refused(template):
    with pytest.raises(amber.ChatTemplateError, match="line 1: access to attribute '.*' .* unsafe"):
        ChatTemplate(template).render(messages=[{"role": "user", "content": "a"}])


HARMLESS = {"long chain": "50001", "deep nesting": "1"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template(name, monkeypatch):
    """Ends with an error in good time, and the next template is served."""
    monkeypatch.setattr(chat, "SECONDS", 1.5)
    begun = time.monotonic()
    try:
        text = ChatTemplate(HOSTILE[name]).render(messages=[])
        # What the sandbox hides is undefined, and prints as nothing.
        assert text == "" or HARMLESS.get(name) == text
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


def test_continued_message(engine):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The old"}]
    text = engine.apply_chat_template(turns, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe old")
    with pytest.raises(amber.ChatTemplateError, match="expected a last message with text"):
        engine.apply_chat_template([{"role": "user"}], continue_final_message=True)
    with pytest.raises(amber.ChatTemplateError, match="leaves out the last message"):
        apply_template("{{ messages[0].role }}", turns, continue_final_message=True)


# ---- files without a template ----


def vocabulary(path, *tokens, template=None, plain=0):
    """Tokens are control ones, but for so many at the end."""
    image = Image()
    image.key("tokenizer.ggml.model", STRING, "llama")
    texts = ["<unk>", "<s>", "</s>", "a", *tokens, *(["\u2581"] if plain else [])]
    image.array("tokenizer.ggml.tokens", STRING, texts)
    image.array("tokenizer.ggml.scores", F32, [0.0] * len(texts))
    image.key("tokenizer.ggml.add_space_prefix", BOOL, False)
    kinds = [3] * (len(tokens) - plain) + [1] * (plain + bool(plain))
    image.array("tokenizer.ggml.token_type", I32, [2, 3, 3, 1, *kinds])
    path.write_bytes(image.finish())
    return amber.Tokenizer(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_recognized(tmp_path, name):
    family = FAMILIES[name]
    tokenizer = vocabulary(tmp_path / "v.gguf", *family.marks)
    assert recognize(tokenizer) == (name if family.marks else None)
    if family.marks:
        tokenizer = vocabulary(tmp_path / "w.gguf", *family.marks[1:])
        assert recognize(tokenizer) != name


def test_engine_chooses_a_template(demo_model):
    with amber.Engine("demo") as engine:
        assert (engine.chat_template, engine.chat_template_source) == (None, "none")
        with pytest.raises(amber.ChatTemplateError, match="no chat template.*chatml, llama3"):
            engine.generate(MESSAGES)
    with amber.Engine("demo", chat_template="vicuna") as engine:
        assert engine.chat_template_source == "given: vicuna"
        assert engine.apply_chat_template(MESSAGES).endswith("USER: And now?\nASSISTANT:")


def marked_model(path, marks, plain, **templates):
    """A whole model whose last tokens are marks, so many of them plain text, with templates."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(maker.FOLDER.parent / "golden" / "llama.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        value = field.contents()
        if field.name.startswith(("GGUF.", "general.arch", "tokenizer.chat")):
            continue
        if field.name == "tokenizer.ggml.tokens":
            value[-len(marks) :] = marks
        if field.name == "tokenizer.ggml.token_type":
            value[-len(marks) :] = [3] * (len(marks) - plain) + [1] * plain
        kinds = [kind.name for kind in field.types]
        if kinds[0] == "ARRAY":
            writer.add_array(field.name, value)
        else:
            writer.add_key_value(field.name, value, field.types[0])
    for name, template in templates.items():
        writer.add_string("tokenizer." + name.replace("__", "."), template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_engine_recognizes_a_family(tmp_path):
    """A whole model whose vocabulary has ChatML's marks, with no template and with two."""
    marks = ["<|im_start|>", "<|im_end|>"]

    def write(path, **templates):
        return amber.Engine(marked_model(path, marks, 0, **templates))

    with write(tmp_path / "none.gguf") as engine:
        assert engine.chat_template_source == "recognized: chatml"
        assert engine.info.has_chat_template
        text = engine.apply_chat_template(MESSAGES[1:])
        assert text.startswith("<|im_start|>user\nHi <b>")
        assert engine.encode_prompt(MESSAGES).count(engine.tokenizer.token_id("<|im_end|>")) == 4
    with write(
        tmp_path / "two.gguf", chat_template="plain", chat_template__tool_use="{{ tools[0].name }}"
    ) as engine:
        assert engine.chat_template_source == "file"
        assert engine.apply_chat_template(MESSAGES) == "plain"
        assert engine.apply_chat_template(MESSAGES, tools=[{"name": "clock"}]) == "clock"


def test_system_message_is_folded():
    folded = fold_system(MESSAGES)
    assert folded[0] == {"role": "user", "content": "Be brief.\n\n" + MESSAGES[1]["content"]}
    assert folded[1:] == MESSAGES[2:]
    assert fold_system(MESSAGES[1:]) is None and fold_system(MESSAGES[:1]) is None


def test_system_message_is_folded_once(monkeypatch):
    """A template that refuses the role is asked again; not so one that takes too long."""
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    asked = []

    class Engine:
        def __init__(self, template):
            self.template = template

        def apply_chat_template(self, messages, **variables):
            asked.append(messages[0]["role"])
            return apply_template(self.template, messages, **variables)

    refusing = "{{ raise_exception('no') if messages[0].role == 'system' }}" + CHATML
    assert "Be brief.\n\nHi" in chat_prompt(Engine(refusing), MESSAGES, {})
    assert asked == ["system", "user"]
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(amber.ChatTemplateError, match="not done after 0.5 seconds"):
        chat_prompt(Engine(endless), MESSAGES, {})
    assert asked == ["system", "user", "system"]


# ---- thinking blocks ----


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("prompt", "answer", "shown"),
    [
        ("", "<think>\nHm, a < b.\n</think>\n\nYes.", "Yes."),
        ("", "  <think></think>Yes </think>.", "Yes </think>."),
        ("", "<thinking>a</think></thinking>b", "b"),
        ("assistant\n<think>\n", "Hm.\n</think>\n\n Yes.\n\nNo.", "Yes.\n\nNo."),
        ("<think>\n\n</think>\n\n", "Yes.", "Yes."),
        ("", "No block: <think>a</think>", "No block: <think>a</think>"),
        ("", " <thin air>", " <thin air>"),
        ("", " <thin", " <thin"),
        ("", "  \n", "  \n"),
        ("", "<think>never done </thin", ""),
        ("", "", ""),
    ],
)
def test_thinking_is_left_out(size, prompt, answer, shown):
    thinking = Thinking(prompt)
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    text = "".join(thinking.push(piece) for piece in pieces)
    assert text + thinking.finish() == shown
    assert thinking.inside == (shown == "" and answer != "")


# ---- channels ----

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
ANSWERS = [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
     "<think>\nHm.\n</think>\n\nYes."),
    ("<|channel|>final<|message|>Yes.", "Yes."),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b",
     "<think>\na\n\nb"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f "
     "<|message|>{}",
     "<think>\na\n</think>\n\nassistant<|channel|>commentary to=functions.f <|message|>{}"),
    ("Plain <text>", "Plain <text>"),
    ("<|channel|>final<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two.",
     "One.\n\nTwo."),
    ("<|channel|>anal", ""),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "shown"), ANSWERS)
def test_channels_become_a_thinking_block(tmp_path, answer, shown):
    tokens = sorted({*(c for c in answer), *"x"} - {"a"})
    path = tmp_path / "v.gguf"
    tokenizer = vocabulary(path, *HARMONY, *tokens, plain=len(tokens))
    ids = tokenizer.encode(answer, add_special=False, parse_special=True)
    with AnswerText(tokenizer) as text:
        got = "".join([*map(text.push, ids), text.finish()])
    assert got == shown
    thoughts, closed, rest = got.removeprefix("<think>\n").partition("\n</think>\n\n")
    if closed:
        message = {"role": "assistant", "content": got}
        want = {"role": "assistant", "content": rest, "thinking": thoughts}
        assert without_thoughts(message) == want
    hidden = Thinking()
    assert "Hm." not in hidden.push(got) + hidden.finish()


def test_marks_of_thoughts_that_are_control_tokens(tmp_path):
    tokenizer = vocabulary(tmp_path / "v.gguf", "[THINK]", "[/THINK]", "b", plain=1)
    ids = [tokenizer.token_id(t) for t in ("[THINK]", "a", "[/THINK]", "b")]
    with AnswerText(tokenizer) as text:
        got = "".join([*map(text.push, ids), text.finish()])
    assert got == "[THINK]a[/THINK]b"
    hidden = Thinking()
    assert hidden.push(got) + hidden.finish() == "b"


def test_answer_in_channels(tmp_path, monkeypatch):
    """Through the whole engine: what is sampled is scripted."""
    template = (maker.FOLDER / "channels.jinja").read_text()
    marks = [*HARMONY, "Hm", "analysis", "final", "assistant", "Yes"]
    path = marked_model(tmp_path / "m.gguf", marks, 5, chat_template=template)
    script = ["<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", "assistant",
              "<|channel|>", "final", "<|message|>", "Yes", "<|return|>"]  # fmt: skip
    with amber.Engine(path) as engine:
        ids = iter([engine.tokenizer.token_id(t) for t in script])
        monkeypatch.setattr(amber.Session, "_sample", lambda _self, _sampler: next(ids))
        result = engine.generate([{"role": "user", "content": "a"}], max_tokens=20)
        assert result.text == "<think>\nHm\n</think>\n\nYes"
        assert (result.finish_reason, result.stop_reason) == ("stop", "<|return|>")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": result.text},
                 {"role": "user", "content": "b"}]  # fmt: skip
        text = engine.apply_chat_template(turns)
    assert "Hm" not in text and "<|channel|>final<|message|>Yes<|end|>" in text

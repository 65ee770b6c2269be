"""The conversation of amber-run, driven through a pseudo-terminal."""

import json
import os
import re
import sys

import pytest

pexpect = pytest.importorskip("pexpect")

TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant:"""
STATS = r"\[prompt (\d+) tok(?:, (\d+) cached)?.*?decode (\d+) tok.*?\((\w+)\)\]"
PROMPT = r"[\r\n](?:\x1b\[[0-9;?]*[a-zA-Z]|\x1b.)*>[ \b]"  # at the beginning of a line
MORE = PROMPT.replace(">", r"\.")


@pytest.fixture
def talk(tmp_path, demo_model):
    """Starts a conversation; ends what a test leaves running."""
    started = []

    def start(*args, env=None, chat=True):
        template = tmp_path / "template.jinja"
        template.write_text(TEMPLATE)
        options = ["--chat-template", str(template)] if chat else []
        environment = {
            **os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1",
            "XDG_STATE_HOME": str(tmp_path / "state"), **(env or {})
        }  # fmt: skip
        child = pexpect.spawn(
            sys.executable,
            ["-m", "amber", "demo", "--temp", "0", "-n", "8", *options, *args],
            env=environment, encoding="utf-8", timeout=15, dimensions=(24, 200), cwd=tmp_path,
        )  # fmt: skip
        child.state = tmp_path / "state" / "amber" / "history"
        started.append(child)
        child.expect(PROMPT)
        return child

    yield start
    for child in started:
        child.close(force=True)


def say(child, line):
    """Sends a line; returns (prompt tokens, cached, decoded, finish reason) of its answer."""
    child.sendline(line)
    child.expect(STATS)
    prompt, cached, decoded, finish = child.match.groups()
    child.expect(PROMPT)
    return int(prompt), int(cached or 0), int(decoded), finish


def command(child, line):
    """Sends a command; returns what it prints."""
    child.sendline(line)
    child.expect(PROMPT)
    # prompt_toolkit redraws the typed line before the output comes.
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", child.before).replace("\r", "").split(line)[-1]


def test_second_turn_is_cached(talk):
    child = talk()
    first = say(child, "Tell me a long story of an old king and his daughter.")
    second = say(child, "And then?")
    assert first[1] == 0 and first[2] == 8
    assert second[1] >= first[0] - 1 and second[0] > first[0] + 8
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_commands(talk, tmp_path):
    child = talk()
    assert "/regen" in command(child, "/help")
    assert "temperature = 0.5" in command(child, "/set temp 0.5")
    assert "temperature       0.5" in command(child, "/show params")
    assert "did you mean 'temperature'" in command(child, "/set temperatur 1")
    assert "top_p" in command(child, "/set top_p 7")
    assert "no such command" in command(child, "/frobnicate")
    assert "llama" in command(child, "/show info")
    command(child, "/set temperature 0")

    plain = say(child, "Hello")[0]
    assert say(child, "/regen")[:2] == (plain, plain - 1)
    command(child, "/clear")
    command(child, "/system Be brief.")
    assert "Be brief." in command(child, "/show system")
    with_system = say(child, "Hello")[0]
    assert with_system > plain

    (tmp_path / "ask.txt").write_text("Hello from\na file\n")
    assert say(child, "/read ask.txt")[0] > with_system
    command(child, "/save talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["system"] == "Be brief."
    assert [turn[0] for turn in saved["turns"]] == ["Hello", "Hello from\na file"]
    command(child, "/clear")
    assert "2 turns" in command(child, "/load talk.json")
    assert "user: Hello from" in command(child, "/show history")
    assert "no-such.json" in command(child, "/load no-such.json")
    (tmp_path / "bad.json").write_text("[1]")
    assert "not a conversation" in command(child, "/load bad.json")

    command(child, "/stats off")
    assert "[prompt" not in command(child, "Hi")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_several_lines(talk, tmp_path):
    child = talk()
    child.sendline('"""one')
    child.expect(MORE)
    child.sendline('two"""')
    child.expect(STATS)
    child.expect(PROMPT)
    child.sendline("three\\")
    child.expect(MORE)
    child.sendline("four")
    child.expect(STATS)
    child.expect(PROMPT)
    command(child, "/save talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [turn[0] for turn in saved["turns"]] == ["one\ntwo", "three\nfour"]


def test_ctrl_c_in_answer_and_at_prompt(talk):
    child = talk("--ignore-eos", "-n", "-1", "-c", "16384")
    before = command(child, "/show history")
    child.sendline("Hello")
    child.expect("[a-z]+ [a-z]+ [a-z]+ ")  # the answer is coming
    child.sendintr()
    child.expect_exact("(stopped; this turn is forgotten)", timeout=5)
    child.expect(STATS)
    assert child.match.group(4) == "cancelled"
    child.expect(PROMPT)
    assert command(child, "/show history") == before
    command(child, "/set max_tokens 4")
    assert say(child, "Hello")[2] == 4  # it goes on

    child.send("half a line")
    child.sendintr()
    child.expect(PROMPT)
    child.sendintr()
    child.expect_exact("(Ctrl-C again")
    child.expect(PROMPT)
    assert say(child, "Hello")[2] == 4  # in between: the count begins again
    child.sendintr()
    child.expect_exact("(Ctrl-C again")
    child.expect(PROMPT)
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_ctrl_c_in_prefill(talk, tmp_path):
    (tmp_path / "long.txt").write_text("The old king went to the forest and met a fox. " * 2000)
    child = talk("-c", "32768")
    child.sendline("/read long.txt")
    child.expect("prompt:")  # the bar: prefill is under way
    child.sendintr()
    child.expect_exact("(stopped; this turn is forgotten)", timeout=1)
    child.expect(PROMPT)
    prompt, _, decoded, _ = say(child, "Hello")
    assert prompt < 30 and decoded == 8


def test_overflow_leaves_the_conversation(talk, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 3000)
    child = talk()
    first = say(child, "Hello")
    error = command(child, "/read long.txt")
    assert re.search(r"prompt has 3\d\d\d tokens, context is 1024; use -c 4096", error)
    assert say(child, "And?")[1] >= first[0] - 1


def test_base_model_continues_text(talk):
    child = talk(chat=False)
    assert "continues your text" in child.before
    first = say(child, "Once upon a time there was")
    second = say(child, " and then")
    assert second[1] >= first[0] - 1
    assert "no chat template" in command(child, "/system Be brief.")


def test_history_file(talk):
    child = talk()
    say(child, "Remember this line")
    assert "Remember this line" in child.state.read_text()
    assert child.state.stat().st_mode & 0o077 == 0
    child.sendline("/bye")
    child.expect(pexpect.EOF)
    child.state.unlink()
    child = talk(env={"AMBER_NOHISTORY": "1"})
    say(child, "Forget this line")
    assert not child.state.exists()


def test_completion(talk):
    child = talk()
    child.send("/reg\t")
    child.expect("en")
    child.sendline()
    child.expect("no turn to answer again")


def test_thinking_and_variables(talk, tmp_path):
    """The prompt's own template opens a thinking block that the little model never closes."""
    template = tmp_path / "thinking.jinja"
    template.write_text(
        "{{ messages[-1].content }}{% if enable_thinking is not defined or enable_thinking %}"
        "<think>\n{% endif %}"
    )
    child = talk("--chat-template", str(template), "--hide-thinking", chat=False)
    child.sendline("Once upon a time")
    child.expect("it was still thinking")
    child.expect(PROMPT)
    assert "enable_thinking = false" in command(child, "/var enable_thinking false")
    child.sendline("Once upon a time")
    assert child.expect(["it was still thinking", STATS]) == 1
    child.expect(PROMPT)
    assert "is not set" in command(child, "/var enable_thinking")
    command(child, "/thinking show")
    child.sendline("Once upon a time")
    assert child.expect(["it was still thinking", STATS]) == 1
    child.expect(PROMPT)
    assert "expected show or hide" in command(child, "/thinking maybe")
    assert "expected NAME VALUE" in command(child, "/var 1x 2")


def test_system_prompt_that_the_template_refuses(talk, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    child = talk("--chat-template", str(template), chat=False)
    plain = say(child, "Hello")[0]
    command(child, "/clear")
    command(child, "/system Be brief.")
    assert say(child, "Hello")[0] > plain

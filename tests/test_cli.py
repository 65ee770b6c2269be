"""amber-run as a program: what goes to stdout and stderr, exit codes, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import amber

RUN = [sys.executable, "-m", "amber"]
PROMPT = "Once upon a time there was a little"
GREEDY = ["--temp", "0", "-n", "12"]


@pytest.fixture(autouse=True)
def needs_demo(demo_model):
    pass


def run(*args, stdin="", **options):
    return subprocess.run(
        [*RUN, *args], input=stdin, capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def expected():
    """The greedy answer to PROMPT, from Python."""
    with amber.Engine("demo") as engine:
        return engine.generate(PROMPT, temperature=0, max_tokens=12).text


def ended(text):
    return text if text.endswith("\n") else text + "\n"


def test_answer(expected):
    done = run("demo", "-p", PROMPT, *GREEDY)
    assert done.returncode == 0 and done.stdout == ended(expected)
    first, last = done.stderr.splitlines()
    assert first.startswith(f"amber {amber.__version__}  demo: llama 7.")
    assert " -> int8  ctx 1024  cpu " in first and "thread" in first
    for word in ("load", "prompt", "tok/s", "first token", "decode 12 tok", "seed"):
        assert word in last


def test_ways_to_give_a_prompt(expected, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n")
    for args, stdin in (
        (["demo", "-f", str(path)], ""),
        (["demo", "-f", "-"], PROMPT + "\n"),
        (["demo"], PROMPT),
        (["-m", "demo", "--raw", "--prompt", PROMPT], "not read"),
        ([amber.find_model("demo"), "-p", PROMPT], ""),
    ):
        done = run(*args, *GREEDY, "-q", stdin=stdin)
        assert (done.returncode, done.stdout, done.stderr) == (0, ended(expected), "")


def test_json_timings(expected):
    done = run("demo", "-p", PROMPT, *GREEDY, "-q", "--json-timings", "-s", "5")
    assert done.stdout == ended(expected)
    timings = json.loads(done.stderr)
    assert timings["generated_tokens"] == 12 and timings["seed"] == 5
    assert timings["prefill_tokens_per_second"] > 0 < timings["decode_tokens_per_second"]
    assert timings["finish_reason"] == "length" and timings["n_ctx"] == 1024


def test_random_seed_is_printed_and_repeats():
    first = run("demo", "-p", PROMPT, "-n", "30")
    seed = first.stderr.split()[-1]
    assert run("demo", "-p", PROMPT, "-n", "30", "--seed", seed).stdout == first.stdout
    assert run("demo", "-p", PROMPT, "-n", "30").stdout != first.stdout


def test_sampling_flags(expected):
    word = expected.split()[1]
    assert run("demo", "-p", PROMPT, *GREEDY, "--stop", word).stdout == ended(
        expected[: expected.index(word)]
    )
    assert run("demo", "-p", PROMPT, "-n", "12", "--top-k", "1").stdout == ended(expected)
    with amber.Engine("demo") as engine:
        token = engine.generate(PROMPT, temperature=0, max_tokens=1).token_ids[0]
    done = run("demo", "-p", PROMPT, *GREEDY, "--logit-bias", f"{token}=-inf")
    assert done.returncode == 0 and done.stdout != ended(expected)


def test_until_the_context_is_full():
    done = run("demo", "-p", PROMPT, "-c", "32", "--ignore-eos", "--temp", "0", "--json-timings")
    timings = json.loads(done.stderr.splitlines()[-1])
    assert timings["prompt_tokens"] + timings["generated_tokens"] == 33
    assert timings["finish_reason"] == "length"


def test_precision_and_isa(expected):
    done = run("demo", "-p", PROMPT, *GREEDY, "--precision", "float", "--isa", "ref", "-t", "1")
    assert (
        done.returncode == 0 and "-> float" in done.stderr and "cpu ref 1 thread\n" in done.stderr
    )
    assert len(done.stdout.split()) > 3


def test_describe():
    done = run("demo", "--info")
    assert (done.returncode, done.stderr) == (0, "") and "7.3M parameters" in done.stdout
    done = run("demo", "--dump-tokens", "-p", "The king")
    with amber.Engine("demo") as engine:
        ids = engine.tokenize("The king")
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == ids
    done = run("--version")
    assert done.stdout == f"amber {amber.__version__}  cpu: {' '.join(amber.isa_list())}\n"
    assert run("--list-devices").stdout.startswith("cpu ")
    help_text = run("--help").stdout
    for flag in ("-sys", "--min-p", "--json-timings", "--chat-template"):
        assert flag in help_text


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, ["no model", "amber-run demo -p"]),
        (["demo", "--no-such-flag"], 2, ["--no-such-flag"]),
        (["demo"], 2, ["stdin is empty"]),
        (["demo", "-p", "x", "-f", "y"], 2, ["not allowed"]),
        (["demo", "-m", "demo", "-p", "x"], 2, ["two models"]),
        (["demo", "-p", "x", "--temp", "hot"], 2, ["--temp", "hot"]),
        (["demo", "-p", "x", "--top-p", "1.5"], 2, ["top_p", "1.5"]),
        (["demo", "-p", "x", "--precision", "int4"], 2, ["int4"]),
        (["demo", "-p", "x", "--logit-bias", "5:1"], 2, ["--logit-bias", "TOKEN=NUMBER"]),
        (["demo", "-p", "x", "--logit-bias", "no such token=1"], 2, ["logit_bias"]),
        (["demo", "-p", "x", "-sys", "Be brief."], 2, ["-sys", "chat template"]),
        (["demo", "-p", "x", "--chat-template", "chatty"], 2, ["no such file", "chatml, llama3"]),
        (["demo", "-p", "x", "--chat-template-kwargs", "[1]"], 2, ["expected a JSON object"]),
        (["demo", "-p", "x", "--device", "cuda:999"], 1, ["device cuda:999"]),
        (["demo", "-p", "x", "-c", "-7"], 2, ["n_ctx"]),
        (["no-such-model", "-p", "x"], 1, ["no-such-model", "demo"]),
        (["demo", "-f", "no-such-file"], 1, ["no-such-file"]),
    ],
)
def test_wrong_use(args, code, words):
    done = run(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr


def test_wrong_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    done = run(str(path), "-p", "x")
    assert (done.returncode, done.stdout) == (1, "") and "Git LFS" in done.stderr


def test_prompt_too_long():
    done = run("demo", stdin="word " * 3000)
    assert (done.returncode, done.stdout) == (1, "")
    error = done.stderr.splitlines()[-1]
    assert "context is 1024" in error and "use -c 4096" in error
    assert 3000 <= int(error.split("prompt has ")[1].split()[0]) < 4096


def test_chat_template_file(tmp_path):
    """One user turn through a template, which the model file does not have."""
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    options = ["demo", "--chat-template", str(path)]
    done = run(*options, "-p", "Hi", "-sys", "Be brief.", "--dump-tokens")
    text = "system: Be brief.\nuser: Hi\nassistant:"
    with amber.Engine("demo") as engine:
        assert [int(line.split()[0]) for line in done.stdout.splitlines()] == engine.tokenize(text)
    plain = run("demo", "-p", text, *GREEDY, "-q").stdout
    assert run(*options, "-p", "Hi", "-sys", "Be brief.", *GREEDY, "-q").stdout == plain
    path.write_text("{% for m in messages %}\n{{ m.content + 3 }}{% endfor %}")
    done = run(*options, "-p", "Hi")
    assert done.returncode == 1 and "chat template, line 2" in done.stderr


def test_chat_template_by_name_and_variables(tmp_path):
    done = run(
        "demo", "--chat-template", "vicuna", "-p", "Hi", "-sys", "Be brief.", "--dump-tokens"
    )
    with amber.Engine("demo") as engine:
        ids = engine.tokenize("Be brief.\n\nUSER: Hi\nASSISTANT:")
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == ids
    assert "given: vicuna" in run("demo", "--chat-template", "vicuna", "--info").stdout
    path = tmp_path / "template.jinja"
    path.write_text(
        "{{ messages[0].content }}{% if x %}{{ raise_exception('x') }}{% endif %}<think>"
    )
    options = ["demo", "--chat-template", str(path), "-p", "The king", *GREEDY]
    shown, hidden = run(*options, "-q"), run(*options, "-q", "--hide-thinking")
    assert shown.stdout and (hidden.returncode, hidden.stdout) == (0, "")
    done = run(*options, "--chat-template-kwargs", '{"x": true}')
    assert done.returncode == 1 and "chat template, line 1: x" in done.stderr


def test_closed_pipe():
    """A reader that has seen enough: no traceback."""
    process = subprocess.Popen(
        [*RUN, "demo", "-p", PROMPT, "--ignore-eos", "-q"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == b""
    process.stderr.close()


def interrupt(args, ready, **options):
    """Runs, sends SIGINT once `ready(process)` returns. (code, stdout, stderr, seconds after)"""
    process = subprocess.Popen(
        [*RUN, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    ready(process)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - begun


def test_ctrl_c_in_prefill(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("The old king went to the forest and met a fox. " * 2000)

    def ready(process):
        assert process.stderr.readline().startswith("amber ")  # loaded; prefill begins
        time.sleep(1)

    code, out, err, seconds = interrupt(["demo", "-f", str(path), "-c", "32768"], ready)
    assert (code, out) == (130, "") and seconds < 1
    assert "cancelled" in err and "Traceback" not in err


def test_ctrl_c_in_answer_keeps_its_text():
    seen = []
    code, out, err, seconds = interrupt(
        ["demo", "-p", PROMPT, "--ignore-eos", "-c", "32768", "--temp", "0"],
        lambda process: seen.append(process.stdout.read(40)),
    )
    assert code == 130 and seconds < 1
    assert "cancelled" in err and "Traceback" not in err
    text = seen[0] + out
    assert text.endswith("\n") and len(text) > 40
    with amber.Engine("demo") as engine:
        whole = engine.generate(PROMPT, temperature=0, max_tokens=30, ignore_eos=True).text
    assert whole[:40] == text[:40]


def test_starts_fast():
    """All that comes before loading, imports too, in under 0.3 s (best of five)."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        run("--version")
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.3
    heavy = "{'jinja2', 'prompt_toolkit', 'numpy', 'tqdm'}"
    code = f"import sys, amber.cli; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n"


def test_output_that_is_not_unicode():
    with amber.Tokenizer("demo") as tokenizer:
        token = tokenizer.token_id("<0xC3>")  # alone it is U+FFFD
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = ["-n", "3", "--logit-bias", f"{token}=1000"]
    done = run("demo", "-p", PROMPT, *options, env=environment)
    assert (done.returncode, done.stdout) == (0, "???\n") and "Traceback" not in done.stderr

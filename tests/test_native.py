"""amber-native, the runner without Python, as a program."""

import os
import re
import signal
import subprocess
import time

import pytest

import amber

PROMPT = "Once upon a time there was a little"
SLOW = ["--precision", "float", "-t", "1"]  # with AMBER_ISA=ref: some tokens a second


@pytest.fixture(scope="module")
def native(test_bin):
    return str(test_bin / "amber-native")


def run(*args, **options):
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(args, capture_output=True, text=True, timeout=120, **options)


def test_answer_is_pythons(native, demo_model):
    with amber.Engine("demo") as engine:
        expected = engine.generate(PROMPT, temperature=0, max_tokens=20).text
        sampled = engine.generate(PROMPT, max_tokens=20, seed=7).text
    done = run(native, demo_model, "-p", PROMPT, "-n", "20", "--temp", "0")
    assert done.returncode == 0
    assert done.stdout.removesuffix("\n") == expected.removesuffix("\n")
    (line,) = done.stderr.splitlines()
    for word in ("load", "prefill", "tok/s", "first token", "decode", "seed"):
        assert word in line
    done = run(native, demo_model, "-p", PROMPT, "-n", "20", "-s", "7")
    assert done.stdout.removesuffix("\n") == sampled.removesuffix("\n")
    assert done.stderr.rstrip().endswith("seed 7")


def test_prompt_from_stdin(native, demo_model, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    options = ["-n", "8", "--temp", "0"]
    with open(path) as file:
        piped = run(native, demo_model, *options, stdin=file)
    assert piped.returncode == 0
    assert piped.stdout == run(native, demo_model, "-p", PROMPT, *options).stdout


def test_random_seed_is_told_and_repeats(native, demo_model):
    options = [native, demo_model, "-p", PROMPT, "-n", "16", "--temp", "1.5"]
    first = run(*options)
    seed = re.search(r"seed (\d+)", first.stderr)[1]
    assert run(*options, "-s", seed).stdout == first.stdout


def test_info_and_help(native, demo_model):
    info = run(native, demo_model, "--info")
    assert info.returncode == 0 and "architecture   llama" in info.stdout
    help_text = run(native, "--help")
    assert help_text.returncode == 0 and "usage: amber-native" in help_text.stdout
    assert run(native, "--version").stdout == amber.__version__ + "\n"


def test_full_context_ends_the_answer(native, demo_model):
    done = run(native, demo_model, "-p", PROMPT, "-c", "24", "--temp", "0")
    assert done.returncode == 0 and done.stdout
    assert "context of 24 tokens is full" in done.stderr


def test_refusals(native, demo_model, tmp_path):
    not_gguf = tmp_path / "x.gguf"
    not_gguf.write_text("version https://git-lfs.github.com/spec/v1\n")
    for args, code, word in (
        ([], 2, "no model"),
        ([demo_model, "again", "-p", "x"], 2, "more than one model"),
        ([demo_model, "-p"], 2, "-p"),
        ([demo_model, "-p", "x", "--frobnicate", "1"], 2, "--frobnicate"),
        ([demo_model, "-p", "x", "-n", "many"], 2, "many"),
        ([demo_model, "-p", "x", "-t", "0"], 2, "-t"),
        ([demo_model, "-p", "x", "--temp", "hot"], 2, "hot"),
        ([demo_model, "-p", "x", "--temp", "nan"], 2, "temperature"),
        ([demo_model, "-p", "x", "--precision", "int4"], 2, "int4"),
        ([demo_model, "-p", "x", "--kv-type", "q8"], 2, "--kv-type: neither f16 nor int8: q8"),
        ([demo_model, "-p", "x", "--kv-type", "int8", "--precision", "float"], 1, "kv_type"),
        (["/no/such/file", "-p", "x"], 1, "/no/such"),
        ([not_gguf, "-p", "x"], 1, "Git LFS"),
        ([demo_model, "-p", "word " * 100, "-c", "50"], 1, "50"),
    ):
        done = run(native, *args)
        assert done.returncode == code and done.stdout == "", (args, done.stderr)
        assert word in done.stderr, (args, done.stderr)


@pytest.mark.parametrize("during", ["prefill", "decode"])
def test_interrupt(native, demo_model, during):
    prompt = "word " * 900 if during == "prefill" else PROMPT
    process = subprocess.Popen(
        [native, demo_model, "-p", prompt, "--temp", "0", *SLOW],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "AMBER_ISA": "ref"},
    )
    if during == "decode":
        assert process.stdout.read(1)
    else:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - sent < 10
    assert bool(out) == (during == "decode")

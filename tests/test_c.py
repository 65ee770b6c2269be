"""Runs the C test programs, as they are and under sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest

PROGRAMS = sorted(path.stem for path in Path(__file__).parent.glob("test_*.c"))


def run(program: Path) -> None:
    env = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}
    done = subprocess.run([program], capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, test_bin: Path) -> None:
    run(test_bin / name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_under_sanitizers(name: str, sanitized_bin: Path) -> None:
    run(sanitized_bin / name)

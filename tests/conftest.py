"""Shared fixtures. Test data lives beside the repository and is optional."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Plans run as they are asked for, whatever this machine gains by them.
os.environ["AMBER_SPARSE_MIN_TOKENS"] = "0"

# A shell starts background jobs with SIGINT ignored, and children inherit that: the programs that
# the tests interrupt would never notice.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Folder of real models, vocabularies and texts: $AMBER_TESTDATA, else ../shared/testdata."""
    path = Path(os.environ.get("AMBER_TESTDATA", ROOT.parent / "shared" / "testdata"))
    if not (path / "models").is_dir():
        pytest.skip("no test data here (set AMBER_TESTDATA)")
    return path


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model that ships with the package."""
    from amber.models import find_model

    return Path(find_model("demo"))


def build(folder: Path, *options: str) -> Path:
    """Configures and builds the C library, its tests and its tools in `folder`."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is missing: pip install '.[test]' brings it"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *ninja, "-DAMBER_WERROR=ON", *options],
        [cmake, "--build", str(folder), "--parallel"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture(scope="session")
def test_bin() -> Path:
    """Folder of the C test programs and tools, built here (or given in $AMBER_TEST_BIN)."""
    given = os.environ.get("AMBER_TEST_BIN")
    return Path(given) if given else build(ROOT / "build" / "ctest")


@pytest.fixture(scope="session")
def sanitized_bin() -> Path:
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build(
        ROOT / "build" / "sanitize",
        "-DAMBER_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    )

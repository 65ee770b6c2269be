"""tools/gpu_check.py without a GPU: it says so, and its steps run on the emulated one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from amber import Engine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import gpu_check

ROOT = gpu_check.ROOT


def check(out: Path, *args: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(out), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_no_gpu(tmp_path: Path) -> None:
    done, lines = check(tmp_path / "out.jsonl", "--driver", "no-such-driver.so")
    assert done.returncode == 3
    assert done.stderr.startswith("no GPU: no NVIDIA driver (no-such-driver.so")
    (line,) = lines
    assert line["step"] == "gpu" and line["ok"] is False
    assert line["reason"].startswith("no GPU: no NVIDIA driver")


def test_wrong_use(tmp_path: Path) -> None:
    done, lines = check(tmp_path / "out.jsonl", "--steps", "probe,dance")
    assert done.returncode == 2 and "found dance" in done.stderr and lines == []


def test_steps_on_the_emulated_gpu(test_bin: Path, tmp_path: Path) -> None:
    if not (test_bin / "libamber_cuda_emulated.so").exists():
        pytest.skip("no C++ compiler built the emulated device")
    out = tmp_path / "out.jsonl"
    done, lines = check(out, "--emulated", "--bin", str(test_bin), "--scratch", str(tmp_path))
    assert done.returncode == 0, done.stderr + out.read_text()
    ends = {line["step"]: line for line in lines if "step_seconds" in line}
    assert list(ends) == list(gpu_check.STEPS)
    for name in ("probe", "kernels", "gemm", "input", "attention", "text", "model"):
        assert ends[name]["ok"] is True, ends[name]
    assert ends["build"]["lacks"].startswith("taken as it is")
    layouts = [line for line in lines if line.get("probe") == "layout"]
    assert len(layouts) == 7 and all(line["wrong"] == 0 for line in layouts)
    (kernels,) = [line for line in lines if line["step"] == "kernels" and "result" in line]
    assert kernels["result"].endswith(" 0 failed")
    forms = {line["form"] for line in lines if line.get("bench") == "gemm" and line["us"] > 0}
    assert forms == {"dense", "2:4", "2:4+r32", "2:4+r16", "8:16x"}
    models = [line for line in lines if line.get("bench") == "model"]
    assert {(m["sparse"], m["what"]) for m in models} == {
        (sparse, what) for sparse in gpu_check.PATTERNS for what in ("prefill", "decode")
    }
    assert all(m["device"] == "cuda:0 emulated" for m in models)
    texts = [line for line in lines if line["step"] == "text" and "equal" in line]
    assert texts and all(line["equal"] for line in texts)
    assert "tok/s" in done.stdout and "us of a product" in done.stdout


def test_a_step_that_hangs_is_stopped_and_recorded(tmp_path: Path) -> None:
    program = tmp_path / "test_cuda_kernels"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    steps = "kernels,input,device"
    args = ["--emulated", "--bin", str(tmp_path), "--steps", steps, "--limit", "2"]
    done, lines = check(tmp_path / "out.jsonl", *args)
    ends = {line["step"]: line for line in lines if "step_seconds" in line}
    assert done.returncode == 0 and list(ends) == steps.split(",")
    assert "stopped after 2 s" in ends["kernels"]["lacks"]
    assert "tool_cuda_bench was not built" in ends["input"]["lacks"]
    assert [line["python"] for line in lines if "python" in line]


def test_a_program_that_fails_is_told(tmp_path: Path) -> None:
    program = tmp_path / "tool_cuda_bench"
    program.write_text("""#!/bin/sh\necho '{"error": "an illegal address"}'; exit 1\n""")
    program.chmod(0o755)
    args = ["--emulated", "--bin", str(tmp_path), "--steps", "gemm,input"]
    done, lines = check(tmp_path / "out.jsonl", *args)
    ends = {line["step"]: line for line in lines if "step_seconds" in line}
    assert done.returncode == 1 and len(ends) == 2
    assert ends["gemm"]["wrong"] == "tool_cuda_bench ended with code 1: an illegal address"


def test_model_files_load(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gpu_check.write_model(path, gpu_check.TINY)
    with Engine(str(path), n_ctx=64) as engine:
        assert engine.info.n_layer == 2 and engine.info.n_vocab == 512
        logits = engine.logits([1, 70, 71, 72])
        assert all(abs(value) < 1e3 for value in logits)
    assert gpu_check.model_bytes(gpu_check.TINY) < path.stat().st_size


@pytest.mark.parametrize(
    ("capability", "arch"), [("8.0", "80"), ("8.7", "87"), ("9.0", "90a"), ("12.0", "120")]
)
def test_architectures(capability: str, arch: str) -> None:
    assert gpu_check.arch_of(capability) == arch

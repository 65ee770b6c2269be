"""The CUDA kernels compile without warnings and spills; for all GPUs: tools/cuda_matrix.py."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import cuda_matrix


def test_ptxas_output_is_understood() -> None:
    text = """ptxas info    : Compiling entry function '_Z11gemm_kernelILi1ELi4EEv9gemm_args'
ptxas info    : Function properties for _Z11gemm_kernelILi1ELi4EEv9gemm_args
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 132 registers, used 1 barriers, 456 bytes cmem[0]"""
    assert cuda_matrix.read_ptxas(text) == {"gemm_kernel<1,4>": {"registers": 132, "spilled": 12}}


def test_machine_code_checks_can_fail() -> None:
    good = {f"{name}>": " ".join(needs) for name, needs in cuda_matrix.MUST.items()}
    assert cuda_matrix.check_sass(good) == []
    assert cuda_matrix.check_sass({**good, "gemv_kernel>": "IDP.4A.S8.S8"}) == [
        "gemv_kernel>: no LDG.E.128"
    ]
    spilled = {**good, "gemv_kernel>": "IDP.4A.S8.S8 LDG.E.128 LDL"}
    assert cuda_matrix.check_sass(spilled) == ["gemv_kernel>: has LDL"]


def test_kernels_compile(tmp_path: Path) -> None:
    if not cuda_matrix.find_nvcc():
        pytest.skip("no nvcc here")
    result = cuda_matrix.compile_for("sm_80", tmp_path)
    assert result["wrong"] == []
    assert all(0 < k["registers"] <= 255 for k in result["kernels"].values())
    # And as text, which drivers compile for GPUs that came later.
    ptx = tmp_path / "amber_cuda.ptx"
    command = [cuda_matrix.find_nvcc(), *cuda_matrix.FLAGS, "-arch=compute_80", "-ptx"]
    subprocess.run([*command, "-o", ptx, cuda_matrix.SOURCE], check=True)
    assert "mma.sp::ordered_metadata.sync.aligned.m16n8k64" in ptx.read_text()

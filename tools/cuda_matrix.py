"""Compiles the CUDA kernels for every supported GPU and tells what came of it: seconds, registers,
spills, bytes, and, where cuobjdump and nvdisasm are found (pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm), whether the machine code has the instructions that it must have.

    python tools/cuda_matrix.py                 all GPUs
    python tools/cuda_matrix.py sm_80 sm_120    these
    python tools/cuda_matrix.py --json out.json
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "cuda" / "amber_cuda.cu"
TARGETS = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_120"]
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Werror", "all-warnings"]
# What a kernel's machine code must and must not contain, by the start of its name.
MUST = {
    "gemm_kernel<0": ["IMMA.16832.S8.S8", "LDS.128", "LDGSTS"],
    "gemm_kernel<1": ["IMMA.SP.16864.S8.S8", "LDS.128", "LDGSTS"],
    "gemm_kernel<2": ["IMMA.SP.16864.S8.S8", "LDS.128", "LDGSTS"],
    "gemm_kernel<3": ["IMMA.SP.16864.S8.S8", "LDS.128", "LDGSTS"],
    "gemm_kernel<4": ["IMMA.SP.16864.S8.S8", "LDS.128", "LDGSTS"],
    "gemv_kernel": ["IDP.4A.S8.S8", "LDG.E.128"],
    "flash_kernel": ["HMMA.16816.F32", "LDSM", "LDGSTS"],
}
MUST_NOT = ["LDL", "STL"]


def find_nvcc() -> str | None:
    """nvcc from the PATH, or where CUDA_PATH or the usual place has it."""
    for folder in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (Path(folder) / "bin" / "nvcc").exists():
            return str(Path(folder) / "bin" / "nvcc")
    return shutil.which("nvcc")


def find_tool(name: str) -> str | None:
    """A CUDA binary utility from the PATH or from NVIDIA's wheels."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in Path(folder).glob(f"**/bin/{name}"):
            found = found or str(path)
    return found


def plain_name(mangled: str) -> str:
    """gemm_kernel<1,4> from _Z11gemm_kernelILi1ELi4EEv9gemm_args."""
    name = re.match(r"_Z\d+([a-z_0-9]*?kernel)(.*)", mangled)
    if not name:
        return mangled
    numbers = re.findall(r"Li(\d+)E", name[2])
    return name[1] + (f"<{','.join(numbers)}>" if numbers else "")


def read_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes per kernel from what ptxas -v prints."""
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.search(
            r"(?:Compiling entry function|Function properties for) '?(\w+)", line
        ):
            name = plain_name(found[1])
            kernels.setdefault(name, {"registers": 0, "spilled": 0})
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name]["spilled"] += int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[name]["registers"] = int(found[1])
    return kernels


def read_sass(cubin: Path) -> dict[str, str] | None:
    """Machine code per kernel; None where the tools are missing."""
    cuobjdump = find_tool("cuobjdump")
    disassembler = find_tool("nvdisasm")
    if not cuobjdump or not disassembler:
        return None
    env = {**os.environ, "PATH": f"{Path(disassembler).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True, env=env
    )
    parts = re.split(r"Function : (\w+)", done.stdout)
    return {plain_name(n): code for n, code in zip(parts[1::2], parts[2::2], strict=True)}


def check_sass(sass: dict[str, str]) -> list[str]:
    """What is wrong with the machine code."""
    wrong = []
    for start, needs in MUST.items():
        names = [name for name in sass if name.startswith(start)]
        if not names:
            wrong.append(f"{start}: no such kernel")
        for name in names:
            wrong += [f"{name}: no {need}" for need in needs if need not in sass[name]]
            wrong += [f"{name}: has {no}" for no in MUST_NOT if re.search(rf"\b{no}\b", sass[name])]
    return wrong


def compile_for(target: str, folder: Path) -> dict:
    """Compiles for one GPU; raises RuntimeError with nvcc's words where that fails."""
    nvcc = find_nvcc()
    assert nvcc
    cubin = folder / f"amber_cuda.{target}.cubin"
    command = [nvcc, *FLAGS, "-Xptxas", "-v,-warn-spills", f"-arch={target}", "-cubin"]
    start = time.monotonic()
    done = subprocess.run([*command, "-o", cubin, SOURCE], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{target}: {done.stdout}{done.stderr}")
    kernels = read_ptxas(done.stderr)
    wrong = [f"{name}: spills" for name, k in kernels.items() if k["spilled"]]
    sass = read_sass(cubin)
    return {
        "target": target,
        "seconds": round(time.monotonic() - start, 1),
        "bytes": cubin.stat().st_size,
        "kernels": kernels,
        "sass": sass is not None,
        "wrong": wrong + (check_sass(sass) if sass else []),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if not find_nvcc():
        print("nvcc was not found (set CUDA_PATH, or put it on the PATH)", file=sys.stderr)
        return 1
    results, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for target in args.targets:
            try:
                r = compile_for(target, Path(folder))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
            results.append(r)
            most = max(k["registers"] for k in r["kernels"].values())
            failed |= bool(r["wrong"])
            print(
                f"{target:8} {r['seconds']:6.1f} s {r['bytes'] / 1024:7.0f} KiB"
                f" {len(r['kernels']):3} kernels, at most {most} registers,"
                f" machine code {'read' if r['sass'] else 'not read'}:"
                f" {'; '.join(r['wrong']) or 'as it must be'}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())

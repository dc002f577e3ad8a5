"""The CUDA sources compile for sm_80, sm_90 and PTX, without spills. No GPU is needed; what the kernels compute is
tested through the C++ emulation of their order of work (test_value.py), for group statistics by the kernel's own text
on threads of the host, and on a GPU by the same test files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
KERNELS = {
    "gae.cu": {"gae_kernel"},
    "moments.cu": {"partial_moments_kernel", "merge_moments_kernel", "whiten_kernel", "group_stats_kernel"},
}
MAX_REGISTERS = 80  # 256 threads: three blocks a multiprocessor at least

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def report(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> registers, spill bytes, shared memory, from ptxas -v."""
    found, key = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(sm_\d+)'", line):
            key = (re.search(r"\d([a-z_]+_kernel)", entry.group(1)).group(1), entry.group(2))
            found.setdefault(key, {"spill": 0, "registers": -1, "shared": 0})  # of a template: the worst form
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[key]["spill"] += int(spill.group(1)) + int(spill.group(2))
        elif used := re.search(r"Used (\d+) registers", line):
            found[key]["registers"] = max(found[key]["registers"], int(used.group(1)))
            shared = re.search(r"(\d+) bytes smem", line)
            found[key]["shared"] = max(found[key]["shared"], int(shared.group(1)) if shared else 0)
    return found


def test_every_source_is_listed():
    assert {source.name for source in SOURCES} == set(KERNELS)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c", str(source)]
    for target in TARGETS:
        command += ["-gencode", target]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = report(done.stderr)
    assert set(kernels) == {(name, arch) for name in KERNELS[source.name] for arch in ("sm_80", "sm_90")}
    for (name, arch), use in sorted(kernels.items()):
        print(f"{name:24} {arch} registers {use['registers']:3} spill {use['spill']} shared {use['shared']}")
        assert use["spill"] == 0, (name, arch)
        assert 0 < use["registers"] <= MAX_REGISTERS, (name, arch)
        assert use["shared"] <= 48 * 1024, (name, arch)


@pytest.fixture(scope="module")
def group_stats(tmp_path_factory) -> Path:
    """The kernel of group statistics as a program whose threads are the host's."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("threads")
    source = (SOURCES[0].parent / "moments.cu").read_text()
    kernel = re.search(r"template <int kTeam, typename Join>.*?(?=^}  // namespace$)", source, re.DOTALL | re.MULTILINE)
    (folder / "kernel.inc").write_text(kernel.group())
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-pthread",
        f"-I{folder}",
        str(Path(__file__).parent / "cuda_on_threads.cpp"),
    ]
    subprocess.run([*command, "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.mark.parametrize("sizes", [[5000], [5], [0], [8, 0, 1, 33, 300, 7, 64, 2]], ids=str)
def test_group_statistics_on_threads_of_the_host(group_stats, sizes):
    """One group by a whole block, several by a warp each: as fp64 torch has them, equal rewards exactly."""
    g = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(sum(sizes), generator=g, dtype=torch.float64)
    values[1::7] = torch.nan
    offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for rewards in (values, torch.full_like(values, 0.1)):
        lines = [len(rewards), *rewards.tolist(), len(offsets), *offsets]
        words = "\n".join(map(repr, lines))
        done = subprocess.run([str(group_stats)], input=words, capture_output=True, text=True, check=True, timeout=120)
        count, mean, m2 = torch.tensor([float(x) for x in done.stdout.split()], dtype=torch.float64).view(3, -1)
        for i, (begin, end) in enumerate(pairwise(offsets)):
            finite = rewards[begin:end]
            finite = finite[finite.isfinite()]
            centre = finite.mean() if len(finite) else torch.zeros((), dtype=torch.float64)
            assert count[i] == len(finite)
            torch.testing.assert_close(mean[i], centre, rtol=1e-14, atol=0)
            torch.testing.assert_close(m2[i], (finite - centre).square().sum(), rtol=1e-9, atol=1e-9)
            assert m2[i] == 0 or rewards is values


def configure(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """CMake over the copy of the sources in `folder`."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = shutil.which("cmake") or pytest.skip("no cmake")
    command = [cmake, "-S", str(folder), "-B", str(folder / "b"), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert list((folder / "b").rglob("_C.dir"))
    return done


def copy_sources(folder: Path) -> None:
    for name in ("csrc", "cmake"):
        shutil.copytree(SOURCES[0].parents[2] / name, folder / name)
    shutil.copy(SOURCES[0].parents[2] / "CMakeLists.txt", folder)


@needs_nvcc
def test_nvcc_need_not_be_on_path(tmp_path):
    """A toolkit that only CUDA_HOME knows of, as on many a GPU machine."""
    copy_sources(tmp_path)
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n')
    nvcc.chmod(0o755)
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
    done = configure(tmp_path, PATH=path, CUDA_HOME=str(tmp_path / "toolkit"), RLHF_FAST_CUDA="on")
    assert list((tmp_path / "b").rglob("_cuda.dir")), done.stdout + done.stderr
    assert str(nvcc) in (tmp_path / "b" / "CMakeCache.txt").read_text()


@needs_nvcc
def test_broken_sources_cost_the_cuda_module_alone(tmp_path):
    """RLHF_FAST_CUDA=auto: without `_cuda` the build goes on, and `_C` knows why (`rlhf-fast doctor` shows it)."""
    copy_sources(tmp_path)
    done = configure(tmp_path)
    assert list((tmp_path / "b").rglob("_cuda.dir")), done.stdout + done.stderr
    with open(tmp_path / "csrc" / "cuda" / SOURCES[0].name, "a") as file:
        file.write('\n#error "planted"\n')
    shutil.rmtree(tmp_path / "b")
    done = configure(tmp_path)
    assert "planted" in done.stderr
    assert "did not compile the CUDA sources" in done.stdout
    assert not list((tmp_path / "b").rglob("_cuda.dir"))

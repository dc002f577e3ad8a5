"""What a user gets: the sdist builds, the wheel holds the right files, and no compiler is no obstacle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from rlhf_fast import _backend

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys, scikit_build_core.build as b; print(getattr(b, sys.argv[1])(sys.argv[2], {}))"
BUILT_HERE = (".git", ".venv*", "build", "dist", "runs", "__pycache__", "*.so", ".*_cache", ".hypothesis")


def build(what: str, source: Path, destination: Path, **env: str) -> Path:
    """Run a hook of the build backend in `source`, as pip does, with nothing left from an earlier one."""
    shutil.rmtree(source / "build", ignore_errors=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CUDACXX", "RLHF_FAST_CUDA")}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(destination)],
        cwd=source, env=clean | env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return destination / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*BUILT_HERE))
    archive = build("build_sdist", folder / "tree", folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / archive.name.removesuffix(".tar.gz")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def assert_python_files(found: set[str]) -> None:
    kernels = {f"rlhf_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels
    assert kernels | {f"rlhf_fast/{name}" for name in ("__init__.py", "py.typed", "ops/__init__.py")} <= found
    assert "rlhf_fast/kernels/__init__.py" not in found
    top = {name.partition("/")[0] for name in found}
    assert {name for name in top if not name.endswith(".dist-info")} == {"rlhf_fast"}
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_kernels_is_not_a_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # transformers would import it from the working directory


def test_sdist_is_complete(sdist):
    for name in (
        "LICENSE",
        "README.md",
        "CMakeLists.txt",
        "cmake/cuda_compiles.cmake",
        "csrc/bindings.cpp",
        "csrc/cpu/row_pass_vec.h",
    ):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.so"))
    assert not (sdist / ".venv").exists()


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_wheel_from_the_sdist(sdist, tmp_path):
    # -O0: what the compiler makes of the kernels is not the question here.
    wheel = build(
        "build_wheel", sdist, tmp_path, RLHF_FAST_CUDA="off",
        SKBUILD_CMAKE_DEFINE="CMAKE_CXX_FLAGS_RELEASE=-O0", CMAKE_BUILD_PARALLEL_LEVEL="2",
    )  # fmt: skip
    found = names(wheel)
    assert_python_files(found)
    assert any(name.startswith("rlhf_fast/_C.") for name in found)
    assert not any("_cuda." in name for name in found)

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S: without the editable installation that these tests may run from.
    code = f"""
import sys
sys.path[:0] = [{str(site)!r}, {str(Path(torch.__file__).parents[1])!r}]
import rlhf_fast
from rlhf_fast import _backend
assert rlhf_fast.__file__.startswith({str(site)!r}), rlhf_fast.__file__
assert _backend.cpp_module().__file__.startswith({str(site)!r})
assert _backend.cpp_available()
"""
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=tmp_path)


def test_install_without_a_compiler(sdist, tmp_path):
    wheel = build("build_wheel", sdist, tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert wheel.name.endswith("py3-none-any.whl")
    found = names(wheel)
    assert_python_files(found)
    assert not any(name.endswith((".so", ".pyd")) for name in found)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_cuda_on_demand_fails_without_nvcc(sdist, tmp_path):
    with pytest.raises(AssertionError, match="no working nvcc was found"):
        build("build_wheel", sdist, tmp_path, RLHF_FAST_CUDA="on", CUDACXX=str(tmp_path / "no-such-nvcc"))


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_this_installation_has_its_extension():
    # A failed build falls back to pure Python and most tests would pass: here it must not go unseen.
    assert _backend.cpp_available(), _backend.unavailable_reason("_C") or "_C is out of date: install again"

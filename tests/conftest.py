"""Where the suite runs: on the GPU when there is one, otherwise Triton's kernels go through its interpreter."""

import os

# Before torch loads its OpenMP: threads that wait by spinning make tiny ops crawl on a machine that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ON_GPU = torch.cuda.is_available()
FAKE_GPU = "FAKE_GPU" in os.environ  # tests/fake_gpu: no streams, no graphs, and the CPU's speed
if ON_GPU:  # for this process: those that tests start, ranks above all, run as on a machine without one
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic when torch is asked to be
    torch.cuda.init()
    torch.cuda.device_count()  # is remembered from now on
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """For the run on a GPU of under ten minutes, benchmarks/gpu_visit.py."""
    parser.addoption("--on-device", action="store_true", help="only tests that take the `device` fixture")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a GPU changes nothing about, if asked to."""
    if config.getoption("--on-device"):
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]


def pytest_report_header() -> list[str]:
    where = torch.cuda.get_device_name() if ON_GPU else "none: Triton kernels are interpreted on the CPU"
    return [f"torch {torch.__version__}, GPU: {where}"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which the GPU-capable tests run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The GPU, for tests of what nothing else has."""
    if device.type != "cuda":
        pytest.skip("of a GPU alone")
    if FAKE_GPU:
        pytest.skip("the simulated GPU has no streams and no graphs, and its memory is the CPU's to fill")
    return device


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

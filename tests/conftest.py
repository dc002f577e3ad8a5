"""Where the suite runs: on the GPU when there is one, otherwise Triton's kernels go through its interpreter."""

import os

# Before torch loads its OpenMP: threads that wait by spinning make tiny ops crawl on a machine that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ON_GPU = torch.cuda.is_available()
if ON_GPU:  # for this process: those that tests start, ranks above all, run as on a machine without one
    torch.cuda.init()
    torch.cuda.device_count()  # is remembered from now on
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """For a visit to a GPU."""
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

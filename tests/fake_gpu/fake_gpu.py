"""A GPU of host memory for a torch without CUDA: `import fake_gpu` before torch, or `pytest -p fake_gpu`.

FAKE_GPU names the folder in which `build` has put the two libraries, FAKE_GPUS how many devices there are (1). Ops run
on the CPU (device.cpp), Triton's kernels in the interpreter with bf16 as the hardware rounds it, the CUDA scans as the
C++ ones. What this shows is that the host's code hands the right tensors to the right device; it says nothing about
kernels, streams or time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

HERE = Path(__file__).parent
NOTHING = [
    "_lazy_init",
    "init",
    "synchronize",
    "empty_cache",
    "ipc_collect",
    "manual_seed",
    "manual_seed_all",
    "seed_all",
    "_sleep",
]
LIBRARIES = {"hooks": ["-ltorch_cpu", "-lc10"], "device": ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]}


def torch_folder() -> Path:
    """Where torch lies, without importing it."""
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def build(folder: Path) -> None:
    """Compile both libraries into `folder`: half a minute."""
    torch = torch_folder()
    paths = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    common = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-w", *(f"-I{path}" for path in paths)]
    common += [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", f"-Wl,-rpath,{folder}", "-DTORCH_EXTENSION_NAME=x"]
    for name, libraries in LIBRARIES.items():
        own = [f"-L{folder}", "-l:hooks.so"] if name == "device" else []
        command = [*common, str(HERE / f"{name}.cpp"), "-o", str(folder / f"{name}.so"), *libraries, *own]
        subprocess.run(command, check=True)


def load(folder: Path):
    """torch with a device, and the module that steers it."""
    if "torch" in sys.modules:
        raise RuntimeError("fake_gpu must be imported before torch")
    for name in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "hooks.so"), mode=ctypes.RTLD_GLOBAL)
    import torch

    spec = importlib.util.spec_from_file_location("fake_gpu_device", folder / "device.so")
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    _patch_cuda(torch, device)
    return device


class Properties:
    """Of the only device."""

    name, major, minor, multi_processor_count, total_memory = "a fake GPU", 9, 0, 4, 16 << 30


class Event:
    """Of the host's clock."""

    def __init__(self, **options):
        self.time = 0.0

    def record(self, stream=None):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)

    synchronize = wait = lambda self, *args: None
    query = lambda self: True  # noqa: E731


class Stream:
    """The only one."""

    cuda_stream = 0

    def __init__(self, *args, **options):
        pass

    synchronize = wait_stream = lambda self, *args: None
    __enter__ = __exit__ = lambda self, *args: None


def _patch_cuda(torch, device) -> None:
    cuda, count = torch.cuda, int(os.environ.get("FAKE_GPUS", "1"))
    device.set_devices(count)

    def index(which=None) -> int:
        found = which if isinstance(which, int) or which is None else torch.device(which).index
        return device.get_device() if found is None else found

    class current:
        def __init__(self, which):
            self.index = index(which)

        def __enter__(self):
            self.before = device.get_device()
            device.set_device(self.index)

        def __exit__(self, *args):
            device.set_device(self.before)

    values = dict(
        is_available=True, is_initialized=True, device_count=count, get_device_properties=Properties,
        get_device_name=Properties.name, get_device_capability=(9, 0), is_bf16_supported=True, get_arch_list=["sm_90"],
        current_stream=Stream(), default_stream=Stream(), _is_in_bad_fork=False, is_current_stream_capturing=False,
        get_sync_debug_mode=0, initial_seed=0, mem_get_info=(16 << 30, 16 << 30),
    )  # fmt: skip
    for name, value in values.items():
        setattr(cuda, name, lambda *args, _value=value, **options: _value)
    for name in NOTHING:
        setattr(cuda, name, lambda *args, **options: None)  # each its own: torch.compile tells them apart
    for name in ("memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *args: device.live())
        setattr(cuda, f"max_{name}", lambda *args: device.peak())
    cuda.reset_peak_memory_stats = lambda *args: device.reset_peak()
    cuda.current_device, cuda.set_device, cuda.device = (
        device.get_device,
        lambda d: device.set_device(index(d)),
        current,
    )
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.Event, cuda.Stream, cuda.stream = Event, Stream, lambda stream: contextlib.nullcontext()
    cuda.set_sync_debug_mode = lambda mode: device.sync_error(mode == "error")
    torch.Tensor.pin_memory = lambda self, *args: self


def _patch_interpreter(device) -> None:
    """bf16 as a GPU has it: rounded to nearest, and multiplied as numbers. Its own copies are no syncs."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def wide(data):
        bits = np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(data.shape)

    def narrow(data):
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(data), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.astype(np.uint16).view(interpreter._get_np_dtype(tl.bfloat16))

    def dot(self, a, b, d, *args, _plain=builder.create_dot):
        if a.dtype.scalar != tl.bfloat16:
            return _plain(self, a, b, d, *args)
        return handle(np.matmul(wide(a.data), wide(b.data)) + d.data, d.dtype.scalar)

    builder.create_dot = dot
    for name in ("cast_impl", "create_fp_trunc", "create_fp_to_fp"):

        def cast(self, src, to, *args, _plain=getattr(builder, name)):  # noqa: B008
            if (src.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
                return _plain(self, src, to, *args)
            return handle(narrow(src.data), tl.bfloat16)

        setattr(builder, name, cast)

    def launch(self, *args, _plain=interpreter.GridExecutor.__call__, **options):
        for tensor in (t for t in (*args, *options.values()) if getattr(t, "is_cuda", False)):
            if tensor.get_device() != device.get_device():
                raise RuntimeError(f"launched on cuda:{device.get_device()}, but a tensor lies on {tensor.device}")
        waits = device.sync_error(False)
        try:
            return _plain(self, *args, **options)
        finally:
            device.sync_error(waits)

    interpreter.GridExecutor.__call__ = launch


def _scans() -> types.ModuleType:
    """`rlhf_fast._cuda` by `rlhf_fast._C`: the memory is the host's."""

    def cpp():
        from rlhf_fast import _C

        return _C

    module = types.ModuleType("rlhf_fast._cuda")
    module.gae_workspace_bytes = module.moments_workspace_bytes = lambda n: 64

    def gae(*args):
        *vectors, n, batch, length, gamma, lam, carry, bootstrap, ends, advantages, returns, workspace, stream = args
        cpp().gae(*vectors, batch, length, gamma, lam, carry, bootstrap, advantages, returns, 1)

    def ppo_advantages(*args):
        *head, shaped, kl, statistics, eps, workspace, stream = args
        before, bootstrap, rest = head[:4], head[10], head[12:]  # the 12th says where sequences end: a scan knows
        cpp().ppo_advantages(*before, *head[5:10], bootstrap, *rest, kl, bool(statistics), eps, 1)

    module.gae, module.ppo_advantages = gae, ppo_advantages
    module.moments = lambda x, mask, n, workspace, out, stream: cpp().moments(x, mask, n, out, 1)
    module.whiten = lambda *args: cpp().whiten(*args[:-1], 1)
    module.group_stats = lambda *args: cpp().group_stats(*args[:-1], 1)
    return module


if "FAKE_GPU" in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    DEVICE = load(Path(os.environ["FAKE_GPU"]))
    _patch_interpreter(DEVICE)
    sys.modules["rlhf_fast._cuda"] = _scans()

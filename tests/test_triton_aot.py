"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU; what the assembler made of it is judged.

Nothing here ran on a GPU: registers, spills and instructions are read off the machine code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).with_name("aot.py")
REGISTERS_PER_SM = 65536

SPILLS = {
    "divergence_dlogits bf16->bf16 jsd both cap": 8,
    "divergence_dlogits fp32->bf16 jsd bias both cap in place": 16,
}
"""Bytes that Triton 3.6 spills where 3.9 spills none: two and four registers of the rarest variants."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def found() -> dict:
    """What `aot.py` prints. In a process of its own: this one may have switched Triton to its interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, str(AOT), "--json", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reports(found) -> dict[tuple[str, int], dict]:
    """By (name, sm)."""
    return {(r["name"], r["sm"]): r for r in found["reports"]}


@needs_triton
def test_every_kernel_compiles_for_every_target(reports):
    assert {sm for _, sm in reports} == {80, 90, 100}
    kernels = {name.split()[0] for name, sm in reports if sm == 90}
    rows = {"row_stats", "row_combine", "row_dlogits", "row_divergence", "divergence_dlogits"}
    assert kernels == rows | {"head_stats", "head_combine", "head_exp", "policy_clip", "policy_sums"}


@needs_triton
def test_no_shipped_configuration_spills(reports):
    assert {k: r["spills"] for k, r in reports.items() if r["spills"] > SPILLS.get(k[0], 0)} == {}


@needs_triton
def test_row_passes_leave_room_for_enough_programs(reports):
    """With 64 bytes in flight per thread, 512 threads of a multiprocessor carry 32 KB: latency * bandwidth (H200)."""
    for (name, sm), r in reports.items():
        if name.startswith(("row_stats", "row_dlogits", "row_divergence", "divergence_dlogits")):
            resident = REGISTERS_PER_SM // (r["registers"] * 256) * 256
            assert resident >= 512, (name, sm, r["registers"])


@needs_triton
def test_aligned_rows_use_16_byte_accesses(reports):
    for (name, sm), r in reports.items():
        if "ragged" in name or name.startswith(("row_combine", "policy_sums", "head_")):
            continue
        assert r["load_bytes"] == 16, (name, sm)
        if not name.startswith(("row_stats", "row_divergence")):
            assert r["store_bytes"] == 16, (name, sm)


@needs_triton
def test_the_head_runs_on_the_tensor_cores_and_loads_by_tma(reports):
    """Four products a step of 64 columns, two loads for each of the stages ahead and for the step itself."""
    found = {k: r["units"] for k, r in reports.items() if k[0].startswith(("head_stats", "head_exp"))}
    assert {sm for _, sm in found} == {90, 100}
    for (name, sm), units in found.items():
        assert units["HMMA"] == 0, (name, sm)  # the slow road, to which the compiler turns where it must
        assert units["UTMALDG"] == 8 if sm == 90 else units["UTMALDG"] >= 2, (name, sm, units)
        assert units["HGMMA" if sm == 90 else "UTCHMMA"] >= 4, (name, sm, units)
        if sm == 90:
            assert reports[name, sm]["shared"] <= 227 * 1024  # what a program may have on an H100


@needs_triton
def test_stats_loads_a_whole_block_before_its_arithmetic(reports):
    for sm in (80, 90, 100):
        assert reports["row_stats fp32 V=151936 H", sm]["wide_events"].startswith("LLLLM")


@needs_triton
def test_narrowing_in_place_stores_behind_a_barrier_and_loads_ahead(reports):
    """Without the barrier one warp overwrites what another has not read; without the prefetch loads go one by one."""
    for sm in (80, 90, 100):
        events = reports["row_dlogits fp32->bf16 in place H order", sm]["wide_events"].replace("M", "")
        events = events.lstrip("S")  # the rows of zeros
        assert events.startswith("LLLLLLLLBSS"), events  # block 0, block 1, then block 0 is stored
        assert "LS" not in events
        events = reports["divergence_dlogits fp32->bf16 jsd in place", sm]["wide_events"].replace("M", "")
        assert events.startswith("LLLLLLLLBS"), events  # two loads of either tile, ahead of the store of block 0
        assert "LS" not in events


@needs_triton
def test_the_reader_of_machine_code_sees_what_is_there(found):
    """Spills would pass unseen if cuobjdump's wording changed: a kernel made to spill must be caught."""
    assert found["planted"] > 0


@needs_triton
def test_launchers_pass_through_the_compiler(found):
    """The interpreter binds arguments its own way; here the JIT's binder and heuristics see what launchers pass."""
    pair = ["row_divergence_kernel", "divergence_dlogits_kernel"]
    stats, split = ["row_stats_kernel", "row_combine_kernel"], ["policy_clip_kernel", "policy_sums_kernel"]
    head = ["head_stats_kernel", "head_combine_kernel", "head_exp_kernel"]
    assert found["launches"] == [*stats, *stats, *["row_dlogits_kernel"] * 2, *pair, *head, *split, *split]

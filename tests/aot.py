"""Compile every Triton kernel ahead of time, without a GPU, and report what the assembler says.

    python tests/aot.py [--json] [--quick] [sm ...]        # 80 90 100 by default

Prints registers per thread, spilled bytes, shared memory and the widest global access of each shipped
configuration. Runs in a process of its own: under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before triton decorates anything

import triton
from rlhf_fast.kernels import divergence, head_exp, head_stats, policy, row_pass
from rlhf_fast.kernels._common import EXACT, next_pow2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)
ALIGNED = (("tt.divisibility", 16),)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
UNITS = ("HGMMA", "UTCHMMA", "UTMALDG", "HMMA")  # wgmma, tcgen05's mma, a TMA load, mma.sync
NARROW_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Config(NamedTuple):
    name: str
    kernel: Any
    types: dict[str, str]  # argument -> triton type, e.g. "*fp32"; absent: a constant
    constants: dict[str, Any]
    num_warps: int
    aligned: frozenset[str]  # arguments known to be multiples of 16
    num_stages: int | None = None


class Report(NamedTuple):
    name: str
    sm: int
    registers: int
    spills: int  # bytes of local memory per thread
    shared: int
    load_bytes: int  # widest global load and store, as in the machine code
    store_bytes: int
    wide_events: str  # 16-byte loads L, 16-byte stores S, barriers B, exponentials M, in the order of the code
    units: dict[str, int]  # how often each of UNITS stands in the code


def _config(name, kernel, types, constants, num_warps, ragged=()) -> Config:
    """Every pointer and every integer stride or length is a multiple of 16, save those in `ragged`."""
    aligned = {k for k, t in types.items() if (t.startswith("*") or k in STRIDES) and k not in ragged}
    return Config(name, kernel, types, constants, num_warps, frozenset(aligned))


STRIDES = {"v", "z_stride", "out_stride", "ref_stride", "ref_out_stride", "segment"}


def _stats(
    z: str, v: int, *, entropy=True, softcap=False, bias=False, target=True, ragged=False, padded=False
) -> list[Config]:
    lanes = row_pass.stats_lanes(NARROW_TYPES[z])
    segments, _ = row_pass.split_row(v, row_pass.STATS_SEGMENT, row_pass.ROWS_PER_BLOCK * lanes)
    types = {"z_ptr": f"*{z}", "max_ptr": "*fp32", "logsum_ptr": "*fp32", "n": "i32", "v": "i32", "z_stride": "i32"}
    types |= {"pre": "fp32"}
    constants: dict[str, Any] = {"SEGMENTS": segments, "HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
    constants |= {"HAS_TARGET": target, "HAS_LOGPROB": target, "HAS_ENTROPY": entropy}
    optional = {"target_ptr": ("*i64", target), "bias_ptr": ("*fp32", bias), "logprob_ptr": ("*fp32", target)}
    optional |= {"entropy_ptr": ("*fp32", entropy), "post": ("fp32", softcap), "part_ptr": ("*fp32", segments > 1)}
    _fill(types, constants, optional)
    flags = [
        f for f, on in (("H", entropy), ("cap", softcap), ("bias", bias), ("ragged", ragged), ("padded", padded)) if on
    ]
    label = " ".join([z, f"V={v}", *flags])
    unaligned = ("v", "z_stride") if ragged else ("v",) if padded else ()
    own = {"ROWS": row_pass.ROWS_PER_BLOCK, "LANES": lanes}
    configs = [
        _config(
            f"row_stats {label}",
            row_pass.row_stats_kernel,
            types | {"segment": "i32"},
            constants | own,
            row_pass.WARPS,
            unaligned,
        )
    ]
    if segments > 1:
        own = {"PADDED": next_pow2(segments), "BLOCK_N": row_pass.COMBINE_ROWS}
        combine = _config(f"row_combine {label}", row_pass.row_combine_kernel, types, constants | own, 4, unaligned)
        configs.append(combine)
    return configs


def _dlogits(
    z: str, out: str, *, narrow=False, b=True, order=True, softcap=False, bias=False, ragged=False, padded=False
):
    types = {"z_ptr": f"*{z}", "out_ptr": f"*{out}", "target_ptr": "*i64", "max_ptr": "*fp32", "logsum_ptr": "*fp32"}
    types |= {"d_ptr": "*fp32", "a_ptr": "*fp32", "pre": "fp32"}
    types |= dict.fromkeys(("v", "z_stride", "out_stride", "segment"), "i32")
    constants: dict[str, Any] = {"SEGMENTS": 1 if narrow else 10, "BLOCK": row_pass.DLOGITS_BLOCK}
    constants |= {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "HAS_TARGET": True, "HAS_ORDER": order, "HAS_B": b}
    optional = {"order_ptr": ("*i64", order), "bias_ptr": ("*fp32", bias), "b_ptr": ("*fp32", b)}
    _fill(types, constants, optional | {"post": ("fp32", softcap)})
    flags = (
        ("in place", narrow),
        ("H", b),
        ("order", order),
        ("cap", softcap),
        ("bias", bias),
        ("ragged", ragged),
        ("padded", padded),
    )
    label = " ".join([f"{z}->{out}", *(f for f, on in flags if on)])
    unaligned = ("v", "z_stride", "out_stride") if ragged else ("v",) if padded else ()
    return [_config(f"row_dlogits {label}", row_pass.row_dlogits_kernel, types, constants, row_pass.WARPS, unaligned)]


def _fill(types: dict, constants: dict, optional: dict[str, tuple[str, bool]]) -> None:
    for name, (kind, present) in optional.items():
        if present:
            types[name] = kind
        else:
            constants[name] = None


def configs(sm: int) -> list[Config]:
    """The configurations that matter: every dtype and every option at least once, the hot ones as shipped for `sm`."""
    out = []
    for z in ("fp32", "bf16"):
        out += _stats(z, 151936)
        out += _stats(z, 151936, entropy=False)[:1]
    out += _stats("fp32", 32000) + _stats("fp16", 32000)
    out += _stats("fp32", 256000, softcap=True, bias=True)
    out += _stats("bf16", 256000, softcap=True, bias=True)[:1]
    out += _stats("fp32", 50257, ragged=True, target=False)[:1]
    out += _stats("fp32", 50257, padded=True)[:1]  # V ragged, rows padded to 16 elements
    out += _dlogits("fp32", "bf16", narrow=True, padded=True)
    out += _dlogits("fp32", "bf16", narrow=True)
    out += _dlogits("fp32", "bf16", narrow=True, b=False, order=False)
    out += _dlogits("fp32", "fp16", narrow=True, softcap=True, bias=True)
    out += _dlogits("fp32", "fp32") + _dlogits("bf16", "bf16") + _dlogits("fp16", "fp16", order=False)
    out += _dlogits("fp32", "bf16", softcap=True, bias=True)
    out += _dlogits("fp32", "bf16", narrow=True, ragged=True)
    return out + _divergence() + _policy() + (_head_stats(sm) if sm >= 90 else [])


def _divergence() -> list[Config]:
    vectors = ("max_ptr", "logsum_ptr", "ref_max_ptr", "ref_sum_ptr")
    out = []
    for z, to, kind, options in (
        ("fp32", "bf16", "forward", {"in place"}),
        ("fp32", "bf16", "reverse", {"in place"}),
        ("fp32", "bf16", "jsd", {"in place"}),
        ("fp32", "bf16", "jsd", {"in place", "both", "cap", "bias"}),
        ("bf16", "bf16", "jsd", {"both", "cap"}),
        ("fp32", "bf16", "jsd", {"in place", "ragged"}),
    ):
        code = ("forward", "reverse", "jsd").index(kind)
        cap, bias, both = ("cap" in options), ("bias" in options), ("both" in options)
        types = {"z_ptr": f"*{z}", "ref_ptr": f"*{z}"} | dict.fromkeys(vectors, "*fp32")
        types |= dict.fromkeys(("v", "z_stride", "ref_stride", "segment"), "i32")
        types |= dict.fromkeys(("pre", "ref_pre", "share"), "fp32")
        constants: dict[str, Any] = {"KIND": code, "BLOCK": divergence.BLOCK, "HAS_BIAS": bias, "HAS_SOFTCAP": cap}
        constants |= {"HAS_REF_BIAS": bias, "HAS_REF_SOFTCAP": cap}
        optional = {"bias_ptr": ("*fp32", bias), "ref_bias_ptr": ("*fp32", bias)}
        _fill(types, constants, optional | {"post": ("fp32", cap), "ref_post": ("fp32", cap)})
        label = " ".join([f"{z}->{to}", kind, *sorted(options)])
        unaligned = ("v", "z_stride", "ref_stride", "out_stride", "ref_out_stride") if "ragged" in options else ()
        parts = {"part_ptr": ("*fp32", code != 0), "ref_part_ptr": ("*fp32", code != 1)}
        own = types.copy(), constants | {"SEGMENTS": 10}
        _fill(*own, parts)
        value, grad = divergence.row_divergence_kernel, divergence.divergence_dlogits_kernel
        out.append(_config(f"row_divergence {label}", value, *own, divergence.WARPS, unaligned))
        own = (
            types | {"out_ptr": f"*{to}", "grad_ptr": "*fp32"} | dict.fromkeys(("out_stride", "ref_out_stride"), "i32")
        )
        own = own, constants | {"SEGMENTS": 1 if "in place" in options else 10, "HAS_OUT": True, "HAS_REF_OUT": both}
        sums = {"kl_ptr": ("*fp32", code != 0), "ref_kl_ptr": ("*fp32", code != 1)}
        _fill(*own, sums | {"ref_out_ptr": (f"*{to}", both)})
        out.append(_config(f"divergence_dlogits {label}", grad, *own, divergence.WARPS, unaligned))
    return out


def _head_stats(sm: int) -> list[Config]:
    own = head_stats.config_for(sm)
    out = []
    for z, options in (("bf16", ()), ("bf16", ("H",)), ("bf16", ("H", "cap", "bias")), ("fp16", ("H",))):
        entropy, cap, bias = ("H" in options), ("cap" in options), ("bias" in options)
        types = {"hidden": f"tensordesc<{z}[{own.block_n},{own.block_d}]>", "pre": "fp32", "target_ptr": "*i64"}
        types |= {"weight": f"tensordesc<{z}[{own.block_v},{own.block_d}]>", "part_ptr": "*fp32", "picked_ptr": "*fp32"}
        types |= dict.fromkeys(("n", "v", "d", "blocks_n", "blocks_v", "tiles", "programs", "group"), "i32")
        constants: dict[str, Any] = {"BLOCK_N": own.block_n, "BLOCK_V": own.block_v, "BLOCK_D": own.block_d}
        constants |= {"HAS_BIAS": bias, "HAS_SOFTCAP": cap, "HAS_ENTROPY": entropy}
        _fill(types, constants, {"bias_ptr": ("*fp32", bias), "post": ("fp32", cap)})
        label = " ".join(["head_stats", z, *options])
        config = _config(label, head_stats.head_stats_kernel, types, constants, own.warps)
        out.append(config._replace(num_stages=own.stages))
    types = {"hidden": f"tensordesc<bf16[{own.block_n},{own.block_d}]>", "pre": "fp32", "target_ptr": "*i64"}
    types |= {
        "weight": f"tensordesc<bf16[{own.block_v},{own.block_d}]>",
        "out": f"tensordesc<bf16[{own.block_n},{own.block_v // 4}]>",
    }
    types |= dict.fromkeys(("part_ptr", "picked_ptr", "shift_ptr"), "*fp32")
    types |= dict.fromkeys(("n", "v", "d", "blocks_n", "blocks_v", "tiles", "programs", "group"), "i32")
    constants = {"BLOCK_N": own.block_n, "BLOCK_V": own.block_v, "BLOCK_D": own.block_d}
    constants |= {"bias_ptr": None, "HAS_BIAS": False}
    config = _config("head_exp bf16", head_exp.head_exp_kernel, types, constants, own.warps)
    out.append(config._replace(num_stages=own.stages))
    vectors = ("part_ptr", "picked_ptr", "logprob_ptr", "max_ptr", "logsum_ptr", "entropy_ptr")
    types = {"target_ptr": "*i64"} | dict.fromkeys(vectors, "*fp32") | dict.fromkeys(("n", "v", "blocks_v"), "i32")
    constants = {"ROWS": head_stats.COMBINE_ROWS, "TILES": head_stats.COMBINE_TILES, "HAS_ENTROPY": True}
    return [*out, _config("head_combine H", head_stats.head_combine_kernel, types, constants, 4)]


def _policy() -> list[Config]:
    vectors = ("logprob_ptr", "old_ptr", "adv_ptr", "weight_ptr", "policy_weight_ptr", "ref_ptr")
    vectors += ("entropy_ptr", "entropy_weight_ptr", "dentropy_ptr")
    scalars = ("low", "high", "delta", "dual_clip", "beta", "entropy_coef")
    out = []
    for name, absent, kl, dtype in (
        ("grpo", {*vectors[4:], "delta", "dual_clip", "beta", "entropy_coef"}, "", "fp32"),
        ("on-policy", {"old_ptr", *vectors[4:], "delta", "dual_clip", "beta", "entropy_coef"}, "", "fp32"),
        ("everything k3", set(), "k3", "fp32"),
        ("everything k2/abs bf16", set(), "abs", "bf16"),
    ):
        types = {"partial_ptr": "*fp32", "dlogprob_ptr": "*fp32", "n": "i64"}
        constants: dict[str, Any] = {"KL": kl, "KL_GRADIENT": "k2" if kl == "abs" else kl, "KL_CORRECTION": bool(kl)}
        constants |= {"BLOCK": policy.BLOCK}
        optional = {v: (f"*{dtype}" if v != "dentropy_ptr" else "*fp32", v not in absent) for v in vectors}
        _fill(types, constants, optional | {s: ("fp32", s not in absent) for s in scalars})
        out.append(_config(f"policy_clip {name}", policy.policy_clip_kernel, types, constants, policy.WARPS))
    types = {"partial_ptr": "*fp32", "sums_ptr": "*fp32", "programs": "i32"}
    out.append(_config("policy_sums", policy.policy_sums_kernel, types, {"BLOCK": policy.SUM_BLOCK}, 4))
    return out


def compile_config(config: Config, sm: int) -> Report:
    """Compile one configuration for one target and read the cubin and the PTX."""
    fn = config.kernel
    while not isinstance(fn, triton.JITFunction):  # under triton.heuristics
        fn = fn.fn
    names = fn.arg_names
    missing = [a for a in names if a not in config.types and a not in config.constants]
    if missing:
        raise ValueError(f"{config.name}: neither type nor constant for {missing}")
    signature = {a: config.types.get(a, "constexpr") for a in names}
    attrs = {(names.index(a),): [list(ALIGNED[0])] for a in config.aligned}
    source = ASTSource(fn, signature, dict(config.constants), attrs)
    options = {"num_warps": config.num_warps, **EXACT}
    if config.num_stages is not None:
        options["num_stages"] = config.num_stages
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = resource_usage(file.name)
        sass = _cuobjdump("-sass", file.name)
    events, widest = memory_events(sass)
    return Report(
        config.name,
        sm,
        usage["REG"],
        max(usage["STACK"], usage["LOCAL"]),
        compiled.metadata.shared,
        widest["LDG"],
        widest["STG"],
        events,
        {unit: len(re.findall(rf"\b{unit}\b", sass)) for unit in UNITS},
    )


def _cuobjdump(flag: str, cubin: str) -> str:
    return subprocess.run([str(CUOBJDUMP), flag, cubin], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, as cuobjdump gives them."""
    text = _cuobjdump("--dump-resource-usage", cubin)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump gave no resource usage: {text!r}")
    return found


_INSTRUCTION = re.compile(r"\b(LDG|STG|BAR|MUFU)\.([\w.]+)")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def memory_events(sass: str) -> tuple[str, dict[str, int]]:
    """`Report.wide_events`, and the widest LDG and STG in bytes."""
    events, widest = [], {"LDG": 0, "STG": 0}
    for name, suffix in _INSTRUCTION.findall(sass):
        if name in widest:
            size = max((_BYTES.get(part, 0) for part in suffix.split(".")), default=0) or 4
            widest[name] = max(widest[name], size)
            if size == 16:
                events.append(name[0])
        else:
            events.append(name[0])
    return "".join(events), widest


def table(reports: list[Report]) -> str:
    lines = [f"{'configuration':<52} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7} {'load B':>7} {'store B':>8}"]
    for r in reports:
        lines.append(
            f"{r.name:<52} {r.sm:>4} {r.registers:>5} {r.spills:>6} {r.shared:>7} {r.load_bytes:>7} {r.store_bytes:>8}"
        )
    return "\n".join(lines)


class _NoDevice:
    """A driver that names a target and has no device: enough for the JIT to bind arguments and compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def dry_launches() -> list[str]:
    """Call every launcher on CPU tensors and compile what it would have launched; the kernels' names, in order."""
    import torch

    triton.runtime.driver.set_active(_NoDevice())
    run, names = triton.JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.JITFunction.run = compile_only
    try:
        n, v = 4, 40000
        z, target, order = torch.zeros(n, v), torch.zeros(n, dtype=torch.long), torch.arange(n)
        f, bias, x = torch.zeros(n), torch.zeros(v), torch.zeros(3000)
        plain = {"scale": 1.0, "softcap": None, "inv_temperature": 1.0}
        stats = {"row_max": f, "log_sum": f}
        row_pass.row_stats(z, target, None, **plain, **stats, logprob=f, entropy=f)
        row_pass.row_stats(z, None, bias, **plain | {"softcap": 30.0}, **stats, logprob=None, entropy=None)
        narrow = z.view(torch.bfloat16)[:, :v]
        row_pass.row_dlogits(z, narrow, order, target, None, **plain, **stats, d_target=f, a=f, b=f)
        row_pass.row_dlogits(z, z, None, None, bias, **plain, **stats, d_target=f, a=f, b=None)
        forms = {"ref_share": 0.5, "form": (1.0, None, 1.0), "ref_form": (1.0, 30.0, 1.0)}
        forms |= {**stats, "ref_max": f, "ref_sum": f, "ref_kl": f}
        divergence.row_divergence(z, z, None, bias, kind=0, **forms, own_kl=None)
        divergence.divergence_dlogits(z, z, None, bias, kind=2, **forms, own_kl=f, grad=f, out=narrow, ref_out=None)
        config, half = head_stats.config_for(90), torch.zeros(4, 64, dtype=torch.bfloat16)
        outputs = {**stats, "logprob": f, "entropy": f, "config": config, "programs": 2}
        head_stats.head_stats(half, torch.zeros_like(half), target, None, **plain, **outputs)
        narrow = torch.zeros(4, 16, dtype=torch.bfloat16)[:, :4]
        head_exp.head_exp(half, half, target, None, f, pre=1.0, out=narrow, config=config, programs=2)
        policy.policy_clip_fwd(x, None, x, x, clip_low=0.2, clip_high=0.2)
        terms = {"delta": 2.0, "dual_clip": 3.0, "beta": 0.1, "kl_correction": True, "entropy_coef": 0.1}
        policy.policy_clip_fwd(*[x] * 8, clip_low=0.2, clip_high=0.2, **terms)
    finally:
        triton.JITFunction.run = run
    return names


HOT = ("row_stats fp32 V=151936 H", "row_dlogits fp32->bf16 in place H order", "policy_clip everything k3")
HOT += ("head_stats bf16 H", "row_divergence fp32->bf16 jsd in place", "divergence_dlogits fp32->bf16 jsd in place")


def plan(arguments: list[str]) -> list[tuple[Config, int]]:
    """What to compile: everything for the given targets (all three by default); --quick: sm_90, and HOT for others."""
    targets = [int(a) for a in arguments if a.isdigit()] or list(TARGETS)
    every = [(c, sm) for sm in targets for c in configs(sm)]
    return [(c, sm) for c, sm in every if sm == 90 or c.name in HOT] if "--quick" in arguments else every


def compile_named(name: str, sm: int, **changes: Any) -> Report:
    """The configuration of that name: a kernel cannot be sent to another process."""
    config = next(c for c in configs(sm) if c.name == name)
    return compile_config(config._replace(**changes), sm)


def main(arguments: list[str]) -> None:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        # a configuration made to spill: a reader who sees none is caught
        spill = pool.submit(compile_named, "row_stats bf16 V=256000 H cap bias", 90, num_warps=2)
        reports = list(pool.map(compile_named, *zip(*((c.name, sm) for c, sm in plan(arguments)), strict=True)))
        planted = spill.result().spills
    if "--json" not in arguments:
        print(table(reports))
        return
    print(json.dumps(dict(reports=[r._asdict() for r in reports], planted=planted, launches=dry_launches())))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every public op, fuzzed: a right result, or a ValueError or TypeError that names an argument. Nothing else."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from fuzz_cases import CALLS, OURS_ALONE, Draw, twisted
from test_public import OPS
from torch import Tensor

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import rlhf_fast  # noqa: E402
from rlhf_fast import reference  # noqa: E402

GROUP_OPS = {"vocab_parallel_logprob"}  # its bad arguments: test_vocab_parallel
# What a valid call may be off by: statistics are fp32 everywhere but for the products of half precision on the CPU.
ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 5e-3}
health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
few = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=health, database=None)


def test_every_op_is_fuzzed():
    assert set(CALLS) == set(OPS) - GROUP_OPS


@pytest.mark.parametrize("name", CALLS)
@few
@given(st.data())
def test_valid_calls_match_the_reference(name, data):
    call = CALLS[name](Draw(lambda options: data.draw(st.sampled_from(options))))
    compare(name, call, getattr(rlhf_fast, name)(**call))


@pytest.mark.parametrize("name", CALLS)
@few
@given(st.data())
def test_bad_arguments_are_named(name, data):
    def choose(options: list) -> Any:
        return data.draw(st.sampled_from(options))

    call = CALLS[name](Draw(choose))
    victim = choose(sorted(call))
    try:
        call[victim] = twisted(call[victim], choose)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        hypothesis.reject()  # that twist does not exist for this tensor
    if victim == "batch" and (call["batch"] is None or (isinstance(call["batch"], dict) and "w" not in call["batch"])):
        hypothesis.reject()  # what the caller's own function misses is its own error
    try:
        out = getattr(rlhf_fast, name)(**call)
    except (ValueError, TypeError) as error:
        assert names_an_argument(str(error), name, victim), f"{victim}={call[victim]!r}: {error}"  # noqa: PT017
    else:
        compare(name, call, out)


def names_an_argument(message: str, op: str, victim: str) -> bool:
    """Whether a message is about the arguments of an op, rather than from somewhere inside."""
    if victim == "kind" and message.startswith(("unknown policy loss", "unknown preference loss", "unknown KTO kind")):
        return True
    known = {p for p in inspect.signature(getattr(rlhf_fast, op)).parameters if p != "options"} | {victim}
    said = (" must ", " goes with ", " go with ", " is outside ", " needs ", " requires grad", " knows ", "unknown ")
    return any(word in message for word in known) and any(word in message for word in said)


def compare(name: str, call: dict[str, Any], out: Any) -> None:
    """The outputs against the reference on fp64 copies of the inputs; no NaN where the inputs were finite."""
    ours = list(outputs(out))
    if isinstance(call.get("lengths"), Tensor) and (call["lengths"] < 1).any():
        return  # a count of tokens that is none: looking would wait for the device
    if any(t.is_meta for t in ours):
        return
    tensors = [t for t in call.values() if isinstance(t, Tensor)]
    rounding = max([ROUNDING.get(t.dtype, 1e-4) for t in tensors], default=1e-4)
    numbers = [x for x in call.values() if isinstance(x, float)]
    if all(t.isfinite().all() for t in tensors if t.is_floating_point()) and all(map(math.isfinite, numbers)):
        assert not any(t.isnan().any() for t in ours if t.is_floating_point()), f"NaN: {call}"
    if any(t.numel() and t.abs().max() > 100 for t in tensors if t.is_floating_point()):
        return  # what is left of a difference of such numbers is rounding
    if isinstance(call.get("mask"), Tensor):
        call = {**call, "mask": call["mask"].bool()}  # the references take nothing else
    wide = {k: widened(v) for k, v in call.items() if k not in OURS_ALONE}
    try:
        expected = list(outputs(getattr(reference, name)(**wide)))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return  # the references take no empty batches, nor masks of numbers
    for mine, theirs in zip(ours, expected, strict=False):
        if theirs.is_floating_point() and theirs.isnan().any():
            continue  # a reference that overflows, on options such as beta=2**63
        scale = 1 + (theirs.double().abs().nan_to_num(0, 0, 0).max().item() if theirs.numel() else 0.0)
        torch.testing.assert_close(
            mine.double(), theirs.double(), rtol=rounding, atol=rounding * min(scale, 1e3), equal_nan=True
        )


def outputs(out: Any) -> list[Tensor]:
    """The tensors of a result; metrics aside."""
    if isinstance(out, Tensor):
        return [out]
    if hasattr(out, "logprob") and hasattr(out, "loss"):
        return [out.loss, out.logprob]
    return [t for t in out if isinstance(t, Tensor)]


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in (torch.float16, torch.bfloat16, torch.float32) else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    return value


# ---- what calls are made of beside the ops


@pytest.mark.parametrize("make", [rlhf_fast.PolicyLoss, rlhf_fast.PreferenceLoss, rlhf_fast.KTO])
@pytest.mark.parametrize("value", [math.nan, math.inf, "text", [], {}, 1j, True, 10**400, torch.ones(2)])
@pytest.mark.parametrize("option", ["kind", "beta"])
def test_options_of_losses_are_named(make, option, value):
    with pytest.raises((ValueError, TypeError), match=r"kind|loss|beta"):
        make(**{option: value})


def test_offsets_and_targets_out_of_range_are_named():
    hidden, weight = torch.ones(3, 2), torch.ones(4, 2)
    for target in ([0, 1, 4], [0, -1, 2], [0, 2**31, 1]):
        with pytest.raises(ValueError, match=r"target\[\d\] = .* is outside the vocabulary \[0, 4\)"):
            rlhf_fast.linear_logprob(hidden, weight, torch.tensor(target))
    for offsets in ([0, 2], [1, 3], [0, 4], [0, 3, 2, 3], [0, -1, 3], []):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            rlhf_fast.gae(torch.ones(3), torch.ones(3), cu_seqlens=torch.tensor(offsets, dtype=torch.int64))

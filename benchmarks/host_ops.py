"""The operations of OpenRLHF, verl and LLaMA-Factory beside what the integrations put in their place; and what
torch.compile and TRL make of the same ops.

    python benchmarks/host_ops.py [--output FOLDER] [--rounds 15] [--only NAME]

CPU time of a call, forward and backward where it has one, the two sides in turn, medians of rounds, on one thread: a
loss over tokens is memory-bound, and a second thread mostly waits for the first. Errors are against the host's own
formula in fp64, of values and gradients. Needs the hosts' sources: see tests/hosts.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts import host  # noqa: E402
from test_llamafactory import DPOTrainer, KTOTrainer  # noqa: E402
from test_openrlhf import MODULES as OPENRLHF  # noqa: E402
from test_openrlhf import STUBS as OPENRLHF_STUBS  # noqa: E402
from test_verl import MODULES as VERL  # noqa: E402
from test_verl import NAMES, config_of  # noqa: E402

from rlhf_fast import group_advantages, masked_whiten, policy_loss  # noqa: E402
from rlhf_fast.benchmarks import report  # noqa: E402
from rlhf_fast.benchmarks.measure import median  # noqa: E402
from rlhf_fast.benchmarks.providers import tokens  # noqa: E402
from rlhf_fast.integrations import llamafactory, openrlhf, verl  # noqa: E402

SIZES = ((8, 512), (16, 1024), (64, 4096))
VOCAB, LOGIT_SIZES = 32000, ((2, 128), (4, 256))


class Case(NamedTuple):
    """theirs(*tensors), ours(*tensors) -> a tensor or a tuple; the first `leaves` tensors get gradients."""

    name: str
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    leaves: int = 1
    exact: Callable[..., Any] | None = None  # in fp64, where the host computes in fp32 whatever it is given


def batch(rows: int, width: int) -> SimpleNamespace:
    """Log-probabilities a little off-policy, right-padded, one reward at the end, groups of eight."""
    torch.manual_seed(0)
    logprob = -torch.rand(rows, width)
    lengths = torch.randint(width // 4, width + 1, (rows,))
    rewards = torch.zeros(rows, width)
    rewards[torch.arange(rows), lengths - 1] = torch.randn(rows)
    return SimpleNamespace(
        logprob=logprob, old=logprob + 0.1 * torch.randn(rows, width), values=torch.randn(rows, width),
        advantages=torch.randn(rows, width), mask=torch.arange(width) < lengths[:, None], rewards=rewards,
        index=torch.arange(rows).div(8, rounding_mode="floor").numpy(),
    )  # fmt: skip


# ---- the hosts -------------------------------------------------------------------------------------------------


def openrlhf_cases() -> Iterator[Case]:
    with host("openrlhf", OPENRLHF, OPENRLHF_STUBS) as (loss, utils, _, maker):
        policy, value, dpo = loss.PolicyLoss(), loss.ValueLoss(0.2), loss.DPOLoss(0.1)
        gae = maker.RemoteExperienceMaker.get_advantages_and_returns
        for rows, width in SIZES:
            x, size = batch(rows, width), f"{rows} x {width}"

            def losses(function, module, *names, x=x):
                return lambda first, *rest: function(module, first, *rest, x.mask)

            for name, module, mine, tensors in (
                ("PolicyLoss", policy, openrlhf.policy_loss_forward, (x.logprob, x.old, x.advantages)),
                ("ValueLoss", value, openrlhf.value_loss_forward, (x.values, x.values + x.old, x.advantages)),
            ):
                theirs = type(module).forward
                yield Case(f"openrlhf {name} {size}", losses(theirs, module), losses(mine, module), tensors)
            k3 = lambda f: lambda a, b: f(a, b, kl_estimator="k3")  # noqa: E731
            exact = lambda a, b: torch.expm1(b - a) + a - b  # noqa: E731
            mine, theirs = k3(openrlhf.compute_approx_kl), k3(utils.compute_approx_kl)
            yield Case(f"openrlhf compute_approx_kl {size}", theirs, mine, (x.logprob, x.old), exact=exact)
            scan = lambda f, x=x: lambda v, r: tuple(t * x.mask for t in f(None, v, r, x.mask, 1.0, 0.95))  # noqa: E731
            mine = scan(openrlhf.get_advantages_and_returns)
            yield Case(f"openrlhf GAE {size}", scan(gae), mine, (x.values, x.rewards), leaves=0)
        pairs = tuple(torch.randn(4, 64).unbind())
        call = lambda f: lambda *t: f(dpo, *t)  # noqa: E731
        yield Case("openrlhf DPOLoss 64", call(type(dpo).forward), call(openrlhf.dpo_loss_forward), pairs, leaves=2)
        for rows, width in LOGIT_SIZES:
            logits, ids = torch.randn(rows, width, VOCAB), torch.randint(0, VOCAB, (rows, width))
            size = f"{rows} x {width} x {VOCAB}"
            call = lambda f, ids=ids: lambda z: f(z * 1.0, ids)  # OpenRLHF's may write to them  # noqa: E731
            mine, theirs = call(openrlhf.log_probs_from_logits), call(utils.log_probs_from_logits)
            yield Case(f"openrlhf log_probs_from_logits {size}", theirs, mine, (logits,))


def verl_cases() -> Iterator[Case]:
    with host("verl", VERL, ("ray", "tensordict", "omegaconf", "codetiming", "orjson")) as found, verl.patch():
        v = SimpleNamespace(**dict(zip(NAMES, found, strict=True)))
        config = config_of(v, policy={"kl_cov_ratio": 0.002, "ppo_kl_coef": 1.0}, clip_ratio_low=1.0)
        algorithm = SimpleNamespace(gamma=1.0, get=lambda name, default=None: default)
        kinds = dict(vanilla="ppo") | {k: k for k in ("gspo", "sapo", "gpg", "geo_mean", "kl_cov", "cispo", "dppo_tv")}
        gae = next(c for c in verl._patch.changes if getattr(c, "name", "") == "compute_gae_advantage_return").original
        for rows, width in SIZES:
            x, size = batch(rows, width), f"{rows} x {width}"
            for theirs, mine in kinds.items():
                functions = [v.core.get_policy_loss_fn(name) for name in (theirs, f"rlhf_fast_{mine}")]
                calls = [lambda new, old, adv, f=f, x=x: f(old, new, adv, x.mask, config=config)[0] for f in functions]
                yield Case(f"verl {theirs} {size}", *calls, (x.logprob, x.old, x.advantages))
            calls = [
                lambda r, v, f=f, x=x: f(r, v, x.mask.to(r.dtype), 1.0, 0.95)[0] * x.mask
                for f in (gae, verl.compute_gae_advantage_return)
            ]
            yield Case(f"verl GAE {size}", *calls, (x.rewards, x.values), leaves=0)
            for theirs in ("grpo", "rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
                functions = [v.core.get_adv_estimator_fn(name) for name in (theirs, f"rlhf_fast_{theirs}")]
                calls = [
                    lambda r, f=f, x=x: f(
                        token_level_rewards=r.clone(), response_mask=x.mask.to(r.dtype), index=x.index, config=algorithm
                    )[0] * x.mask
                    for f in functions
                ]  # fmt: skip
                yield Case(f"verl {theirs} advantages {size}", *calls, (x.rewards,), leaves=0)


def llamafactory_cases() -> Iterator[Case]:
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # of packages that this part of it does not use
    trl = {"trl": dict(DPOTrainer=DPOTrainer, KTOTrainer=KTOTrainer), "trl.models": {}, "trl.trainer": {}}
    stubs = ("omegaconf", "galore_torch", "torchaudio", "fire", "av", "librosa")
    with host("llamafactory", ("llamafactory.train.trainer_utils",), stubs, trl) as (utils,):
        for rows, width in LOGIT_SIZES:
            labels = torch.randint(0, VOCAB, (rows, width))
            labels[:, : width // 4] = -100
            for ld_alpha in (None, 0.5):
                calls = [
                    lambda z, f=f, y=labels, a=ld_alpha: f(z, y, ld_alpha=a)[0]
                    for f in (utils.get_batch_logps, llamafactory.get_batch_logps)
                ]
                name = f"llamafactory get_batch_logps{', ld_alpha' if ld_alpha else ''} {rows} x {width} x {VOCAB}"
                yield Case(name, *calls, (torch.randn(rows, width, VOCAB),))


def torch_cases() -> Iterator[Case]:
    rows, width = 256, 4096
    x, size = batch(rows, width), f"{rows} x {width}"
    a, rewards = torch.randn(rows), torch.randn(rows * 16)
    ours = lambda new, old: policy_loss(new, old, a, kind="grpo", mask=x.mask)[0]  # noqa: E731
    for name, loss in (("GRPO loss without metrics", tokens._grpo), ("GRPO loss and metrics", tokens._grpo_metrics)):
        fast = torch.compile(loss)
        theirs, exact = (lambda new, old, f=f: f(new, old, a, x.mask)[0] for f in (fast, loss))
        yield Case(f"torch.compile {name} {size}", theirs, ours, (x.logprob, x.old), exact=exact)
    theirs, exact = (lambda v, f=f: f(v, x.mask) for f in (torch.compile(tokens._whitened), tokens._whitened))
    ours = lambda v: masked_whiten(v, x.mask)  # noqa: E731
    yield Case(f"torch.compile whitening {size}", theirs, ours, (x.values,), leaves=0, exact=exact)
    theirs = lambda r: tokens._reshape(None, SimpleNamespace(group_rewards=r))()["advantages"]  # noqa: E731
    ours = lambda r: group_advantages(r, group_size=tokens.GROUP, eps=tokens.GROUP_EPS).advantages  # noqa: E731
    yield Case(f"trl group advantages {rewards.numel()}", theirs, ours, (rewards,), leaves=0)


# ---- measuring -------------------------------------------------------------------------------------------------


def results(call: Callable[..., Any], tensors: tuple[Tensor, ...], leaves: int) -> list[Tensor]:
    """What comes out, and the gradients of the first of it."""
    tensors = [t.detach().requires_grad_(i < leaves) for i, t in enumerate(tensors)]
    out = call(*tensors)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    return [*(t.detach() for t in out), *(torch.autograd.grad(out[0].sum(), tensors[:leaves]) if leaves else ())]


def error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest ||got - truth|| / ||truth|| over values and gradients."""
    off = [((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item() for a, b in zip(got, truth)]  # noqa: B905
    return max(off)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    wide = tuple(t.double() if t.is_floating_point() else t for t in case.tensors)
    truth = results(case.exact or case.theirs, wide, case.leaves)
    sides = {"host": case.theirs, "ours": case.ours}
    row: dict[str, Any] = {"name": case.name}
    for side, call in sides.items():
        row[f"{side}_error"] = error(results(call, case.tensors, case.leaves), truth)
    repeat, samples = {}, {side: [] for side in sides}
    for side, call in sides.items():
        start = time.process_time()
        results(call, case.tensors, case.leaves)
        repeat[side] = max(1, min(50, int(0.01 / max(time.process_time() - start, 1e-6))))
    for _ in range(rounds):
        for side, call in sides.items():
            start = time.process_time()
            for _ in range(repeat[side]):
                results(call, case.tensors, case.leaves)
            samples[side].append((time.process_time() - start) * 1e3 / repeat[side])
    row |= {f"{side}_ms": median(s) for side, s in samples.items()}
    row["ratio"] = row["ours_ms"] / row["host_ms"]
    return row


def main(arguments: list[str]) -> None:
    """Run, print, and save where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for host-ops.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    info, rows = report.environment("cpu"), []
    print(report.hardware_line(info))
    print(f"{'host operation':62} {'host ms':>9} {'ours ms':>9} {'ratio':>6} {'host error':>10} {'ours':>8}")
    for cases in (openrlhf_cases(), verl_cases(), llamafactory_cases(), torch_cases()):
        for case in cases:
            if options.only not in case.name:
                continue
            row = measure(case, options.rounds)
            rows.append(row)
            times = f"{row['host_ms']:9.3f} {row['ours_ms']:9.3f} {row['ratio']:6.2f}"
            print(f"{row['name']:62} {times} {row['host_error']:10.1e} {row['ours_error']:8.1e}", flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / "host-ops.json"
        path.write_text(json.dumps({"schema": report.SCHEMA, **info, "host_ops": rows}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])

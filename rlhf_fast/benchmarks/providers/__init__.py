"""Who is measured: providers as data, in the order of the table's code. See `base` for what one is."""

from __future__ import annotations

from rlhf_fast.benchmarks.providers import liger, others, ours, plain, tokens, trl
from rlhf_fast.benchmarks.providers.base import Provider, Step, Unavailable, build
from rlhf_fast.benchmarks.providers.ours import OURS
from rlhf_fast.benchmarks.providers.plain import NAIVE

__all__ = ["NAIVE", "OURS", "PROVIDERS", "Provider", "Step", "Unavailable", "build"]

_TOKENS = {NAIVE: tokens.PLAIN, "torch.compile": tokens.COMPILED}
_ALL = [*ours.PROVIDERS, *plain.PROVIDERS, *trl.PROVIDERS, *liger.PROVIDERS, *others.PROVIDERS, *tokens.PROVIDERS]

PROVIDERS = {p.name: p._replace(ops=p.ops | _TOKENS.get(p.name, {})) for p in _ALL}

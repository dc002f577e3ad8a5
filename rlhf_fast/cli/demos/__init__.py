"""`rlhf-fast demo`: the real trainers, configs and data readers on a task that needs no download.

Each module here holds one demo: `demo(output, seed, *, quiet, ...) -> summary`. They share `task`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMOS = {  # name -> what it shows
    "grpo": "a verifiable reward teaches what 100 labelled examples did not",
    "rm": "a reward model from pairs of the model's own samples ranks held-out pairs",
    "ppo": "a critic and a verifiable reward, a clipped step at a time",
    "ppo-rm": "the same on a learned reward, while the verifier watches",
    "dpo": "the same pairs move the policy itself, without a reward model",
    "kto": "single judged samples do it too, without pairs",
}


def load_demo(name: str) -> Callable[..., dict[str, Any]]:
    """The `demo` function of a name in `DEMOS`."""
    if name not in DEMOS:
        raise ValueError(f"demo must be one of {', '.join(DEMOS)}, got {name!r}")
    return importlib.import_module(f"rlhf_fast.cli.demos.{name.replace('-', '_')}").demo


def demo(name: str = "grpo", output: str | Path | None = None, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Run a demo, or all of them one after the other; returns what `summary.json` in `output` holds.

    Args:
        name: one of `DEMOS`, or "all".
        output: default runs/demo-<name>.
        options: the demo's own, such as `quiet`.
    """
    folder = Path(output or f"runs/demo-{name}")
    if name == "all":
        return {each: load_demo(each)(folder / each, seed, **options) for each in DEMOS}
    return load_demo(name)(folder, seed, **options)

"""The policy's weights on their way to a completions server, and how old the server's are when nobody brings them."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast.trainers.models.lora import merged
from rlhf_fast.trainers.rollout.http_client import BadAnswer, JSONClient, ServerError

# What this process last told each server (by the address it announced it to): samplers come and go, servers stay.
HELD: dict[str, tuple[int, ...]] = {}
BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> tuple[int, ...]:
    """A number for each tensor that trains (for each at all where none does); equal for equal bits."""
    trained = [p for p in model.parameters() if p.requires_grad] or list(model.parameters())
    with torch.no_grad():
        sums = [p.detach().reshape(-1).view(BYTES[p.element_size()]).sum(dtype=torch.int64) for p in trained]
    return tuple(int(s) for s in sums)


class ServedWeights:
    """Which weights the server holds. `refresh` before every rollout.

    Args:
        model: the policy.
        sync: brings its weights to the server; None: nobody does.
    """

    def __init__(self, model: nn.Module, sync: Callable[[nn.Module], None] | None):
        self.model, self.sync = model, sync
        self.age = 0  # rollouts before which the weights had changed and were not brought over
        self._last: tuple[int, ...] | None = None

    def refresh(self) -> None:
        """Bring the weights over if they have changed since the last call, or count and warn (1, 2, 4, ... times)."""
        now = fingerprint(self.model)
        changed, first = now != self._last, self._last is None
        if changed and self.sync is not None:
            self.sync(self.model)
        elif changed and not first:
            self.age += 1
            if self.age & (self.age - 1) == 0:
                warnings.warn(
                    f"the completions server's weights are {self.age} update{'s' * (self.age > 1)} old and nothing "
                    "brings it new ones: samples come from an ever older policy. Set rollout_server_update_url (sync=)",
                    stacklevel=3,
                )
        self._last = now


class DiskUpdate:
    """Writes the weights as safetensors and tells the server where they are.

    Args:
        client: how the server is reached.
        folder: must be readable by the server under the same path. Each version gets a folder of its own in it, the
            one before is removed once the server has taken the new one.
        url: a path on the server, such as SGLang's "/update_weights_from_disk", or a whole URL.
        body: what is posted; "{path}" becomes the folder's path.
    Notes: adapters are merged in a copy of the model, which takes its memory once more; the policy is never touched.
        In a distributed run the first process writes and tells, the others wait, and a failure is raised on all.
        Weights that the server has been told of already are not written again; a server that is started anew in the
        middle of a run does not say so and samples from what it was started with.
    """

    def __init__(self, client: JSONClient, folder: str | Path, url: str, body: Any = None):
        self.client, self.folder, self.url = client, Path(folder), url
        self.body = {"model_path": "{path}"} if body is None else body

    def __call__(self, model: nn.Module) -> None:
        error: list[str | None] = [None]
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            try:
                self._update(model)
            except Exception as problem:
                if not distributed:
                    raise
                error[0] = str(problem)
        if distributed:
            torch.distributed.broadcast_object_list(error)
            if error[0] is not None:
                raise ServerError(error[0])

    def _update(self, model: nn.Module) -> None:
        address, now = self.client.address(self.url), fingerprint(model)
        if HELD.get(address) == now:
            return
        if hasattr(model, "merge_and_unload"):
            model = merged(copy.deepcopy(model))
        old = {int(p.name.rpartition("-")[2]): p for p in self.folder.glob("weights-*")}
        new = self.folder / f"weights-{max(old, default=0) + 1}"
        model.save_pretrained(new)
        self.client.call(self.url, _fill(self.body, str(new.resolve())), check=_accepted)
        HELD[address] = now
        for folder in old.values():
            shutil.rmtree(folder, ignore_errors=True)


def _fill(body: Any, path: str) -> Any:
    if isinstance(body, dict):
        return {key: _fill(value, path) for key, value in body.items()}
    if isinstance(body, list):
        return [_fill(value, path) for value in body]
    return body.replace("{path}", path) if isinstance(body, str) else body


def _accepted(answer: Any) -> Any:
    if isinstance(answer, dict) and answer.get("success") is False:
        raise BadAnswer(f"the server refused the weights: {str(answer)[:200]}")
    return answer

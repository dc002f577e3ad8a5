"""The options of sampling: how tokens are drawn, by which sampler, and in how many turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlhf_fast.trainers.config import RunConfig, require
from rlhf_fast.trainers.config_types import in_words_of
from rlhf_fast.trainers.rollout.http_client import JSONClient, ServerOptions


@dataclass(kw_only=True)
class RolloutConfig(RunConfig):
    """Samplers: `group` (own loop, one prefill a prompt), `generate` (model.generate), `continuous` (transformers'
    continuous batching, for the GPU), `server` (OpenAI-compatible completions over HTTP).
    """

    num_generations: int = 1  # completions a prompt
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0  # 0: off. top_k and top_p bias the importance ratios
    top_p: float = 1.0
    sampler: Literal["group", "generate", "continuous", "server"] = "group"
    rollout_batch_size: int | None = None  # sequences decoded at once; None: all
    # ---- sampler: server
    rollout_server_url: str | None = None
    rollout_server_model: str | None = None  # None: the first that the server lists
    rollout_server_timeout: float = 600.0  # seconds without a byte
    rollout_server_attempts: int = 5
    rollout_server_update_url: str | None = None  # where new weights are announced; None: nowhere, with a warning
    rollout_server_update_body: dict[str, Any] | None = None  # what is posted there; None: {"model_path": "{path}"}
    rollout_server_update_folder: str | None = None  # None: server_weights in output_dir
    # ---- conversations: max_completion_length bounds the whole of one, the environment's tokens included
    environment: str | None = None  # "package.module:function", see rollout.turns.Environment
    environment_role: str = "user"  # of its messages, where the tokenizer has a chat template
    max_turns: int = 4  # turns of the policy in a completion, with an environment
    max_turn_length: int | None = None  # sampled tokens of a turn; None: max_completion_length

    aliases: ClassVar[Mapping[str, str]] = {"max_new_tokens": "max_completion_length"}

    def validate(self) -> None:
        super().validate()
        for name in ("num_generations", "max_completion_length", "rollout_server_attempts", "max_turns"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("rollout_batch_size", "max_turn_length"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1 or null")
        for name in ("temperature", "rollout_server_timeout"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        if (self.sampler == "server") != (self.rollout_server_url is not None):
            raise ValueError(
                f"sampler: server and rollout_server_url go together, got sampler={self.sampler!r}, "
                f"rollout_server_url={self.rollout_server_url!r}"
            )

        for name in ("rollout_server_model", "rollout_server_update_url"):
            if getattr(self, name) and self.sampler != "server":
                raise ValueError(f"{name} goes with sampler: server, got sampler={self.sampler!r}")

        if self.sampler == "server":
            self.server_options()  # checks them

    def server_options(self) -> ServerOptions:
        """How the server is reached."""
        keys = {name: f"rollout_server_{name}" for name in ("url", "model", "timeout", "attempts")}
        with in_words_of(keys):
            return ServerOptions(**{name: getattr(self, key) for name, key in keys.items()})

    @property
    def turn_length(self) -> int:
        """Tokens that are sampled at once, at most."""
        return min(self.max_turn_length or self.max_completion_length, self.max_completion_length)

    def sampler_options(self) -> dict[str, Any]:
        """Keywords of `make_sampler` beyond those that every sampler takes."""
        if self.sampler != "server":
            return {}
        from rlhf_fast.trainers.rollout.sync import DiskUpdate

        options = self.server_options()
        if self.rollout_server_update_url is None:
            return {"options": options}
        folder = self.rollout_server_update_folder or Path(self.output_dir) / "server_weights"
        url, body = self.rollout_server_update_url, self.rollout_server_update_body
        return {"options": options, "sync": DiskUpdate(JSONClient(options), folder, url, body)}

"""Reward models as reward functions, alone or several of them: what `Rewards` takes beside Python functions.

    mean: sum_m w_m r_m        min: min_m r_m        mean_std: mean - k std,  std^2 = sum_m w_m (r_m - mean)^2

A policy that climbs a learned reward finds where it is wrong. Models trained from different seeds or data are wrong in
different places, so the worst of them, or their mean less their disagreement, leaves fewer such places.

Source: Coste et al. 2024, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv:2310.02743): worst-case
optimisation, and uncertainty-weighted optimisation with the variance in the place of k std.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.trainers.config import find_model
from rlhf_fast.trainers.config_types import names
from rlhf_fast.trainers.models.hf_utils import DTYPES, is_adapter, vocabulary_size
from rlhf_fast.trainers.models.reward_model import load_reward_model, score_sequences
from rlhf_fast.trainers.rewards import RewardFunction, Rewards, load_function
from rlhf_fast.trainers.rl_config import RLConfig
from rlhf_fast.trainers.running_stats import RunningStats

AGGREGATIONS = ("mean", "min", "mean_std")


class RewardModel:
    """A reward model as a reward function: the score of prompt + completion.

    Args:
        model: a sequence classifier with one label; see `rlhf_fast.trainers.models.reward_model`. Not trained here.
        pad_token_id: any id of its vocabulary; lengths tell padding, ids do not.
        batch_size: sequences a forward, of similar lengths.
        name: in the metrics, as reward_<name>.
    """

    def __init__(self, model: nn.Module, pad_token_id: int = 0, *, batch_size: int = 64, name: str = "reward_model"):
        self.model = model.requires_grad_(False).eval()
        self.pad_token_id, self.batch_size, self.__name__ = pad_token_id, batch_size, name
        self.vocabulary = vocabulary_size(model)

    def to(self, device: torch.device) -> RewardModel:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        sequences = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, completion_ids, strict=True)]
        for row, ids in enumerate(sequences):
            if max(ids) >= self.vocabulary:
                last = self.vocabulary - 1
                raise ValueError(
                    f"row {row}: token id {max(ids)} is outside of the reward model's vocabulary 0..{last}"
                )
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, score in zip(rows, self._score([sequences[row] for row in rows]).tolist(), strict=True):
                scores[row] = score
        return scores

    def _score(self, sequences: list[list[int]]) -> Tensor:
        device = self.model.get_input_embeddings().weight.device
        lengths = [len(ids) for ids in sequences]
        padded = [ids + [self.pad_token_id] * (max(lengths) - len(ids)) for ids in sequences]
        return score_sequences(self.model, torch.tensor(padded, device=device), torch.tensor(lengths, device=device))


class RewardEnsemble:
    """Several reward functions as one. A row that a member cannot score (None, NaN) has no reward: NaN.

    Args:
        members: reward models or other reward functions.
        aggregation: mean, min or mean_std.
        weights: one a member, above 0, for mean and mean_std; they are normalised to sum to 1. Default equal.
        std_coef: k of mean_std.
        normalize: each member's scores by their own running mean and standard deviation first. Bradley-Terry leaves a
            model's offset free, and min of models with different offsets is only one of them. Every call moves the
            statistics, but inside of `fixed_statistics`; before the first one scores stay as they are.
        name: in the metrics.
    Attributes: metrics, of the last call: `<name>_spread`, the mean over rows of the members' standard deviation.
    Raises: ValueError naming the option.
    """

    def __init__(
        self,
        members: Sequence[RewardFunction | str],
        *,
        aggregation: str = "mean",
        weights: Sequence[float] | None = None,
        std_coef: float = 1.0,
        normalize: bool = False,
        name: str = "ensemble",
    ):
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"reward_aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
        if not 0 <= std_coef < math.inf:
            raise ValueError(f"reward_std_coef must be at least 0 and finite, got {std_coef}")
        self.members = Rewards(members)
        count = len(self.members.functions)
        weights = [1.0] * count if weights is None else [float(w) for w in weights]
        if len(weights) != count or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"reward_model_weights must hold {count} numbers above 0, one a model, got {weights}")
        self.weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        self.aggregation, self.std_coef, self.__name__ = aggregation, std_coef, name
        self.statistics = [RunningStats() for _ in range(count)] if normalize else []
        self.metrics: dict[str, float] = {}
        self.accelerator: Any = None  # statistics over its processes
        self.fixed = False  # the statistics do not move

    def to(self, device: torch.device) -> RewardEnsemble:
        for member in self.members.functions:
            if hasattr(member, "to"):
                member.to(device)
        return self

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        each = self.members(prompts, completions, columns).each.double()  # (B, F)
        for k, statistics in enumerate(self.statistics):
            if not self.fixed:
                statistics.update(each[:, k], self.accelerator)
            if statistics.count:
                each[:, k] = statistics.normalize(each[:, k])
        mean = each @ self.weights
        std = ((each - mean[:, None]).square() @ self.weights).sqrt()
        kept = std[std.isfinite()]
        self.metrics = {f"{self.__name__}_spread": float(kept.mean()) if len(kept) else math.nan}
        return {"mean": mean, "min": each.amin(1), "mean_std": mean - self.std_coef * std}[self.aggregation].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": [statistics.state_dict() for statistics in self.statistics]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for statistics, saved in zip(self.statistics, state["statistics"], strict=True):
            statistics.load_state_dict(saved)


@contextmanager
def fixed_statistics(functions: Iterable[RewardFunction]) -> Iterator[None]:
    """Inside the block, ensembles among the functions normalise by the statistics they have and take nothing in."""
    ensembles = [(ensemble, ensemble.fixed) for ensemble in _ensembles(functions)]
    for ensemble, _ in ensembles:
        ensemble.fixed = True
    try:
        yield
    finally:
        for ensemble, fixed in ensembles:
            ensemble.fixed = fixed


def _ensembles(functions: Iterable[RewardFunction]) -> Iterator[RewardEnsemble]:
    """Those among the functions, and among their members."""
    for function in functions:
        if isinstance(function, RewardEnsemble):
            yield function
            yield from _ensembles(function.members.functions)


def load_rewards(config: RLConfig, tokenizer: Any = None) -> list[RewardFunction]:
    """What scores a run's completions: the reward model, or the ensemble of them; then the functions of reward_funcs.

    Raises: ValueError or FileNotFoundError naming the key, also when a reward model's tokens are not the policy's.
    """
    functions = [load_function(spec) for spec in names(config.reward_funcs)]
    folders = names(config.reward_model)
    for folder in folders:
        check_kind(folder, config.reward_model_type)
    dtype = DTYPES["bfloat16" if config.bf16 or config.pure_bf16 else config.dtype or "float32"]
    members = []
    for folder in folders:
        model = load_reward_model(folder, dtype=dtype, trust_remote_code=config.trust_remote_code)
        check_same_tokens(folder, tokenizer)
        pad = 0 if tokenizer is None else tokenizer.pad_token_id
        name = "reward_model" if len(folders) == 1 else Path(folder).name
        members.append(RewardModel(model, pad, batch_size=config.per_device_eval_batch_size, name=name))
    if len(members) < 2 and not config.reward_normalize:
        return members + functions
    ensemble = RewardEnsemble(
        members,
        aggregation=config.reward_aggregation,
        weights=config.reward_model_weights,
        std_coef=config.reward_std_coef,
        normalize=config.reward_normalize,
    )
    return [ensemble, *functions]


def check_kind(folder: str, kind: str | None) -> None:
    """Raise ValueError where a folder of `reward_model` does not hold what `reward_model_type` says."""
    found = "lora" if is_adapter(find_model("reward_model", folder)) else "full"
    if kind not in (None, found):
        raise ValueError(
            f"reward_model_type is {kind}, but {folder} holds {'an adapter' if found == 'lora' else 'a whole model'}"
        )


def check_same_tokens(folder: str, tokenizer: Any) -> None:
    """Raise ValueError when the tokenizer saved in `folder` gives other ids than `tokenizer`. None there: no check."""
    if tokenizer is None or not (Path(folder) / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    differ = {token for token, _ in own.items() ^ tokenizer.get_vocab().items()}
    if differ:
        raise ValueError(
            f"reward_model: {folder} has another tokenizer than the policy ({len(differ)} tokens differ, such as "
            f"{sorted(differ)[0]!r}): it cannot score the policy's tokens"
        )

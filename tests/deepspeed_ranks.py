"""ZeRO-2 and ZeRO-3 on any number of processes: `python deepspeed_ranks.py OUT [STAGE]` in torchrun's environment.

Without a stage the same runs without DeepSpeed, on one process. The loops of GRPO and PPO are in zero_ranks.py.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist

VOCAB, ROWS, LENGTH, STEPS = 40, 4, 9, 2


def model(tied: bool):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.3)
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


def zero(stage: int) -> dict:
    """Every parameter is partitioned, however small, and let go as soon as its module has run."""
    options = dict(stage=stage, stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0)
    options |= dict(stage3_max_live_parameters=0, stage3_max_reuse_distance=0)
    allowed = dict(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    return dict(zero_optimization=options, gradient_clipping=0.0, **allowed)


# ---- fuse_lm_head ------------------------------------------------------------------------------------------------


def fused(stage: int | None, rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """{case: weights after STEPS of SGD, and the losses}: log-probs or a loss_fn, tied or not, checkpointed or not."""
    cases = {
        f"{'loss_fn' if ready else 'logprob'}{', tied' if tied else ''}{', checkpointed' if again else ''}": (
            ready, tied, again,
        )
        for ready in (False, True) for tied in (False, True) for again in (False, True)
    }  # fmt: skip
    return {name: _fused(stage, rank, ranks, *case) for name, case in cases.items()}


def _fused(stage: int | None, rank: int, ranks: int, ready: bool, tied: bool, again: bool) -> dict[str, torch.Tensor]:
    from rlhf_fast import PolicyLoss
    from rlhf_fast.integrations.lm_head import fuse_lm_head

    net = model(tied)
    if again:
        net.gradient_checkpointing_enable()
    net.train()
    if stage is None:
        engine, optimizer = net, torch.optim.SGD(net.parameters(), lr=0.1)
    else:
        import deepspeed

        config = zero(stage) | dict(train_micro_batch_size_per_gpu=ROWS // ranks)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    fuse_lm_head(net)
    torch.manual_seed(1)
    ids, advantages = torch.randint(0, VOCAB, (ROWS, LENGTH)), torch.randn(ROWS, LENGTH - 1)
    mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
    ids, advantages = ids[mine], advantages[mine]
    losses = []
    for _ in range(STEPS):
        if ready:
            loss_fn = PolicyLoss("grpo", normalizer=ROWS / ranks * (LENGTH - 1), aggregation="token_mean")
            loss = engine(ids[:, :-1], target_ids=ids[:, 1:], loss_fn=loss_fn, batch=dict(advantages=advantages)).loss
        else:
            loss = -(engine(ids[:, :-1], target_ids=ids[:, 1:]).logprob * advantages).mean()
        if stage is None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
        losses.append(loss.detach())
    return {"losses": _mean(torch.stack(losses))} | _weights(net, stage)


def _mean(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _weights(net: torch.nn.Module, stage: int | None) -> dict[str, torch.Tensor]:
    if stage != 3:
        return {name: p.detach().clone() for name, p in net.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return {name: p.detach().clone() for name, p in net.named_parameters()}


# ---- trainers ----------------------------------------------------------------------------------------------------


def trainers(folder: Path, path: str, stage: int | None, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """{trainer: weights after two steps}: TRL's under the patch on the model in `path`, and ours."""
    from stage_cases import tiny
    from test_dpo import trainer_for as dpo_trainer
    from test_sft import make_rows
    from test_sft import trainer_for as sft_trainer
    from trl_cases import trainer

    from rlhf_fast.integrations import trl as patched
    from rlhf_fast.trainers.sharding import partitioned, state_of

    common = dict(max_steps=2, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    if stage is not None:
        common["deepspeed"] = zero(stage) | dict(train_micro_batch_size_per_gpu="auto")
    out = {}

    def run(name, made):
        made.train()
        out[name] = _weights(made.accelerator.unwrap_model(made.model), stage)

    for kind in ("sft", "dpo"):
        with patched.patch():
            options = common | dict(per_device_train_batch_size=8 // ranks, shuffle_dataset=False)
            if kind == "dpo":
                del options["shuffle_dataset"]
            options |= dict(train_sampling_strategy="sequential")
            run(f"trl {kind}", trainer(kind, path, folder, **options))
    ours = common | dict(train_sampling_strategy="sequential")
    run("sft", sft_trainer(
        folder / "sft", tiny(vocab_size=18, dtype=torch.float32), make_rows(8),
        **ours, per_device_train_batch_size=8 // ranks,
    ))  # fmt: skip
    for name, options in {"dpo": {}, "dpo, ahead": {}, "dpo, followed": dict(sync_steps=1, sync_alpha=0.3)}.items():
        net = tiny(dtype=torch.float32)
        options |= ours | dict(per_device_train_batch_size=8 // ranks)
        made = dpo_trainer(folder / name, net, ref=None, **options)
        if bool(partitioned(made.reference.model)) != (stage == 3):
            raise RuntimeError(f"{name}, stage {stage}: the reference does not lie as the policy does")
        reference = made.reference.model
        if name == "dpo, ahead":
            made.precompute_reference(batch_size=3)  # three batches
        run(name, made)
        out[name] |= {f"reference.{n}": w for n, w in state_of(reference).items()}
    return out


def main(folder: Path, stage: int | None) -> None:
    """Write RANK/results.pt and RANK/rl.pt, resume."""
    import zero_ranks
    from ranks import exact_norms
    from trl_cases import saved

    torch.set_num_threads(1)
    gc.freeze()  # stage 3 collects garbage in every step of making an engine: not among what has been imported
    rank, ranks = 0, int(os.environ["WORLD_SIZE"])
    own = folder / os.environ["RANK"]
    path = saved(own / "model")  # afterwards only the first rank would write
    if stage is not None:
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # its own collectives would be compiled first
        deepspeed.init_distributed("gloo")
        rank = dist.get_rank()
    torch.save(fused(stage, rank, ranks) | trainers(own, path, stage, ranks), own / "results.pt")
    if stage is not None:
        for case in zero_ranks.RESUMED[stage]:
            zero_ranks.resume(folder / "resumed" / case, case, stage)
        os.environ |= dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage))  # as launched
    exact_norms()
    torch.save(zero_ranks.results(own), own / "rl.pt")


if __name__ == "__main__":
    from rlhf_fast.cli.train import leave_ranks

    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    leave_ranks()

"""What the tests of GRPO share: a tiny model, a reward, a trainer, an experience of ragged completions."""

import importlib
import json

import torch
import transformers

from rlhf_fast.cli.demos.task import make_tokenizer
from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer
from rlhf_fast.trainers.refill import Batch
from rlhf_fast.trainers.rollout.samplers import Rollout

PROMPTS = ["25>", "7>", "90331>", "2516>", "8>", "11>", "4444>", "306>"]


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=15, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=2, pad_token_id=0, **kwargs,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def digits_sum(completion_ids, **_):
    """A reward that differs within groups."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def config(tmp_path, **kwargs):
    values = dict(
        output_dir=str(tmp_path), num_generations=4, max_completion_length=5, cutoff_len=32, use_cpu=True,
        per_device_train_batch_size=16, steps_per_generation=2, learning_rate=1e-3, disable_tqdm=True,
        plot_loss=False, max_steps=2, seed=3,
    )  # fmt: skip
    return GRPOConfig(**{**values, **kwargs})


def trainer(tmp_path, model=None, reward=digits_sum, callbacks=(), **kwargs):
    rows = [{"prompt": p, "answer": str(len(p))} for p in PROMPTS]
    return GRPOTrainer(model or tiny(), make_tokenizer(), rows, reward, config(tmp_path, **kwargs), callbacks=callbacks)


def log_rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]


def exact_norms(monkeypatch):
    """transformers' RMSNorm rounds to fp32 even in an fp64 model; here it does not."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in ("qwen2", "llama"):
        modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        monkeypatch.setattr(getattr(modeling, f"{module.capitalize()}RMSNorm"), "forward", forward)


def experience_of(it, seed=0):
    """A rollout of ragged completions, some cut, with one NaN reward; in fp64."""
    g = torch.Generator().manual_seed(seed)
    prompts = it.prompts[:4]
    group = it.config.num_generations
    lengths = torch.randint(1, 6, (len(prompts) * group,), generator=g)
    total = int(lengths.sum())
    rollout = Rollout(
        torch.randint(3, 15, (total,), generator=g),
        -3 * torch.rand(total, generator=g),
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        ["length" if n == 5 else "stop" for n in lengths.tolist()],
        it.sampler.settings,
    )
    rows = [p for p in prompts for _ in range(group)]
    experience, metrics = it.advantages(Batch(list(prompts), rollout, it.score_rollout(rows, rollout)))
    assert 0 < metrics["truncated_completions"] < 1
    return experience._replace(advantages=experience.advantages.double(), logprob=experience.logprob.double())

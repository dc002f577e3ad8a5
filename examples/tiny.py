"""What the examples share: a random model of 15,000 parameters, and a task for it, sorting four digits."""

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

PAD, EOS, VOCAB = 0, 1, 12  # tokens 2 to 11 are the digits
IGNORE = -100


def tiny_model(head: type[nn.Module] = Qwen2ForCausalLM, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return head(Qwen2Config(**sizes, num_key_value_heads=2, pad_token_id=PAD, eos_token_id=EOS, **options))


def tiny_reward_model() -> nn.Module:
    return tiny_model(Qwen2ForSequenceClassification, num_labels=1)


def sorting(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (count, 4), their digits in order with EOS (count, 5), and the same out of order."""
    prompts = torch.randint(2, VOCAB, (count, 4))
    good, bad = prompts.sort(dim=1).values, prompts.sort(dim=1, descending=True).values
    end = torch.full((count, 1), EOS)
    return prompts, torch.cat([good, end], 1), torch.cat([bad, end], 1)


def aligned(prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each: position i predicts `targets[:, i]`, prompts predict nothing."""
    ids = torch.cat([prompts, answers], 1)
    targets = ids.clone()
    targets[:, : prompts.shape[1]] = IGNORE
    return ids[:, :-1], targets[:, 1:]


def padded(rollout, column: Tensor, fill: float) -> Tensor:
    """(B, T) from the flat (N,) tensor of a rollout's tokens."""
    parts = column.split(rollout.lengths.tolist())
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

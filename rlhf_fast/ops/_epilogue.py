"""The forward of a head without a tile of logits: its statistics taken in the product's own epilogue.

Never run on a GPU yet: RLHF_FAST_HEAD=epilogue turns it on, and the tiles of cuBLAS are the default. docs/kernels.md
says what either costs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rlhf_fast import _backend
from rlhf_fast.ops._rows import RowStats, Transform

PARTIAL_BUDGET = 256 << 20
"""Bytes of partial results of one launch: 37,000 rows of a vocabulary of 151,936."""

_INTERPRETED = (90, 2)  # capability and multiprocessors where there is no GPU


def applies(hidden: Tensor, weight: Tensor) -> bool:
    """Whether RLHF_FAST_HEAD asks for this road and these tensors can take it: bf16 or fp16, D a multiple of 8 and rows
    of the head that start on 16 bytes, sm_90 or sm_100. Everything else takes the tiles."""
    if _backend.head_road() != "epilogue" or _backend.backend(hidden.device, "row_pass") != "triton":
        return False
    # Triton's interpreter multiplies the bit patterns of bf16 matrices
    dtypes = (torch.bfloat16, torch.float16) if hidden.is_cuda else (torch.float16,)
    can_align = hidden.shape[1] * hidden.element_size() % 16 == 0  # copies of hidden states have rows without padding
    return hidden.dtype in dtypes and can_align and aligned(weight) and served(_processor(hidden.device)[0])


def served(capability: int) -> bool:
    """Whether blocks are chosen for that processor: 9.0 and 10.x. Those of 12.x have the TMA but 99 KB of shared memory
    and none of sm_100's matrix units."""
    return capability == 90 or 100 <= capability < 110


def rows_per_launch(vocab: int, device: torch.device, budget: int | None) -> int:
    """Rows whose partial results fit in the budget."""
    from rlhf_fast.kernels import head_stats

    config = head_stats.config_for(_processor(device)[0])
    return max(1, (budget or PARTIAL_BUDGET) // head_stats.partial_bytes(vocab, config))


def stats(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, tf: Transform, *, entropy: bool) -> RowStats:
    """Statistics of h @ weight.T + bias: h (n, D), weight (V, D), bias (V,), target (n,) int64."""
    from rlhf_fast.kernels import head_stats

    capability, programs = _processor(h.device)
    out = [torch.empty(h.shape[0], dtype=torch.float32, device=h.device) for _ in range(4 if entropy else 3)]
    result = RowStats(*out[:3], out[3] if entropy else None)
    with _backend.on_device(h):
        head_stats.head_stats(
            h if aligned(h) else h.clone(memory_format=torch.contiguous_format),
            weight,
            target.contiguous(),
            None if bias is None else bias.float().contiguous(),
            **tf._asdict(),
            **result._asdict(),
            config=head_stats.config_for(capability),
            programs=programs,
        )
    return result


def exponentials(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, shift: Tensor, pre: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(s - shift) into `out`; its sum over each row and s of the target, (n,) each."""
    from rlhf_fast.kernels import head_exp, head_stats

    capability, programs = _processor(h.device)
    config = head_stats.config_for(capability)
    return head_exp.head_exp(
        h, weight, target.contiguous(), bias, shift, pre=pre, out=out, config=config, programs=programs
    )


def aligned(matrix: Tensor) -> bool:
    """Whether the rows are contiguous and start on 16 bytes each, as TMA wants them."""
    start, step = matrix.data_ptr(), matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and start % 16 == 0 and step % 16 == 0 and step > 0


@cache
def _processor(device: torch.device) -> tuple[int, int]:
    """(compute capability as in sm_90, multiprocessors)."""
    if device.type != "cuda":
        return _INTERPRETED
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count

"""`fuse_lm_head`: log-probabilities and losses through a causal LM's own forward, its logits never formed.

The head's module is called where the model calls it, so FSDP, ZeRO-3, PEFT and gradient checkpointing see an ordinary
module call. In a fused call it computes the result right there and hands the model four made-up logits instead, which
also shows what the model does to its logits afterwards (a scale, a soft cap): nothing about an architecture is
guessed, and an unknown transformation is an error.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import _checks
from rlhf_fast.ops.fused import LossFn, fused_linear_loss
from rlhf_fast.ops.linear import linear_logprob
from rlhf_fast.types import FusedLoss, LogProb

PROBE = (0.5, -2.0, 8.0, 60.0)
"""Logits handed to the model in a fused call; their images tell scale and soft cap."""

SCALES = {  # config key -> the factors on the raw logits that it may stand for
    "logit_scale": lambda value: (value,),  # Cohere
    "logits_scaling": lambda value: (1 / value, value),  # Granite; HyperCLOVA X
    "lm_head_multiplier": lambda value: (value,),  # Falcon-H1
    "output_multiplier": lambda value: (value,),  # Muse
}
SOFTCAP = "final_logit_softcapping"  # Gemma


def fuse_lm_head(model: nn.Module) -> nn.Module:
    """Give a causal LM's forward the keywords of the fused head; returns the model.

    Afterwards `model(input_ids, ..., target_ids=t)` returns LogProb(logprob, entropy, lse) of the targets, and
    `model(input_ids, ..., target_ids=t, loss_fn=f, batch=..., segments=...)` returns FusedLoss. Without `target_ids`
    the forward is the model's own, so `generate` is unchanged.

    Keywords of a fused call:
        target_ids: (B, T) int64, aligned to the hidden states: `target_ids[:, i]` is the token that position i
            predicts, `input_ids[:, i + 1]` as a rule. -100: not scored, not computed.
        loss_fn, batch, segments, entropy, temperature, chunk_size, memory_budget: as in `fused_linear_loss` and
            `linear_logprob`. Soft cap and logit scale are the model's own.
        return_hidden: give (result, hidden), with the hidden states (B, T, D) that the head saw: what a value head on
            the same trunk takes, in the same forward and backward.
        return_aux_loss: give (result, aux_loss), the load-balancing loss () of a mixture of experts, before its
            coefficient, differentiable; with return_hidden (result, hidden, aux_loss).
    Args:
        model: a transformers causal LM, or a PEFT model around one. Before or after FSDP2, DDP and `device_map`.
    Raises: TypeError if the model has no linear output head; ValueError in the fused call if the model transforms its
        logits in a way that its config does not explain, or carries an adapter on the head other than one plain LoRA.
    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> tiny = dict(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = fuse_lm_head(Qwen2ForCausalLM(Qwen2Config(**tiny, num_key_value_heads=2)))
        >>> ids = torch.randint(0, 17, (2, 5))
        >>> model(ids[:, :-1], target_ids=ids[:, 1:]).logprob.shape
        torch.Size([2, 4])
    """
    base = _base(model)
    _attach(_head(base))
    if not hasattr(base, "_unfused_forward"):
        base._unfused_forward, base.forward = base.forward, _Forward(base)
    return model


def unfuse_lm_head(model: nn.Module) -> nn.Module:
    """Take `fuse_lm_head` back; returns the model."""
    base = _base(model)
    if hasattr(base, "_unfused_forward"):
        for module in model.modules():  # a head that was wrapped or replaced since may still be there
            if module is not base and "_unfused_forward" in module.__dict__:
                _restore(module, _slot(module))
        _restore(base, "forward")
    return model


class _Forward:
    """The forward of a fused module. Unlike a bound method it is copied and pickled with its module."""

    def __init__(self, module: nn.Module, *, head: bool = False):
        self.__self__, self.head = module, head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (_head_forward if self.head else _model_forward)(self.__self__, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:  # accelerate binds it to the module once more
        return _head_forward if self.head else _function_of(type(self.__self__))

    @property
    def __signature__(self) -> inspect.Signature:  # of the model's own forward, for what looks at its parameters
        return inspect.signature(types.MethodType(self.__func__, self.__self__))


@functools.cache
def _function_of(model_class: type) -> Callable[..., Any]:
    """`_model_forward` with the name and the parameters of a class's own; nothing leads back to that one."""

    @functools.wraps(model_class.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _model_forward(self, *args, **kwargs)

    del forward.__wrapped__
    forward.__signature__ = inspect.signature(model_class.forward)
    return forward


def _attach(head: nn.Module) -> None:
    """Let a head look for fused calls, once. PEFT and `resize_token_embeddings` make new ones."""
    if "_unfused_forward" not in head.__dict__:
        slot = _slot(head)
        head._unfused_forward, head._fused_calls = getattr(head, slot), {}  # by thread
        setattr(head, slot, _Forward(head, head=True))


def _slot(module: nn.Module) -> str:
    """Where a module keeps its own forward: accelerate's hooks (`device_map`) put theirs in front, which move weights
    and inputs to where they meet."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _restore(module: nn.Module, slot: str) -> None:
    """Put the forward back that was there before."""
    original = module.__dict__.pop("_unfused_forward")
    module.__dict__.pop("_fused_calls", None)
    if getattr(original, "__func__", None) is getattr(type(module), "forward", None) and slot == "forward":
        del module.forward
    else:
        setattr(module, slot, original)


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse_lm_head` has been applied."""
    return hasattr(_base(model), "_unfused_forward")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(base: nn.Module) -> nn.Module:
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    # Looking at the weight matters: DeepSpeed (ZeRO-3) notes what the model's forward touches, and gathers it for the
    # model's backward too.
    if not isinstance(getattr(head, "weight", None), Tensor) and not hasattr(head, "base_layer"):
        raise TypeError(f"{type(base).__name__} has no linear output head: get_output_embeddings() gave {head!r}")
    return head


class _Request:
    """One fused call on its way from the model's forward to its head."""

    def __init__(self, target: Tensor, loss_fn: LossFn | None, options: dict[str, Any], transform: dict | None):
        self.target, self.loss_fn, self.options, self.transform = target, loss_fn, options, transform
        self.hidden: Tensor | None = None
        self.result: LogProb | FusedLoss | None = None


def _model_forward(
    self,
    *args,
    target_ids: Tensor | None = None,
    loss_fn: LossFn | None = None,
    batch: dict[str, Any] | None = None,
    segments: Tensor | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    return_hidden: bool = False,
    return_aux_loss: bool = False,
    **kwargs,
):
    if target_ids is None:
        given = dict(loss_fn=loss_fn is not None, return_hidden=return_hidden, return_aux_loss=return_aux_loss)
        if any(given.values()):
            raise ValueError(f"{next(name for name, asked in given.items() if asked)} needs target_ids")
        return self._unfused_forward(*args, **kwargs)
    if kwargs.get("labels") is not None:
        raise ValueError("give target_ids (aligned to the hidden states) or labels (shifted by the model), not both")
    options = dict(entropy=entropy, temperature=temperature, chunk_size=chunk_size, memory_budget=memory_budget)
    if loss_fn is not None:
        options |= dict(batch=batch, segments=segments)
    kwargs.setdefault("use_cache", False)
    if not hasattr(self, "_logit_transform"):
        self._logit_transform = _probe(self, target_ids.device)
    request = _Request(target_ids, loss_fn, options, self._logit_transform)
    if return_aux_loss:
        kwargs["output_router_logits"] = True
    output = _run(self, request, args, kwargs)
    extra = (request.hidden,) if return_hidden else ()
    if return_aux_loss:
        if getattr(output, "aux_loss", None) is None:
            raise ValueError(f"return_aux_loss: {type(self).__name__} gives no aux_loss")
        extra += (output.aux_loss,)
    return (request.result, *extra) if extra else request.result


def _head_forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
    if self._fused_calls:
        return _answer(self, hidden, args, kwargs)
    return self._unfused_forward(hidden, *args, **kwargs)


@torch.compiler.disable
def _answer(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The result of this thread's fused call, kept in its request, and made-up logits for the model."""
    request = self._fused_calls.get(threading.get_ident())
    if request is None:
        return self._unfused_forward(hidden, *args, **kwargs)
    if request.transform is not None:
        if request.target.shape != hidden.shape[:-1]:
            want, got = _checks.shape_str(hidden.shape[:-1]), _checks.shape_str(request.target.shape)
            raise ValueError(f"target_ids must be (B, T)={want}, got {got}")
        linear, lora = head_parts(self)
        target, options = _to(request.target, hidden.device), _to(request.options, hidden.device)
        options |= request.transform | {"bias": getattr(linear, "bias", None), "lora": lora}
        if request.loss_fn is None:
            request.result = linear_logprob(hidden, linear.weight, target, **options)
            _expect_weight(linear, request.result.logprob)
        else:
            request.result = fused_linear_loss(hidden, linear.weight, target, request.loss_fn, **options)
    request.hidden = hidden
    probe = torch.tensor(PROBE, dtype=hidden.dtype, device=hidden.device)
    return probe.expand(*hidden.shape[:-1], len(PROBE))


def _to(value: Any, device: torch.device) -> Any:
    """Tensors, in dicts too, where the head is: `device_map` may have it elsewhere than the inputs."""
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) and value.dim() else value


def _expect_weight(linear: nn.Module, logprob: Tensor) -> None:
    """The backward of log-probs reads the head once more: an error if a wrapper has taken its memory back by then."""
    if not logprob.requires_grad:
        return
    weight = linear.weight

    def check(_: Tensor) -> None:
        if weight.numel() and weight.untyped_storage().size() == 0:
            raise RuntimeError(
                "the head's weight was resharded after its forward, and its backward needs it: wrap the head with the "
                "root (or reshard_after_forward=False), or give the loss as loss_fn, which needs it in the forward only"
            )

    logprob.register_hook(check)


def head_parts(head: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor, float] | None]:
    """The plain head, and the low-rank adapter that PEFT has put on it: (a, b, scaling), or None.

    Raises: ValueError when what is active there is not one plain LoRA adapter.
    """
    linear = getattr(head, "base_layer", head)
    if linear is head or head.disable_adapters or head.merged:
        return linear, None
    active = [n for n in head.active_adapters if any(n in getattr(head, part, ()) for part in head.adapter_layer_names)]
    if not active:
        return linear, None
    plain = len(active) == 1 and active[0] in getattr(head, "lora_A", ()) and _is_plain(head, active[0])
    if not plain:
        raise ValueError(
            f"the head carries {type(head).__module__}.{type(head).__name__} with adapters {active}: the fused head "
            "takes one plain LoRA adapter without dropout"
        )
    a, b = (part[active[0]].weight.to(linear.weight.dtype) for part in (head.lora_A, head.lora_B))
    return linear, (a, b, float(head.scaling[active[0]]))


def _is_plain(head: nn.Module, name: str) -> bool:
    """Whether an adapter adds scaling * b @ a and nothing else."""
    a, b = head.lora_A[name], head.lora_B[name]
    dropout = head.training and getattr(head.lora_dropout[name], "p", 0) > 0
    variant = head.use_dora.get(name) or getattr(head, "lora_variant", {}).get(name) is not None
    return type(a) is type(b) is nn.Linear and b.bias is None and not dropout and not variant


@torch.compiler.disable(recursive=False)
def _run(base: nn.Module, request: _Request, args: tuple, kwargs: dict) -> Any:
    head, thread = _head(base), threading.get_ident()
    _attach(head)
    head._fused_calls[thread] = request
    try:
        output = base._unfused_forward(*args, **kwargs)
    finally:
        del head._fused_calls[thread]
    if request.hidden is None:
        raise ValueError(f"{type(base).__name__}.forward does not call its output head: it cannot be fused")
    return output


@torch.no_grad()
def _probe(base: nn.Module, offloaded: torch.device) -> dict[str, float | None]:
    """Scale and soft cap between the head and the model's logits, read off the images of PROBE. Once per model."""
    device = base.get_input_embeddings().weight.device
    device = offloaded if device.type == "meta" else device
    ids = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        output = _run(base, _Request(None, None, {}, None), (), dict(input_ids=ids, use_cache=False))
    logits = output.logits if hasattr(output, "logits") else output[0]
    got = logits.reshape(-1, len(PROBE))[0].double().cpu()
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    known = {key: value for key in SCALES if isinstance(value := getattr(config, key, None), (int, float)) and value}
    scales = [1.0, *itertools.chain.from_iterable(SCALES[key](value) for key, value in known.items())]
    caps = [None] + ([cap] if (cap := getattr(config, SOFTCAP, None)) else [])
    x = torch.tensor(PROBE, dtype=torch.float64)
    tolerance = 4 * torch.finfo(base.dtype).eps
    for scale, cap in itertools.product(scales, caps):
        y = x * scale
        y = y if cap is None else cap * torch.tanh(y / cap)
        if torch.allclose(got, y, rtol=tolerance, atol=tolerance):
            return {"logit_scale": float(scale), "softcap": None if cap is None else float(cap)}
    raise ValueError(
        f"{type(base).__name__} turns head outputs {list(PROBE)} into {got.tolist()}, which its config "
        f"({', '.join([*SCALES, SOFTCAP])}) does not explain: it cannot be fused"
    )

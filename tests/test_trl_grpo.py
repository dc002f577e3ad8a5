"""`FastGRPOTrainer` against TRL's own loss: every loss_type and option, on a model, values and gradients."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from _budget import assert_within_budget
from trl_cases import VOCAB, saved, trainer

from rlhf_fast.integrations import trl_grpo
from rlhf_fast.integrations.lm_head import unfuse_lm_head
from rlhf_fast.integrations.trl import FastGRPOTrainer, GRPOLossMixin, PatchError
from rlhf_fast.losses import PolicyLoss
from rlhf_fast.ops import _kept
from rlhf_fast.ops._head import Head

GRPOTrainer = trl_grpo.GRPOTrainer
LOSS_TYPES = trl_grpo.LOSS_TYPES
CLIPPED = trl_grpo.CLIPPED
TEMPERATURE = 0.7
PROMPT, LENGTHS = 5, (7, 1, 4, 6)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    return trainer("grpo", saved(folder / "model"), folder, cls=FastGRPOTrainer, beta=0.1, temperature=TEMPERATURE)


@pytest.fixture
def grpo(fast):
    """The trainer in the state in which it was made, whatever a test sets."""
    before, args = dict(vars(fast)), dict(vars(fast.args))
    fast.current_gradient_accumulation_steps = 1
    fast.beta = 0.0
    fast.model.train()
    yield fast
    vars(fast).clear()
    vars(fast).update(before)
    vars(fast.args).update(args)


def batch(grpo) -> dict[str, torch.Tensor]:
    """What TRL hands its loss: prompts padded on the left, completions on the right, policies near the current one."""
    return dict(_batch(grpo.model))


@functools.cache
def _batch(model) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    rows, width = len(LENGTHS), max(LENGTHS)
    ids = torch.randint(4, VOCAB, (rows, PROMPT + width), generator=g)
    prompt_mask = torch.ones(rows, PROMPT, dtype=torch.long)
    prompt_mask[1, :2] = 0
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    inputs = dict(prompt_ids=ids[:, :PROMPT], prompt_mask=prompt_mask)
    inputs |= dict(completion_ids=ids[:, PROMPT:], completion_mask=mask, num_items_in_batch=torch.tensor(31))
    with torch.no_grad():
        now = logprobs(model, inputs)[0]
    near = [(now + 0.4 * torch.randn(now.shape, generator=g)) * mask for _ in range(3)]
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    return inputs | dict(zip(names, near, strict=True)) | dict(advantages=torch.tensor([1.3, -0.7, -1.1, 0.5]))


def logprobs(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the completions from logits, in the model's dtype."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT - 1 : -1] / TEMPERATURE
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    counts = inputs["completion_mask"].bool()
    return chosen.masked_fill(~counts, 0), -(logp.exp() * logp).sum(-1).masked_fill(~counts, 0)


def run(grpo, inputs, *, road: str):
    """(loss, gradients, metrics) by `road`: ours, TRL's, or TRL's formula on fp64 logits."""
    model, mode = grpo.model, "train" if grpo.model.training else "eval"
    model.zero_grad()
    grpo._metrics[mode].clear()
    if road == "truth":
        model = unfuse_lm_head(copy.deepcopy(model)).double()
        model.forward = type(model).forward.__get__(model)
        grpo._get_per_token_logps_and_entropies = lambda *_, **__: (*logprobs(model, inputs), None)
    grpo.own_road = None if road == "ours" else "asked by the test"
    loss = grpo._compute_loss(model, dict(inputs))
    vars(grpo).pop("_get_per_token_logps_and_entropies", None)
    if loss.requires_grad:
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, {name: values[0] for name, values in grpo._metrics[mode].items()}


def compare(grpo, **inputs_over):
    inputs = batch(grpo) | inputs_over
    truth, theirs, ours = (run(grpo, inputs, road=road) for road in ("truth", "TRL", "ours"))
    assert ours[1].keys() == theirs[1].keys() == truth[1].keys()
    size, rounding = max(1.0, truth[0].abs().item()), 0.0
    if grpo.loss_type == "vespo":  # a function of the product of all ratios: each log-prob rounds, times |k - lambda w|
        rounding = 3 * max(LENGTHS) * 2.0**-24 * inputs["ref_per_token_logps"].abs().max().item() * size
    assert_within_budget(ours[0], theirs[0], truth[0], torch.float32, scale=size, rounding=rounding, name="loss")
    for name, grad in truth[1].items():
        # sums of 18 tokens' gradients, each as large as the largest
        assert_within_budget(
            ours[1][name], theirs[1][name], grad, torch.float32, scale=max(1.0, 18 * grad.abs().max()), name=name
        )
    assert ours[2] == pytest.approx(theirs[2], rel=1e-4, abs=1e-5, nan_ok=True)  # TRL's code on our log-probs
    return ours


def setting(grpo, loss_type, level="token"):
    grpo.loss_type, grpo.importance_sampling_level = loss_type, level
    grpo.epsilon_low, grpo.epsilon_high = 0.2, 1.3 if loss_type == "cispo" else 0.28


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type(grpo, loss_type, level):
    setting(grpo, loss_type, level)
    loss, grads, _ = compare(grpo)
    assert loss != 0
    assert all(g.abs().max() > 0 for g in grads.values())
    for bias in (False, True):
        grpo.beta, grpo.args.use_bias_correction_kl = 0.1, bias
        _, _, metrics = compare(grpo)
        assert metrics["kl"] > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulation_evaluation_and_on_policy(grpo, loss_type):
    setting(grpo, loss_type)
    grpo.current_gradient_accumulation_steps, grpo.args.steps_per_generation = 3, 2
    accumulated = compare(grpo)[0]
    grpo.model.eval()
    evaluated = compare(grpo)[0]
    assert not torch.isclose(accumulated, evaluated)
    compare(grpo, old_per_token_logps=None)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_delta(grpo, loss_type, level):
    setting(grpo, loss_type, level)
    plain = run(grpo, batch(grpo), road="ours")[0]
    grpo.args.delta = 0.9
    assert compare(grpo)[0] != plain


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus(grpo, loss_type):
    setting(grpo, loss_type)
    plain = run(grpo, batch(grpo), road="ours")[0]
    grpo._entropy_bonus_enabled, grpo.entropy_coef = True, 0.05
    grpo.current_gradient_accumulation_steps = 2
    assert compare(grpo)[0] != plain


def test_adaptive_entropy_bonus_moves_once_a_step(grpo):
    grpo._entropy_bonus_enabled = grpo.use_adaptive_entropy = True
    grpo._entropy_window_stats = None
    grpo.args.entropy_target, grpo.args.entropy_coef_delta = 50.0, 0.01
    grpo.args.entropy_coef_min, grpo.args.entropy_coef_max = 0.0, 1.0
    seen = []
    for road in ("ours", "TRL"):
        grpo.entropy_coef, grpo._last_world_entropy = 0.02, 1.0
        loss, grads, metrics = run(grpo, batch(grpo), road=road)
        seen.append((loss.item(), grpo.entropy_coef, grpo._last_world_entropy, metrics["policy_loss"]))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    losses = []
    for road in ("ours", "TRL"):
        grpo._last_world_entropy = 60.0  # above the target: no bonus
        losses.append(run(grpo, batch(grpo), road=road)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(seen[0][0], rel=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_policy_mask(grpo, loss_type):
    setting(grpo, loss_type)
    plain = run(grpo, batch(grpo), road="ours")[0]
    grpo.off_policy_mask_threshold = -10.0  # every sequence of negative advantage is out
    assert compare(grpo)[0] != plain
    grpo.off_policy_mask_threshold = 0.1
    inputs = batch(grpo)
    inputs.pop("sampling_per_token_logps")
    losses = [run(grpo, inputs, road=road)[0].item() for road in ("ours", "TRL")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_vllm_importance_correction(grpo, loss_type, mode):
    setting(grpo, loss_type)
    plain = run(grpo, batch(grpo), road="ours")[0]
    grpo.use_vllm = grpo.vllm_importance_sampling_correction = True
    grpo.vllm_importance_sampling_mode = mode
    grpo.vllm_importance_sampling_clip_min, grpo.vllm_importance_sampling_clip_max = 0.6, 1.3
    inputs = batch(grpo)  # the ratio as TRL forms it while it generates
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
    ratio = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    outside = (ratio < 0.6) | (ratio > 1.3)
    assert outside.any()
    ratio = ratio.clamp(0.6, 1.3) if mode.endswith("truncate") else ratio.masked_fill(outside, 0.0)
    corrected = compare(grpo, importance_sampling_ratio=ratio)[0]
    assert corrected != plain


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_tokens(grpo, loss_type):
    setting(grpo, loss_type)
    compare(grpo, advantages=torch.randn(len(LENGTHS), max(LENGTHS)))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
def test_tool_tokens_are_neither_scored_nor_counted(grpo, loss_type, monkeypatch):
    setting(grpo, loss_type)
    grpo.beta = 0.1
    tool_mask = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    tool_mask[0, 2:5] = 0
    poison = {}
    for key in ("old_per_token_logps", "ref_per_token_logps"):  # TRL has scored them: exp of their ratio overflows
        poison[key] = batch(grpo)[key].clone()
        poison[key][0, 2:5] = -200.0 if key.startswith("old") else 0.0
    rows = []
    monkeypatch.setattr(Head, "logits", _counted(Head.logits, rows))
    got = run(grpo, batch(grpo) | poison | {"tool_mask": tool_mask}, road="ours")
    assert sum(rows) == sum(LENGTHS) - 3
    clean = run(grpo, batch(grpo) | {"tool_mask": tool_mask}, road="TRL")
    assert got[0].item() == pytest.approx(clean[0].item(), abs=1e-6)  # a sum of terms near 1
    assert got[2] == pytest.approx(clean[2], rel=1e-4, abs=1e-6, nan_ok=True)


def _counted(method, rows):
    def logits(self, h):
        rows.append(h.shape[0])
        return method(self, h)

    return logits


def test_one_product_forward_where_trls_road_takes_two(grpo, monkeypatch):
    from rlhf_fast.integrations import trl

    inputs, rows = batch(grpo), []
    setting(grpo, "sapo")  # no token is clipped: all have a gradient
    monkeypatch.setattr(Head, "logits", _counted(Head.logits, rows))
    run(grpo, inputs, road="ours")
    assert sum(rows) == sum(LENGTHS)  # masked positions, prompts and padding are not among them
    rows.clear()
    monkeypatch.setattr(_kept, "KEEP", 0)  # bytes of logits that may stay from the forward to the backward: as on a GPU
    with trl.patch():
        run(grpo, inputs, road="TRL")
    assert sum(rows) == 2 * sum(LENGTHS)


def test_a_batch_of_which_nothing_counts(grpo):
    inputs = batch(grpo)
    nothing = {"completion_mask": torch.zeros_like(inputs["completion_mask"])}
    loss, grads, _ = run(grpo, inputs | nothing, road="ours")
    assert grads
    assert loss == 0
    assert all(bool((g == 0).all()) for g in grads.values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(top_entropy_quantile=0.5), "top_entropy_quantile"),
        (dict(cast_lm_head_to_fp32=True), "cast_lm_head_to_fp32"),
    ],
)
def test_what_takes_trls_road_says_so(tmp_path, options, reason):
    path = saved(tmp_path / "model")
    with pytest.warns(UserWarning, match=f"takes TRL's own loss: {reason}"):
        ours = trainer("grpo", path, tmp_path, cls=FastGRPOTrainer, **options)
    ours.train()
    theirs = trainer("grpo", path, tmp_path, **options)
    theirs.train()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_loss_type_takes_trls_road(grpo):
    grpo.loss_type = "someday"
    assert "someday" in trl_grpo._needs_own_road(grpo)


def test_another_loss_below_the_mixin_is_refused():
    class Other(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 0

    class Mixed(GRPOLossMixin, Other):
        pass

    with pytest.raises(PatchError, match="_compute_loss is that of Other"):
        Mixed()


def test_another_release_is_refused(monkeypatch):
    monkeypatch.setattr(trl_grpo, "VERSIONS", ">=1.17")
    with pytest.raises(PatchError, match=r"trl 1\.16\.\d+ is outside >=1\.17"):
        FastGRPOTrainer()
    monkeypatch.setitem(trl_grpo.KNOWN, "_compute_loss", "(self, model, inputs, more)")
    with pytest.raises(PatchError, match=r"has the signature \(self, model, inputs\); .* inputs, more\)"):
        type("Any", (FastGRPOTrainer,), {"any_version": True})()


def test_a_loss_that_differs_from_trls_is_an_error(grpo, monkeypatch):
    monkeypatch.setattr(trl_grpo, "_loss", lambda trainer: PolicyLoss("grpo", clip_low=0.01, clip_high=0.01))
    with pytest.raises(RuntimeError, match="TRL makes the loss"):
        run(grpo, batch(grpo), road="ours")

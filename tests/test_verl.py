"""verl's own functions beside ours, with and without the patch: the same losses and gradients. Skipped without verl."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hosts import host

pytest.importorskip("transformers")
np = pytest.importorskip("numpy")

from rlhf_fast.integrations import verl as ours  # noqa: E402
from rlhf_fast.integrations._patching import PatchError  # noqa: E402

MODULES = (
    *("verl.trainer.ppo.core_algos", "verl.utils.experimental.torch_functional"),
    *("verl.utils.kernel.linear_cross_entropy", "verl.workers.config", "verl.models.transformers.dense_common"),
)
NAMES = ("core", "torch", "kernel", "config", "models")


@pytest.fixture(scope="module")
def verl():
    with host("verl", MODULES, ("ray", "tensordict", "omegaconf", "codetiming", "orjson")) as found:
        yield SimpleNamespace(**dict(zip(NAMES, found, strict=True)))


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def batch(rows=4, width=9):
    """fp64, ragged masks with a hole, a row that is masked whole, a group id a row."""
    torch.manual_seed(0)
    logprob = -torch.rand(rows, width, dtype=torch.float64) * 3
    old = logprob + 0.6 * torch.randn_like(logprob)
    advantages = torch.randn_like(logprob)
    mask = torch.arange(width) < torch.tensor([width, 5, 3, 0])[:rows, None]
    mask[0, 3:5] = False
    return logprob, old, advantages, mask


def config_of(verl, info=None, policy=None, **options):
    config = verl.config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    config.global_batch_info.update(info or {})
    for name, value in (policy or {}).items():
        object.__setattr__(config.policy_loss, name, value)
    return config


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = dict(dp_size=2, batch_num_tokens=40, global_batch_size=16, loss_scale_factor=11)
# verl's name, ours, options under which they are the same formula
LOSSES = {
    "vanilla": ("ppo", {}),
    "vanilla, asymmetric": ("ppo", {"clip_ratio_high": 0.4, "clip_ratio_c": 1.5}),
    "gspo": ("gspo", {}),
    "sapo": ("sapo", {"tau_neg": 1.0625}),
    "gpg": ("gpg", {}),
    "cispo": ("cispo", {"clip_ratio_low": 0.3}),
    "geo_mean": ("geo_mean", {}),
    "kl_cov": ("kl_cov", {}),
    "clip_cov": ("clip_cov", {}),
    "dppo_tv": ("dppo_tv", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5}),
    "dppo_kl": ("dppo_kl", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.5}),
    "dro": ("dro", {}),
}
# all eligible tokens are taken: verl draws them at random
COV = {
    "clip_cov_ratio": 1.0,
    "clip_cov_lb": 0.05,
    "clip_cov_ub": 0.5,
    "kl_cov_ratio": 0.3,
    "ppo_kl_coef": 0.7,
    "dro_beta": 0.3,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LOSSES)
def test_policy_losses(verl, case, mode, info, weighted):
    """Loss and gradient to fp64; verl adds 1e-8 to counts of tokens."""
    name, (kind, options) = case.partition(",")[0], LOSSES[case]
    if kind == "geo_mean" and weighted:
        pytest.skip("verl makes one weight a sequence of them")
    logprob, old, advantages, mask = batch()
    weights = 0.5 + torch.rand_like(logprob) if weighted else None
    results = []
    with ours.patch():
        for key in (name, f"rlhf_fast_{kind}"):
            config = config_of(verl, info, COV, **options)
            x = logprob.clone().requires_grad_()
            function = verl.core.get_policy_loss_fn(key)
            loss, metrics = function(
                old_log_prob=old, log_prob=x, advantages=advantages, response_mask=mask,
                loss_agg_mode=mode, config=config, rollout_is_weights=weights,
            )  # fmt: skip
            results.append((loss.detach(), *torch.autograd.grad(loss, x), metrics))
    theirs, mine = results
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-7, atol=1e-10)
    assert mine[1].abs().max() > 0
    assert all(isinstance(v, float) for v in mine[2].values())
    compared = {"actor/ppo_kl", "actor/pg_clipfrac"} if kind in ("ppo", "gspo", "dppo_tv", "dppo_kl") else set()
    if kind == "ppo":
        assert mine[2]["actor/pg_clipfrac"] > 0
        compared.add("actor/pg_clipfrac_lower")
    for metric in compared:
        assert mine[2][metric] == pytest.approx(theirs[2][metric], rel=1e-6), metric


def test_what_is_masked_matters_to_nothing(verl):
    logprob, old, advantages, mask = batch()
    with ours.patch():
        function = verl.core.get_policy_loss_fn("rlhf_fast_ppo")
        x = logprob.masked_fill(~mask, float("nan")).requires_grad_()
        old, advantages = (t.masked_fill(~mask, float("nan")) for t in (old, advantages))
        loss, metrics = function(old, x, advantages, mask, config=config_of(verl))
        loss.backward()
        assert x.grad[~mask].eq(0).all()
        assert np.isfinite(list(metrics.values())).all()
        loss, metrics = function(old, x, advantages, torch.zeros_like(mask), config=config_of(verl))
        assert loss == 0
        assert np.isfinite(list(metrics.values())).all()
        with pytest.raises(ValueError, match="batch_num_tokens is required when dp_size > 1"):
            function(old, x, advantages, mask, config=config_of(verl, {"dp_size": 2}))
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            function(old, x, advantages, mask, loss_agg_mode="mean", config=config_of(verl))
        with pytest.raises(ValueError, match="rollout_is_weights are per token"):
            verl.core.get_policy_loss_fn("rlhf_fast_geo_mean")(
                old, x, advantages, mask, config=config_of(verl), rollout_is_weights=old
            )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_gae(verl, gamma, lam):
    values, rewards, _, mask = batch()
    theirs = verl.core.compute_gae_advantage_return(rewards, values, mask.double(), gamma, lam)
    with ours.patch():
        mine = verl.core.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=1e-7, atol=1e-8)  # verl's counts + 1e-8
        assert a[~mask].eq(0).all()


UID = np.array(["b", "a", "b", "a", "b", "c", "c"], dtype=object)
ALGO = SimpleNamespace(gamma=0.9, get=lambda name, default=None: default)
PLAIN = SimpleNamespace(gamma=1.0, get=lambda name, default=None: name != "norm_adv_by_std_in_grpo" and default)


@pytest.mark.parametrize(
    ("theirs", "mine", "options"),
    [
        ("grpo", "grpo", {}),
        ("grpo", "dr_grpo", {"norm_adv_by_std_in_grpo": False}),
        ("grpo_vectorized", "grpo", {}),
        ("rloo", "rloo", {}),
        ("rloo_vectorized", "rloo", {}),
        ("opo", "opo", {}),
        ("grpo_passk", "pass_at_k", {}),
        ("reinforce_plus_plus", "reinforce_plus_plus", {}),
        ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", {}),
    ],
)
def test_advantage_estimators(verl, theirs, mine, options):
    torch.manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([6, 4, 3, 6, 1, 2, 5])[:, None]).double()
    rewards = torch.zeros(7, 6, dtype=torch.float64)
    rewards[range(7), mask.sum(1).long() - 1] = torch.randn(7, dtype=torch.float64)
    given = dict(response_mask=mask, index=UID, config=ALGO)
    with ours.patch():
        wanted = verl.core.get_adv_estimator_fn(theirs)(token_level_rewards=rewards.clone(), **given, **options)
        got = verl.core.get_adv_estimator_fn(f"rlhf_fast_{mine}")(token_level_rewards=rewards, **given)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a * mask, b * mask, rtol=1e-7, atol=1e-8)
        assert got[0].abs().max() > 0.1
        if mine == "grpo":
            undivided = verl.core.get_adv_estimator_fn("rlhf_fast_grpo")(rewards, mask, config=PLAIN, index=UID)
            plain = verl.core.get_adv_estimator_fn("rlhf_fast_dr_grpo")(rewards, mask, config=PLAIN, index=UID)
            torch.testing.assert_close(undivided, plain)
        if mine != "reinforce_plus_plus":
            with pytest.raises(ValueError, match="index must hold the prompt's uid"):
                verl.core.get_adv_estimator_fn(f"rlhf_fast_{mine}")(rewards, mask, config=ALGO)


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linear_for_ppo(verl, shape, dtype):
    """Both backends of verl's fused kernels give what our head gives; ours is at least as close to fp64."""
    torch.manual_seed(0)
    hidden = torch.randn(*shape, 16, dtype=torch.float64)
    weight, labels = torch.randn(37, 16, dtype=torch.float64), torch.randint(0, 37, shape)
    up = torch.randn(2, *shape, dtype=torch.float64)
    low = [hidden.to(dtype), weight.to(dtype)]

    def run(call, inputs, temperature=0.7):
        h, w = (x.clone().requires_grad_() for x in inputs)
        logprob, entropy = call(h, w, labels, temperature)
        out = (logprob.reshape(shape), entropy.reshape(shape))
        grads = torch.autograd.grad(out, (h, w), [u.to(o.dtype) for u, o in zip(up, out, strict=True)])
        return [x.detach().double() for x in (*out, *grads)]

    def exact(h, w, ids, temperature):
        logp = torch.log_softmax(h @ w.T / temperature, -1)
        return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    truth = run(exact, [x.double() for x in low])
    fused = verl.torch.FusedLinearForPPO()
    theirs = run(fused.forward, low)
    with ours.patch():
        results = [run(fused.forward, low), run(verl.kernel.linear_cross_entropy, low)]
    # the budget: verl's own largest error, and rounding of the results
    floor = torch.finfo(dtype).eps
    for mine in results:
        for a, b, want in zip(mine, theirs, truth, strict=True):
            size = want.abs().max()
            assert (a - want).abs().max() <= (b - want).abs().max() + 4 * floor * size
    assert len({x.shape for x in results[0]} & {torch.Size(shape)}) == 1


def test_a_step_of_verls_model_forward_and_loss(verl):
    """The forward of a model with fused kernels, both backends, and the "vanilla" loss: the model's gradients."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1))
    ids, mask = torch.randint(0, 31, (3, 10)), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    old, advantages = -torch.rand(3, 6) * 4, torch.randn(3, 6)

    def step(backend, loss_mode):
        model.zero_grad()
        out = getattr(verl.models, f"forward_with_{backend}_backend")(
            model, input_ids=ids, temperature=0.8, return_dict=True
        )
        logprob, entropy = (x.reshape(3, 10)[:, 3:9] for x in (out.log_probs, out.entropy))
        loss, _ = verl.core.get_policy_loss_fn(loss_mode)(old, logprob, advantages, mask, config=config_of(verl))
        (loss - 0.01 * verl.core.agg_loss(entropy, mask, "token-mean")).backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step("torch", "vanilla")
    with ours.patch():
        for backend in ("torch", "triton"):  # verl's triton backend runs on a GPU only, ours everywhere
            my_loss, mine = step(backend, "rlhf_fast_ppo")
            torch.testing.assert_close(my_loss, loss, rtol=2e-6, atol=2e-6)
            assert mine.keys() == gradients.keys()
            for name, gradient in gradients.items():  # fp32, the same sums in another order
                torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_kernels_signature(verl, monkeypatch):
    hidden, weight, labels = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randint(0, 11, (2, 3))
    with ours.patch():
        logprob, entropy = verl.kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "none", None)
        assert logprob.shape == entropy.shape == (6,)
        with pytest.raises(ValueError, match="reduction must be 'none', got 'mean'"):
            verl.kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
        called = []
        with monkeypatch.context() as spy:
            spy.setattr(torch.distributed, "get_world_size", lambda group: 2)
            spy.setattr(ours._LINEAR, "_old", lambda *a: called.append(a))
            verl.kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "none", "a group of two")
        assert called[0][-1] == "a group of two"  # verl's own kernel


def test_taken_back_and_refused(verl, monkeypatch):
    core, before = verl.core, (verl.kernel.linear_cross_entropy, verl.torch.FusedLinearForPPO.forward)
    losses, estimators = dict(core.POLICY_LOSS_REGISTRY), dict(core.ADV_ESTIMATOR_REGISTRY)
    with ours.patch():
        assert "rlhf_fast_gspo" in core.POLICY_LOSS_REGISTRY
        with pytest.raises(PatchError, match="verl is patched already"):
            ours.patch()
    assert (verl.kernel.linear_cross_entropy, verl.torch.FusedLinearForPPO.forward) == before
    assert losses == core.POLICY_LOSS_REGISTRY
    assert estimators == core.ADV_ESTIMATOR_REGISTRY
    monkeypatch.setitem(core.POLICY_LOSS_REGISTRY, "rlhf_fast_ppo", print)
    with pytest.raises(PatchError, match="has an entry 'rlhf_fast_ppo' already"):
        ours.patch()
    assert verl.torch.FusedLinearForPPO.forward is before[1]
    monkeypatch.delitem(core.POLICY_LOSS_REGISTRY, "rlhf_fast_ppo")
    monkeypatch.setattr(core, "compute_policy_loss_vanilla", lambda old, new: None)
    with pytest.raises(PatchError, match=r"compute_policy_loss_vanilla has the signature \(old, new\)"):
        ours.patch()

"""Every policy loss and option that a config reaches, through the trainer, against `reference.policy_loss`."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from grpo_cases import exact_norms, experience_of, log_rows, tiny, trainer  # noqa: E402

from rlhf_fast import reference  # noqa: E402
from rlhf_fast.losses import policy_loss  # noqa: E402
from rlhf_fast.losses.registry import policy_loss_kinds  # noqa: E402
from rlhf_fast.trainers.beforehand import with_entropy_threshold  # noqa: E402
from rlhf_fast.trainers.experience import IGNORE, MicroBatch, MiniBatch, as_plain, from_plain  # noqa: E402
from rlhf_fast.trainers.grpo import PROPORTIONAL, GRPOConfig, _idle  # noqa: E402
from rlhf_fast.trainers.models.policy import updating_mode  # noqa: E402

BY_COVARIANCE = {"clip_cov", "kl_cov"}  # they select by the log-probabilities of before the update; see below

CASES = {kind: dict(loss_type=kind) for kind in policy_loss_kinds() if kind not in BY_COVARIANCE} | {
    "delta": dict(delta=1.5),
    "dual clip": dict(dual_clip=2.0),
    "sequence level": dict(importance_sampling_level="sequence"),
    "kl k1": dict(beta=0.2, kl_estimator="k1", kl_gradient="k2"),
    "kl correction": dict(beta=0.2, kl_correction=True),
    "own numbers": dict(loss_type="sapo", loss_params={"temperature_pos": 2.0}),
    "off-policy mask": dict(off_policy_mask_threshold=0.05),
    "token truncate": dict(importance_correction="token_truncate"),
    "sequence mask": dict(importance_correction="sequence_mask", importance_correction_max=2.0),
    "geometric mask": dict(importance_correction="geometric_mask", importance_correction_min=0.5, loss_type="gspo"),
    "vespo corrected": dict(importance_correction="token_truncate", loss_type="vespo"),
    "top entropy": dict(top_entropy_quantile=0.4),
    "top entropy, bonus": dict(top_entropy_quantile=0.5, entropy_coef=0.2, loss_type="dapo"),
}
NAMES = {  # of the config -> of the reference
    "epsilon": "clip_low", "epsilon_high": "clip_high", "importance_sampling_level": "importance_level",
    "off_policy_mask_threshold": "off_policy_threshold", "top_entropy_quantile": "top_entropy",
    "importance_correction": "correction", "importance_correction_min": "correction_min",
    "importance_correction_max": "correction_max",
}  # fmt: skip


def reference_options(options):
    out = {NAMES.get(name, name): value for name, value in options.items() if name not in ("loss_type", "loss_params")}
    return out | options.get("loss_params", {})


def tokens_of(model, experience, temperature=1.0):
    """logprob and entropy (N,) of all completion tokens, sequence by sequence, from whole logits."""
    logprob, entropy = [], []
    for ids, prompt in zip(
        experience.ids.split(experience.cu_seqlens.diff().tolist()), experience.prompt_lengths.tolist(), strict=True
    ):
        logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, prompt - 1 : -1] / temperature, -1)
        logprob.append(logps.gather(1, ids[prompt:, None])[:, 0])
        entropy.append(-(logps.exp() * logps).sum(-1))
    return torch.cat(logprob), torch.cat(entropy)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A trainer in fp64 with a reference, an experience near the policy, and the same model in plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        exact_norms(patch)
        it = trainer(tmp_path_factory.mktemp("losses"), tiny().double(), beta=0.1)
        updating_mode(it.model, True)
        it.minibatches_per_rollout = 1
        plain, other = tiny().double().eval(), tiny(seed=9).double().eval()
        it.reference.model.load_state_dict(other.state_dict())
        experience = experience_of(it)
        with torch.no_grad():
            now, entropy = tokens_of(plain, experience)
            ref, _ = tokens_of(other, experience)
        drift = torch.randn(len(now), generator=torch.Generator().manual_seed(1))
        yield it, it.config, plain, experience._replace(logprob=now + 0.3 * drift.double()), now, entropy, ref


@pytest.mark.parametrize("case", CASES, ids=str)
def test_through_the_trainer_equals_the_reference(setting, case):
    it, base, plain, experience, now, entropy, ref = setting
    options = CASES[case]
    config = replace(base, **{"beta": 0.0, **options})
    config.num_iterations = 2
    reference_model = it.reference
    it.config, it.loss = config, config.policy_loss()
    it.drops_zero_advantages = config.loss_type in PROPORTIONAL and not (config.beta or config.recomputes)
    it.reference = reference_model if config.beta else None
    for model in (it.model, plain):
        model.zero_grad()
    try:
        (minibatch,) = it.minibatches(experience)
        loss = sum(it.fused_loss(m, minibatch, on_policy=False).loss for m in minibatch.micros)
        loss.backward()
    finally:
        it.reference = reference_model
    logprob, h = tokens_of(plain, experience)
    old = now if config.importance_correction or config.top_entropy_quantile < 1 else experience.logprob
    named = reference_options(options) | ({"max_length": 5} if config.loss_type == "dr_grpo" else {})
    want, _ = reference.policy_loss(
        logprob, old, experience.advantages, kind=config.loss_type, cu_seqlens=experience.cu_completions,
        ref_logprob=ref, entropy=h, rollout_logprob=experience.logprob, **named,
    )  # fmt: skip
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
    for (name, got), p in zip(it.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, p.grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["gspo", "grpo"])
def test_a_micro_batch_with_nothing_to_train_on_has_no_extremes(tmp_path, kind):
    it = trainer(tmp_path, loss_type=kind, num_iterations=2, learning_rate=0.0)
    it.start()
    experience = experience_of(it)
    experience = experience._replace(logprob=tokens_of(tiny().eval(), experience)[0].detach() + 0.5)
    minibatch = it.minibatches(experience)[0]
    idle = _idle(minibatch.micros[0])
    found = it.update(minibatch._replace(micros=[idle, *minibatch.micros, idle]), on_policy=False)
    for name in ("ratio_max", "ratio_min"):
        assert float(found[name]) == pytest.approx(0.60653, rel=1e-4), name


def test_selected_tokens_are_counted_over_all_processes():
    """Ties at the threshold are all selected, so the share asked for is not the count; it outlives a checkpoint."""

    class Two:
        """Two processes, of which the other has these entropies."""

        num_processes, device = 2, torch.device("cpu")
        other = torch.tensor([2.0, 2.0, 5.0, 0.1])

        def pad_across_processes(self, values, pad_index):
            return torch.nn.functional.pad(values, (0, 4 - len(values)), value=pad_index)

        def gather(self, values):
            return torch.cat([values, self.other])

    grid = torch.zeros(1, 4)
    micro = MicroBatch(grid.long(), torch.tensor([[3, IGNORE, 4, 5]]), torch.tensor([0, 4]), grid, grid)
    micro = micro._replace(extra={"old_entropy": torch.tensor([[2.0, 9.0, 0.2, 0.3]])})
    found = with_entropy_threshold(MiniBatch([micro], 1, 7, 7), 0.3, Two())
    assert found.entropy_threshold == 2.0
    assert found.selected_tokens == 4  # of the seven: 2, 2, 2 and 5
    again = from_plain(as_plain(found), torch.device("cpu"))
    assert again[1:] == found[1:]


@pytest.mark.parametrize("kind", sorted(BY_COVARIANCE))
def test_selections_by_covariance_train(tmp_path, kind):
    bounds = {"cov_low": -9.0, "cov_high": 9.0} if kind == "clip_cov" else {}
    it = trainer(tmp_path, loss_type=kind, loss_params={"fraction": 0.2, **bounds}, num_iterations=2, max_steps=4)
    it.train()
    rows = log_rows(tmp_path)
    assert all(0 <= r["cov_fraction"] <= 0.3 for r in rows)
    assert any(r["cov_fraction"] > 0 for r in rows)
    assert rows[0]["ratio_max"] == rows[0]["ratio_min"] == 1.0  # they know the old policy, and the ratio stays exact


def test_correction_says_how_far_sampler_and_trainer_are_apart(tmp_path):
    """A sampler whose log-probabilities are off by 0.5 nats: weights exp(-0.5), all alike, so ESS 1."""
    it = trainer(tmp_path, importance_correction="token_truncate", max_steps=2, learning_rate=0.0)
    sample = it.sampler

    class Off:
        settings = sample.settings

        def __call__(self, *args):
            rollout = sample(*args)
            return rollout._replace(logprob=rollout.logprob + 0.5)

    it.sampler = Off()
    it.train()
    row = log_rows(tmp_path)[0]
    assert row["rollout_ratio_mean"] == pytest.approx(0.60653, rel=1e-4)
    assert row["rollout_ess"] == pytest.approx(1.0, rel=1e-4)
    assert row["sampler_logprob_gap"] == pytest.approx(0.5, rel=1e-4)
    assert row["ratio_max"] == row["ratio_min"] == 1.0


def test_options_are_checked_when_they_are_read():
    base = GRPOConfig(output_dir="x")
    with pytest.raises(ValueError, match="importance_correction must be one of token_truncate, .* got 'tokens'"):
        replace(base, importance_correction="tokens")
    with pytest.raises(ValueError, match=r"top_entropy_quantile must be in \(0, 1\], got 0"):
        replace(base, top_entropy_quantile=0)
    with pytest.raises(ValueError, match="unknown parameter of policy loss 'grpo': 'tau'"):
        replace(base, loss_params={"tau": 1.0})
    for options in (dict(sync_ref_model=True), dict(ref_model="x")):
        with pytest.raises(ValueError, match="is given, but there is no reference: beta is 0, and there is no max_kl"):
            replace(base, **options)
        assert replace(base, max_kl=1.0, **options).needs_reference


@pytest.mark.parametrize("kind", sorted(PROPORTIONAL) + ["dro"])
def test_rows_of_zero_advantage_may_be_dropped_where_they_have_no_gradient(kind):
    logprob = (-torch.rand(2, 5)).requires_grad_()
    loss, _ = policy_loss(logprob, logprob.detach() + 0.3, torch.zeros(2), kind=kind, max_length=5)
    (grad,) = torch.autograd.grad(loss, logprob)
    assert grad.eq(0).all() == (kind in PROPORTIONAL)

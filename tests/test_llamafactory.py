"""LLaMA-Factory's preference trainers with and without the patch: the same loss and gradients. Skipped without it.

It wants an older TRL than the one that is installed here: of TRL it gets the formulas of two losses.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hosts import host
from torch.nn.functional import logsigmoid

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from rlhf_fast.integrations import llamafactory as ours  # noqa: E402
from rlhf_fast.integrations._patching import PatchError  # noqa: E402
from rlhf_fast.integrations.lm_head import is_fused, unfuse_lm_head  # noqa: E402
from rlhf_fast.losses import preference_loss  # noqa: E402
from rlhf_fast.trainers.config import make_config  # noqa: E402

VOCAB, PAD = 31, -100


class DPOTrainer(transformers.Trainer):
    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected):
        a, b = chosen - ref_chosen, rejected - ref_rejected
        losses = (a - b - 0.5 / self.beta).square() if self.loss_type == "ipo" else -logsigmoid(self.beta * (a - b))
        return losses, self.beta * a.detach(), self.beta * b.detach()


class KTOTrainer(transformers.Trainer):
    def kto_loss(self, chosen, rejected, kl, ref_chosen, ref_rejected, ref_kl):
        drift = (kl - ref_kl).mean().clamp(min=0).detach()
        good, bad = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        losses = torch.cat([1 - torch.sigmoid(good - self.beta * drift), 1 - torch.sigmoid(self.beta * drift - bad)])
        return losses, good.detach(), bad.detach(), drift


@pytest.fixture(scope="module")
def factory():
    patcher = pytest.MonkeyPatch()
    patcher.setenv("DISABLE_VERSION_CHECK", "1")
    modules = tuple(f"llamafactory.train.{m}" for m in ("trainer_utils", "dpo.trainer", "kto.trainer"))
    trl = {"trl": dict(DPOTrainer=DPOTrainer, KTOTrainer=KTOTrainer), "trl.models": {}, "trl.models.utils": {}}
    trl |= {"trl.trainer": {}}
    with host(
        "llamafactory", modules, ("omegaconf", "galore_torch", "torchaudio", "fire", "av", "librosa"), trl
    ) as found:
        yield SimpleNamespace(**dict(zip(("utils", "dpo", "kto"), found, strict=True)))
    patcher.undo()


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, num_key_value_heads=1, **options))


def rows(count, width=9, seed=3):
    """Right-padded rows with labels on their last tokens."""
    torch.manual_seed(seed)
    ids, lengths = torch.randint(3, VOCAB, (count, width)), torch.randint(5, width + 1, (count,))
    attention = (torch.arange(width) < lengths[:, None]).long()
    labels = ids.masked_fill((attention == 0) | (torch.arange(width) < 3), PAD)
    labels[0, 5] = PAD  # a hole
    return ids, attention, labels


def trainer_of(cls, model, ref_model, **options):
    trainer = object.__new__(cls)
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, device=torch.device("cpu"))
    arguments = SimpleNamespace(use_ref_model=ref_model is not None)
    values = dict(accelerator=accelerator, finetuning_args=arguments, model=model, ref_model=ref_model, beta=0.3)
    values |= dict(ld_alpha=None, ftx_gamma=0.0, bco_gemma=0.0, simpo_gamma=0.5, loss_type="sigmoid")
    values |= dict(_stored_metrics=defaultdict(lambda: defaultdict(list)), **options)
    for name, value in values.items():
        setattr(trainer, name, value)
    return trainer


def compare(trainer, model, batch, skipped):
    """Loss, metrics and gradients of `get_batch_loss_metrics`, without and with the patch."""
    results = []
    for patched in (False, True):
        model.zero_grad()
        with ours.patch() if patched else nullcontext():
            loss, metrics = trainer.get_batch_loss_metrics(model, dict(batch))
        assert is_fused(model) == patched
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), metrics, gradients))
    unfuse_lm_head(model)
    (loss, metrics, gradients), (my_loss, my_metrics, my_gradients) = results
    # fp32 on both sides: sums of some 6 log-probabilities of a size of 3.4
    torch.testing.assert_close(my_loss, loss, rtol=2e-6, atol=2e-6)
    assert my_gradients.keys() == gradients.keys()
    assert max(g.abs().max() for g in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(my_gradients[name], gradient, rtol=2e-4, atol=2e-6)
    assert my_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        if name.startswith(skipped):
            assert my_metrics[name] != my_metrics[name], name  # NaN
        else:
            assert my_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "ipo"}, {"ld_alpha": 0.4}, {"ftx_gamma": 0.1}, {"loss_type": "orpo"}, {"loss_type": "simpo"}],
)
def test_pairs(factory, options, lora):
    ids, attention, labels = rows(6)
    model, ref_model = tiny(), tiny(1)
    if lora:  # on the head as well; the reference is the model without it
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        for name, p in model.named_parameters():
            p.data.add_(0.3 * torch.randn_like(p) if "lora_B" in name else 0)
    with_reference = options.get("loss_type") not in ("orpo", "simpo")
    trainer = trainer_of(factory.dpo.CustomDPOTrainer, model, ref_model if with_reference else None, **options)
    if lora and with_reference:
        trainer.ref_model = None
    batch = dict(input_ids=ids, attention_mask=attention, labels=labels)
    compare(trainer, model, batch, "logits/")


@pytest.mark.parametrize("keys", [{}, {"pref_ftx": 0.7}], ids=str)
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo", "simpo"])
def test_its_keys_mean_its_losses(factory, kind, keys):
    """The loss that our configuration makes of `pref_loss` and `pref_ftx`, on answers of very different lengths."""
    ids, attention, labels = rows(6)
    labels[:2, 4:] = PAD  # one token is left
    model, ref_model = tiny(), None if kind in ("orpo", "simpo") else tiny(1)
    trainer = trainer_of(
        factory.dpo.CustomDPOTrainer, model, ref_model, loss_type=kind, ftx_gamma=keys.get("pref_ftx", 0.0)
    )
    batch = dict(input_ids=ids, attention_mask=attention, labels=labels)
    want, _ = trainer.get_batch_loss_metrics(model, dict(batch))

    def sums(model):
        logps, lengths = factory.utils.get_batch_logps(model(ids, attention_mask=attention).logits, labels)
        return [*logps.chunk(2), *lengths.chunk(2)]

    config = make_config({"stage": "dpo", "pref_loss": kind, "pref_beta": 0.3, "simpo_gamma": None, **keys})
    chosen, rejected, *lengths = sums(model)
    refs = () if ref_model is None else [x.detach() for x in sums(ref_model)[:2]]
    loss = preference_loss(chosen, rejected, *refs, kind=config.preference_loss(), lengths=tuple(lengths)).loss
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tags", [[True, False, True, False], [True] * 4])
def test_kto(factory, tags):
    model, ref_model = tiny(), tiny(1)
    trainer = trainer_of(factory.kto.CustomKTOTrainer, model, ref_model, ftx_gamma=0.1)
    names = ("input_ids", "attention_mask", "labels")
    batch = dict(zip(names, rows(4), strict=True)) | dict(zip(("kl_" + n for n in names), rows(4, seed=5), strict=True))
    batch["kto_tags"] = torch.tensor(tags)
    compare(trainer, model, batch, "logits/")


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_get_batch_logps(factory, ld_alpha):
    _, _, labels = rows(6)
    logits = (torch.randn(6, 9, VOCAB, dtype=torch.float64) * 3).requires_grad_()
    pad = labels.masked_fill(labels == PAD, 2)  # another padding label
    for given, label in ((labels, PAD), (pad, 2)):
        results = []
        for patched in (False, True):
            with ours.patch() if patched else nullcontext():
                logps, lengths = factory.utils.get_batch_logps(logits, given, label, ld_alpha)
            results.append((logps, lengths, *torch.autograd.grad(logps, logits, torch.arange(6.0).double())))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-13)
    with ours.patch(), pytest.raises(ValueError, match="must have the same shape"):
        factory.utils.get_batch_logps(logits[:, 1:], labels)


def test_bf16_logits_are_closer_to_fp64(factory):
    _, _, labels = rows(6)
    logits = (torch.randn(6, 9, VOCAB) * 4).bfloat16()
    truth, _ = factory.utils.get_batch_logps(logits.double(), labels)
    theirs, _ = factory.utils.get_batch_logps(logits, labels)
    with ours.patch():
        mine, _ = factory.utils.get_batch_logps(logits, labels)
    assert ((mine - truth).abs() <= (theirs - truth).abs() + 1e-5).all()
    assert (theirs - truth).abs().max() > 1e-2


def test_a_model_whose_head_cannot_be_fused_is_refused(factory):
    ids, attention, labels = rows(4)
    model = tiny()
    trainer = trainer_of(factory.dpo.CustomDPOTrainer, model, None, loss_type="simpo")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    batch = dict(input_ids=ids, attention_mask=attention, labels=labels)
    with ours.patch(), pytest.raises(TypeError, match="has no linear output head"):
        trainer.get_batch_loss_metrics(model, batch)


def test_taken_back_and_refused(factory, monkeypatch):
    before = factory.dpo.get_batch_logps, factory.dpo.CustomDPOTrainer.concatenated_forward
    with ours.patch():
        assert factory.dpo.get_batch_logps is factory.kto.get_batch_logps is ours.get_batch_logps
        with pytest.raises(PatchError, match="llamafactory is patched already"):
            ours.patch()
    assert (factory.dpo.get_batch_logps, factory.dpo.CustomDPOTrainer.concatenated_forward) == before
    changed = lambda self, model, batch: None  # noqa: E731
    changed.__module__ = "llamafactory.train.kto.trainer"
    monkeypatch.setattr(factory.kto.CustomKTOTrainer, "forward", changed)
    with pytest.raises(PatchError, match=r"CustomKTOTrainer\.forward has the signature \(self, model, batch\)"):
        ours.patch()
    assert factory.kto.get_batch_logps is before[0]

"""The sampler over HTTP, against a real server process on loopback: one with a model, and quick ones that misbehave."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from completions_server import KEY  # noqa: E402
from test_rollout import EOS, RAGGED, VOCAB, check_recorded, settings, tiny  # noqa: E402

from rlhf_fast.trainers.rollout import http_client  # noqa: E402
from rlhf_fast.trainers.rollout.http_client import JSONClient, ServerError, ServerOptions  # noqa: E402
from rlhf_fast.trainers.rollout.samplers import make_sampler  # noqa: E402
from rlhf_fast.trainers.rollout.server import ServerSampler  # noqa: E402
from rlhf_fast.trainers.rollout.sync import DiskUpdate, fingerprint  # noqa: E402

SCRIPT = Path(__file__).with_name("completions_server.py")


class Server:
    """A server process and a way to tell it what to do."""

    def __init__(self, *arguments: str):
        command = [sys.executable, str(SCRIPT), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def tell(self, **values) -> dict:
        data = json.dumps(values).encode() if values else None
        with urllib.request.urlopen(f"{self.url}/test", data, timeout=10) as response:
            return json.loads(response.read())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def sampling_server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    server = Server("--model", str(folder))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def canned_server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def served(sampling_server):
    sampling_server.tell(mode=None, times=0, requests=0, most_at_once=0)
    return sampling_server


@pytest.fixture
def canned(canned_server):
    canned_server.tell(mode=None, times=0, seconds=0.3, requests=0, most_at_once=0)
    return canned_server


def sampler_of(server, model, *, sync=None, seed=0, batch_size=None, timeout=20.0, attempts=3, wanted=None, **options):
    options = ServerOptions(server.url, timeout=timeout, attempts=attempts, backoff=0.01, **options)
    return ServerSampler(model, wanted or settings(), options=options, seed=seed, batch_size=batch_size, sync=sync)


# ---- what is sampled


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_are_the_models(served, model, temperature):
    sampler = sampler_of(served, model, wanted=settings(temperature=temperature))
    rollout = sampler(RAGGED, 4)
    assert len(set(map(tuple, rollout.completions()))) > 4
    assert {"stop", "length"} == set(rollout.finish)
    check_recorded(model, RAGGED, 4, rollout)


def test_seeds_and_state(served, model):
    first, second = sampler_of(served, model, seed=7), sampler_of(served, model, seed=7)
    a = first(RAGGED, 2)
    assert a.completions() == second(RAGGED, 2).completions()
    state = first.state_dict()
    b = first(RAGGED, 2)
    assert b.completions() != a.completions()
    second.load_state_dict(state)
    assert second(RAGGED, 2).completions() == b.completions()


def test_greedy(served, model):
    rollout = sampler_of(served, model, wanted=settings(greedy=True))(RAGGED, 2)
    group = make_sampler("group", model, settings(greedy=True))(RAGGED, 2)
    assert rollout.completions() == group.completions()


def test_logprobs_that_ignore_the_temperature_are_refused(served, model):
    served.tell(mode="raw", times=0)
    with pytest.raises(ServerError, match=r"do not follow the temperature 0\.7: .*processed_logprobs"):
        sampler_of(served, model, wanted=settings(temperature=0.7))(RAGGED)
    rollout = sampler_of(served, model)(RAGGED)  # at temperature 1 there is no difference
    check_recorded(model, RAGGED, 1, rollout)


def test_the_request_leaves_nothing_to_the_servers_defaults(canned, model):
    with pytest.warns(UserWarning, match="importance ratios are biased"):
        restricted = settings(top_p=0.9, top_k=5, temperature=1.0)
    rollout = make_sampler("server", model, restricted, options=canned.url)([[3, 4]], 3)
    assert rollout.settings is restricted
    assert rollout.completions() == [[5, 6, EOS]] * 3
    body = canned.tell()["last"]
    assert body["prompt"] == [3, 4]
    want = dict(n=3, max_tokens=8, temperature=1.0, top_p=0.9, top_k=5, model="tiny", stop_token_ids=[EOS])
    want |= dict(repetition_penalty=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0, return_token_ids=True)
    assert {key: body[key] for key in want} == want


def test_the_key_comes_from_the_environment(canned, model, monkeypatch):
    sampler_of(canned, model)([[3]])
    assert canned.tell()["authorized"] is False
    monkeypatch.setenv("RLHF_FAST_SERVER_API_KEY", KEY)
    sampler_of(canned, model)([[3]])
    assert canned.tell()["authorized"] is True


def test_requests_are_made_at_once_within_the_limits(canned, model):
    canned.tell(mode="slow", times=100, most_at_once=0)
    prompts = [[3]] * 6
    start = time.perf_counter()
    sampler_of(canned, model, concurrency=3)(prompts)
    assert time.perf_counter() - start < 6 * 0.3  # one after the other would take that long
    assert canned.tell()["most_at_once"] == 3
    canned.tell(most_at_once=0)
    sampler_of(canned, model, batch_size=4)(prompts, 2)
    assert canned.tell()["most_at_once"] == 2  # two groups of two


# ---- servers that fail


@pytest.mark.parametrize("mode", ["503", "garbage", "drop", "cut", "deep"])
def test_what_may_pass_is_tried_again(canned, model, mode):
    canned.tell(mode=mode, times=2)
    assert sampler_of(canned, model)([[3]]).completions() == [[5, 6, EOS]]
    assert canned.tell()["requests"] == 3


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("503", "HTTP 503 .*as told"),
        ("garbage", "not JSON: .*<html>"),
        ("drop", "[Rr]emote|reset"),
        ("cut", "cut off after 0 bytes"),
        ("deep", "not JSON: "),
    ],
)
def test_giving_up_names_the_address_the_attempts_and_the_reason(canned, model, mode, reason):
    canned.tell(mode=mode, times=100)
    with pytest.raises(ServerError, match=rf"{canned.url}/v1/completions: no usable answer in 3 attempts; .*{reason}"):
        sampler_of(canned, model)([[3]])


@pytest.mark.parametrize(("mode", "reason"), [("400", "HTTP 400 .*as told"), ("redirect", "HTTP 302")])
def test_what_cannot_pass_is_not_tried_again(canned, model, mode, reason):
    canned.tell(mode=mode, times=100)
    with pytest.raises(ServerError, match=reason):
        sampler_of(canned, model)([[3]])
    assert canned.tell()["requests"] == 1


def test_a_server_that_is_too_slow(canned, model):
    canned.tell(mode="slow", times=1, seconds=1.2)
    sampler = sampler_of(canned, model, timeout=0.6)
    assert sampler([[3]]).completions() == [[5, 6, EOS]]  # the second attempt is in time
    canned.tell(mode="slow", times=100)
    with pytest.raises(ServerError, match="3 attempts; the last: timed out"):
        sampler([[3]])


def test_an_answer_that_never_ends(canned, model, monkeypatch):
    canned.tell(mode="drip", times=100)
    start = time.perf_counter()
    with pytest.raises(ServerError, match=r"2 attempts; the last: timed out: \d+ bytes in 0.4 seconds, and no end"):
        sampler_of(canned, model, timeout=0.1, attempts=2)([[3]])
    assert time.perf_counter() - start < 5
    monkeypatch.setattr(http_client, "LARGEST", 1 << 20)
    canned.tell(mode="huge", times=100)
    with pytest.raises(ServerError, match="longer than 1048576 bytes"):
        sampler_of(canned, model, attempts=2)([[3]])


def test_an_empty_answer_that_was_announced_longer_is_no_consent(canned):
    """Weights count as taken only after a whole answer."""
    canned.tell(mode="cut", times=100)
    client = JSONClient(ServerOptions(canned.url, attempts=2, backoff=0.01))
    with pytest.raises(ServerError, match="cut off"):
        client.call("/v1/completions", {"n": 1, "stop_token_ids": [1], "prompt": []})


def test_a_server_that_dies_in_mid_run_and_one_that_comes_back(model):
    server = Server()
    sampler = sampler_of(server, model, attempts=2)
    sampler([[3]])
    server.tell(mode="die", times=1)
    start = time.perf_counter()
    with pytest.raises(ServerError, match=rf"{server.url}.* in [12] attempts; the last: .*(refused|closed|reset)"):
        sampler([[3]] * 40, 2)
    assert time.perf_counter() - start < 5
    server.process.wait()

    patient = sampler_of(server, model, attempts=60)
    patient._model_name = "tiny"
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        result = pool.submit(patient, [[3]])
        time.sleep(0.2)
        back = Server("--port", str(server.port))
        stack.callback(back.stop)
        assert result.result(30).completions() == [[5, 6, EOS]]


# ---- answers that are not what was asked for


def good_choice(**changes):
    logprobs = {"tokens": ["token_id:5", f"token_id:{EOS}"], "token_logprobs": [-1.0, -2.0]}
    return {"index": 0, "finish_reason": "stop", "logprobs": logprobs, **changes}


def with_logprobs(**changes):
    return good_choice(logprobs={**good_choice()["logprobs"], **changes})


BAD = {
    "no choices": ({}, "no list of choices"),
    "not a mapping": ([1], "no list of choices"),
    "choices are text": ({"choices": ["a"]}, "no list of choices"),
    "too few": ({"choices": []}, r"1 choices were asked for, got index \[\]"),
    "index is text": ({"choices": [good_choice(index="0")]}, r"got index \['0'\]"),
    "index is a list": ({"choices": [good_choice(index=[0])]}, "1 choices were asked for"),
    "id of many digits": (
        {"choices": [with_logprobs(tokens=["token_id:" + "9" * 5000, "token_id:1"])]},
        "token 0 must",
    ),
    "beyond the floats": ({"choices": [with_logprobs(token_logprobs=[-(10**400), -1.0])]}, "finite and at most 0"),
    "twice": ({"choices": [good_choice(), good_choice()]}, r"got index \[0, 0\]"),
    "id outside": ({"choices": [good_choice(token_ids=[VOCAB, EOS])]}, rf"id in \[0, {VOCAB}\), got {VOCAB}"),
    "negative id": ({"choices": [good_choice(token_ids=[-1, EOS])]}, "got -1"),
    "id is text": ({"choices": [with_logprobs(tokens=["token_id:x", "token_id:1"])]}, "got 'token_id:x'"),
    "id is a bool": ({"choices": [good_choice(token_ids=[True, EOS])]}, "got True"),
    "missing logprobs": ({"choices": [with_logprobs(token_logprobs=[-1.0])]}, "2 tokens and token_logprobs 1"),
    "no logprobs": ({"choices": [good_choice(logprobs=None, token_ids=[5, EOS])]}, "token_logprobs None"),
    "NaN": ({"choices": [with_logprobs(token_logprobs=[math.nan, -1.0])]}, "finite and at most 0, got nan"),
    "infinite": ({"choices": [with_logprobs(token_logprobs=[-math.inf, -1.0])]}, "got -inf"),
    "positive": ({"choices": [with_logprobs(token_logprobs=[-1.0, 0.5])]}, "token 1: .* got 0.5"),
    "null": ({"choices": [with_logprobs(token_logprobs=[None, -1.0])]}, "got None"),
    "too long": (
        {"choices": [good_choice(token_ids=[5] * 9, logprobs={"token_logprobs": [-1.0] * 9}, finish_reason="length")]},
        "1 to 8 tokens, got 9",
    ),
    "empty": ({"choices": [with_logprobs(tokens=[], token_logprobs=[])]}, "1 to 8 tokens, got 0"),
    "goes on": ({"choices": [good_choice(token_ids=[EOS, 5])]}, "goes on after its end at token 0"),
    "stops without EOS": ({"choices": [good_choice(token_ids=[5, 6])]}, "finished with 'stop' and last token 6"),
    "odd reason": ({"choices": [good_choice(finish_reason="abort")]}, "finished with 'abort'"),
    "no ids": ({"choices": [with_logprobs(tokens=["hello", "</s>"])]}, "gives no token ids"),
    "other prompt": ({"choices": [good_choice()], "usage": {"prompt_tokens": 4}}, "was 3 tokens, the server saw 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_does_not_fit_is_refused(model, name):
    sampler = ServerSampler(model, settings(), options="http://127.0.0.1:1")
    answer, complaint = BAD[name]
    with pytest.raises((ValueError, ServerError), match=complaint):
        sampler.read(answer, 1, 3)
    good = sampler.read({"choices": [good_choice()], "usage": {"prompt_tokens": 3}}, 1, 3)
    assert good[0].ids == [5, EOS]
    assert good[0].stopped


def test_a_log_probability_rounded_over_zero_is_zero(model):
    sampler = ServerSampler(model, settings(), options="http://127.0.0.1:1/v1/")
    (got,) = sampler.read({"choices": [with_logprobs(token_logprobs=[-1.0, 1e-4])]}, 1, 3)
    assert got.logprob == [-1.0, 0.0]
    assert sampler.client.base == "http://127.0.0.1:1"


# ---- the server's weights


def changed(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 0.5


def test_old_weights_are_counted(canned):
    model = tiny()
    sampler = sampler_of(canned, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler([[3]])
        sampler([[3]])
    for age in range(1, 5):
        changed(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sampler([[3]])
        told = [w for w in said if f"weights are {age} update" in str(w.message)]
        assert len(told) == (age in (1, 2, 4))
    assert sampler.weights.age == 4


def test_new_weights_are_brought_over(served, tmp_path):
    model = tiny()
    update = DiskUpdate(JSONClient(ServerOptions(served.url)), tmp_path, "/update_weights_from_disk")
    sampler = sampler_of(served, model, sync=update)
    for version in (1, 2):
        changed(model)
        check_recorded(model, RAGGED, 2, sampler(RAGGED, 2))
        assert [p.name for p in tmp_path.iterdir()] == [f"weights-{version}"]
    written = (tmp_path / "weights-2" / "model.safetensors").stat().st_mtime_ns
    sampler(RAGGED)  # unchanged: nothing is written
    another = DiskUpdate(JSONClient(ServerOptions(served.url)), tmp_path, "/update_weights_from_disk")
    sampler_of(served, model, sync=another)(RAGGED)  # nor by another sampler, such as that of an evaluation
    assert [p.name for p in tmp_path.iterdir()] == ["weights-2"]
    assert (tmp_path / "weights-2" / "model.safetensors").stat().st_mtime_ns == written
    served.tell(mode="refuse")
    changed(model)
    update.client = JSONClient(ServerOptions(served.url, attempts=2, backoff=0.01))
    with pytest.raises(ServerError, match="in 2 attempts; the last: the server refused the weights: .*as told"):
        sampler(RAGGED)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_adapters_are_merged_on_the_way_and_stay_as_they_are(served, tmp_path, targets, tied):
    """Also on a head whose weight is the embedding's, which the head's adapter must leave alone."""
    peft = pytest.importorskip("peft")
    model = tiny(tie_word_embeddings=tied)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update = DiskUpdate(JSONClient(ServerOptions(served.url)), tmp_path, served.url + "/update_weights_from_disk")
    rollout = sampler_of(served, model, sync=update)(RAGGED, 2)
    check_recorded(model, RAGGED, 2, rollout)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with model.disable_adapter(), pytest.raises(AssertionError):
        check_recorded(model, RAGGED, 2, rollout)


def test_of_several_processes_the_first_one_brings_the_weights(model, tmp_path, monkeypatch):
    """The others wait for its word, and a failure is raised on all."""
    update = DiskUpdate(JSONClient(ServerOptions("http://127.0.0.1:1", attempts=1)), tmp_path / "new", "/update")
    words = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda word: words.append(list(word)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    update(model)
    assert words == [[None]]
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(RuntimeError, match="http://127.0.0.1:1/update: no usable answer in 1 attempts"):
        update(model)
    assert "no usable answer" in words[1][0]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda word: word.__setitem__(0, "disk full"))
    with pytest.raises(RuntimeError, match="disk full"):
        update(model)


def test_a_run_samples_from_the_weights_that_it_trains(served, tmp_path):
    """GRPO over the server: at every step its log-probabilities are the trainer's; with old weights they are not."""
    pytest.importorskip("accelerate")
    from rlhf_fast.cli.demos.task import make_model, make_tokenizer
    from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer

    tokenizer = make_tokenizer()
    config = GRPOConfig(
        output_dir=str(tmp_path), sampler="server", rollout_server_url=served.url, rollout_server_timeout=20,
        rollout_server_update_url="/update_weights_from_disk", temperature=0.8, num_generations=4, cutoff_len=32,
        max_completion_length=5, per_device_train_batch_size=8, learning_rate=1e-2, max_steps=3, logging_steps=1,
        use_cpu=True, plot_loss=False, disable_tqdm=True, report_to="none", seed=1,
    )  # fmt: skip
    rows = [{"prompt": text} for text in ("12>", "321>", "4>")]
    trainer = GRPOTrainer(make_model(0, tokenizer), tokenizer, rows, lambda completion_ids, **_: [
        float(sum(t % 2 for t in ids)) for ids in completion_ids
    ], config)  # fmt: skip
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
    log = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    gaps = [row["sampler_logprob_gap_max"] for row in log if "sampler_logprob_gap_max" in row]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4  # fp32 rounding of two forwards
    assert [p.name for p in (tmp_path / "server_weights").iterdir()] == ["weights-3"]


def test_options_of_a_run_are_checked():
    from rlhf_fast.trainers.rollout.config import RolloutConfig

    def config(**options):
        return RolloutConfig(stage="grpo", **options)

    with pytest.raises(ValueError, match="go together, got sampler='server', rollout_server_url=None"):
        config(sampler="server")
    with pytest.raises(ValueError, match="go together, got sampler='group', rollout_server_url='http://a'"):
        config(rollout_server_url="http://a")
    with pytest.raises(ValueError, match="sampler must be one of group, generate, continuous, server, got 'vllm'"):
        config(sampler="vllm")
    for name in ("max_turns", "rollout_server_attempts", "max_turn_length", "rollout_batch_size", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must be .* got 0"):
            config(**{name: 0})
    assert config().sampler_options() == {}
    assert config(max_turn_length=7).turn_length == 7
    assert config(max_turn_length=7, max_completion_length=5).turn_length == 5
    options = config(sampler="server", rollout_server_url="http://a", rollout_server_model="m").sampler_options()
    assert options == {"options": ServerOptions("http://a", model="m")}
    update = dict(rollout_server_update_url="/new", rollout_server_update_body={"method": "reload", "at": "{path}"})
    sync = config(sampler="server", rollout_server_url="http://a", output_dir="out", **update).sampler_options()["sync"]
    assert (sync.folder, sync.url, sync.body) == (
        Path("out/server_weights"),
        "/new",
        {"method": "reload", "at": "{path}"},
    )


def test_fingerprint_sees_one_bit():
    model = tiny().to(torch.bfloat16)
    before = fingerprint(model)
    assert before == fingerprint(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int16)[3, 4] += 1
    assert fingerprint(model) != before
    weight.data.view(torch.int16)[3, 4] -= 1
    assert fingerprint(model) == before


def test_bad_options_are_named(model):
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'file:///etc/passwd'"):
        ServerOptions("file:///etc/passwd")
    with pytest.raises(ValueError, match="timeout must be positive, got 0"):
        ServerOptions("http://localhost", timeout=0)
    sampler = ServerSampler(model, settings(), options="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="row 1 is empty"):
        sampler([[1], []])
    with pytest.raises(ValueError, match="at least one prompt"):
        sampler([])

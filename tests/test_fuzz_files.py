"""Files of any content: data, registries, configurations are read, or refused by a ValueError that names the file."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from test_data import word_tokenizer

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("transformers")

import yaml  # noqa: E402
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from rlhf_fast.trainers.config import load_config  # noqa: E402
from rlhf_fast.trainers.data.dataset_info import read_registry, resolve  # noqa: E402
from rlhf_fast.trainers.data.pairs import tokenize_kto, tokenize_pairs  # noqa: E402
from rlhf_fast.trainers.data.readers import read_rows  # noqa: E402
from rlhf_fast.trainers.data.templates import apply_template  # noqa: E402
from rlhf_fast.trainers.data.tokenize import tokenize_prompts, tokenize_sft  # noqa: E402

health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # of each test; 0: some that are always the same
few = settings(
    deadline=None, max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, suppress_health_check=health, database=None
)
READ = [tokenize_sft, tokenize_prompts, tokenize_pairs, tokenize_kto]
SUFFIXES = [".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".arrow"]

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("\ud800"))
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3))
columns = "prompt completion chosen rejected label messages conversations instruction output text tools history system"
roles = st.sampled_from(["user", "assistant", "system", "tool", "function_call", "x"])
turns = st.lists(st.fixed_dictionaries({"role": roles | scalars, "content": values}) | values, max_size=3)
rows = st.dictionaries(st.sampled_from([*columns.split(), "margin", "kto_tag"]), values | turns, max_size=5)
GOOD = json.dumps({"prompt": "a b", "completion": "c", "chosen": "c", "rejected": "d", "label": True})


@st.composite
def damaged(draw) -> bytes:
    """Good rows with something wrong in them, or anything."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray("\n".join([GOOD] * draw(st.integers(1, 3))).encode())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(data)


@few
@given(data=damaged(), suffix=st.sampled_from(SUFFIXES), read=st.sampled_from(READ))
@example(data=b'{"prompt": ' + b"[" * 100_000, suffix=".jsonl", read=tokenize_sft)
@example(data=GOOD.encode() + b'\n{"prompt": "a", "prompt": "b"}', suffix=".json", read=tokenize_prompts)
@example(data=b'{"text": "\\udc00"}', suffix=".jsonl", read=tokenize_sft)
@example(data=b'{"prompt": ' + b"9" * 5000 + b"}", suffix=".jsonl.gz", read=tokenize_prompts)
@example(data=b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n", suffix=".jsonl", read=tokenize_sft)
@example(data=b'prompt,completion\n"a', suffix=".csv", read=tokenize_sft)
@example(data=b"PAR1" * 20, suffix=".parquet", read=tokenize_sft)
def test_data_files(tmp_path, data, suffix, read):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") and not data.startswith(b"\x00") else data)
    try:
        read(read_rows([path]), word_tokenizer(), max_length=16)
    except ValueError as error:
        text = str(error)
        assert str(path) in text or text.startswith(("no row is left", "no pair is left", "no prompt is left")), text


@few
@given(
    row=rows,
    read=st.sampled_from(READ),
    template=st.sampled_from([None, "chatml", "llama3", "qwen3", "mistral", "alpaca"]),
)
def test_rows_of_any_shape_through_any_template(tmp_path, row, read, template):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        read(read_rows([path]), apply_template(word_tokenizer(), template), max_length=64)
    except ValueError as error:
        text = str(error)
        assert f"{path}, line 1: " in text or " is left" in text, text


@few
@given(
    entry=values
    | st.dictionaries(
        st.sampled_from(["file_name", "columns", "tags", "split", "ranking", "formatting", "num_samples", "subset"]),
        values,
        max_size=5,
    )
)
def test_registries(tmp_path, entry):
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"a": entry}))
    (tmp_path / "data.jsonl").write_text(GOOD)
    try:
        resolve(["a"], str(tmp_path))
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error), error  # noqa: PT017


@few
@given(data=st.binary(max_size=80))
def test_registries_of_any_bytes(tmp_path, data):
    path = tmp_path / "dataset_info.json"
    path.write_bytes(data)
    try:
        read_registry(path)
    except ValueError as error:
        assert str(path) in str(error), error  # noqa: PT017


keys = st.sampled_from(
    ["stage", "model_name_or_path", "dataset", "output_dir", "learning_rate", "seed", "reward_funcs", "lora_target"]
    + ["num_generations", "cutoff_len", "report_to", "bf16", "interleave_probs", "training_arguments", "beta", "x"]
)


@few
@given(
    settings=st.dictionaries(keys | st.text(max_size=5), values, max_size=5),
    raw=st.binary(max_size=60),
    stage=st.sampled_from(["sft", "rm", "dpo", "kto", "ppo", "grpo", None]),
)
@example(settings={}, raw=b"a: &a [*a]", stage=None)
@example(settings={}, raw=b"? [1]\n: 2", stage=None)
@example(settings={}, raw=b"{" * 5000, stage=None)
@example(settings={}, raw=b"seed: 1\nseed: 2", stage=None)
@example(settings={}, raw=b"stage: 2024-13-45", stage=None)
def test_configurations(tmp_path, settings, raw, stage):
    path = tmp_path / "run.yaml"
    path.write_bytes(yaml.safe_dump({**settings, "stage": stage}, allow_unicode=False).encode() if stage else raw)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:  # there is no such model or data
        load_config(path)
    assert str(path) in str(caught.value)


@few
@given(override=st.text(max_size=20) | st.tuples(keys, st.text(max_size=12)).map("=".join))
def test_overrides(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text("stage: sft\nmodel_name_or_path: none\ndataset: none\noutput_dir: out")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_config(path, [override])
    assert str(path) in str(caught.value)

"""Nothing that a file or a server holds is run: read from the source of the package, and tried with hostile files."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_floors import sources

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute; "?" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> str:
    """The source of a keyword argument; "" without one."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), "")


def complaints(source: str) -> Iterator[str]:
    """What of a module could run something that it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"imports {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield f"imports from {node.module}"
        if isinstance(node, ast.Call):
            yield from complaints_of_call(node)


def complaints_of_call(call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    if name == "torch.load" and keyword(call, "weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "yaml.load" and keyword(call, "Loader") not in ("Loader", "yaml.SafeLoader", "yaml.CSafeLoader"):
        yield "yaml.load without a safe loader"
    if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") != "False":
        yield "np.load without allow_pickle=False"
    if keyword(call, "shell") == "True":
        yield f"{name} through a shell"
    if keyword(call, "trust_remote_code") == "True":
        yield f"{name} with trust_remote_code=True"


def test_nothing_that_is_read_is_run():
    modules = sources()
    found = [f"{module}: {what}" for module, source in modules.items() for what in complaints(source)]
    assert len(modules) > 100
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_planted_hole_is_found(line):
    assert list(complaints(line))


def test_the_yaml_loader_is_a_safe_one():
    """`Loader` above is the class that `read_yaml` defines."""
    source = sources()["rlhf_fast.trainers.config_types"]
    classes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == "Loader"]
    assert [ast.unparse(base) for c in classes for base in c.bases] == ["yaml.SafeLoader"]


# ---- hostile files

transformers = pytest.importorskip("transformers")

from test_cli import config, invoke  # noqa: E402, F401

MARK = "it_ran"


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def run(config):  # noqa: F811
    return config


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt"])
def test_pickles_are_not_run(run, name):
    folder = run.parent
    overrides = []
    if name == "pytorch_model.bin":
        (folder / "model" / "model.safetensors").unlink()
        target = folder / "model" / name
    else:
        assert invoke("train", run, "save_steps=1", "max_steps=1").exit_code == 0
        target = folder / "out" / "checkpoint-1" / name
        overrides = ["resume_from_checkpoint=true"]
    torch.save({"bomb": Bomb(folder / MARK)}, target)
    result = invoke("train", run, *overrides)
    assert result.exit_code != 0
    assert not (folder / MARK).exists()


def test_code_beside_a_model_is_not_run(run):
    folder = run.parent
    (folder / "model" / "evil.py").write_text(f"import os\nos.mkdir({str(folder / MARK)!r})\nclass C: pass\n")
    for file, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        settings = json.loads((folder / "model" / file).read_text())
        settings["auto_map"] = {c: "evil.C" if c != "AutoTokenizer" else ["evil.C", None] for c in classes}
        (folder / "model" / file).write_text(json.dumps(settings))
    invoke("train", run, "max_steps=1")
    assert not (folder / MARK).exists()


@pytest.mark.parametrize(
    "text", ["stage: !!python/object/apply:os.mkdir [{mark}]", "!!python/object/new:os.mkdir [{mark}]"]
)
def test_yaml_makes_no_objects(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("{mark}", str(tmp_path / MARK)))
    result = invoke("train", path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "not valid YAML" in result.stderr
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("spec", ["__import__('os').mkdir('x')", "os:mkdir('x')", "lambda: 1", "os", ":f", "a:b"])
def test_rewards_are_import_paths(tmp_path, run, spec, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", run, "stage=grpo", f"reward_funcs={spec}")
    assert result.exit_code == 2
    assert "reward function" in result.stderr
    assert not (tmp_path / "x").exists()


def test_chat_templates_run_in_a_sandbox():
    from test_data import word_tokenizer

    from rlhf_fast.trainers.data.chat import Chat

    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ValueError, match="a.jsonl, line 1: the chat template failed"):
        Chat([{"role": "user", "content": "a"}], 1, "a.jsonl, line 1").render(tokenizer)


@pytest.mark.parametrize("name", ["../../secret.jsonl", "/etc/passwd"])
def test_a_registry_names_data_files_only(tmp_path, name):
    """It may point anywhere, as its reader may, but what is no data is an error rather than text to learn."""
    from rlhf_fast.trainers.data.dataset_info import resolve
    from rlhf_fast.trainers.data.readers import read_rows

    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": name}}))
    with pytest.raises((FileNotFoundError, ValueError), match="no file or folder|expected one of .json"):
        read_rows([source.path for source in resolve(["a"], str(tmp_path))])

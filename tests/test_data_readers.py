"""Files of every kind: what they hold, where a row came from, what is wrong with them, and that reading is lazy."""

from __future__ import annotations

import gzip
import json
import random
import time
import tracemalloc

import pytest
from test_data import marked, word_tokenizer

from rlhf_fast.trainers.data.pairs import tokenize_kto
from rlhf_fast.trainers.data.readers import Rows, read_rows
from rlhf_fast.trainers.data.tokenize import tokenize_sft

pa = pytest.importorskip("pyarrow")

ROWS = [{"prompt": f"p{i}", "completion": "é \u2028 \n" + "x" * i} for i in range(600)]  # more than a block of a table


def write_jsonl(path):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")


def write_gz(path):
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)


def write_csv(path):
    import csv

    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        writer = csv.DictWriter(f, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70)


def write_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as f:
        f.write_table(table, max_chunksize=70)


def write_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as f:
        f.write_table(table)


FILES = {
    "a.jsonl": (write_jsonl, "line"),
    "b.json": (lambda path: path.write_text(json.dumps(ROWS)), "row"),
    "c.jsonl.gz": (write_gz, "line"),
    "d.csv": (write_csv, "row"),
    "e.parquet": (write_parquet, "row"),
    "f.arrow": (write_stream, "row"),
    "g.arrow": (write_file, "row"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path, name):
    write, unit = FILES[name]
    write(tmp_path / name)
    rows = read_rows([tmp_path / name])
    assert list(rows) == ROWS
    order = random.Random(0).sample(range(600), 200)
    assert [rows[i] for i in order] == [ROWS[i] for i in order]
    assert rows.where(299) == f"{tmp_path / name}, {unit} 300"
    assert list(read_rows([tmp_path / name], limit=3)) == ROWS[:3]


def test_a_folder_of_all_kinds(tmp_path):
    for name, (write, _) in FILES.items():
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no data")
    rows = read_rows([tmp_path])
    assert list(rows) == ROWS * len(FILES)
    assert rows.where(600 * 3) == f"{tmp_path / 'd.csv'}, row 1"
    assert len(read_rows([tmp_path], limit=601)) == 601


def call(name, **arguments):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def called(calls, answer="a"):
    """A conversation with calls."""
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, "tool_calls": calls}]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder"])
def test_calls_and_tools_are_free_of_the_nulls_that_arrow_fills_in(tmp_path, kind):
    """What two calls or schemas do not share is null in the table; nulls of other columns, and in lists, stay."""
    rows = [
        {
            "messages": called(call("f", city="x", days=[1, None])),
            "tools": [tool("f", city={"type": "string", "enum": ["x", None]}) | {"strict": True}],
            "named_otherwise": [tool("g", n={"type": "int"})],
            "cases": [{"a": 1, "b": None}, {"a": 2, "b": 3}],
        },
        {
            "messages": called(call("g", n=1)),
            "tools": [tool("g", n={"type": "int"})],
            "named_otherwise": [tool("f", city={"type": "string"})],
            "cases": [{"a": None, "b": 1}],
        },
    ]
    path, table = tmp_path / f"x.{kind}".removesuffix(".folder"), pa.Table.from_pylist(rows)
    if kind == "folder":
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    elif kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as f:
            f.write_table(table)
    for row, want in zip(read_rows([path]), rows, strict=True):
        assert row["messages"][1]["tool_calls"] == want["messages"][1]["tool_calls"]
        assert {key: row[key] for key in ("tools", "named_otherwise", "cases")} == {
            key: want[key] for key in ("tools", "named_otherwise", "cases")
        }


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_json_features_of_datasets_are_decoded(tmp_path, kind):
    """Also where they are deep in a column; a null that their text holds stays, in calls too."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    if not hasattr(datasets, "Json"):
        pytest.skip("datasets before 5 has no Json feature")
    features = {"messages": [datasets.Json()], "info": {"a": datasets.Json(), "b": datasets.Value("string")}}
    rows = [
        {"messages": called(call("f", city=None)), "info": {"a": 1, "b": "1"}},
        {"messages": called(call("g", city=2)), "info": {"a": {"x": [None]}, "b": "{}"}},
        {"messages": called(call("g"), answer=""), "info": {"a": None, "b": None}},
    ]
    columns = {key: [row[key] for row in rows] for key in features}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    path = tmp_path / "x" if kind == "folder" else tmp_path / "x.parquet"
    data.save_to_disk(str(path)) if kind == "folder" else data.to_parquet(str(path))
    assert list(read_rows([path])) == rows


def test_json_that_is_none_names_the_row(tmp_path):
    from pyarrow import parquet

    if not hasattr(pa, "json_"):
        pytest.skip("pyarrow before 19 has no JSON type")
    parquet.write_table(pa.table({"info": pa.array(["1", "{"], pa.json_())}), tmp_path / "x.parquet")
    rows = read_rows([tmp_path])
    assert rows[0] == {"info": 1}
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: not valid JSON: Expecting property name"):
        rows[1]


def test_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.select(range(599, -1, -1)).save_to_disk(str(tmp_path / "one"))
    rows = read_rows([tmp_path / "one"])
    assert list(rows) == ROWS[::-1]
    assert rows.where(0) == f"{tmp_path / 'one'}, row 1"
    datasets.DatasetDict(train=data, test=data.select([5])).save_to_disk(str(tmp_path / "sub" / "many"))
    assert len(read_rows([tmp_path / "sub" / "many"])) == 600
    assert list(read_rows([tmp_path / "sub"], split="test", subset="many")) == [ROWS[5]]
    with pytest.raises(ValueError, match=r"many: split must be one of train, test, got dev"):
        read_rows([tmp_path / "sub" / "many"], split="dev")
    with pytest.raises(FileNotFoundError, match="no folder .*other"):
        read_rows([tmp_path / "sub"], subset="other")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="one: not readable as a folder of save_to_disk: "):
        read_rows([tmp_path / "one"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x,y\n1,2\n3\n", r"a\.csv: not readable as \.csv: .*(Row|row) #?3.*[Ee]xpected 2 columns, got 1"),
        ("a.csv", b"", r"a\.csv: not readable as \.csv: Empty CSV file"),
        ("a.csv", b"x\n\xff\n", r"a\.csv: not readable as \.csv: .*UTF8"),
        ("a.csv", b"x,y\n", r"the dataset is empty: no row in .*a\.csv"),
        ("a.parquet", b"no parquet", r"a\.parquet: not readable as \.parquet: "),
        ("a.arrow", b"no arrow data", r"a\.arrow: not readable as \.arrow: "),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: not readable as \.gz: "),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n{')[:-4], r"a\.jsonl\.gz: not readable as \.gz: "),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n\n{'), r"a\.jsonl\.gz, line 3: not valid JSON: "),
        ("a.txt", b"x", r"a\.txt: expected one of \.json, \.jsonl, .*, got \.txt"),
        ("a", b"x", r"a: expected one of .*, got no suffix"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows([tmp_path / name]))


def test_a_csv_is_text_and_its_labels_are_read_from_it(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion,label\n1,"b",true\n2,,False\n3,c,0\n')
    rows = read_rows([tmp_path / "a.csv"])
    assert rows[0] == {"prompt": "1", "completion": "b", "label": "true"}
    assert rows[1]["completion"] == ""
    assert tokenize_kto(rows, word_tokenizer(), max_length=9).labels.tolist() == [True, False, False]
    (tmp_path / "a.csv").write_text("prompt,completion,label\n1,b,maybe\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 1: label must be true or false, got 'maybe'"):
        tokenize_kto(read_rows([tmp_path / "a.csv"]), word_tokenizer(), max_length=9)


def test_columns_that_are_null_are_not_there(tmp_path):
    """A Parquet file of mixed rows fills every row with every column."""
    from pyarrow import parquet

    mixed = [{"prompt": "a", "completion": "b"}, {"text": "c"}, {"instruction": "d", "output": "e", "input": ""}]
    parquet.write_table(
        pa.Table.from_pylist(
            [dict.fromkeys(("prompt", "completion", "text", "instruction", "output", "input")) | r for r in mixed]
        ),
        tmp_path / "a.parquet",
    )
    data = tokenize_sft(read_rows([tmp_path / "a.parquet"]), word_tokenizer(), max_length=9)
    assert [marked(data, i) for i in range(3)] == ["a b* </s>*", "c* </s>*", "d e* </s>*"]


def test_select_convert_and_join(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"x": f"{name}{i}"}) + "\n" for i in range(3)))
    a, b = (read_rows([tmp_path / f"{name}.jsonl"]) for name in "ab")
    both = Rows.join([a.select([2, 0]), b.convert(lambda row, where: {**row, "where": where[-6:]})])
    assert [r["x"] for r in both] == ["a2", "a0", "b0", "b1", "b2"]
    assert both[3] == {"x": "b1", "where": "line 2"}
    assert [both.where(i)[-15:] for i in (0, 4)] == ["a.jsonl, line 3", "b.jsonl, line 3"]
    assert [r["x"] for r in Rows.join([both, a], [(0, 4), (1, 1), (0, 0)])] == ["b2", "a1", "a2"]


def test_lines_are_read_when_asked_for(tmp_path):
    path = tmp_path / "big.jsonl"
    line = json.dumps({"prompt": "word " * 400, "completion": "x"}) + "\n"
    with open(path, "w") as f:
        f.writelines([line] * 20_000)
    size = path.stat().st_size
    assert size > 40e6
    tracemalloc.start()
    try:
        rows = read_rows([path])
        assert sum(len(r["completion"]) for r in rows) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 8  # offsets, one block of the file, one row


def test_a_line_longer_than_a_block(tmp_path):
    rows = [{"x": "a" * n} for n in (3, 3 << 20, 5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_rows([tmp_path / "a.jsonl"])) == rows


def test_places_cost_little():
    rows = Rows.from_list([{"x": i} for i in range(20_000)])
    start = time.process_time()
    assert rows.where(19_999) == [rows.where(i) for i in range(len(rows))][-1] == "rows, row 20000"
    assert time.process_time() - start < 0.5  # 0.02 when alone on a core

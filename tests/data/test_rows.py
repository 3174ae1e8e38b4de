"""A bad row is found before anything is trained, and its file and line are told."""

import json
import re

import pytest

from pt_jax.data import rows

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 🙂"}]
GOOD = {
    "text": {"text": "世界"},
    "messages": {"messages": CHAT},
    "completion": {"prompt": "a", "completion": "b"},
    "preference": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
    "question": {"prompt": "2+2?", "answer": "4"},
}


def jsonl(tmp_path, *lines):
    """A file of these lines: text as it stands, everything else as JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", GOOD)
def test_a_row_comes_back_with_its_kind_and_where_it_stood(tmp_path, kind):
    path = jsonl(tmp_path, GOOD[kind], GOOD[kind] | {"more": 1})
    assert rows.read(path) == [
        GOOD[kind] | {"kind": kind, "source": f"{path}:1"},
        GOOD[kind] | {"more": 1, "kind": kind, "source": f"{path}:2"},
    ]


@pytest.mark.parametrize("answer", ["4", 4, 4.0, -0.5])
def test_an_answer_may_be_a_number(tmp_path, answer):
    row = rows.read(jsonl(tmp_path, {"prompt": "2+2?", "answer": answer}))[0]
    assert row["answer"] == answer
    assert type(row["answer"]) is type(answer)


def test_the_caller_says_which_kinds_it_can_use(tmp_path):
    """A preference row is no completion row because it lacks one column; a row may have the columns of two."""
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b", "answer": "b"})
    assert rows.read(path, kinds=("question",))[0]["kind"] == "question"
    assert rows.read(path, kinds=("messages", "completion"))[0]["kind"] == "completion"
    with pytest.raises(ValueError, match=r"rows.jsonl:1: has the columns answer, completion, prompt; expected "
                                         r"prompt \+ chosen \+ rejected or text$"):  # fmt: skip
        rows.read(path, kinds=("preference", "text"))


def test_a_row_that_could_be_read_in_two_ways_is_refused(tmp_path):
    """The text would be trained on whole, the completion would not; nobody can tell which was meant."""
    path = jsonl(tmp_path, {"text": "ab"}, {"text": "ab", "prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match=r"rows.jsonl:2: could be read as text or prompt \+ completion; leave out"):
        rows.read(path, kinds=("text", "messages", "completion"))
    assert [r["kind"] for r in rows.read(path, kinds=("text", "question"))] == ["text", "text"]


def test_a_byte_order_mark_and_blank_lines_do_not_matter_and_do_not_shift_the_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff\n{"text": "é"}\r\n\r\n   \n{"text": "b"}\n\n'.encode())
    assert [(r["text"], r["source"]) for r in rows.read(path)] == [("é", f"{path}:2"), ("b", f"{path}:5")]


def test_a_character_in_two_halves_is_one(tmp_path):
    assert rows.read(jsonl(tmp_path, r'{"text": "\ud83d\ude42"}'))[0]["text"] == "🙂"


def test_a_separator_inside_a_string_ends_no_line(tmp_path):
    """str.splitlines would cut here; JSON allows them unescaped."""
    path = jsonl(tmp_path, '{"text": "a\u2028b\x85c"}', {"text": "d"})
    assert [r["text"] for r in rows.read(path)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"is not JSON \(.* at column 13\)"),
        ("text", r"is not JSON"),
        ('["text"]', r"is list, expected an object with named columns"),
        ('"text"', r"is str, expected an object"),
        ("null", r"is NoneType, expected an object"),
        ("{}", r"has the columns \(none\); expected text or messages or "),
        ('{"prompt": "a", "chosen": "b"}', r"has the columns chosen, prompt; expected "),
        ('{"text": 3}', r"text must be a string or a list of messages, got 3"),
        ('{"text": null}', r"text must be a string or a list of messages, got None"),
        ('{"text": ""}', r"text is empty"),
        ('{"prompt": "a", "completion": ""}', r"completion is empty"),
        ('{"messages": "hello"}', r"messages must be a list of messages, got 'hello'"),
        ('{"messages": []}', r"messages must be a list of messages, got \[\]"),
        ('{"messages": {"role": "user"}}', r"messages must be a list of messages, got \{'role': 'user'\}"),
        ('{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
         r"messages\[1\] must have role and content, both strings, got \{'content': 'b'\}"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have role and content"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\] must have role and content"),
        ('{"messages": ["hello"]}', r"messages\[0\] must have role and content, both strings, got 'hello'"),
        ('{"prompt": [], "completion": "b"}', r"prompt must be a string or a list of messages, got \[\]"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
         r"some columns are strings and some are messages; all must be of one form"),
        ('{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}',
         r"some columns are strings and some are messages"),
        ('{"prompt": "a", "answer": null}', r"answer must be a string or a finite number, got None"),
        ('{"prompt": "a", "answer": true}', r"answer must be a string or a finite number, got True"),
        ('{"prompt": "a", "answer": NaN}', r"answer must be a string or a finite number, got nan"),
        pytest.param('{"text": ' + "1" * 5000 + "}", r"is not JSON that can be read", id="5000 digits"),
        pytest.param("[" * 100_000, r"is not JSON that can be read", id="100000 brackets"),
        (r'{"text": "ab\ud800"}', r"text is not Unicode text: '\\ud800' at character 3 is half of a character"),
        (r'{"messages": [{"role": "user", "content": "\udfff"}]}', r"messages\[0\] is not Unicode text: '\\udfff'"),
        (r'{"prompt": "a", "chosen": "b", "rejected": "\ud83d "}', r"rejected is not Unicode text: '\\ud83d'"),
        (r'{"prompt": "a", "answer": "\ud800"}', r"answer is not Unicode text: '\\ud800'"),
        ('{"prompt": "a", "answer": ["4"]}', r"answer must be a string or a finite number, got \['4'\]"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    good = GOOD["text"]
    if '"prompt"' in line:
        good = GOOD["question" if "answer" in line else "preference" if "chosen" in line else "completion"]
    path = jsonl(tmp_path, good, "", line)
    with pytest.raises(ValueError, match=r"^" + re.escape(str(path)) + ":3: " + message):
        rows.read(path)


def test_rows_of_two_kinds_are_refused_at_the_second(tmp_path):
    path = jsonl(tmp_path, GOOD["text"], GOOD["text"], GOOD["messages"])
    with pytest.raises(ValueError, match=r"rows.jsonl:3: is a messages row, but the rows before are text rows"):
        rows.read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such file; give a .jsonl or .parquet file"):
        rows.read(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_a_file_with_nothing_in_it(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl: has no rows"):
        rows.read(tmp_path / "rows.jsonl")


def test_a_file_that_is_not_utf_8(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows.jsonl: cannot be read as UTF-8 text"):
        rows.read(tmp_path / "rows.jsonl")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    data = [{"prompt": "é\n\u2028", "answer": 4}, {"prompt": "世 🙂", "answer": "x"}]
    rows.write_jsonl(path, data)
    assert [{k: r[k] for k in ("prompt", "answer")} for r in rows.read(path)] == data


@pytest.fixture
def data_sets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # not that of whoever tests
    return datasets


@pytest.mark.parametrize("kind", GOOD)
def test_parquet_and_a_saved_data_set_read_as_the_same_rows(tmp_path, data_sets, kind):
    lines = [GOOD[kind] | {"i": i} for i in range(3)]
    data = data_sets.Dataset.from_list(lines)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "folder"))
    expected = rows.read(jsonl(tmp_path, *lines))
    for name in ("rows.parquet", "folder"):
        got = rows.read(tmp_path / name)
        assert [r["source"] for r in got] == [f"{tmp_path / name}:{i}" for i in (1, 2, 3)]
        assert [r | {"source": ""} for r in got] == [r | {"source": ""} for r in expected]


def test_parquet_rows_lack_the_columns_that_are_null(tmp_path, data_sets):
    """A file has every column in every row; a null is what a JSON line leaves out."""
    lines = [{"prompt": "a", "answer": "1", "completion": "b"}, {"prompt": "a", "answer": None, "completion": "b"}]
    data_sets.Dataset.from_list(lines).to_parquet(str(tmp_path / "rows.parquet"))
    assert len(rows.read(tmp_path / "rows.parquet", kinds=("completion",))) == 2
    with pytest.raises(ValueError, match=r"rows.parquet:2: has the columns completion, prompt; expected prompt"):
        rows.read(tmp_path / "rows.parquet", kinds=("question",))


def test_a_parquet_file_that_changed_is_read_anew(tmp_path, data_sets):
    for text in ("old", "new"):
        data_sets.Dataset.from_list([{"text": text}]).to_parquet(str(tmp_path / "rows.parquet"))
        assert rows.read(tmp_path / "rows.parquet")[0]["text"] == text


def test_what_the_datasets_library_cannot_read_is_told(tmp_path, data_sets):
    (tmp_path / "rows.parquet").write_bytes(b"nonsense")
    (tmp_path / "folder").mkdir()
    for name in ("rows.parquet", "folder"):
        with pytest.raises(ValueError, match=rf"{name}: the datasets library cannot read it"):
            rows.read(tmp_path / name)


def test_a_folder_of_splits_asks_for_one_of_them(tmp_path):
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(
        ValueError, match=r"folder: holds the splits train, test; give the folder of one, .*folder/train"
    ):
        rows.read(tmp_path / "folder")
    assert rows.read(tmp_path / "folder" / "train")[0]["text"] == "train"

"""Labelled files of every format: the same examples from all, and one line that names file and line for damage."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megabert.finetune.tasks import formats, readers
from megabert.finetune.tasks.baselines import predict_tfidf
from megabert.finetune.tasks.metrics import score
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import Examples, Task

TEXTS = ["good film", "bad, \u00e9 \u6f22 \U0001f600 film", "so-so \u2028 film"]
LABELS = ["good", "bad", "good"]


def task_of(*files: str, labels: tuple[str, ...] = ("bad", "good"), texts: tuple[str, ...] = ("text",)) -> Task:
    metrics = ("accuracy",) if labels else ("pearson",)
    names = dict(zip(("train", "validation", "test"), files * 3, strict=False))
    return Task(name="own", texts=texts, labels=labels, metrics=metrics, files=names, test={})


def delimited(separator: str) -> bytes:
    rows = [("text", "label"), *zip(TEXTS, LABELS, strict=True)]
    quoted = [[f'"{cell}"' if separator in cell else cell for cell in row] for row in rows]
    return "".join(separator.join(row) + "\n" for row in quoted).encode()


def json_lines() -> bytes:
    rows = ({"label": y, "other": [1], "text": x} for x, y in zip(TEXTS, LABELS, strict=True))
    return "\n".join(map(json.dumps, rows)).encode()


CONTENTS: dict[str, bytes] = {
    "a.tsv": delimited("\t"),
    "bom.tsv": b"\xef\xbb\xbf" + delimited("\t"),
    "crlf.tsv": delimited("\t").replace(b"\n", b"\r\n"),
    "a.csv": delimited(","),
    "bom.csv": b"\xef\xbb\xbf" + delimited(",").replace(b"\n", b"\r\n"),
    "a.jsonl": json_lines(),
    "bom.jsonl": b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n\r\n") + b"\n \n",
    "a.tsv.gz": gzip.compress(delimited("\t")),
    "a.csv.gz": gzip.compress(delimited(",")),
    "a.jsonl.gz": gzip.compress(json_lines()[:40]) + gzip.compress(json_lines()[40:]),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_examples(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert read_split(task_of(name), tmp_path, "train") == Examples(TEXTS, None, [1, 0, 1])


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "quoted.csv", "a.jsonl"])
def test_every_format_takes_a_text_of_ten_million_characters(tmp_path, name):
    text = "ab c " * 2_000_000
    lines = {
        "a.tsv": f"label\ttext\ngood\t{text}\n",
        "a.csv": f"label,text\ngood,{text}\n",
        "quoted.csv": f'label,text\ngood,"{text}"\n',
        "a.jsonl": json.dumps({"label": "good", "text": text}),
    }
    (tmp_path / name).write_text(lines[name])
    assert read_split(task_of(name), tmp_path, "train").first == [text]


def write_table(path: Path, **columns: object) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("encode", [lambda column: column, lambda column: column.dictionary_encode()])
def test_a_parquet_file_gives_them_too(tmp_path, encode: Callable):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": encode(pyarrow.array(TEXTS)), "label": encode(pyarrow.array(LABELS))})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression="none")
    assert read_split(task_of("a.parquet"), tmp_path, "train") == Examples(TEXTS, None, [1, 0, 1])
    path.write_bytes(path.read_bytes().replace(b"good film", b"goof film", 1))
    with pytest.raises(ValueError, match=r"a\.parquet: not a parquet file that can be read: .*CRC"):
        read_split(task_of("a.parquet"), tmp_path, "train")


def test_a_number_is_the_label_of_this_name_in_every_format(tmp_path, monkeypatch):
    task = task_of("a.jsonl", labels=("2", "-1", "0"))
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 0}\n{"text": "y", "label": -1}\n')
    assert read_split(task, tmp_path, "train").labels == [2, 1]
    monkeypatch.chdir(tmp_path)
    write_table(Path("a.parquet"), text=["x", "y"], label=[0, -1])
    task = task_of("a.parquet", labels=("2", "-1", "0"))
    assert read_split(task, Path("."), "train").labels == [2, 1]
    write_table(Path("a.parquet"), text=["x", "y"], label=[0, 3])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1, column label: is 3, expected 2, -1, 0\."):
        read_split(task, Path("."), "train")


def test_targets_of_a_regression_are_numbers(tmp_path):
    task = task_of("a.jsonl", labels=())
    good = {"3": 3.0, "-0.5e2": -50.0, '"2.5"': 2.5, '" 7 "': 7.0, "1e15": 1e15}
    rows = (f'{{"text": "x", "label": {value}}}\n' for value in good)
    (tmp_path / "a.jsonl").write_text("".join(rows))
    assert read_split(task, tmp_path, "train").labels == list(good.values())
    for bad in (
        "true",
        "null",
        '""',
        '"1_000"',
        '"3,5"',
        '"\u0663"',
        "NaN",
        "1e16",
        "1e999",
        "9" * 400,
        "[1]",
        '"nan"',
    ):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "label": {bad}}}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1, column label: is .*, expected a number from") as error:
            read_split(task, tmp_path, "train")
        assert "\n" not in str(error.value)


HEADER = b"text\tlabel\n"
ROW = b'{"text": "x", "label": "good"}\n'
DAMAGED = {
    "unknown label": ("a.jsonl", ROW + b'{"text": "x", "label": "Good"}', "line 2, column label: is 'Good', expected"),
    "label of another type": ("a.jsonl", b'{"text": "x", "label": ["good"]}', "line 1, column label: is \\['good'\\]"),
    "label is null": ("a.jsonl", ROW + b'{"text": "x", "label": null}', "line 2, column label: is null, expected bad"),
    "text is null": ("a.jsonl", ROW * 2 + b'{"text": null, "label": "bad"}', "line 3, column text: is null, expected"),
    "text is a number": ("a.jsonl", b'{"text": 3, "label": "bad"}', "line 1, column text: is 3, expected a string"),
    "no column": ("a.jsonl", ROW + b'{"texts": "x"}', "line 2: has no column text, only texts"),
    "two columns": ("a.jsonl", b'{"text": "x", "text": "y"}', "line 1: not valid JSON: the key 'text' appears twice"),
    "not an object": ("a.jsonl", ROW + b"[1]\n", "line 2: is \\[1\\], expected an object with text, label"),
    "cut": ("a.jsonl", ROW + ROW[:12], "line 2: not valid JSON: Expecting"),
    "deep": ("a.jsonl", ROW + b"[" * 100_000, "line 2: not valid JSON: maximum recursion depth"),
    "huge number": ("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}", "line 1: not valid JSON: Exceeds the limit"),
    "surrogate": ("a.jsonl", rb'{"text": "\ud800", "label": "bad"}', "line 1, column text: has a NUL or half of a"),
    "NUL in JSON": ("a.jsonl", rb'{"text": "a\u0000b", "label": "bad"}', "line 1, column text: has a NUL or half"),
    "one array": ("a.jsonl", b'[\n{"text": "x", "label": "good"}\n]', "line 1: not valid JSON: Expecting value"),
    "only blanks": ("a.jsonl", b"\n \n", "has no examples"),
    "no rows": ("a.tsv", HEADER, "has no examples"),
    "no bytes": ("a.tsv", b"", "line 1: has no column text, only nothing"),
    "no bytes in gzip": ("a.csv.gz", b"", "line 1: has no column text, only nothing"),
    "NUL": ("a.tsv", HEADER + b"a\0b\tgood\n", "line 2: has a NUL byte, expected UTF-8"),
    "Latin-1": ("a.tsv", HEADER + b"x\tgood\n" * 5000 + b"caf\xe9\tgood\n", "line 5002: not UTF-8: byte 4 is 0xe9"),
    "UTF-16": ("a.csv", "text,label\nx,good\n".encode("utf-16"), "line 1: is UTF-16, expected UTF-8. Convert it"),
    "UTF-16 without a mark": ("a.tsv", "text\tlabel\n".encode("utf-16-le"), "line 1: has a NUL byte, expected UTF-8"),
    "old line ends": ("a.csv", b"text,label\rx,good\r", "line 1: lines end with a carriage return alone"),
    "no .gz": ("a.jsonl", gzip.compress(ROW), "line 1: is compressed by gzip: its name must end with .gz"),
    "not gzip": ("a.jsonl.gz", ROW, "line 1: damaged gzip data: Not a gzipped file"),
    "gzip is cut": ("a.tsv.gz", gzip.compress(HEADER + b"x\tgood\n", mtime=0)[:-9], "damaged gzip data: Compressed"),
    "flipped bit": ("a.tsv.gz", gzip.compress(HEADER)[:-6] + b"\1\2\3\4\5\6", "damaged gzip data: CRC check failed"),
    "short row": ("a.tsv", HEADER + b"x\tgood\ny\n", "line 3: has 1 columns, expected 2: label is missing"),
    "blank line": ("a.tsv", HEADER + b"\nx\tgood\n", "line 2: has 1 columns, expected 2: label is missing"),
    "long row": ("a.csv", b"text,label\nx,good,1\n", "line 2: has 3 columns, expected 2: a tab or comma too many"),
    "two headers": ("a.csv", b"text,label,text\nx,good,y\n", "line 1: has two columns text, only text, label, text"),
    "open quote": ("a.csv", b'text,label\n"x,good\ny,bad\n', "line 3: unexpected end of data; is a quote not closed"),
    "text after a quote": ("a.csv", b'text,label\n"x"y,good\n', "line 2: ',' expected after '\"'"),
    "another format": ("a.json", b"[]", "expected a .tsv, .csv, .jsonl .each also .gz. or .parquet file"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_line_with_the_file_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_split(task_of(name), tmp_path, "train")
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 300


def test_what_is_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(readers, "MAX_TEXT_CHARACTERS", 600)
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 5000)
    monkeypatch.setattr(formats, "MAX_ROW_GROUP_BYTES", 300)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"[" * 10_000_000))
    with pytest.raises(ValueError, match="line 1: has more than 1,000 bytes, too many for one example"):
        read_split(task_of(path.name), tmp_path, "train")
    path.write_bytes(gzip.compress(ROW.replace(b'"x"', b'"' + b"x" * 700 + b'"')))
    with pytest.raises(ValueError, match="line 1, column text: has 700 characters, expected at most 600"):
        read_split(task_of(path.name), tmp_path, "train")
    path.write_bytes(gzip.compress(ROW.replace(b'"x"', b'"' + b"x" * 500 + b'"') * 20))
    with pytest.raises(ValueError, match="line 11: more than .* or 5,000 characters are in one split"):
        read_split(task_of(path.name), tmp_path, "train")
    write_table(tmp_path / "a.parquet", text=["x" * 300], label=["good"])
    with pytest.raises(ValueError, match="its row group 0 has .* bytes, more than 300, which are held in memory"):
        read_split(task_of("a.parquet"), tmp_path, "train")


def test_a_baseline_without_two_labels_or_words_predicts_a_constant():
    dev = {"": Examples(["x", "y z"], None, [0, 1])}
    for train in (Examples(["good film", "film"], None, [1, 1]), Examples(["!", "?", "."], None, [1, 0, 1])):
        predictions, _ = predict_tfidf(train, dev, False)
        assert predictions[""].tolist() == [1, 1]
    predictions, _ = predict_tfidf(Examples(["good film", "film"], None, [2.5, 2.5]), dev, True)
    assert predictions[""].tolist() == [2.5, 2.5]
    pairs = {"": Examples(["a b"], ["c d"], [0])}
    assert predict_tfidf(Examples(["good", "bad"], ["good", "film"], [0, 2]), pairs, False)[0][""].shape == (1,)


@pytest.mark.parametrize("truth", [0, 1])
def test_an_evaluation_set_of_one_label_is_scored(truth):
    """Matthews' correlation is undefined there, and F1 without a positive; both are 0."""
    import numpy as np

    labels, right, wrong = np.full(4, truth), np.full(4, truth), np.full(4, 1 - truth)
    assert (score("accuracy", right, labels), score("accuracy", wrong, labels)) == (1.0, 0.0)
    assert (score("f1", right, labels), score("f1", wrong, labels)) == (float(truth), 0.0)
    assert score("matthews", right, labels) == score("matthews", wrong, labels) == 0.0
    assert score("matthews", np.array([0, 1, 0, 1]), labels) == 0.0

"""A JSON file of the wrong form is a one-line error that names the file."""

import json

import pytest

from megabert.files import json_file
from megabert.files.json_file import read_json
from megabert.files.metrics_format import read_metrics


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (b"[1]", "holds a list, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
        (b'{"a": ' + b"[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": [{"b": 1, "b": 2}]}', "not JSON: the key 'b' appears twice"),
        (b'{"a": "\xff"}', "not JSON: 'utf-8' codec"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "more than 0 MiB"),
    ],
)
def test_anything_else_is_refused(tmp_path, monkeypatch, content, message):
    if b"xxx" in content:
        monkeypatch.setattr(json_file, "MAX_BYTES", 1000)
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: damaged: .*{message}") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_only_records_of_numbers_are_metrics(tmp_path):
    good = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan"), "lr": 1}]
    bad = [
        "[1]",
        '{"step": "3"}',
        '{"step": true}',
        '{"step": 4, "loss": "x"}',
        '{"loss": 1}',
        "[" * 100_000,
        '{"step":',
    ]
    lines = [json.dumps(good[0]), *bad, json.dumps(good[1])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]

"""Tests that every source yields exactly its documents, in a fixed order, however it is cut into input splits."""

import gzip
import importlib.metadata
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources import InputSplit, LeftOut, ReadOptions, list_input_splits, read_input_split, source_state
from data_prep.sources.base import DamagedError
from data_prep.sources.docstrings import docstrings
from data_prep.sources.hub import transport_error


def read_all(source: str, **options) -> list[str]:
    return read_with(source, LeftOut(), **options)


def read_with(source: str, left_out: LeftOut, **options) -> list[str]:
    read = ReadOptions(**options)
    splits = list_input_splits(str(source), read, left_out)
    return [text for split in splits for text in read_input_split(split, read, left_out)]


def test_docstrings_come_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\n\nif True:\n    class A:\n        """Class."""\n        def f(self):\n'
        '            """Method."""\n'
        'def g():\n    try:\n        def h():\n            "Inner."\n    except E:\n        pass\n    x = "not one"\n'
    )
    assert list(docstrings(path)) == ["Module.", "Class.", "Method.", "Inner."]
    path.write_text("def broken(:\n")
    assert list(docstrings(path)) == []


def test_docstrings_that_are_no_text_are_left_out_and_counted(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Module."""\ndef f():\n    "a\\0b"\ndef g():\n    "c\\ud800"\n')
    left_out = LeftOut()
    split = InputSplit("docstrings", (str(path),), 0, 0, 1)
    assert list(read_input_split(split, ReadOptions(), left_out)) == ["Module."]
    assert left_out.counts == {"docstrings with characters that no text contains": 2}


def test_a_folder_with_the_name_of_the_corpus_of_docstrings_is_not_confused_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docstrings").mkdir()
    (tmp_path / "docstrings/a.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"docstrings: is a folder or a file here, .* Pass \./docstrings for what is"):
        list_input_splits("docstrings", ReadOptions())
    assert [split.paths for split in list_input_splits("./docstrings", ReadOptions())] == [("docstrings/a.txt",)]


def test_the_corpus_of_docstrings_has_nothing_of_megabert_itself(tmp_path, monkeypatch):
    # setuptools leaves a megabert.egg-info beside the code, which lists all files of megabert.
    package = tmp_path / "megabert.egg-info"
    package.mkdir()
    installed = importlib.metadata.distribution("megabert")
    (package / "PKG-INFO").write_text(installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "")
    (package / "SOURCES.txt").write_text("megabert/own.py\n")
    (tmp_path / "megabert").mkdir()
    (tmp_path / "megabert/own.py").write_text('"""Of megabert."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.metadata.distribution("megabert")
    assert [str(file) for file in found.files or ()] == ["megabert/own.py"]
    files = [path for split in list_input_splits("docstrings", ReadOptions()) for path in split.paths]
    assert len(files) > 1000
    assert [path for path in files if "megabert" in Path(path).name or path.startswith(str(tmp_path))] == []


def test_every_format_yields_its_documents(tmp_path):
    lines = [json.dumps({"text": f"document {i} \u00e9", "body": f"other {i}"}) for i in range(50)]
    plain = "\n".join([*lines[:25], "", *lines[25:]])
    (tmp_path / "a.jsonl").write_text(plain)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain.encode()))
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "d.txt").write_text("first\nparagraph\n\nsecond")
    (tmp_path / "ignored.bin").write_bytes(b"x")
    expected = [f"document {i} \u00e9" for i in range(50)]
    assert read_all(str(tmp_path)) == [*expected * 4, "first\nparagraph\n\nsecond"]
    assert read_all(str(tmp_path / "d.txt"), blank_lines=True) == ["first\nparagraph\n", "second"]
    assert read_all(str(tmp_path / "a.jsonl"), text_key="body") == [f"other {i}" for i in range(50)]


def test_byte_ranges_of_a_jsonl_cover_every_line_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    texts = ["x" * (i * 7 % 150) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert len(list_input_splits(str(path), ReadOptions(), LeftOut())) > 20
    assert read_all(str(path)) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text"', r"a\.jsonl at byte 14: not valid JSON"),
        ('{"text": "a", "text": "b"}', r"a\.jsonl at byte 0: not valid JSON: the key 'text' appears twice"),
        (r'{"text": "a", "te\u0078t": "b"}', r"a\.jsonl at byte 0: not valid JSON: the key 'text' appears twice"),
        (
            r'{"text": "a", "x": {"y": 1, "\u0079": 2}}',
            r"a\.jsonl at byte 0: not valid JSON: the key 'y' appears twice",
        ),
        ('[{"text": "a"}]\n', r"a\.jsonl at byte 0: is a list, .*'a'.*, expected one object such as .*per line"),
        ('"a"\n', r"a\.jsonl at byte 0: is a str, 'a', expected one object such as .*per line"),
        ('{"body": "a"}\n', r"a\.jsonl at byte 0: has no field 'text', its fields are: body.*--text-key"),
    ],
)
def test_the_error_names_a_malformed_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_all(str(tmp_path))


def test_what_a_library_says_of_damage_is_one_line():
    """pyarrow ends some of its messages with a line break."""
    error = DamagedError("a.parquet: not a .parquet file: Invalid data\n. Download it again.")
    assert str(error) == "a.parquet: not a .parquet file: Invalid data . Download it again."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_sources_without_text_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="no such file or folder"):
        list_input_splits(str(tmp_path / "none"), ReadOptions(), LeftOut())
    with pytest.raises(ValueError, match="holds no text; expected .txt, .jsonl "):
        list_input_splits(str(tmp_path), ReadOptions(), LeftOut())
    with pytest.raises(ValueError, match="holds tokens shards, expected text to tokenize"):
        list_input_splits(str(corpus.tokens), ReadOptions(), LeftOut())


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines, by a regular expression."""
    return [part.strip() for part in re.split(r"\n[ \t]*(?=\n)", "\n" + text + "\n\n") if part.strip()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["a", "bb ccc", "\u00e9\u4f60", "", "", " \t", "word " * 30]), min_size=2, max_size=40),
    st.integers(1, 90),
)
def test_byte_ranges_of_a_txt_cover_every_paragraph_once(tmp_path, monkeypatch, lines, split_bytes):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", split_bytes)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    assert [text.strip() for text in read_all(str(path), blank_lines=True)] == paragraphs("\n".join(lines))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\x1b"), max_size=60), min_size=1, max_size=20),
    st.integers(1, 90),
)
def test_byte_ranges_of_any_size_cover_every_line_of_a_jsonl_once(tmp_path, monkeypatch, texts, split_bytes):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", split_bytes)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert read_all(str(path)) == texts


def test_a_file_too_large_for_one_document_is_refused_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"x\n\n")
    with open(tmp_path / "a.txt", "r+b") as file:
        # A sparse file, which takes no space on disk.
        file.truncate(65 << 20)
    with pytest.raises(
        ValueError, match="a.txt: longer than 64 MiB, the largest allowed document. Pass --blank-lines if"
    ):
        list_input_splits(str(tmp_path / "a.txt"), ReadOptions(), LeftOut())
    with pytest.raises(ValueError, match="a.txt at byte 3: longer than 64 MiB"):
        read_all(str(tmp_path / "a.txt"), blank_lines=True)


def test_documents_that_do_not_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.base.MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("a line\n" * 1000)
    with pytest.raises(
        ValueError, match=r"a\.txt at byte 0: longer than .* by blank lines, or convert the file to \.jsonl"
    ):
        read_all(str(tmp_path), blank_lines=True)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"x" * 2000 + b'"}'))
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz at line 2: longer than .* Cut the line into documents"):
        read_all(str(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_the_error_names_a_truncated_compressed_file(tmp_path, name):
    data = b"".join(json.dumps({"text": str(i * 7919)}).encode() + b"\n" for i in range(5000))
    whole = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name}: (truncated|at|.*not valid JSON)"):
        read_all(str(tmp_path))
    (tmp_path / name).write_bytes(b"no archive at all, only text")
    with pytest.raises(ValueError, match=f"{name}: truncated, or not the format that its name says.*Download it again"):
        read_all(str(tmp_path))


def test_a_zst_of_several_frames_is_read_whole(tmp_path):
    frames = [zstandard.compress(json.dumps({"text": str(i)}).encode() + b"\n") for i in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read_all(str(tmp_path)) == ["0", "1", "2"]


def write_parquet(path, texts, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": texts, **columns}), path, row_group_size=10
    )


def test_parquet_is_read_by_row_groups(tmp_path):
    texts = [f"document {i} \u00e9" if i != 7 else None for i in range(35)]
    write_parquet(tmp_path / "a.parquet", texts, number=list(range(35)))
    assert len(list_input_splits(str(tmp_path), ReadOptions(), LeftOut())) == 4
    assert read_all(str(tmp_path)) == [text for text in texts if text is not None]
    with pytest.raises(ValueError, match="has no field 'body', its fields are: number, text. Pass .* --text-key"):
        list_input_splits(str(tmp_path), ReadOptions("body"), LeftOut())
    with pytest.raises(ValueError, match="field 'number' holds int64, expected text"):
        list_input_splits(str(tmp_path), ReadOptions("number"), LeftOut())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match=r"b\.parquet: not a \.parquet file"):
        list_input_splits(str(tmp_path), ReadOptions(), LeftOut())


def write_hub_folder(folder):
    for name in ("en", "de"):
        (folder / name).mkdir(parents=True)
        for shard in range(3):
            write_parquet(
                folder / name / f"train-{shard:05d}-of-00003.parquet", [f"{name} {shard} {i}" for i in range(4)]
            )
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train-*.parquet\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_a_data_set_in_the_layout_of_the_hub_is_streamed_by_shards(tmp_path):
    folder = write_hub_folder(tmp_path / "set")
    expected = [f"de {shard} {i}" for shard in range(3) for i in range(4)]
    assert len(list_input_splits(f"hf:{folder}:de", ReadOptions(), LeftOut())) == 3
    assert read_all(f"hf:{folder}:de") == expected == read_all(f"hf:{folder}", dataset_config="de")
    with pytest.raises(ValueError, match="names a configuration, but --dataset-config is en. Pass one of the two"):
        read_all(f"hf:{folder}:de", dataset_config="en")
    with pytest.raises(ValueError, match="cannot be opened: .*See --dataset-config and --dataset-split"):
        read_all(f"hf:{folder}:de", dataset_split="test")
    with pytest.raises(ValueError, match="shard 0 row 0: has no field 'body', its fields are: text"):
        read_all(f"hf:{folder}:de", text_key="body")
    before = source_state(list_input_splits(f"hf:{folder}:de", ReadOptions(), LeftOut()))
    write_parquet(folder / "de" / "train-00000-of-00003.parquet", ["another"])
    assert source_state(list_input_splits(f"hf:{folder}:de", ReadOptions(), LeftOut())) != before


def test_a_local_data_set_is_the_folder_of_its_name(tmp_path, monkeypatch):
    """The name may be a pattern that matches another folder, a format, or a word; datasets knows "parquet"."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for name in ("set[1]", "set1", "se*", "s:t", "parquet", "a/b::c"):
        (tmp_path / name).mkdir(parents=True)
        write_parquet(tmp_path / name / "train-00000-of-00001.parquet", [f"in {name}"])
    for name in ("set1", "s:t", "parquet"):
        assert read_all(f"hf:{name}") == [f"in {name}"]
    for name in ("set[1]", "./se*", "a"):
        with pytest.raises(ValueError, match=r"has one of \* \? \[ :: in its name.* without hf:"):
            read_all(f"hf:{name}")


def test_a_data_set_that_is_a_script_is_refused_and_not_run(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/corpus.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError, match=r"hf:.*/corpus: cannot be opened: .*scripts are no longer supported"):
        list_input_splits(f"hf:{tmp_path}/corpus", ReadOptions())
    assert not (tmp_path / "run").exists()


def test_a_hub_data_set_is_pinned_to_its_revision(tmp_path, monkeypatch):
    """The calls to the hub are replaced and their arguments recorded."""
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    folder = write_hub_folder(tmp_path / "set")
    calls = []
    load = datasets.load_dataset

    def load_dataset(*args, **options):
        calls.append((args, options.pop("revision"), options))
        return load(str(folder), *args[1:], **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name: type("Info", (), {"sha": f"sha of {name}"}))
    splits = list_input_splits("hf:allenai/c4", ReadOptions(dataset_config="en"), LeftOut())
    assert calls == [(("allenai/c4", "en"), "sha of allenai/c4", {"split": "train", "streaming": True})]
    assert len(splits) == 3
    assert next(read_input_split(splits[0], ReadOptions(), LeftOut())) == "en 0 0"


@pytest.mark.parametrize("kind", ["of Python", "of the HTTP client"])
def test_an_unreachable_hub_is_a_one_line_error(monkeypatch, kind):
    hub = pytest.importorskip("huggingface_hub")
    error = ConnectionError if kind == "of Python" else transport_error()

    def fail(self, name):
        raise error("no route to host")

    monkeypatch.setattr(hub.HfApi, "dataset_info", fail)
    with pytest.raises(
        ValueError, match="hf:allenai/c4: no such data set on the hub, or the hub cannot be reached: no route"
    ):
        list_input_splits("hf:allenai/c4", ReadOptions(), LeftOut())


@pytest.mark.parametrize(
    ("source", "package"),
    [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("hf:.", "datasets"), ("hf:a/b", "datasets")],
)
def test_the_error_names_a_missing_package(tmp_path, monkeypatch, source, package):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"ARROW1")
    monkeypatch.chdir(tmp_path)
    for name in ("pyarrow", "pyarrow.parquet", "datasets", "huggingface_hub"):
        # Import then fails as if it were not installed.
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}. Install it: pip install 'megabert\[prep\]'"):
        list_input_splits(source, ReadOptions(), LeftOut())


def test_write_shards_imports_no_package_that_it_may_not_need():
    """Every worker imports the module. torch alone would take it a second and 200 MB."""
    optional = ("torch", "datasets", "pyarrow", "matplotlib")
    code = f"import sys, data_prep.write_shards; print([name for name in {optional} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

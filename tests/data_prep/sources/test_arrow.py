"""Tests that every column of text is read, from .parquet, .arrow and save_to_disk, and that damage is named."""

import errno
import hashlib
import io
import json
import struct

import fsspec
import pytest

from data_prep.sources import LeftOut, ReadOptions, list_input_splits, read_input_split, remote
from data_prep.sources.columns import arrow, parquet

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

TEXTS = ["one", None, "two \u4f60", "one"]
READ = ["one", "two \u4f60", "one"]


def read(source, left_out=None, **options) -> list[str]:
    left_out = LeftOut(options.get("skip_damaged", False)) if left_out is None else left_out
    read_options = ReadOptions(**options)
    splits = list_input_splits(str(source), read_options, left_out)
    return [text for split in splits for text in read_input_split(split, read_options, left_out)]


def write(path, **columns) -> None:
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    new = pyarrow.ipc.new_file if path.name.startswith("file") else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "large dictionary"])
def test_every_type_of_text_is_read_and_nulls_are_counted(tmp_path, name, kind):
    large = pyarrow.large_string()
    column = {
        "dictionary": lambda: pyarrow.array(TEXTS).dictionary_encode(),
        "large dictionary": lambda: pyarrow.array(TEXTS, large).dictionary_encode(),
    }.get(kind, lambda: pyarrow.array(TEXTS, getattr(pyarrow, kind)()))()
    write(tmp_path / name, text=column, meta=pyarrow.StructArray.from_arrays([column], ["text"]))
    for key in ("text", "meta.text"):
        left_out = LeftOut()
        assert read(tmp_path, left_out, text_key=key) == READ
        assert left_out.counts == {"null texts": 1}
        assert "row 1)" in str(left_out)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_without_text_are_refused_and_a_column_of_nulls_is_empty(tmp_path, name):
    write(tmp_path / name, text=pyarrow.nulls(3), number=[1, 2, 3], meta=[{"text": 1}] * 3)
    left_out = LeftOut()
    assert read(tmp_path, left_out) == []
    assert left_out.counts == {"null texts": 3}
    for key, message in {
        "number": "field 'number' holds int64, expected text",
        "meta": "field 'meta' holds struct<text: int64>, expected text",
        "meta.text": "field 'meta.text' holds int64",
        "meta.body": r"has no field 'meta.body', its fields are: meta, number, text.* as --text-key",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read(tmp_path, text_key=key)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_is_not_utf_8_is_named(tmp_path, name):
    write(tmp_path / name, text=pyarrow.array([b"a", b"caf\xe9", b"z"]).view(pyarrow.string()))
    with pytest.raises(ValueError, match=rf"{name}.*: row 1 is not valid UTF-8 at its byte 3"):
        read(tmp_path)
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out, skip_damaged=True) == ["a", "z"]
    assert left_out.counts == {"damaged": 1}


def test_a_damaged_page_is_named_with_its_file(tmp_path):
    write(tmp_path / "a.parquet", text=[f"document {n * 7919}" for n in range(20_000)])
    write(tmp_path / "b.parquet", text=["whole"])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[300:2000] = b"\x55" * 1700
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet row group 0: damaged: .*Download or write it again"):
        read(tmp_path)
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out, skip_damaged=True) == ["whole"]
    assert left_out.counts == {"damaged": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_half_a_file_is_named(tmp_path, name):
    write(tmp_path / name, text=[f"document {n * 7919}" for n in range(20_000)])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name}: (not a \.parquet file|damaged): .*again"):
        read(tmp_path)
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out, skip_damaged=True) == []
    assert left_out.counts == {"damaged": 1}


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_a_text_outside_its_file_is_damage(tmp_path, name):
    """Reading it would end the process with a signal."""
    write(tmp_path / name, text=["aaaa", "bbbb"])
    data, places = (tmp_path / name).read_bytes(), struct.pack("<iii", 0, 4, 8)
    assert data.count(places) == 1
    for wrong in ((0, 4, 1 << 30), (0, -(1 << 30), 8), (0, 8, 4)):
        (tmp_path / name).write_bytes(data.replace(places, struct.pack("<iii", *wrong)))
        with pytest.raises(ValueError, match=rf"{name}: damaged: .*Download or write it again"):
            read(tmp_path)
        assert read(tmp_path, skip_damaged=True) == []


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_file_that_cannot_be_read_now_is_no_damage(tmp_path, name, monkeypatch):
    write(tmp_path / name, text=["a"])
    monkeypatch.setattr(pyarrow, "memory_map", refuse)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(PermissionError):
        read(tmp_path, LeftOut(skip_damaged=True), skip_damaged=True)


def refuse(path, **_):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_damaged_schema_or_footer_is_named(tmp_path):
    write(tmp_path / "a.parquet", text=["a"], column=["b"])
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"column", b"col\xffmn"))
    with pytest.raises(ValueError, match=r"a\.parquet: damaged: 'utf-8' codec .*Download or write it again"):
        read(tmp_path / "a.parquet")
    for name, at in (("file.arrow", -30), ("stream.arrow", 20)):
        write(tmp_path / name, text=["a", "b"])
        data = bytearray((tmp_path / name).read_bytes())
        data[at : at + 8] = b"\xff" * 8
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: damaged: .*Download or write it again"):
            read(tmp_path / name)


@pytest.fixture
def saved(tmp_path):
    """A data set in two files, and a data set with the splits train and test."""
    texts = [f"text {n}" for n in range(10)]
    whole = datasets.Dataset.from_dict({"text": texts})
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    test = datasets.Dataset.from_dict({"text": ["of the test split"]})
    datasets.DatasetDict({"train": whole, "test": test}).save_to_disk(tmp_path / "two")
    return tmp_path, texts


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folders_of_save_to_disk_are_read(saved, prefix):
    folder, texts = saved
    write(folder / "one" / "cache-0123.arrow", text=["of a cache of datasets"])
    assert read(f"{prefix}{folder / 'one'}") == texts
    left_out = LeftOut()
    assert read(f"{prefix}{folder / 'two'}", left_out) == texts
    assert left_out.counts == {"other splits": 1}
    assert read(f"{prefix}{folder / 'two'}", dataset_split="test") == ["of the test split"]
    with pytest.raises(ValueError, match="two: has no split 'dev'. Pass one of these as --dataset-split: train, test"):
        read(f"{prefix}{folder / 'two'}", dataset_split="dev")


def test_folders_of_save_to_disk_below_a_folder_are_read(saved):
    folder, texts = saved
    assert read(folder) == texts * 2


def test_a_saved_data_set_cannot_name_files_elsewhere(saved):
    state = saved[0] / "one" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../two/train/data-00000-of-00001.arrow"}]}))
    with pytest.raises(ValueError, match=r"state\.json: '\.\./two/.*' is not a name in its folder"):
        read(saved[0] / "one")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("one/state.json", lambda text: text[:30], "damaged: "),
        ("one/state.json", lambda text: text.replace('"_data_files"', '"_data"'), "damaged: it lacks '_data_files'"),
        ("one/state.json", lambda text: '{"_data_files": [5]}', "5 is not a name in its folder"),
        ("two/dataset_dict.json", lambda text: "", "damaged: "),
        ("two/dataset_dict.json", lambda text: '{"splits": ["test"], ' + text[1:], "damaged: .*'splits' appears twice"),
        ("two/dataset_dict.json", lambda text: '{"splits": "train"}', "damaged: splits is a str, expected a list"),
    ],
)
def test_a_saved_data_set_that_does_not_say_its_files_is_not_read_as_a_folder(saved, file, change, message):
    """Caches of datasets, and the test split, are beside the documents."""
    folder = saved[0]
    write(folder / "one" / "cache-0123.arrow", text=["of a cache of datasets"])
    (folder / file).write_text(change((folder / file).read_text()))
    for source in (folder, (folder / file).parent):
        with pytest.raises(ValueError, match=rf"{file}: {message}.* Save the data set again"):
            read(source)
    left_out = LeftOut(skip_damaged=True)
    assert read(folder, left_out, skip_damaged=True) == saved[1]
    assert left_out.counts["damaged"] == 1


def test_caches_of_datasets_beside_the_files_of_a_data_set_are_left_out(tmp_path, saved):
    """Without the state.json that names the files, nothing but their names tells the two apart."""
    folder = saved[0] / "one"
    loaded = datasets.load_from_disk(folder)
    loaded.map(lambda row: {"text": row["text"].upper()}).filter(lambda row: row["text"] != "TEXT 3", num_proc=2)
    (folder / "state.json").unlink()
    caches = list(folder.glob("cache-*.arrow"))
    assert len(caches) >= 3
    left_out = LeftOut()
    assert read(folder, left_out) == [f"text {n}" for n in range(10)]
    assert left_out.counts["hidden files and folders"] == len(caches)
    named = [path for path in caches if datasets.Dataset.from_file(str(path)).column_names == ["text"]]
    assert read(named[0])[0] == "TEXT 0"


def test_files_without_rows_hold_no_document_and_fields_of_one_name_are_refused(tmp_path):
    for name in ("a.parquet", "b.arrow"):
        write(tmp_path / name, text=pyarrow.array([], pyarrow.string()))
    write(tmp_path / "c.parquet", text=["text"])
    assert read(tmp_path) == ["text"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet: has several fields 'text'"):
        read(tmp_path)


def test_other_programs_may_have_a_state_json(tmp_path):
    (tmp_path / "state.json").write_text("[1]")
    (tmp_path / "a.txt").write_text("of a folder")
    assert read(tmp_path) == ["of a folder"]


def test_a_large_value_in_many_rows_is_not_held_for_all_rows(tmp_path, monkeypatch):
    """500 rows of 100 kB, from a file of some hundred bytes: only a few are held at once."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1_000_000)
    table = pyarrow.table({"text": pyarrow.array(["x" * 100_000] * 500)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    assert [len(batch) for _, batch in parquet._batches(str(tmp_path / "a.parquet"), 0, ReadOptions())] == [9] * 55 + [
        5
    ]


def test_columns_other_than_the_text_may_have_pages_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_PAGE_BYTES", 10_000)
    write(tmp_path / "a.parquet", text=["a"], image=[b"x" * 100_000])
    assert read(tmp_path) == ["a"]


def test_a_page_that_expands_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    table = pyarrow.table({"text": ["x" * 100_000] * 20})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    monkeypatch.setattr(parquet, "MAX_PAGE_BYTES", 1_000_000)
    with pytest.raises(
        ValueError, match=r"a\.parquet: the page at byte 4 takes 2 MiB when it is unpacked.*write_batch_size"
    ):
        read(tmp_path)
    pq.write_table(
        table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_batch_size=2, data_page_size=1000
    )
    # As the message says.
    assert len(read(tmp_path)) == 20


@pytest.mark.parametrize(
    "options", [{}, {"data_page_version": "2.0"}, {"compression": "gzip"}, {"write_page_index": True}]
)
@pytest.mark.parametrize("encoding", [None, "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_page_headers_of_every_writer_are_understood(tmp_path, options, encoding):
    texts = [f"document {n * 7919} " * (n % 50) for n in range(5000)]
    encodings = {"use_dictionary": False, "column_encoding": {"text": encoding}} if encoding else {}
    pq.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", data_page_size=10_000, **encodings, **options
    )
    rows = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    largest = parquet._largest_page(str(tmp_path / "a.parquet"), rows, "text")
    assert 5_000 < largest <= rows.column(0).total_uncompressed_size
    assert read(tmp_path) == texts


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
@pytest.mark.parametrize("kind", ["text", "dictionary"])
def test_a_remote_arrow_file_is_fetched_once_and_refused_as_a_local_one(monkeypatch, new, kind):
    texts = [hashlib.sha256(bytes([n % 256])).hexdigest() * 4 for n in range(500)]
    column = pyarrow.array(texts)
    table = pyarrow.table({"text": column.dictionary_encode() if kind == "dictionary" else column})
    system, file = fsspec.filesystem("memory"), io.BytesIO()
    with new(file, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table, max_chunksize=100)
    data, fetched = file.getvalue(), []
    monkeypatch.setattr(remote, "FIRST_BYTES", 1000)
    monkeypatch.setattr(remote, "LAST_BYTES", 1000)
    cat_file = type(system).cat_file

    def count(self, path, start, end, **options):
        fetched.append(end - start)
        return cat_file(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(system), "cat_file", count)
    system.pipe("/arrow/a.arrow", data)
    assert read("memory://arrow/a.arrow") == texts
    assert len(data) > 10_000
    assert sum(fetched) < 1.5 * len(data)
    system.pipe("/arrow/a.arrow", data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"memory://.*/a\.arrow: damaged: .*Download or write it again"):
        read("memory://arrow/a.arrow")
    system.pipe("/arrow/a.arrow", data)
    monkeypatch.setattr(arrow, "MAX_BATCH_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"a\.arrow: message 1 takes 0 MiB when it is unpacked, the limit is 0"):
        read("memory://arrow/a.arrow")
    system.rm("/arrow", recursive=True)


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
@pytest.mark.parametrize("kind", ["text", "dictionary"])
def test_an_arrow_batch_that_expands_beyond_the_limit_is_refused_before_it_is_unpacked(
    tmp_path, monkeypatch, new, kind
):
    column = pyarrow.array([f"{n}" + "x" * 100_000 for n in range(20)])
    table = pyarrow.table({"text": column.dictionary_encode() if kind == "dictionary" else column})
    for compression, rows in (("zstd", 20), ("lz4", 20), (None, 20), ("zstd", 2)):
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with new(str(tmp_path / "a.arrow"), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=rows)
        monkeypatch.setattr(arrow, "MAX_BATCH_BYTES", 3_000_000)
        assert len(read(tmp_path)) == 20
        monkeypatch.setattr(arrow, "MAX_BATCH_BYTES", 1_000_000)
        if compression and (rows == 20 or kind == "dictionary"):
            with pytest.raises(
                ValueError, match=r"a\.arrow: message 1 takes 2 MiB when it is unpacked, the limit is 0"
            ):
                read(tmp_path)
        else:
            # As the message says; what is not compressed takes what the file has.
            assert len(read(tmp_path)) == 20


def test_a_text_beyond_the_limit_of_a_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.base.MAX_DOCUMENT_BYTES", 1000)
    for name in ("a.parquet", "b.arrow"):
        write(tmp_path / name, text=pyarrow.array(["short", "x" * 2000, "z"]).dictionary_encode())
        with pytest.raises(ValueError, match=rf"{name}.*: row 1: longer than"):
            read(tmp_path / name)
        assert read(tmp_path / name, skip_damaged=True) == ["short", "z"]

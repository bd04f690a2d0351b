"""Tests that text is decoded by what its file says of itself or by --encoding, and refused where neither fits."""

import codecs
import gzip
import io
import json
import random
import tracemalloc

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import train_tokenizer, write_shards
from data_prep.sources import LeftOut, ReadOptions, list_input_splits, read_input_split
from data_prep.sources.text_encoding import ChunkStream, Encoding, in_utf8, open_bytes
from megabert.data.shards.manifest import read_manifest

TEXT = "caf\u00e9 \u4f60\u597d \U0001f600\nsecond line"
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path, left_out=None, **options) -> list[str]:
    left_out = LeftOut(options.get("skip_damaged", False)) if left_out is None else left_out
    read_options = ReadOptions(**options)
    splits = list_input_splits(str(path), read_options, left_out)
    return [text for split in splits for text in read_input_split(split, read_options, left_out)]


def write_all(folder, encode, packing: str) -> dict[str, list[str]]:
    """Write a .txt, a .txt of two paragraphs and a .jsonl. encode: to bytes. Returns the documents of each."""
    contents = {
        "whole.txt": TEXT,
        "blank.txt": f"{TEXT}\n\nsecond {TEXT}",
        "lines.jsonl": json.dumps({"text": TEXT}, ensure_ascii=False) + "\n" + json.dumps({"text": "b"}) + "\n",
    }
    for name, content in contents.items():
        (folder / (name + packing)).write_bytes(PACK[packing](encode(content)))
    return {"whole.txt": [TEXT], "blank.txt": [f"{TEXT}\n", f"second {TEXT}"], "lines.jsonl": [TEXT, "b"]}


LINES = "".join(f'{{"text": "{number * 7919}"}}\n' for number in range(20_000))
DAMAGED = {
    "garbage behind a .gz": ("a.jsonl.gz", gzip.compress(LINES.encode()) + b"garbage", 20_000),
    "garbage behind a small .gz": (
        "a.jsonl.gz",
        gzip.compress(LINES[:1000].encode()) + b"garbage",
        LINES[:1000].count("\n"),
    ),
    "half a .gz": ("a.jsonl.gz", (whole := gzip.compress(LINES.encode()))[: len(whole) // 2], 9_000),
    "garbage behind a .gz in UTF-16": ("a.jsonl.gz", gzip.compress(LINES.encode("utf-16")) + b"garbage", 20_000),
    "garbage behind a .zst": ("a.jsonl.zst", zstandard.compress(LINES.encode()) + b"garbage", 20_000),
    "half a character in UTF-16": ("a.jsonl", LINES.encode("utf-16") + b"\0\xd8", 20_000),
    "a wrong character in UTF-16": ("a.jsonl", LINES.encode("utf-16") + b"\0\xdc" + LINES.encode("utf-16-le"), 20_000),
    "a NUL in UTF-16": ("a.jsonl", LINES.encode("utf-16") + b"\0\0", 20_000),
    "a wrong character in ISO-2022": ("a.jsonl", ('{"text": "\u65e5"}\n' * 9 + '"').encode("iso2022_jp") + b"\xff", 9),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_documents_before_the_damage_are_read(tmp_path, case):
    name, data, intact = DAMAGED[case]
    (tmp_path / name).write_bytes(data)
    left_out = LeftOut(skip_damaged=True)
    texts = read(tmp_path / name, left_out, skip_damaged=True, encoding="iso2022_jp" if "ISO" in case else None)
    assert len(texts) >= intact
    assert left_out.counts["damaged"]
    if "ISO" not in case:
        assert texts == [str(number * 7919) for number in range(len(texts))]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("codec", MARKS)
def test_a_byte_order_mark_says_the_encoding(tmp_path, codec, packing):
    expected = write_all(tmp_path, lambda text: MARKS[codec] + text.encode(codec), packing)
    for name, texts in expected.items():
        path = tmp_path / (name + packing)
        assert read(path, blank_lines=name == "blank.txt") == texts
        # What the file says of itself counts more than the option, which is for the files that say nothing.
        if name == "lines.jsonl":
            assert read(path, encoding="latin-1") == texts


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("packing", PACK)
def test_line_ends_of_old_macs_are_refused_where_a_line_matters(tmp_path, packing, mark):
    for name, content in {"a.jsonl": '{"text": "a"}\r{"text": "b"}\r', "a.txt": "a\r\rb\r"}.items():
        path = tmp_path / (name + packing)
        path.write_bytes(PACK[packing](mark + content.encode()))
        with pytest.raises(ValueError, match=f"{path}: lines end with a carriage return alone. Convert them: tr"):
            read(path, blank_lines=name == "a.txt")
        left_out = LeftOut(skip_damaged=True)
        assert read(path, left_out, blank_lines=name == "a.txt", skip_damaged=True) == []
        assert left_out.counts == {"damaged": 1}
    path = tmp_path / f"a.txt{packing}"
    assert read(path) == ["a\r\rb\r"]
    path.write_bytes(PACK[packing](mark + b"50 %\r99 %\n\nb"))
    assert read(path, blank_lines=True) == ["50 %\r99 %\n", "b"]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "gb18030", "utf-8-sig", "utf-16"])
def test_the_option_says_the_encoding(tmp_path, codec, packing):
    expected = write_all(tmp_path, lambda text: text.encode(codec), packing)
    for name, texts in expected.items():
        assert read(tmp_path / (name + packing), blank_lines=name == "blank.txt", encoding=codec) == texts


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("iso2022_kr", "\ud55c\uad6d\uc5b4"),
        ("iso2022_jp", "\u65e5\u672c"),
        ("hz", "\u4e2d\u6587"),
        ("utf-7", "caf\u00e9"),
    ],
)
@pytest.mark.parametrize("packing", PACK)
def test_an_encoding_with_a_state_is_read_from_the_beginning_of_the_file(tmp_path, monkeypatch, codec, text, packing):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 10)
    path = tmp_path / ("a.txt" + packing)
    path.write_bytes(PACK[packing]("\n\n".join([text] * 3).encode(codec)))
    assert read(path, blank_lines=True, encoding=codec) == [f"{text}\n", f"{text}\n", text]
    if codec.startswith("iso2022"):
        # All of its bytes are ASCII, but its escape sequences tell.
        with pytest.raises(ValueError, match=rf"a\.txt.*: byte \d+ begins an escape .*--encoding {codec}, or convert"):
            read(path)
        assert read(path, encoding=codec) == ["\n\n".join([text] * 3)]


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.txt"])
def test_an_encoding_without_an_order_of_bytes_needs_a_mark_and_the_option_in_the_message_reads_it(
    tmp_path, name, codec
):
    content = '{"text": "hello"}' if name == "a.jsonl" else "hello"
    (tmp_path / name).write_bytes(content.encode(f"{codec}-be"))
    options = {"blank_lines": name == "b.txt"}
    with pytest.raises(ValueError, match=rf"{name}: has no byte order mark.*--encoding {codec}-le or .*{codec}-be\."):
        read(tmp_path, encoding=codec, **options)
    assert read(tmp_path, encoding=f"{codec}-be", **options) == ["hello"]
    assert read(tmp_path, encoding=codec, skip_damaged=True, **options) == []


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_latin_1_is_refused_and_the_option_in_the_message_reads_it(tmp_path, name):
    content, byte = b"caf\xe9 au lait", 3
    if ".jsonl" in name:
        content, byte = b'{"text": "a"}\n{"text": "caf\xe9"}\n', 27
    (tmp_path / name).write_bytes(PACK[name.removeprefix("a.txt").removeprefix("a.jsonl")](content))
    message = rf"{name}( at .*)?: byte {byte} \(0xe9\) is not valid utf-8\. .*such as --encoding latin-1"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    assert read(tmp_path, encoding="latin-1")[-1].startswith("caf\u00e9")
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out, skip_damaged=True) == (["a"] if "jsonl" in name else [])
    assert left_out.counts == {"damaged": 1}
    assert f"byte {byte} (0xe9)" in str(left_out)


def test_the_byte_of_a_paragraph_is_counted_from_the_beginning_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\ncaf\xe9\n\nthree")
    with pytest.raises(ValueError, match=r"a\.txt: byte 12 \(0xe9\)"):
        read(tmp_path, blank_lines=True)
    assert read(tmp_path, blank_lines=True, skip_damaged=True) == ["one\n", "three"]


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.txt"])
def test_utf_16_without_a_mark_is_refused_and_the_option_in_the_message_reads_it(tmp_path, name, codec):
    content = '{"text": "hello"}\n{"text": "more"}' if name == "a.jsonl" else "hello\n\nmore"
    (tmp_path / name).write_bytes(content.encode(codec))
    options = {"blank_lines": name == "b.txt"}
    nul = 1 if codec.endswith("le") else 0
    with pytest.raises(ValueError, match=rf"{name}.*: byte {nul} is NUL, .*such as --encoding {codec}; otherwise"):
        read(tmp_path, **options)
    expected = {"a.txt": ["hello\n\nmore"], "a.jsonl": ["hello", "more"], "b.txt": ["hello\n", "more"]}[name]
    assert read(tmp_path, encoding=codec, **options) == expected


def test_a_damaged_utf_16_file_names_its_byte(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF16_LE + '{"text": "a"}\n'.encode("utf-16-le") + b"\x00\xd8a\x00")
    with pytest.raises(
        ValueError, match=r"a\.jsonl: byte 30 \(0x00\) is not valid utf-16-le. The file's byte order mark"
    ):
        read(tmp_path)
    left_out = LeftOut(skip_damaged=True)
    read(tmp_path, left_out, skip_damaged=True)
    assert left_out.counts == {"damaged": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_compressed_file_without_its_suffix_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(ValueError, match=rf"{name}: is compressed. Rename it so that its name ends with \.gz"):
        read(tmp_path)
    (tmp_path / name).rename(tmp_path / f"{name}.gz")
    assert read(tmp_path) == ["a" if name == "a.jsonl" else '{"text": "a"}']


@pytest.mark.parametrize("command", [write_shards, train_tokenizer])
@pytest.mark.parametrize("name", ["latin-one", "base64", "undefined", "rot13"])
def test_an_unknown_encoding_is_refused(capsys, command, name):
    with pytest.raises(SystemExit) as exit_info:
        command.main([f"--encoding={name}"])
    assert exit_info.value.code == 2
    assert f"encoding is '{name}', expected the name of a text encoding, such as latin-1" in capsys.readouterr().err


def test_a_null_is_left_out_and_anything_else_is_damaged(tmp_path):
    lines = ['{"text": "a"}', '{"text": null}', '{"text": 1}', '{"body": "b"}', "{", '["text"]', '{"text": "z"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out, skip_damaged=True) == ["a", "z"]
    assert left_out.counts == {"null texts": 1, "damaged": 4}
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], lines[-1]]))
    left_out = LeftOut()
    assert read(tmp_path, left_out) == ["a", "z"]
    assert str(left_out) == f"null texts: 1 ({tmp_path / 'a.jsonl'} at byte 14)"


def test_the_switch_in_the_message_leaves_the_lines_out_and_the_manifest_has_places(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n{"text": "b"}\n' + "{\n" * 5)
    command = [f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--workers=1", "--min-shards=1"]
    message = r"a\.jsonl at byte 14: not valid JSON.*Expected one object .* Or pass --on-bad-document skip, which"
    with pytest.raises(ValueError, match=message):
        write_shards.main(command)
    assert write_shards.main([*command, "--on-bad-document", "skip"]) == 0
    assert f"left out: damaged: 6 (such as {tmp_path / 'a.jsonl'} at byte 14: not" in capsys.readouterr().out
    statistics = read_manifest(tmp_path / "out").statistics
    assert (statistics["documents"], statistics["left_out"]) == (2, {"damaged": 6})
    places = [example.partition(": ")[0] for example in statistics["left_out_examples"]["damaged"]]
    assert places == [f"{tmp_path / 'a.jsonl'} at byte {byte}" for byte in (14, 30, 32)]


def test_a_field_inside_an_object_is_named_with_a_dot(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "a"}}\n{"meta": null}\n{"meta.text": "b"}\n')
    left_out = LeftOut()
    assert read(tmp_path, left_out, text_key="meta.text") == ["a", "b"]
    assert left_out.counts == {"null texts": 1}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_a_line_that_is_too_long_is_left_out_with_the_switch(tmp_path, monkeypatch, packing):
    monkeypatch.setattr("data_prep.sources.base.MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 40)
    lines = ['{"text": "a"}', json.dumps({"text": "x" * 1000}), '{"text": "b"}']
    (tmp_path / f"a.jsonl{packing}").write_bytes(PACK[packing]("\n".join(lines).encode()))
    with pytest.raises(ValueError, match="longer than .*Cut the line into documents"):
        read(tmp_path)
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out, skip_damaged=True) == ["a", "b"]
    assert left_out.counts == {"damaged": 1}


def test_the_rest_of_a_long_line_is_not_read_beyond_the_byte_range(tmp_path):
    """Otherwise each byte range of a file without line ends would read the file to its end."""
    with open(tmp_path / "a.jsonl", "wb") as file:
        # NULs, which take no space on disk.
        file.truncate(200 << 20)
    splits = list_input_splits(str(tmp_path), ReadOptions(), LeftOut())
    tracemalloc.start()
    assert [list(read_input_split(split, ReadOptions(), LeftOut())) for split in splits[1:]] == [[]] * (len(splits) - 1)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_zst_that_expands_a_lot_is_read_in_small_pieces(tmp_path):
    """1,500 times its size: as one piece, it would take 256 MB."""
    block = "".join(json.dumps({"text": f"{n} " + "x" * 4000}) + "\n" for n in range(16)).encode()
    with zstandard.ZstdCompressor().stream_writer(open(tmp_path / "a.jsonl.zst", "wb")) as file:
        for _ in range((64 << 20) // len(block)):
            file.write(block)
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 1 << 20
    (split,) = list_input_splits(str(tmp_path), ReadOptions(), LeftOut())
    tracemalloc.start()
    assert sum(1 for _ in read_input_split(split, ReadOptions(), LeftOut())) == (64 << 20) // len(block) * 16
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def test_a_zst_with_the_largest_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(
        open(tmp_path / "a.txt.zst", "wb")
    ) as file:
        file.write(b"text")
    assert read(tmp_path) == ["text"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=200), st.sampled_from(["utf-16-le", "utf-16-be", "utf-32-be"]), st.integers(1, 7))
def test_text_is_encoded_again_whatever_the_size_of_the_pieces(monkeypatch, text, codec, size):
    monkeypatch.setattr("data_prep.sources.text_encoding.READ_BYTES", size)
    text = text.replace("\0", "")
    stream = in_utf8(io.BytesIO(text.encode(codec)), Encoding(codec, 0), "here")
    assert stream.read().decode() == text


@given(st.lists(st.binary(max_size=20)), st.integers(1, 30))
def test_a_stream_of_chunks_is_their_concatenation(chunks, size):
    stream = io.BufferedReader(ChunkStream(iter(chunks)), size)
    parts = []
    while part := stream.read(size):
        parts.append(part)
    assert b"".join(parts) == b"".join(chunks)


def test_archives_of_many_members_are_read_whole(tmp_path):
    rng = random.Random(0)
    pieces = [rng.randbytes(rng.randrange(5000)) for _ in range(30)]
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"".join(map(PACK[suffix], pieces)))
        with open_bytes(str(path)) as file:
            assert file.read() == b"".join(pieces)

"""Samples: encoding and decoding; foreign bytes are refused without unpickling, writing or large allocations."""

import io
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.shards.sample_format import (
    TokenChunk,
    decode_text,
    decode_tokens,
    encode_npy,
    encode_text,
    encode_tokens,
    read_npy,
    read_sample,
    token_dtype,
    write_sample,
)


def chunk_bytes(sample: dict[str, bytes], key: str = "train-00000-00000") -> bytes:
    file = io.BytesIO()
    write_sample(tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT), key, sample)
    return file.getvalue()


def member_bytes(**fields) -> bytes:
    member = tarfile.TarInfo(fields.pop("name", "a.tokens.npy"))
    for name, value in fields.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT)


@given(st.dictionaries(st.sampled_from(["a", "b.npy", "jsonl", "lengths.npy"]), st.binary(max_size=2000)))
def test_what_is_written_is_read(sample):
    assert read_sample(chunk_bytes(sample), "here") == sample


FOREIGN_TYPES = [
    *[tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
    *[tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME],
]


@pytest.mark.parametrize("kind", FOREIGN_TYPES)
def test_tar_members_must_be_plain_files(kind):
    data = member_bytes(type=kind, linkname="/etc/passwd")
    with pytest.raises(ValueError, match=r"here: damaged: member '.*' is of type"):
        read_sample(data, "here")


@pytest.mark.parametrize("name", ["/etc/passwd.tokens.npy", "../../out.tokens.npy", "a/../../b.tokens.npy"])
def test_names_of_foreign_members_never_become_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = member_bytes(name=name, size=3) + b"abc".ljust(512, b"\0")
    assert list(read_sample(data, "here").values()) == [b"abc"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 1 << 20, 1 << 62])
def test_a_member_larger_than_the_chunk_is_refused(size):
    with pytest.raises(ValueError, match="damaged: .*expected plain members that fill the chunk"):
        read_sample(member_bytes(size=size), "here")


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_random_bytes_are_refused_or_decoded_but_never_crash(noise, place):
    sample = {
        "tokens.npy": encode_npy(np.arange(9, dtype=np.uint16)),
        "lengths.npy": encode_npy(np.full(3, 3, np.int32)),
    }
    data = bytearray(chunk_bytes(sample))
    data[place : place + len(noise)] = noise
    try:
        found = decode_tokens(read_sample(bytes(data), "here"), "here")
    except ValueError as error:
        if not str(error).startswith("here"):
            raise
    else:
        assert found.lengths.sum() == len(found.tokens)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Bomb()),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([Bomb()])),
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (999999999999999999,), }"),
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (999999999999, 999999999999), }"),
        npy("{'descr': '<f1', 'fortran_order': False, 'shape': (1,), }", b"a"),
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }", b"ab"),
        npy("{'descr': '<u2', 'fortran_order': False, 'shape': (1,), }", b"abcd"),
        npy("(" * 100),
        b"",
        b"\x93NUMPY",
    ],
)
def test_only_plain_arrays_are_read_and_nothing_is_allocated_before(data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"here: .*Write it again"):
            read_npy(data, "here")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (70_000,), (0, 5), (3, 5)])
def test_arrays_saved_by_numpy_are_read(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    found = read_npy(encode_npy(array), "here")
    assert found.dtype == dtype
    assert np.array_equal(found, array)
    assert found.flags.writeable


def test_lengths_must_sum_to_the_number_of_tokens():
    sample = encode_tokens(TokenChunk(np.arange(5, dtype=np.uint16), np.array([2, 2])))
    with pytest.raises(ValueError, match="lengths sum to 4, expected int32 that sum to the chunk's 5"):
        decode_tokens(sample, "here")


def test_samples_survive_encoding_and_decoding():
    chunk = TokenChunk(np.arange(7, dtype=np.uint16), np.array([3, 0, 4], dtype=np.int32))
    decoded = decode_tokens(encode_tokens(chunk), "here")
    assert all(np.array_equal(a, b) for a, b in zip(chunk, decoded, strict=True))
    documents = ["plain", "two\nlines", "\u2028 \U0001f600 \x00", ""]
    assert decode_text(encode_text(documents), "here") == documents
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"jsonl": b""}, r"expected a member \.tokens\.npy"),
        ({"tokens.npy": b"garbage", "lengths.npy": b""}, "not a plain .npy array"),
    ],
)
def test_wrong_token_samples_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        decode_tokens(sample, "shard.tar chunk 3")


def test_arrays_of_a_wrong_dtype_or_size_are_refused():
    good = TokenChunk(np.arange(7, dtype=np.uint16), np.array([7], dtype=np.int32))
    floats = encode_tokens(good._replace(tokens=np.zeros(7)))
    with pytest.raises(ValueError, match=r"holds float64 of shape \(7,\), expected flat uint16 or uint32"):
        decode_tokens(floats, "x")
    short = encode_tokens(good._replace(lengths=np.array([6], dtype=np.int32)))
    with pytest.raises(ValueError, match="lengths sum to 6, expected int32 that sum to the chunk's 7 tokens"):
        decode_tokens(short, "x")


def test_pickles_are_never_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain .npy array"):
        decode_tokens({"tokens.npy": buffer.getvalue(), "lengths.npy": b""}, "x")


def test_wrong_text_samples_are_refused():
    for sample, message in (({"tokens.npy": b""}, "expected a member .jsonl"), ({"jsonl": b'{"a": 1}\n'}, "not one")):
        with pytest.raises(ValueError, match=message):
            decode_text(sample, "x")


def test_names_of_our_members_never_become_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        write_sample(tar, "../../etc/escape", {"jsonl": b""})
        chunk = buffer.getvalue()[: tar.offset]
    assert read_sample(chunk, "x")
    assert list(tmp_path.iterdir()) == []

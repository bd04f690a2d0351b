"""Reading is safe: whatever the bytes say, nothing is unpickled, written, or allocated beyond their size."""

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
    decode_tokens,
    encode_npy,
    encode_tokens,
    read_npy,
    read_sample,
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


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
                                  tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])  # fmt: skip
def test_members_that_are_no_plain_files_are_refused(kind):
    data = member_bytes(type=kind, linkname="/etc/passwd")
    with pytest.raises(ValueError, match=r"here: damaged: member '.*' is of type"):
        read_sample(data, "here")


@pytest.mark.parametrize("name", ["/etc/passwd.tokens.npy", "../../out.tokens.npy", "a/../../b.tokens.npy"])
def test_a_name_is_never_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = member_bytes(name=name, size=3) + b"abc".ljust(512, b"\0")
    assert list(read_sample(data, "here").values()) == [b"abc"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 1 << 20, 1 << 62])
def test_a_size_beyond_the_chunk_is_refused(size):
    with pytest.raises(ValueError, match="damaged: .*expected plain members that fill the chunk"):
        read_sample(member_bytes(size=size), "here")


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_noise_is_refused_or_read_but_never_crashes(noise, place):
    sample = {
        "tokens.npy": encode_npy(np.arange(9, dtype=np.uint16)),
        "lengths.npy": encode_npy(np.full(3, 3, np.int32)),
    }
    data = bytearray(chunk_bytes(sample))
    data[place : place + len(noise)] = noise
    try:
        found = decode_tokens(read_sample(bytes(data), "here"), "here")
    except ValueError as mistake:
        if not str(mistake).startswith("here"):
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
def test_arrays_that_are_not_plain_are_refused_without_allocating(data):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"here: .*Write it again"):
            read_npy(data, "here")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64, np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (70_000,), (0, 5), (3, 5)])
def test_arrays_that_numpy_saves_are_read(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    found = read_npy(encode_npy(array), "here")
    assert found.dtype == dtype
    assert np.array_equal(found, array)
    assert found.flags.writeable


def test_lengths_that_do_not_add_up_are_refused():
    sample = encode_tokens(TokenChunk(np.arange(5, dtype=np.uint16), np.array([2, 2])))
    with pytest.raises(ValueError, match="lengths sum to 4, expected int32 that sum to the chunk's 5"):
        decode_tokens(sample, "here")

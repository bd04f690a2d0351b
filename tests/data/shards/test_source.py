"""Sources: splits, reading chunks, damaged and missing shards, mixtures and tokenizers."""

import errno
import hashlib
import io
import json
import mmap
import os
import pickle
import re
import shutil
import socket
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep import write_shards
from megabert.config.cli import exit_code
from megabert.data.shards import sample_format, shard_list
from megabert.data.shards.manifest import CHUNKS, MANIFEST, TOKENIZER, read_manifest
from megabert.data.shards.retry import StoreAwayError
from megabert.data.shards.source import DamagedShardError, check_same_tokenizer, open_corpus, open_source
from megabert.files.disk import DiskError
from tests.helpers.manifests import change_manifest


@pytest.fixture
def folder(corpus, tmp_path):
    """A copy of the token shards that a test may damage."""
    return shutil.copytree(corpus.tokens, tmp_path / "tokens")


def test_plain_webdataset_reads_our_shards(corpus):
    source = open_source(str(corpus.tokens))
    path = corpus.tokens / source.shards[0].name
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    tokens = [np.load(io.BytesIO(sample["tokens.npy"])) for sample in samples]
    lengths = [np.load(io.BytesIO(sample["lengths.npy"])) for sample in samples]
    assert sum(map(len, tokens)) == source.shards[0].tokens
    assert sum(map(len, lengths)) == source.shards[0].documents


def test_chunks_read_by_byte_range_equal_the_whole_shard(corpus):
    source = open_source(str(corpus.tokens))
    samples = webdataset.WebDataset(str(corpus.tokens / source.shards[0].name), shardshuffle=False)
    for number, sample in enumerate(samples):
        whole = np.load(io.BytesIO(sample["tokens.npy"]))
        assert np.array_equal(source.read_chunk(0, number).tokens, whole)


def test_brace_notation_selects_shards_of_one_manifest(corpus):
    source = open_source(f"{corpus.tokens}/train-{{00000..00003}}.tar")
    assert [shard.name for shard in source.shards] == [f"train-{i:05d}.tar" for i in range(4)]
    with pytest.raises(ValueError, match=r"train-00001\.tar is named twice"):
        open_source(f"{corpus.tokens}/train-0000{{0,1,1}}.tar")
    with pytest.raises(ValueError, match=r"train-99999\.tar is not among the manifest's \d+ train shards"):
        open_source(f"{corpus.tokens}/train-99999.tar")
    with pytest.raises(ValueError, match="spans the folders"):
        open_source(f"{corpus.tokens}/{{a,b}}/train-00000.tar")


def test_a_shard_that_is_there_is_meant_before_what_its_braces_and_backslashes_name(corpus, tmp_path):
    folder = tmp_path / "a{1,2}\\b"
    folder.symlink_to(corpus.tokens)
    assert [shard.name for shard in open_source(f"{folder}/train-00000.tar").shards] == ["train-00000.tar"]


def test_a_missing_manifest_raises_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json: no such file.*write_shards\.py"):
        open_source(str(tmp_path))


def test_a_missing_shard_raises_with_its_name(folder):
    (folder / "train-00002.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00002\.tar: the manifest lists this shard, but it is missing"):
        open_source(str(folder))


def test_a_truncated_shard_raises_with_its_name(folder):
    path = folder / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"train-00001\.tar: \d+ bytes, but the manifest says \d+"):
        open_source(str(folder))


def test_a_shard_removed_or_truncated_during_training_raises(folder):
    source = open_source(str(folder))
    path = folder / source.shards[0].name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"chunk 0 \(byte 0\): 1000 bytes, expected \d+: the shard is truncated"):
        source.read_chunk(0, 0)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.tar chunk 0 \(byte 0\): the shard is missing"):
        source.read_chunk(0, 0)


def test_a_damaged_tar_header_raises(folder):
    source = open_source(str(folder))
    path = folder / source.shards[0].name
    data = bytearray(path.read_bytes())
    data[0:100] = b"\xff" * 100
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedShardError, match=r"train-00000\.tar chunk 0 \(byte 0\): damaged: its checksum differs"):
        source.read_chunk(0, 0)


def test_one_flipped_bit_in_a_token_raises(folder):
    """The id stays in range and the tar valid, so only the checksum shows the damage."""
    source = open_source(str(folder))
    path = folder / source.shards[0].name
    place = source.shards[0].chunk(1)
    data = bytearray(path.read_bytes())
    data[place.offset + 1024] ^= 1
    path.write_bytes(bytes(data))
    source.read_chunk(0, 0)
    with pytest.raises(
        DamagedShardError, match=rf"train-00000\.tar chunk 1 \(byte {place.offset}\): damaged: its checksum"
    ):
        source.read_chunk(0, 1)


def rewrite_first_chunk(folder, change) -> Path:
    """Change the sample of the first chunk and correct all checksums, so that only its content shows the change."""
    source = open_source(str(folder))
    shard = source.shards[0]
    path, place = folder / shard.name, shard.chunk(0)
    data = path.read_bytes()
    sample = sample_format.read_sample(data[: place.size], "x")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        sample_format.write_sample(tar, "train-00000-00000", change(sample))
        size = tar.offset
    chunk = buffer.getvalue()[:size]
    path.write_bytes(chunk + data[place.size :])
    index = np.load(folder / CHUNKS)
    index[0, 1], index[0, 4] = size, zlib.crc32(chunk)
    index[1 : len(shard.chunks), 0] += size - place.size
    np.save(folder / CHUNKS, index)

    def correct(raw):
        raw["chunks_sha256"] = hashlib.sha256((folder / CHUNKS).read_bytes()).hexdigest()
        raw["splits"]["train"][0]["bytes"] = len(path.read_bytes())

    change_manifest(folder, correct)
    return folder


def test_an_id_beyond_the_vocabulary_is_refused(folder):
    def change(sample):
        tokens, lengths = sample_format.decode_tokens(sample, "x")
        tokens[5] = 800
        return sample_format.encode_tokens(sample_format.TokenChunk(tokens, lengths))

    source = open_source(str(rewrite_first_chunk(folder, change)))
    with pytest.raises(DamagedShardError, match="holds id 800, but the vocabulary has 800"):
        source.read_chunk(0, 0)


def test_another_number_of_documents_than_in_the_manifest_is_refused(folder):
    def change(sample):
        tokens, lengths = sample_format.decode_tokens(sample, "x")
        lengths = np.concatenate([lengths[:-2], [lengths[-2:].sum()]]).astype(np.int32)
        return sample_format.encode_tokens(sample_format.TokenChunk(tokens, lengths))

    source = open_source(str(rewrite_first_chunk(folder, change)))
    with pytest.raises(DamagedShardError, match=r"\d+ documents, but the manifest says \d+"):
        source.read_chunk(0, 0)


def test_a_shard_without_tokens_is_refused(folder):
    source = open_source(str(rewrite_first_chunk(folder, lambda sample: {"jsonl": b"{}\n"})))
    with pytest.raises(DamagedShardError, match=r"expected a member \.tokens\.npy"):
        source.read_chunk(0, 0)


def test_missing_shards_are_only_logged_with_on_bad_shard_skip(folder, caplog):
    (folder / "train-00002.tar").unlink()
    source = open_source(str(folder), on_bad_shard="skip")
    assert "train-00002.tar: the manifest lists this shard, but it is missing" in caplog.text
    assert len(source.shards) == 24


def test_an_index_of_another_manifest_is_refused(folder):
    index = np.load(folder / CHUNKS)
    np.save(folder / CHUNKS, index[:-1])
    with pytest.raises(ValueError, match=r"belongs to another chunks\.npy than the one next to it"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["../train-00000.tar", "/etc/passwd", "a/b.tar", ".tar", "x.tar/../y.tar", ""])
def test_a_shard_name_cannot_leave_the_folder(folder, name):
    raw = json.loads((folder / MANIFEST).read_text())
    raw["splits"]["train"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="is not a shard's name"):
        open_source(str(folder))


def test_a_mixture_normalizes_weights_and_needs_one_tokenizer(corpus, folder):
    alone = open_corpus([(str(corpus.tokens), 3.0)])
    assert alone.weights == (1.0,)
    both = open_corpus([(str(corpus.tokens), 3.0), (str(folder), 1.0)])
    assert both.weights == (0.75, 0.25)
    assert both.tokens == 2 * alone.tokens
    assert both.fingerprint not in (alone.fingerprint, open_corpus([(str(corpus.tokens), 1.0)] * 2).fingerprint)
    assert np.allclose(both.token_shares, alone.token_shares)
    assert alone.token_shares.sum() == pytest.approx(1.0)
    change_manifest(folder, lambda raw: raw["tokenizer"].update(fingerprint="f" * 64))
    with pytest.raises(ValueError, match="written with tokenizer ffffffffffff, but"):
        open_corpus([(str(corpus.tokens), 3.0), (str(folder), 1.0)])


def test_two_names_of_the_same_shards_are_logged(corpus, caplog):
    """A phase would begin anew with documents that the one before has used."""
    plain, other = str(corpus.tokens), f"{corpus.tokens}/train-{{00000..00002}}.tar"
    open_corpus([(plain, 1.0)], later=[[(plain, 1.0)]])
    assert not caplog.records
    open_corpus([(plain, 1.0)], later=[[(other, 1.0)]])
    assert "have 3 shards in common, whose documents are read for each" in caplog.text
    caplog.clear()
    open_corpus([(plain, 1.0)], later=[[(f"{plain}/", 1.0)]])
    assert "have 24 shards in common" in caplog.text


def test_a_part_without_documents_is_refused(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("one document")
    folder = tmp_path / "one"
    write_shards.main([f"--source={text}", f"--out={folder}"])
    with pytest.raises(ValueError, match="the heldout part has no documents. Write the shards again with --heldout"):
        open_source(str(folder), "heldout")


def test_a_manifest_of_another_format_is_refused_with_a_remedy(folder):
    (folder / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, expected 3. Upgrade megabert, or write the shards again"):
        read_manifest(folder)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="format None, expected 3"):
        read_manifest(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(folder)


def test_shards_of_another_tokenizer_are_refused(corpus, folder):
    source = open_source(str(corpus.tokens))
    change_manifest(folder, lambda raw: raw["tokenizer"].update(fingerprint="f" * 64))
    with pytest.raises(ValueError, match="written with tokenizer ffffffffffff, but .* with"):
        check_same_tokenizer(source, open_source(str(folder), "heldout"))
    with pytest.raises(ValueError, match=r"its fingerprint is .*, but the shards were written with ffffffffffff"):
        open_source(str(folder)).read_tokenizer_file()
    (folder / TOKENIZER).unlink()
    with pytest.raises(ValueError, match="no such file, expected next to the shards"):
        open_source(str(folder)).read_tokenizer_file()


def test_text_shards_need_a_tokenizer(corpus, folder):
    change_manifest(folder, lambda raw: raw.update(kind="text", tokenizer=None))
    with pytest.raises(ValueError, match=r"holds text, expected tokens\. Name a tokenizer with data\.tokenizer"):
        open_source(str(folder))
    with pytest.raises(ValueError, match="no such tokenizer"):
        open_source(str(folder), tokenizer=str(folder / "nowhere"))


def damage(folder: Path, name: str) -> None:
    if name == "tokenizer_config.json":
        (folder / name).write_bytes(b"")
    elif name == "token_counts.npy":
        counts = np.load(folder / name)
        counts[[5, 6]] = counts[[6, 5]] + np.array([1, -1])
        np.save(folder / name, counts)
    else:
        change_manifest(folder, CHANGES[name], sign=False)


def swap_specials(raw: dict) -> None:
    ids = raw["tokenizer"]["special_ids"]
    ids["mask"], ids["sep"] = ids["sep"], ids["mask"]


CHANGES = {
    "special_ids": swap_specials,
    "median": lambda raw: raw["statistics"].update(median_document_tokens=10_000),
    "request": lambda raw: raw.update(request="another"),
}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "token_counts.npy", *CHANGES])
def test_a_changed_file_ends_the_start_with_its_name(folder, name):
    damage(folder, name)
    expected = name if "." in name else MANIFEST
    with pytest.raises(ValueError, match=rf"{expected}: was changed after it had been written.*(Fetch|write) "):
        open_source(str(folder)).check_files()


def test_special_ids_are_compared_with_the_tokenizer(folder):
    """A manifest of format 2, or one that was signed again, has no hash that shows the change."""
    change_manifest(folder, swap_specials)
    with pytest.raises(ValueError, match="its vocabulary and special tokens are not those of tokenizer.json"):
        open_source(str(folder)).check_files()


def as_format_2(folder: Path) -> Path:
    def older(raw):
        raw["format"] = 2
        for name in ("files", "sha256"):
            del raw[name]

    change_manifest(folder, older, sign=False)
    return folder


def test_a_manifest_of_format_2_is_read_and_compared_as_far_as_it_goes(folder):
    source = open_source(str(as_format_2(folder)))
    source.check_files()
    assert source.manifest.files == {}
    assert source.token_counts.sum() == source.tokens
    (folder / "tokenizer_config.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        source.check_files()
    # Optional in this format.
    (folder / "tokenizer_config.json").unlink()
    source.check_files()
    counts = np.load(folder / "token_counts.npy")
    counts[7] += 1
    np.save(folder / "token_counts.npy", counts)
    with pytest.raises(ValueError, match=r"token_counts\.npy: counts \d+ tokens, the training shards have \d+"):
        source.check_files()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "token_counts.npy"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: the manifest lists it, but it cannot be read"):
        open_source(str(folder)).check_files()


def test_the_tokenizer_of_a_recipe_must_exist_and_be_that_of_token_shards(corpus, tmp_path):
    assert open_source(str(corpus.tokens), tokenizer=str(corpus.tokenizer)).tokenizer_path is None
    with pytest.raises(ValueError, match=r"/nonexistent: no such tokenizer"):
        open_source(str(corpus.tokens), tokenizer="/nonexistent")
    other = tmp_path / "tokenizer.json"
    other.write_bytes((corpus.tokenizer / TOKENIZER).read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"Remove data.tokenizer, or write the shards again"):
        open_source(str(corpus.tokens), tokenizer=str(other))


@pytest.mark.parametrize("on_bad_shard", ["stop", "skip"])
def test_a_folder_that_is_gone_is_no_damage(folder, on_bad_shard):
    """A file system that is away: its shards are not missing, so they are not skipped either."""
    source = open_source(str(folder), on_bad_shard=on_bad_shard)
    folder.rename(folder.with_name("away"))
    with pytest.raises(DiskError, match="is gone since the run began, with all shards. Mount it again") as error:
        source.read_chunk(0, 0)
    assert exit_code(error.value) == 74
    folder.with_name("away").rename(folder)
    source.read_chunk(0, 0)


def test_a_store_or_a_disk_that_fails_is_no_missing_file(folder, monkeypatch):
    source = open_source(str(folder))
    for failure, code in ((StoreAwayError("away"), 75), (OSError(errno.EIO, "Input/output error"), 74)):

        def fail(name, max_bytes, failure=failure):
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(type(source.storage), "read_whole", lambda self, name, max_bytes: fail(name, max_bytes))
            with pytest.raises((StoreAwayError, DiskError)) as error:
                source.read_optional("tokenizer_config.json")
        assert exit_code(error.value) == code


def test_another_rank_gets_the_shards_without_their_chunks_and_maps_them(corpus, monkeypatch):
    """Training and held-out shards are of one manifest; from a store, the chunks are sent too."""
    train = open_corpus([(str(corpus.tokens), 1.0)])
    held_out = train.held_out()
    assert held_out.fingerprint == open_corpus([(str(corpus.tokens), 1.0)], "heldout").fingerprint
    sent = pickle.dumps((train, held_out))
    received, received_held_out = pickle.loads(sent)
    manifest = received.sources[0].manifest
    assert manifest is received_held_out.sources[0].manifest
    base = received.sources[0].shards[0].chunks
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    object.__setattr__(train.sources[0].manifest, "chunks_file", None)
    with_chunks = pickle.dumps((train, held_out))
    assert len(with_chunks) > len(sent) + 40 * train.sources[0].num_chunks
    for other in (received, pickle.loads(with_chunks)[0]):
        assert other.fingerprint == train.fingerprint
        for mine, theirs in zip(train.sources[0].shards, other.sources[0].shards, strict=True):
            assert vars(mine) | {"chunks": 0} == vars(theirs) | {"chunks": 0}
            assert (mine.chunks == theirs.chunks).all()
    assert (received.sources[0].read_chunk(0, 0).tokens == train.sources[0].read_chunk(0, 0).tokens).all()
    assert received_held_out.sources[0].shards[0].name.startswith("heldout")


def test_chunks_that_are_cut_in_place_are_named_before_reading_them_kills_the_rank(folder):
    received = pickle.loads(pickle.dumps(open_source(str(folder))))
    index = folder / CHUNKS
    kept = folder / "kept"
    index.rename(kept)
    # The mapped file is still whole.
    assert len(received.read_chunk(0, 0).tokens)
    kept.rename(index)
    size = index.stat().st_size
    os.truncate(index, 0)
    with pytest.raises(
        DiskError, match=rf"chunks\.npy: has 0 bytes, and had {size} when the run began. Fetch or write"
    ):
        received.read_chunk(0, 0)


def test_a_machine_with_other_shards_or_none_under_the_name_is_refused(folder):
    sent = pickle.dumps(open_source(str(folder)))
    index = folder / CHUNKS
    array = np.load(index)
    array[0, 4] ^= 1
    np.save(index, array)
    other = f"{index}: on {socket.gethostname()} it is another file than on rank 0's machine. Copy the shards"
    with pytest.raises(ValueError, match=re.escape(other)):
        pickle.loads(sent)
    index.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{index}: no such file on {socket.gethostname()}. Copy")):
        pickle.loads(sent)


def test_a_machine_with_another_tokenizer_for_text_is_refused(folder, corpus, tmp_path):
    change_manifest(folder, lambda raw: raw.update(kind="text", tokenizer=None))
    tokenizer = shutil.copy(corpus.tokenizer / TOKENIZER, tmp_path)
    sent = pickle.dumps(open_source(str(folder), tokenizer=tokenizer))
    assert pickle.loads(sent).tokenizer == open_source(str(folder), tokenizer=tokenizer).tokenizer
    Path(tokenizer).write_bytes(Path(tokenizer).read_bytes() + b"\n")
    with pytest.raises(ValueError, match=rf"{tokenizer}: on .* it is another file than on rank 0's machine"):
        pickle.loads(sent)


def test_text_is_tokenized_by_the_tokenizer_that_the_run_began_with(tmp_path, corpus):
    """Whoever trains another one to its folder changes neither the ids nor the tokenizer of the checkpoints."""
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path / 'text'}", "--workers=1"])
    tokenizer = shutil.copy(corpus.tokenizer / TOKENIZER, tmp_path)
    source = open_source(str(tmp_path / "text"), tokenizer=tokenizer)
    fingerprint, expected = source.fingerprint, open_source(str(tmp_path / "text"), tokenizer=str(corpus.tokenizer))
    raw = json.loads(Path(tokenizer).read_bytes())
    raw["normalizer"] = {"type": "Lowercase"}
    Path(tokenizer).write_text(json.dumps(raw))
    assert (source.read_chunk(0, 0).tokens == expected.read_chunk(0, 0).tokens).all()
    assert hashlib.sha256(source.read_tokenizer_file()).hexdigest() == source.tokenizer.fingerprint
    assert source.fingerprint == fingerprint


def test_the_sizes_of_many_shards_are_looked_up_at_once(folder, monkeypatch):
    monkeypatch.setattr(shard_list, "MANY_SHARDS", 2)
    open_source(str(folder))
    (folder / "train-00003.tar").unlink()
    with pytest.raises(DamagedShardError, match=r"train-00003.tar: the manifest lists this shard, but it is missing"):
        open_source(str(folder))

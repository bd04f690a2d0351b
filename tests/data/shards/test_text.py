"""Text shards that are tokenized during training give the same tokens as token shards."""

import itertools
import json
import shutil

import numpy as np
import pytest

from data_prep import write_shards
from megabert.data.shards.source import open_corpus
from megabert.data.stream import BatchStream, Position, held_out_batches, open_loader
from tests.data.helpers.synthetic import config_of, same


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_shards.main([f"--source={corpus.jsonl}", f"--out={folder}", "--heldout=0.1", "--chunk_tokens=8192"])
    return open_corpus([(str(folder), 1.0)], tokenizer=str(corpus.tokenizer))


def documents(corpus) -> list[tuple[int, ...]]:
    found = []
    for source in corpus.sources:
        for number, shard in enumerate(source.shards):
            for chunk in range(len(shard.chunks)):
                tokens, lengths = source.read_chunk(number, chunk)
                found += [tuple(part.tolist()) for part in np.split(tokens, lengths.cumsum()[:-1])]
    return sorted(found)


def test_text_gives_the_tokens_of_token_shards(corpus, text):
    ours, theirs = documents(text), documents(open_corpus([(str(corpus.tokens), 1.0)]))
    # The chunks of these token shards have 2,048 tokens, so longer documents are cut there.
    assert [ids for ids in ours if len(ids) < 2048] == [ids for ids in theirs if len(ids) < 2048 and ids in set(ours)]
    assert sum(len(ids) < 2048 for ids in ours) > 0.9 * len(ours)
    assert np.array_equal(np.bincount(np.concatenate(ours)), np.bincount(np.concatenate(theirs)))


def test_statistics_of_text_are_estimated_from_a_sample(corpus, text):
    tokens = open_corpus([(str(corpus.tokens), 1.0)])
    assert text.median_document_tokens == pytest.approx(tokens.median_document_tokens, rel=0.5)
    assert np.abs(text.token_shares - tokens.token_shares).sum() < 0.5
    assert text.tokenizer == tokens.tokenizer
    assert text.sources[0].read_tokenizer_file() == (corpus.tokenizer / "tokenizer.json").read_bytes()
    assert text.sources[0].read_optional("tokenizer_config.json") is not None


def test_another_tokenizer_changes_the_fingerprint(corpus, text, tmp_path):
    other = shutil.copytree(corpus.tokenizer, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(raw | {"version": "1.0"}, indent=2))
    again = open_corpus([(text.sources[0].folder, 1.0)], tokenizer=str(other))
    assert again.fingerprint != text.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_text_resumes_bitwise(text, workers):
    config = config_of(text, bin_tokens=256)

    def batches(count, **options):
        options = {"positions": {}, "first_index": 0} | options
        dataset = BatchStream(text, config, rank=0, world_size=1, **options)
        return list(itertools.islice(iter(open_loader(dataset, workers)), count))

    whole = batches(48)
    positions = {stream: Position.from_json(position.to_json()) for _, stream, position in whole[:16]}
    rest = batches(32, positions=positions, first_index=16)
    assert all(same(batch, whole[batch.index][0]) for batch, _, _ in rest)


def test_text_and_tokens_can_be_mixed(corpus, text):
    both = open_corpus([(str(corpus.tokens), 1.0), (text.sources[0].folder, 1.0)], tokenizer=str(corpus.tokenizer))
    batches = held_out_batches(both, config_of(both, bin_tokens=256), 0.15, 4)
    assert len(batches) == 4

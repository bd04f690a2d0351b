"""Tests of the two passes without worker processes: memory, open files, and the bytes of the shards."""

import json
import os
import resource
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources import LeftOut, ReadOptions, list_input_splits
from data_prep.sources.base import DamagedError, check_text
from data_prep.writing import merged_runs, shard_writer, sorted_runs
from data_prep.writing.length_statistics import plot, summarize


def make_settings(folder, **changes) -> sorted_runs.WriteSettings:
    settings = sorted_runs.WriteSettings(
        folder,
        None,
        np.dtype(np.uint8),
        ReadOptions(),
        min_chars=1,
        heldout=0.2,
        deduplicate=True,
        chunk_tokens=1000,
        seed=0,
    )
    for name in ("runs", "shards"):
        (folder / ".work" / name).mkdir(parents=True, exist_ok=True)
    return replace(settings, **changes)


@pytest.fixture
def source(tmp_path):
    """2,000 documents, of which 500 occur twice."""
    path = tmp_path / "a.jsonl"
    texts = [f"document {i} " + "x" * (i * 7 % 300) for i in range(2000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:500]]))
    return path


def both_passes(folder, source, tasks: int, **changes):
    """Write 3 train shards and a held-out shard. Returns their bytes and the task summaries."""
    settings = make_settings(folder, **changes)
    splits = list_input_splits(str(source), ReadOptions(), LeftOut())
    for number in range(tasks):
        sorted_runs.write_sorted_runs(settings, number, splits[number::tasks])
    summaries = [sorted_runs.read_summary(settings, number) for number in range(tasks)]
    counts = {"train": 3, "heldout": 1}
    reads = merged_runs.plan_reads(settings, summaries, counts)
    for group in reads.groups:
        merged_runs.merge_runs(settings, group, counts)
    names = [
        shard_writer.write_shard(settings, reads.files, part, i, counts) for part in counts for i in range(counts[part])
    ]
    return {name: (folder / name).read_bytes() for name in names}, summaries


@pytest.mark.parametrize("deduplicate", [True, False])
def test_the_number_of_sorted_runs_does_not_change_the_shards(tmp_path, source, monkeypatch, deduplicate):
    one, summaries = both_passes(tmp_path / "one", source, 1, deduplicate=deduplicate)
    assert [(s.runs, s.read) for s in summaries] == [(1, 2500)]
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 40_000)
    monkeypatch.setattr(sorted_runs, "BATCH_BYTES", 1000)
    monkeypatch.setattr(sorted_runs, "RUN_BYTES", 5000)
    many, summaries = both_passes(tmp_path / "many", source, 5, deduplicate=deduplicate)
    assert sum(s.runs for s in summaries) > 80
    assert sum(s.read for s in summaries) == 2500
    assert many == one
    monkeypatch.setattr(merged_runs, "CACHED_BYTES", 0)
    monkeypatch.setattr(merged_runs, "READ_BYTES", 8000)
    merged, _ = both_passes(tmp_path / "merged", source, 5, deduplicate=deduplicate)
    assert merged == one
    files = [path.name for path in (tmp_path / "merged/.work/runs").iterdir() if path.suffix != ".json"]
    assert 5 < len(files) < 20
    assert all(name.endswith(".merged") for name in files)


def test_memory_does_not_grow_with_the_size_of_an_input_split(tmp_path, monkeypatch):
    """Of 30 MB in one input split, only a sorted run of 1 MB is held, and twice that while it is sorted."""
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        for i in range(15_000):
            file.write(json.dumps({"text": f"{i} " + "word " * 400}) + "\n")
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 1 << 30)
    monkeypatch.setattr(sorted_runs, "BATCH_BYTES", 1 << 16)
    monkeypatch.setattr(sorted_runs, "RUN_BYTES", 1 << 20)
    settings = make_settings(tmp_path / "out")
    splits = list_input_splits(str(path), ReadOptions(), LeftOut())
    assert len(splits) == 1
    tracemalloc.start()
    sorted_runs.write_sorted_runs(settings, 0, splits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted_runs.read_summary(settings, 0).runs > 25
    assert peak < 4 << 20


@contextmanager
def open_files_limit(more: int):
    """Allow this many open files more than the process has now."""
    count = max(map(int, os.listdir("/proc/self/fd"))) + 1 + more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_from_a_thousand_sorted_runs_needs_few_open_files(tmp_path, source):
    settings = make_settings(tmp_path / "out")
    sorted_runs.write_sorted_runs(settings, 0, list_input_splits(str(source), ReadOptions(), LeftOut()))
    paths = [sorted_runs.run_path(settings, 0, 0)] * 1000
    with open_files_limit(32):
        name = shard_writer.write_shard(settings, paths, "train", 0, {"train": 50, "heldout": 1})
    assert (settings.out / name).stat().st_size > 0


def test_a_range_of_a_sorted_run_holds_exactly_its_documents(tmp_path, source):
    settings = make_settings(tmp_path / "out", deduplicate=False)
    sorted_runs.write_sorted_runs(settings, 0, list_input_splits(str(source), ReadOptions(), LeftOut()))
    path = sorted_runs.run_path(settings, 0, 0)
    texts = [json.loads(line)["text"].strip() for line in source.read_text().splitlines()]
    half = {text: np.frombuffer(sorted_runs.text_hash(text.encode()), np.uint64) for text in texts}
    bounds = [0, 1, 1 << 62, 3 << 62, (1 << 64) - 1, 1 << 64]
    for part in sorted_runs.PARTS:
        for low, high in pairwise(bounds):
            payload, lengths, hashes = sorted_runs.SortedRun.open(path, settings.dtype).read(part, low, high)
            ends = lengths.cumsum()
            found = [payload[end - n : end].tobytes().decode() for end, n in zip(ends, lengths, strict=True)]
            expected = [
                t
                for t in texts
                if low <= int(half[t][1]) < high
                and (int(half[t][0]) < sorted_runs.heldout_below(0.2)) == (part == "heldout")
            ]
            assert sorted(found) == sorted(expected)
            assert [tuple(row) for row in hashes] == [tuple(half[text]) for text in found]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\\ud800b", r"a.jsonl: a document has half of a surrogate pair as its character 1, .*: '\\ud800b'\. Remove"),
        ("a\\u001b$Bb", r"a.jsonl: a document has an escape sequence of ISO-2022 as its character 1, .* Convert it to"),
        ("a\\u0000b", r"a.jsonl: a document has a NUL as its character 1, which no text contains: '\\x00b'\. Remove"),
    ],
)
def test_what_no_text_contains_is_damage_in_every_source(text, message):
    with pytest.raises(DamagedError, match=message):
        check_text(json.loads(f'"{text}"'), "a.jsonl")
    check_text(json.loads(r'"\ud83d\ude00"'), "a.jsonl")


@pytest.mark.parametrize(("bad", "what"), [("a\0b", "NUL"), ("a\x1b$B", "escape sequence of ISO-2022")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_documents_that_are_no_text_stop_or_are_left_out_and_counted(tmp_path, name, bad, what):
    path, texts = tmp_path / name, ["good", bad]
    if name == "a.jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text("\n\n".join(texts))
    with pytest.raises(ValueError, match=f"{path}: .* {what}"):
        both_passes(tmp_path / "stop", path, 1, heldout=0.0)


def test_statistics_match_the_lengths():
    lengths = np.zeros(65_536, np.int64)
    # The last document has 100,000 tokens.
    lengths[[1, 100, 600, 65_535]] = [5, 3, 1, 1]
    total = 5 + 300 + 600 + 100_000
    found = summarize(lengths, total, "tokens", 12)
    assert (found["documents"], found["tokens"], found["dropped_documents"]) == (10, total, 2)
    assert (found["median_document_tokens"], found["mean_document_tokens"]) == (1, total / 10)
    assert found["documents_of_length_at_most"]["128"] == 8
    histogram = found["length_histogram"]
    assert (sum(histogram["documents"]), sum(histogram["tokens"])) == (10, total)
    place = max(i for i, edge in enumerate(histogram["from"]) if edge <= 100)
    assert (histogram["documents"][place], histogram["tokens"][place]) == (3, 300)
    assert plot(found) == plot(found)
    assert plot(found).startswith(b"\x89PNG")

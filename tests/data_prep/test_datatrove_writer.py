"""Tests that a datatrove pipeline writes the shards of write_shards.py, and that it resumes, and what it refuses."""

import gzip
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import check_shards, write_shards
from data_prep.output_folder import PIPELINE
from data_prep.writing.shard_options import Options
from megabert.data.shards.manifest import read_manifest

README = Path(__file__).parents[2] / "data_prep/README.md"


def documents(texts: list[str]) -> Iterator:
    from datatrove.data import Document  # pyrefly: ignore[missing-import]

    return (Document(text, f"a/{number}") for number, text in enumerate(texts))


def options_of(folder: Path, **others) -> Options:
    return Options(out=str(folder / "out"), min_shards=2, heldout=0.1, workers=1, **others)


def write_runs(options: Options, texts: list[str], tasks: int = 1, ranks: range | None = None) -> None:
    from data_prep.datatrove_writer import WriteRuns

    for rank in ranks or range(tasks):
        list(WriteRuns(options)(documents(texts[rank::tasks]), rank, tasks))


def finish(options: Options) -> None:
    from data_prep.datatrove_writer import FinishShards

    list(FinishShards(options)())


def shards_of(folder: Path) -> dict[str, bytes]:
    assert check_shards.main([str(folder)]) == 0
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".tar", ".npy")}


def test_write_shards_keeps_the_runs_of_a_pipeline(tmp_path, corpus):
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / PIPELINE).write_text("{}")
    with pytest.raises(
        ValueError, match=r"\.work: holds sorted runs of a datatrove pipeline\. Finish them with Finish"
    ):
        write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path}"])
    assert (tmp_path / ".work" / PIPELINE).is_file()


@pytest.mark.datatrove
def test_shards_are_those_of_write_shards_in_any_order_and_number_of_tasks(tmp_path, corpus):
    options = options_of(tmp_path, tokenizer=str(corpus.tokenizer))
    write_runs(options, [*reversed(corpus.texts), *corpus.texts[:9], "  "], tasks=3)
    finish(options)
    command = [f"--source={corpus.jsonl}", f"--out={tmp_path / 'one'}", f"--tokenizer={corpus.tokenizer}"]
    write_shards.main([*command, "--min_shards=2", "--heldout=0.1", "--workers=1"])
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "one")
    left_out = read_manifest(tmp_path / "out").statistics["left_out"]
    assert left_out == {"empty or short texts": 1}


@pytest.mark.datatrove
def test_a_pipeline_goes_on_where_it_was_killed(tmp_path, corpus, monkeypatch):
    options, texts = options_of(tmp_path), corpus.texts[:90]
    write_runs(options, texts, 3, range(2))
    with pytest.raises(ValueError, match=r"lacks the sorted runs of 1 of 3 tasks, such as task 2\. Run the pipeline"):
        finish(options)
    write_runs(options, texts, 3, range(2, 3))
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.write_shards.write_rest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(options)
    with pytest.raises(ValueError, match=r"out: holds shards already\. Choose another out, or pass replace=True"):
        write_runs(options, texts, 3)
    with pytest.raises(ValueError, match="shards are being written from what it holds. Finish them with FinishShards"):
        write_runs(options_of(tmp_path, replace=True), texts, 3)
    finish(options)
    assert read_manifest(tmp_path / "out").statistics["documents"] == 90
    finish(options)


@pytest.mark.datatrove
def test_other_documents_or_options_are_never_taken_for_these(tmp_path, corpus):
    options, texts = options_of(tmp_path), corpus.texts[:60]
    write_runs(options, texts, 2)
    with pytest.raises(ValueError, match="holds sorted runs of other options, another tokenizer or another number of"):
        write_runs(options, texts, 3)
    with pytest.raises(ValueError, match="holds sorted runs of other options or another tokenizer. Give FinishShards"):
        finish(options_of(tmp_path, seed=1))
    # A task that is done again leaves nothing of its earlier documents.
    with pytest.raises(ValueError, match="document a/0: field 'text' holds 5, expected text"):
        write_runs(options, [5], 2, range(1))
    with pytest.raises(ValueError, match="lacks the sorted runs of 1 of 2 tasks, such as task 0"):
        finish(options)
    write_runs(options, texts, 2, range(1))
    finish(options)
    before = shards_of(tmp_path / "out")
    replacing = options_of(tmp_path, replace=True)
    write_runs(replacing, texts[::-1], 4)
    finish(replacing)
    assert shards_of(tmp_path / "out") == before
    write_runs(replacing, texts[:50], 4)
    finish(replacing)
    assert read_manifest(tmp_path / "out").statistics["documents"] == 50


@pytest.mark.datatrove
def test_damage_is_counted_or_named(tmp_path):
    texts = ["good text", None, 5, "half of a pair \ud800", "a NUL \0"]
    with pytest.raises(ValueError, match="document a/2: field 'text' holds 5"):
        write_runs(options_of(tmp_path), texts)
    options = options_of(tmp_path / "skip", on_bad_document="skip")
    write_runs(options, texts)
    finish(options)
    assert read_manifest(tmp_path / "skip/out").statistics["left_out"] == {"null texts": 1, "damaged": 3}
    with pytest.raises(ValueError, match="text_key has no effect in a datatrove pipeline. Omit it"):
        write_runs(options_of(tmp_path, text_key="body"), [])
    with pytest.raises(ValueError, match="has no sorted runs. Run a pipeline that ends with WriteRuns first"):
        finish(options_of(tmp_path / "none"))


@pytest.mark.datatrove
def test_the_pipeline_of_the_readme_runs(tmp_path, corpus):
    (tmp_path / "text").mkdir()
    [script] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    words = sorted({word for text in corpus.texts for word in text.split()})
    chosen = [" ".join(random.Random(seed).sample(words, 100)) for seed in range(60)]
    # Some come again with a word more, which MinHash finds, and the last is filtered.
    texts = [*chosen, *(f"{text} Again." for text in chosen[::10]), "too short"]
    for number in range(2):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::2])
        (tmp_path / f"text/{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    script = script.replace('"/data/tokenizer"', f'"{corpus.tokenizer}"').replace("/data/", f"{tmp_path}/")
    (tmp_path / "pipeline.py").write_text(script.replace(" 64, 8, ", " 2, 2, "))
    for _ in range(2):
        subprocess.run([sys.executable, "pipeline.py"], cwd=tmp_path, check=True, timeout=500)
    shards_of(tmp_path / "tokens")
    assert read_manifest(tmp_path / "tokens").statistics["documents"] == len(chosen)
    assert not (tmp_path / "tokens/.work").exists()


@pytest.mark.datatrove
def test_what_datatrove_writes_is_read_as_it_is(tmp_path, corpus):
    """More tasks than files, so that one of each has no document."""
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyrefly: ignore[missing-import]
    from datatrove.pipeline.writers import JsonlWriter, ParquetWriter  # pyrefly: ignore[missing-import]

    tokenizer, texts = str(corpus.tokenizer / "tokenizer.json"), corpus.texts[:40]
    folders = {name: str(tmp_path / name) for name in ("gz", "zst", "parquet", "ds", "shuffled")}
    steps = [
        JsonlWriter(folders["gz"]),
        JsonlWriter(folders["zst"], compression="zstd"),
        ParquetWriter(folders["parquet"]),
        DocumentTokenizer(folders["ds"], tokenizer_name_or_path=tokenizer, shuffle_documents=False),
        DocumentTokenizer(folders["shuffled"], tokenizer_name_or_path=tokenizer, eos_token="[SEP]"),
    ]
    for rank in range(3):
        for step in steps:
            list(step(documents(texts[rank::2] if rank < 2 else []), rank, 3) or ())
    sizes = {}
    for name, folder in folders.items():
        command = [f"--source={folder}", f"--out={tmp_path / 'out' / name}", f"--tokenizer={corpus.tokenizer}"]
        write_shards.main([*command, "--min_shards=1", "--workers=1"])
        statistics = read_manifest(tmp_path / "out" / name).statistics
        sizes[name] = statistics["documents"], statistics["tokens"]
        assert statistics["left_out"].get("empty files", 0) == (name in ("ds", "shuffled"))
    assert len(set(sizes.values())) == 1

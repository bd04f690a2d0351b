"""Tests that write_shards.py writes every document exactly once, and the same bytes on every run."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import output_folder, write_shards
from data_prep.writing import passes, sorted_runs
from megabert.data.shards.manifest import read_manifest
from megabert.data.shards.sample_format import decode_text, read_sample
from megabert.data.shards.source import open_source
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer
from tests.helpers.cases import cases

REPOSITORY = Path(__file__).resolve().parents[2]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def document_texts(folder: Path, parts: list[str] | None = None) -> list[str]:
    manifest = read_manifest(folder)
    texts = []
    for part in parts or manifest.splits:
        for shard in manifest.splits[part]:
            data = (folder / shard.name).read_bytes()
            for offset, size, *_ in shard.chunks.tolist():
                texts += decode_text(read_sample(data[offset : offset + size], shard.name), shard.name)
    return texts


def test_text_shards_hold_each_document_once_and_can_be_tokenized(tmp_path, corpus):
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(corpus.jsonl.read_text() * 2)
    write_shards.main([f"--source={doubled}", f"--out={tmp_path / 'text'}", "--min_chars=100"])
    assert sorted(document_texts(tmp_path / "text")) == sorted(text for text in corpus.texts if len(text) >= 100)
    write_shards.main(
        [f"--source={tmp_path / 'text'}", f"--out={tmp_path / 'tokens'}", f"--tokenizer={corpus.tokenizer}"]
    )
    assert open_source(str(tmp_path / "tokens")).manifest.statistics["documents"] == len(
        document_texts(tmp_path / "text")
    )


def test_token_shards_hold_exactly_the_tokenized_documents(corpus):
    """Every document is in one part, chosen by its text, and has the ids of the tokenizer without special tokens."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected = {tuple(tokenizer.encode(text, add_special_tokens=False).ids): text for text in corpus.texts}
    manifest = read_manifest(corpus.tokens)
    found: dict[str, list[tuple[int, ...]]] = {"train": [], "heldout": []}
    for part, documents in found.items():
        source = open_source(str(corpus.tokens), part)
        for number, shard in enumerate(source.shards):
            for chunk in range(len(shard.chunks)):
                tokens, lengths = source.read_chunk(number, chunk)
                documents += [tuple(piece.tolist()) for piece in np.split(tokens, lengths.cumsum()[:-1])]
    whole = [document for document in found["train"] + found["heldout"] if document in expected]
    # Only a document of more than chunk_tokens is cut into several.
    assert len(whole) >= len(corpus.texts) - 20
    held = {expected[document] for document in found["heldout"] if document in expected}
    below = sorted_runs.heldout_below(0.1)
    for text in corpus.texts:
        first = np.frombuffer(sorted_runs.text_hash(text.encode()), dtype=np.uint64)[0]
        if tuple(tokenizer.encode(text, add_special_tokens=False).ids) in set(whole):
            assert (text in held) == (first < below)
    assert 0.03 < len(held) / len(corpus.texts) < 0.2
    assert (
        sum(map(len, found["train"] + found["heldout"]))
        == manifest.statistics["tokens"]
        == sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in corpus.texts)
    )
    counts = np.load(corpus.tokens / "token_counts.npy")
    flat = np.concatenate([np.array(document) for document in found["train"]])
    assert np.array_equal(counts, np.bincount(flat, minlength=len(counts)))
    assert len(manifest.splits["train"]) >= 24


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_a_byte(tmp_path, corpus, workers):
    out = tmp_path / "again"
    common = [f"--source={corpus.jsonl}", f"--tokenizer={corpus.tokenizer}", "--heldout=0.1", "--chunk_tokens=2048"]
    write_shards.main([*common, f"--out={out}", f"--workers={workers}"])
    assert hashes(out) == hashes(corpus.tokens)


def test_finished_shards_are_reused_unless_the_source_changed(tmp_path, corpus, capsys):
    source = tmp_path / "corpus.jsonl"
    source.write_text(corpus.jsonl.read_text())
    command = [f"--source={source}", f"--out={tmp_path / 'out'}"]
    write_shards.main(command)
    first = hashes(tmp_path / "out")
    write_shards.main(command)
    assert "already written from this source with these settings, reused" in capsys.readouterr().out
    source.write_text(json.dumps({"text": "one more document"}) + "\n" + source.read_text())
    write_shards.main([*command, "--replace"])
    assert hashes(tmp_path / "out") != first


def test_line_ends_do_not_make_another_text(tmp_path):
    """A document and its copy with CRLF line ends are one text, so only one of them is written."""
    documents = [f"first line {n}\nsecond line" for n in range(300)]
    copies = [document.replace("\n", "\r\n") for document in documents]
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents + copies))
    write_shards.main([f"--source={source}", f"--out={tmp_path / 'out'}", "--heldout=0.3"])
    texts = [text.replace("\r\n", "\n") for text in document_texts(tmp_path / "out")]
    assert sorted(texts) == sorted(documents)


def test_a_long_text_is_never_cut(tmp_path):
    """A cut at a byte could split a character, and the halves could end up on both sides of the held-out split."""
    text = "\u00e9" * 300
    (tmp_path / "a.txt").write_text(text)
    write_shards.main([f"--source={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}", "--chunk_tokens=101"])
    assert document_texts(tmp_path / "out") == [text]


def test_blank_lines_separate_documents_with_the_switch_that_the_error_names(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n")
    write_shards.main([f"--source={tmp_path / 'a.txt'}", "--blank-lines", f"--out={tmp_path / 'out'}"])
    assert sorted(document_texts(tmp_path / "out")) == ["one", "two\nlines"]


def test_a_tokenizer_json_without_its_config_is_enough(tmp_path, corpus):
    (tmp_path / "tokenizer.json").write_text((corpus.tokenizer / "tokenizer.json").read_text())
    command = [f"--source={corpus.jsonl}", f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tokenizer.json'}"]
    write_shards.main(command)
    assert load_auto_tokenizer(tmp_path / "out").mask_token == "[MASK]"


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("  \n ")
    with pytest.raises(ValueError, match="has no document of at least 1 characters; nothing to write"):
        write_shards.main([f"--source={tmp_path}", f"--out={tmp_path / 'out'}"])


def test_a_corpus_of_which_the_tokenizer_leaves_nothing_is_refused(tmp_path, corpus):
    (tmp_path / "a.txt").write_text("\x01")
    (tmp_path / "b.txt").write_text("\x02\x03")
    command = [f"--source={tmp_path}", f"--out={tmp_path / 'out'}", f"--tokenizer={corpus.tokenizer}"]
    with pytest.raises(ValueError, match=r"the tokenizer .*/tokenizer.json leaves no token of any document"):
        write_shards.main(command)
    assert not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "c.txt").write_text("words")
    write_shards.main(command)
    assert read_manifest(tmp_path / "out").statistics["documents"] == 1


def test_a_corpus_of_empty_documents_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("  \n ")
    with pytest.raises(ValueError, match="has no document with a character; nothing to write"):
        write_shards.main([f"--source={tmp_path}", f"--out={tmp_path / 'out'}", "--min_chars=0"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--heldout=1.5", "heldout is 1.5, expected a number in [0, 1)"),
        ("--chunk_tokens=0", "chunk_tokens is 0, expected a number in [1, 131072]"),
        ("--workers=0", "workers is 0, expected a number in [1, 1024]"),
        ("--workers=1000000000000", "workers is 1000000000000, expected a number in [1, 1024]"),
        ("--min-shards=1000000000000", "min_shards is 1000000000000, expected a number in [1, 2^20]"),
        ("--seed=-1", "seed is -1, expected a number in [0, 2^63)"),
        ("--sorce=x", "unknown setting --sorce. Did you mean --source?"),
    ],
)
def test_wrong_flags_are_a_one_line_error(capsys, flag, message):
    with pytest.raises(SystemExit) as exit_info:
        write_shards.main([flag])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_is_in_the_same_part_of_every_corpus(tmp_path, corpus):
    """So a model trained on one corpus has not seen the held-out documents of another."""
    shared, parts = set(corpus.texts[:300]), {}
    for name, texts in (("a", corpus.texts[:400]), ("b", corpus.texts[:300][::-1] + corpus.texts[400:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f" {text}\n"}) + "\n" for text in texts))
        write_shards.main(
            [f"--source={tmp_path / name}.jsonl", f"--out={tmp_path / name}", "--heldout=0.3", f"--seed={len(texts)}"]
        )
        manifest = read_manifest(tmp_path / name)
        parts[name] = {part: set(document_texts(tmp_path / name, [part])) & shared for part in manifest.splits}
    assert parts["a"] == parts["b"]
    assert min(len(texts) for texts in parts["a"].values()) > 50
    assert not parts["a"]["train"] & parts["a"]["heldout"]


def test_statistics_are_in_the_manifest_and_in_a_plot(corpus):
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in corpus.texts]
    statistics = read_manifest(corpus.tokens).statistics
    assert statistics["documents"] == len(lengths)
    assert statistics["median_document_tokens"] == sorted(lengths)[(len(lengths) - 1) // 2]
    assert statistics["documents_of_length_at_most"]["64"] == sum(n <= 64 for n in lengths)
    assert (corpus.tokens / "statistics.png").read_bytes().startswith(b"\x89PNG")


def copy_of_shards(corpus, tmp_path) -> tuple[list[str], Path]:
    """A copy of finished shards, and the command that wrote them."""
    out = shutil.copytree(corpus.tokens, tmp_path / "tokens")
    common = [f"--source={corpus.jsonl}", f"--tokenizer={corpus.tokenizer}", "--heldout=0.1", "--chunk_tokens=2048"]
    return [*common, f"--out={out}"], out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-600])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = [
    ("train-00003.tar", Path.unlink),
    ("heldout-00000.tar", cut),
    ("train-00001.tar", change),
    ("token_counts.npy", change),
    ("chunks.npy", Path.unlink),
    ("statistics.png", Path.unlink),
    ("manifest.json", Path.unlink),
    ("manifest.json", cut),
]
REPLACE = ["--replace", "true"]


@pytest.mark.parametrize(
    ("name", "damage", "replace"),
    cases(
        per_push=[*((*case, []) for case in DAMAGE), (*DAMAGE[1], REPLACE), (*DAMAGE[6], REPLACE)],
        nightly=[(*case, replace) for case in DAMAGE for replace in ([], REPLACE)],
    ),
)
def test_what_is_lost_or_damaged_is_written_again_by_the_same_command(tmp_path, corpus, capsys, name, damage, replace):
    command, out = copy_of_shards(corpus, tmp_path)
    damage(out / name)
    write_shards.main([*command, *replace])
    assert hashes(out) == hashes(corpus.tokens)
    capsys.readouterr()
    write_shards.main([*command, *replace])
    assert "already written from this source with these settings, reused" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_lost_tokenizer_is_copied_again_and_the_shards_stay(tmp_path, corpus, capsys, name):
    command, out = copy_of_shards(corpus, tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / name).write_bytes(b"")
    write_shards.main(command)
    assert "reused" in capsys.readouterr().out
    assert hashes(out) == hashes(corpus.tokens)
    assert times == {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_shards_of_another_request_without_a_manifest_are_kept_unless_replace_is_given(tmp_path, corpus):
    command, out = copy_of_shards(corpus, tmp_path)
    (out / "manifest.json").unlink()
    before = hashes(out)
    with pytest.raises(ValueError, match="has no manifest.json, so it will not be replaced.*or pass --replace"):
        write_shards.main([*command, "--seed=1"])
    assert hashes(out) == before
    write_shards.main([*command, "--seed=1", "--replace"])
    assert read_manifest(out).statistics == read_manifest(corpus.tokens).statistics


def test_a_damaged_shard_is_written_again_after_a_kill_at_the_very_end(tmp_path, corpus):
    """The work folder is still there, and says that every shard is written."""
    command, out = copy_of_shards(corpus, tmp_path)
    shutil.rmtree(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_folder.shutil, "rmtree", lambda *_, **__: None)
        write_shards.main(command)
    assert (out / ".work" / "request").is_file()
    (out / "train-00003.tar").unlink()
    write_shards.main(command)
    assert hashes(out) == hashes(corpus.tokens)


def test_too_many_unknown_tokens_end_the_command_with_examples_and_a_remedy(tmp_path, corpus, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(f"some text {n} \u4f60 \u597d" for n in range(50)))
    command = [f"--source={tmp_path / 'a.txt'}", f"--tokenizer={corpus.tokenizer}", f"--out={tmp_path / 'out'}"]
    command.append("--blank-lines")
    with pytest.raises(
        ValueError, match=r"makes \d\d\.\d% of the tokens .* \[UNK\], such as '\u4f60', '\u597d'; at most 5.0%"
    ) as info:
        write_shards.main(command)
    assert not (tmp_path / "out" / "manifest.json").exists()
    advice = re.findall(r"--max-unknown [\d.]+", str(info.value))[0].split()
    capsys.readouterr()
    write_shards.main([*command, *advice])
    statistics = read_manifest(tmp_path / "out").statistics
    assert statistics["unknown_tokens"] == 100
    share = 100 / statistics["tokens"]
    assert f"{share:.2%} of the tokens are [UNK]" in capsys.readouterr().out


def test_a_damaged_tokenizer_config_is_refused_before_it_is_copied(tmp_path, corpus):
    folder = shutil.copytree(corpus.tokenizer, tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer/tokenizer_config\.json: not valid JSON"):
        write_shards.main([f"--source={corpus.jsonl}", f"--tokenizer={folder}", f"--out={tmp_path / 'out'}"])


def test_the_share_in_the_message_holds_out_a_document(tmp_path, capsys):
    """Both write_shards.py and training name it, and following either gives a held-out part."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(20)))
    command = [f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--workers=1", "--min-shards=1"]
    write_shards.main([*command, "--heldout=0.001"])
    share, *_ = re.findall(
        r"no document is held out\. Write the shards again with --heldout (\S+) or", capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=rf"the heldout part has no documents\. .* with --heldout {share} or more"):
        open_source(str(tmp_path / "out"), "heldout")
    write_shards.main([*command, f"--heldout={share}", "--replace"])
    assert "no document is held out" not in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").statistics["first_heldout"] == float(share)
    assert len(document_texts(tmp_path / "out", ["heldout"])) == 1
    write_shards.main([*command, "--heldout=0.9999", "--replace"])
    assert "every document is held out. Write the shards again with a smaller --heldout." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the train part has no documents\. .* with a smaller --heldout"):
        open_source(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("script", "closed"),
    [
        ("write_shards.py", ">&-"),
        pytest.param("write_shards.py", "2>&-", marks=pytest.mark.nightly),
        ("write_shards.py", "<&- >&- 2>&-"),
        ("train_tokenizer.py", "2>&-"),
    ],
)
def test_closed_streams_change_neither_exit_code_nor_files(tmp_path, script, closed):
    (tmp_path / "a.txt").write_text("some text to learn from. " * 100)
    options = "--model wordpiece --vocab-size 60" if script == "train_tokenizer.py" else "--min-shards 1 --workers 1"
    command = f"{sys.executable} data_prep/{script} {options} --source"
    good = f"{command} {tmp_path / 'a.txt'} --out {tmp_path / 'out'} {closed}"
    subprocess.run(good, shell=True, cwd=REPOSITORY, check=True)
    assert (tmp_path / "out" / ("tokenizer.json" if "tokenizer" in script else "manifest.json")).is_file()
    bad = f"{command} /nowhere {closed}"
    process = subprocess.run(bad, shell=True, cwd=REPOSITORY, check=False, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1
    assert process.stderr.count("\n") == ("2>&-" not in closed)


def test_a_folder_of_another_tokenizer_is_kept_unless_replace_is_given(tmp_path, corpus):
    command, out = copy_of_shards(corpus, tmp_path)
    shutil.rmtree(out)
    out.mkdir()
    (out / "tokenizer.json").write_text("another")
    for step in ([], ["--step=plan"]):
        with pytest.raises(
            ValueError, match="tokenizer.json: is another tokenizer. Choose another --out, or pass --re"
        ):
            write_shards.main([*command, *step])
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]
    write_shards.main([*command, "--replace"])
    assert hashes(out) == hashes(corpus.tokens)


def shards_of(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if name.endswith((".tar", "tokenizer.json"))}


@pytest.mark.parametrize(("step", "first"), [("write_sorted_runs", True), ("write_shards", False)])
def test_a_tokenizer_that_is_replaced_meanwhile_ends_the_command(tmp_path, corpus, monkeypatch, step, first):
    """Replaced before a worker reads it, or before it is copied beside the shards."""
    file = tmp_path / "tokenizer.json"
    file.write_bytes(original := (corpus.tokenizer / "tokenizer.json").read_bytes())
    words = [f"--source={corpus.jsonl}", f"--tokenizer={file}", f"--out={tmp_path / 'out'}", "--workers=1"]
    words += ["--heldout=0.1", "--chunk_tokens=2048"]
    run_step = getattr(passes, step)

    def replace_and_run(*arguments):
        if first:
            file.write_bytes(original + b"\n")
        run_step(*arguments)
        file.write_bytes(original + b"\n")

    with monkeypatch.context() as patch:
        patch.setattr(passes, step, replace_and_run)
        with pytest.raises(ValueError, match="Put that tokenizer back, or begin anew"):
            write_shards.main(words)
    assert not (tmp_path / "out/manifest.json").exists()
    file.write_bytes(original)
    write_shards.main(words)
    assert shards_of(tmp_path / "out") == shards_of(corpus.tokens)

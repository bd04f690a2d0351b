"""Targets of a folder, an export or an import, are those of its run, and are proven in the same way."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megabert.convert import folder_to_hf, to_hf
from megabert.convert.from_hf import import_model, read_model
from megabert.convert.targets import compared_texts, jina, onnx_graphs, registry, sentence_transformers, transformers_js
from megabert.convert.targets.target import DiffersError
from megabert.convert.to_hf import ExportOptions
from megabert.files.checkpoint_format import files_of
from tests.convert.helpers.architecture_targets import TARGETS_OF
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.model.helpers.architectures import ARCHITECTURES

# What differs although the model is the same: hashes and measured differences.
OWN_FILES = {"export.json", "README.md"}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch, skipped_checks):
    """The check in another process has tests of its own; sentence-transformers and Node.js count as missing."""
    monkeypatch.setattr(compared_texts, "NUM_TEXTS", 40)
    monkeypatch.setattr(jina, "COMPARED_TEXTS", 40)
    monkeypatch.setattr(sentence_transformers, "find_spec", lambda name: None)
    monkeypatch.setattr(transformers_js, "find_node", lambda: None)


@pytest.fixture
def make_run(corpus, tmp_path):
    def make_run(architecture: str) -> Path:
        model = small_model(**ARCHITECTURES[architecture] | {"num_attention_heads": 2})
        write_checkpoint(tmp_path / "run", model, corpus.tokenizer)
        return tmp_path / "run"

    return make_run


def assert_same_files(folder: Path, other: Path) -> None:
    assert files_of(folder) == files_of(other)
    for name in {*files_of(folder)} - OWN_FILES:
        if name.endswith("_check.safetensors"):
            one, two = load_file(folder / name), load_file(other / name)
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        else:
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    cards = [(path / "README.md").read_text().partition("## Elsewhere")[0] for path in (folder, other)]
    assert cards[0] == cards[1]


CHEAP = {"mosaicbert": "sentence-transformers,jina", "modernbert": "sentence-transformers,encoder"}
EVERY = [pytest.param(name, marks=[pytest.mark.nightly, pytest.mark.serving]) for name in TARGETS_OF]


@pytest.mark.parametrize("architecture", [*CHEAP, *EVERY])
def test_an_export_gives_the_files_that_its_run_gives(architecture, request, make_run, run_launcher, tmp_path):
    nightly = request.node.get_closest_marker("nightly") is not None
    targets = ",".join(TARGETS_OF[architecture]) if nightly else CHEAP[architecture]
    run = make_run(architecture)
    # The tokenizer cuts texts at 20 tokens, the model has 40 positions.
    assert run_launcher("convert_to_hf.py", run, tmp_path / "hf", "--max-length", "20").code == 0
    done = run_launcher("convert_to_hf.py", run, tmp_path / "direct", "--max-length", "20", "--for", targets)
    assert done.code == 0, done.output
    done = run_launcher("convert_to_hf.py", tmp_path / "hf", tmp_path / "later", "--for", targets)
    assert done.code == 0, done.output
    outcomes, before = (registry.read_outcomes(tmp_path / name) for name in ("later", "direct"))
    assert {*outcomes} == {*targets.split(",")}
    assert {name: "opened" in outcome for name, outcome in outcomes.items()} == {
        name: "opened" in outcome for name, outcome in before.items()
    }
    assert_same_files(tmp_path / "direct", tmp_path / "later")


def test_a_folder_gets_further_targets_in_place(make_run, run_launcher, tmp_path):
    hf = tmp_path / "hf"
    assert run_launcher("convert_to_hf.py", make_run("mosaicbert"), hf, "--for", "jina").code == 0
    assert "is already an export" not in run_launcher("convert_to_hf.py", hf, hf).output
    assert "is already an export" in run_launcher("convert_to_hf.py", hf, hf).output
    (hf / "README.md").write_text((hf / "README.md").read_text() + "\n## Licence\n\nApache\n")
    done = run_launcher("convert_to_hf.py", hf, hf, "--for", "sentence-transformers")
    assert done.code == 0, done.output
    assert "jina: it has the encoder only" in done.output
    assert set(registry.read_outcomes(hf)) == {"sentence-transformers", "jina"}
    card = (hf / "README.md").read_text()
    assert card.count("## Elsewhere") == 1
    assert "## Licence\n\nApache\n" in card
    assert "| steps | 2 of 2 |" in card
    assert run_launcher("convert_to_hf.py", hf, hf, "--max-length", "30").code == 0
    assert "| maximum length of a text | 30 tokens, at which" in (hf / "README.md").read_text()


def test_a_target_of_a_folder_that_differs_loses_its_files_and_the_folder_stays(make_run, tmp_path, monkeypatch):
    def fail(folder, expected):
        raise DiffersError("states differ by 3")

    to_hf.export_checkpoint(make_run("mosaicbert"), tmp_path / "hf")
    before = {name: (tmp_path / "hf" / name).read_bytes() for name in files_of(tmp_path / "hf")}
    monkeypatch.setitem(registry.TARGETS, "jina", replace(registry.TARGETS["jina"], prove=fail))
    folder_to_hf.export_folder(tmp_path / "hf", tmp_path / "out", ExportOptions(targets=("jina",)))
    assert registry.read_outcomes(tmp_path / "out") == {"jina": {"failed": "states differ by 3"}}
    assert not (tmp_path / "out/jina").exists()
    assert {name: (tmp_path / "hf" / name).read_bytes() for name in files_of(tmp_path / "hf")} == before


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_an_imported_folder_has_targets_too(head, corpus, run_launcher, tmp_path):
    """A classifier has those of its encoder; the others are refused before anything is written."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.RobertaConfig(vocab_size=832, max_position_embeddings=42, pad_token_id=0, **sizes)
    theirs = getattr(transformers, f"RobertaFor{head}")(config).eval()
    theirs.save_pretrained(tmp_path / "published")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(corpus.tokenizer / name, tmp_path / "published" / name)
    refused = run_launcher("convert_to_hf.py", tmp_path / "published", tmp_path / "hf", "--for", "encoder").output
    advice = re.search(r"Convert it with (launch/convert_from_hf.py) first", refused)
    assert advice, refused
    assert run_launcher("convert_from_hf.py", tmp_path / "published", tmp_path / "ours").code == 0
    if head != "MaskedLM":
        for name in ("onnx", "onnx-int8", "transformers.js"):
            message = f"--for onnx: the model has a head for {head}, .* Leave onnx out"
            output = run_launcher("convert_to_hf.py", tmp_path / "ours", tmp_path / "hf", "--for", name).output
            assert re.search(message, output), output
            with pytest.raises(ValueError, match=f"--for {name}: the model has a head for {head}"):
                registry.TARGETS[name].check(read_model(tmp_path / "ours").config, {}, 40)
        assert not (tmp_path / "hf").exists()
    done = run_launcher("convert_to_hf.py", tmp_path / "ours", tmp_path / "hf", "--for", "encoder")
    assert done.code == 0, done.output
    assert registry.read_outcomes(tmp_path / "hf")["encoder"]["opened"]["difference"] <= 1e-5
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "hf/encoder")
    ids = torch.randint(5, 800, (2, 9))
    with torch.no_grad():
        expected = theirs.roberta(ids).last_hidden_state
        torch.testing.assert_close(encoder.eval()(ids).last_hidden_state, expected, rtol=0, atol=1e-6)
    assert not any("pooler" in name for name in load_file(tmp_path / "hf/encoder/model.safetensors"))


def test_a_head_that_nothing_has_trained_is_named_by_every_later_export(corpus, tmp_path):
    config = transformers.BertConfig(
        vocab_size=832, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(corpus.tokenizer / name, tmp_path / "in" / name)
    initialized = import_model(tmp_path / "in", tmp_path / "ours").initialized
    assert "decoder.bias" in initialized
    for source, out in (("ours", "hf"), ("hf", "again")):
        done = folder_to_hf.export_folder(tmp_path / source, tmp_path / out, ExportOptions())
        assert sorted(done.initialized) == sorted(initialized)
    assert sorted(import_model(tmp_path / "again", tmp_path / "back").initialized) == sorted(initialized)
    record = json.loads((tmp_path / "hf/export.json").read_text())
    (tmp_path / "hf/export.json").write_text(json.dumps(record | {"initialized": [7]}))
    assert read_model(tmp_path / "hf").initialized == []
    assert onnx_graphs.check(read_model(tmp_path / "hf").config, {}, 40) == []

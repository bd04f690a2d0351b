"""Every target is written, opened and compared; one that differs loses its own files only, and the command says so."""

import json
import shutil
from dataclasses import replace

import pytest

from megabert.commands.export import Options
from megabert.config import cli
from megabert.convert import to_hf
from megabert.convert.targets import registry
from megabert.convert.targets.target import DiffersError, Target
from megabert.files.checkpoint_format import files_of
from tests.convert.helpers.folders import edit_json
from tests.convert.targets.conftest import TARGETS


def test_the_record_and_the_card_say_what_opened_each_target(served):
    outcomes = registry.read_outcomes(served)
    assert tuple(outcomes) == TARGETS
    card = (served / "README.md").read_text()
    for name, outcome in outcomes.items():
        opened = outcome["opened"]
        assert opened["program"]
        assert opened["version"]
        assert 0 <= opened["difference"] < 1e-2
        assert f"| {name} | {outcome['wrote']} | {opened['program']} {opened['version']} |" in card
        assert f"### {name}\n" in card
    assert (
        set(files_of(served)) - {"README.md", "export.json"}
        == json.loads((served / "export.json").read_text())["files"].keys()
    )


def test_verifying_repeats_every_proof(served, tmp_path):
    folder = shutil.copytree(served, tmp_path / "hf")
    assert registry.verify_targets(folder) == registry.read_outcomes(served)
    edit_json(folder / "jina/config.json", num_attention_heads=6)
    outcomes = registry.verify_targets(folder)
    assert "differ by" in outcomes["jina"]["failed"]
    assert "opened" in outcomes["onnx"]


def test_a_target_that_differs_loses_its_own_files_and_the_exit_code_says_so(
    run_launcher, checkpoint, tmp_path, monkeypatch, skipped_checks
):
    def fail(folder, expected):
        raise DiffersError("states differ by 3")

    monkeypatch.setitem(registry.TARGETS, "jina", replace(registry.TARGETS["jina"], prove=fail))
    words = ("convert_to_hf.py", checkpoint, tmp_path / "hf", "--for", "jina,sentence-transformers")
    done = run_launcher(*words)
    assert done.code == 1
    assert "hf: jina: differs from the checkpoint and has no files: states differ by 3" in done.output
    assert (tmp_path / "hf/modules.json").is_file()
    assert not (tmp_path / "hf/jina").exists()
    assert "### jina" not in (tmp_path / "hf/README.md").read_text()
    assert run_launcher("convert_to_hf.py", "--verify-only", tmp_path / "hf").code == 1
    monkeypatch.undo()
    # The same command tries again what failed, and what could not be opened.
    monkeypatch.setattr(
        to_hf.export_check, "run_in_subprocess", lambda folder: {"max_difference": 0.0, "transformers": "0"}
    )
    done = run_launcher(*words)
    assert done.code == 0, done.output
    assert (tmp_path / "hf/jina/config.json").is_file()


def test_what_requires_a_target_that_failed_is_not_written(served, tmp_path, monkeypatch):
    def fail(source, folder):
        raise DiffersError("no")

    folder = shutil.copytree(served, tmp_path / "hf")
    monkeypatch.setitem(registry.TARGETS, "onnx", replace(registry.TARGETS["onnx"], write=fail))
    outcomes = registry.write_targets(folder, ("onnx", "onnx-int8"))
    assert outcomes == {"onnx": {"failed": "no"}, "onnx-int8": {"failed": "needs onnx, which failed"}}


def test_the_list_is_parsed_strictly():
    assert registry.parse_names("") == ()
    assert registry.parse_names("transformers") == ()
    assert registry.parse_names(" jina, onnx-int8 ") == ("onnx", "onnx-int8", "jina")
    with pytest.raises(ValueError, match=r"--for: there is no target 'onx'. Did you mean onnx\?"):
        registry.parse_names("onx")
    for layout in ("gte", "modernbert"):
        with pytest.raises(ValueError, match="Did you mean encoder"):
            registry.parse_names(layout)
    with pytest.raises(ValueError, match="Known are transformers, sentence-transformers, onnx"):
        registry.parse_names("vhs")
    with pytest.raises(ValueError, match="--for: 'onnx' is listed twice"):
        registry.parse_names("onnx,gguf,onnx")


def test_help_lists_every_target(capsys):
    with pytest.raises(SystemExit):
        cli.read_flags(Options, "x.py", "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--for FOR " in text
    assert f"a list with commas: {', '.join(registry.TARGETS)}." in text


def test_a_target_that_needs_other_packages_says_so_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    missing: Target = replace(registry.TARGETS["onnx"], packages=("absent_package",))
    monkeypatch.setitem(registry.TARGETS, "onnx", missing)
    with pytest.raises(ValueError, match=r"--for onnx needs absent_package: pip install 'megabert\[onnx\]'"):
        to_hf.export_checkpoint(checkpoint, tmp_path / "hf", to_hf.ExportOptions(targets=("onnx",)))
    assert not (tmp_path / "hf").exists()


def test_what_a_target_cannot_do_is_said_before_it_is_written(checkpoint, bert, tmp_path):
    notes = to_hf.explain_targets(checkpoint, to_hf.ExportOptions(targets=TARGETS, max_length=4096))
    assert [note.split(":")[0] for note in notes] == ["onnx-int8", "onnx-int8", "jina", "jina"]
    assert "a model of width 24 may lose more" in notes[1]
    assert "texts are cut at 2,048 tokens" in notes[3]
    with pytest.raises(ValueError, match="--for jina: the model has learned, gelu and post-norm layers"):
        to_hf.export_checkpoint(bert[0], tmp_path / "hf", to_hf.ExportOptions(targets=("jina",)))
    assert not (tmp_path / "hf").exists()

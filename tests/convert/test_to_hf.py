"""Exports to Hugging Face folders."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from megabert.convert import from_hf, to_hf
from megabert.convert.check.export_record import TOLERANCE
from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.model.attention import PLANNERS
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.small_model import small_model
from tests.helpers.runs import run_command


def test_every_parameter_is_exported_and_the_check_passes(run, exported):
    before = (exported / "model.safetensors").stat().st_mtime_ns
    measured = to_hf.export_checkpoint(run, exported)
    assert (exported / "model.safetensors").stat().st_mtime_ns == before, "it was written again"
    assert measured["max_difference"] <= TOLERANCE
    weights, config, _ = read_checkpoint(run)
    tensors = load_file(exported / "model.safetensors")
    assert weights.keys() == tensors.keys()
    assert all(torch.equal(weights[name], tensors[name]) for name in weights)
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == config.vocab_size


def test_the_model_card_has_the_runs_numbers(run, exported):
    card = (exported / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert f"| held-out loss | {result['heldout_loss']:.3f} nats" in card
    assert f"| tokens seen | {result['tokens']:,} |" in card
    assert "| steps | 2 of 2 |" in card
    assert "mlm_probability: 0.3" in card
    assert "trust_remote_code=True" in card


@pytest.mark.usefixtures("skipped_checks")
def test_a_checkpoint_is_found_from_within_its_folder_while_its_run_is_writing(run, exported, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy" / run.name)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    monkeypatch.chdir(copy / "checkpoints")
    to_hf.export_checkpoint(Path("."), tmp_path / "hf")
    assert (tmp_path / "hf/README.md").read_text() == (exported / "README.md").read_text()


def test_bert_becomes_transformers_own(bert):
    run, folder = bert
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model) is BertForMaskedLM
    assert not list(folder.glob("*.py"))
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    assert json.loads((folder / "export.json").read_text())["measured"]["largest_logit"] > 0.1
    weights = read_checkpoint(run)[0]
    back = from_hf.read_model(folder)
    assert back.initialized == back.unused == []
    assert weights.keys() == back.weights.keys()
    assert all(torch.equal(weights[name], back.weights[name]) for name in weights), "ours -> transformers' -> ours"


@pytest.mark.parametrize("flags", [[], ["--with-megabert"]], ids=["trust_remote_code", "megabert"])
def test_a_user_of_transformers_can_do_everything(exported, tmp_path, flags):
    """check_transformers_versions.sh does this and more with several versions, also for transformers' own BERT."""
    command = [sys.executable, "tests/convert/helpers/use_folder.py", str(exported), "--scratch", str(tmp_path), *flags]
    done = run_command(command, preload="transformers", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.code == 0, done.output
    results = json.loads(done.output.strip().splitlines()[-1])
    assert results["pipelines"][0] == 5


# Load transformers and print the class of a folder's config twice, each time in a process that has not loaded megabert.
REGISTER = """
import os, sys
from transformers import AutoConfig
for registration in ("import megabert; megabert.register_auto_classes()", "import megabert.model"):
    assert "megabert" not in sys.modules
    if os.fork() == 0:
        exec(registration)
        print(type(AutoConfig.from_pretrained(sys.argv[1])).__module__, flush=True)
        os._exit(0)
    os.wait()
"""


def test_auto_classes_are_registered_by_a_call_or_by_importing_the_model(exported):
    command = [sys.executable, "tests/helpers/scripts/run_code.py", REGISTER, str(exported)]
    done = run_command(command, preload="transformers")
    assert done.code == 0, done.output
    assert done.output.splitlines() == ["megabert.model.configuration_megabert"] * 2, done.output


def test_an_unknown_attention_implementation_is_named(monkeypatch):
    monkeypatch.delitem(PLANNERS, "sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa', expected one of eager, flash_attention_2"):
        small_model()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    victim = copy / "checkpoints" / "step-00000002" / "state.json"
    victim.write_text(victim.read_text() + " ")
    with pytest.raises(ValueError, match=r"cannot be read: .*state\.json has \d+ bytes, expected \d+"):
        read_checkpoint(copy)


def test_a_folder_that_is_not_an_export_is_not_overwritten(run, tmp_path):
    (tmp_path / "config.json").write_text("another model's")
    with pytest.raises(ValueError, match="is neither empty nor an export"):
        to_hf.export_checkpoint(run, tmp_path)
    assert (tmp_path / "config.json").read_text() == "another model's"


def test_a_missing_checkpoint_is_reported_in_one_line(run_launcher, tmp_path):
    done = run_launcher("convert_to_hf.py", tmp_path, tmp_path / "out")
    assert done.code == 1
    assert done.output.startswith("launch/convert_to_hf.py: ")
    assert "no checkpoint here; expected a run's output folder, " in done.output
    assert ", or a MegaBERT folder, with config.json and weights." in done.output
    assert done.output.count("\n") == 1


@pytest.mark.usefixtures("skipped_checks")
def test_an_import_sends_a_run_to_the_export_whose_folder_it_reads(corpus, tmp_path):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    with pytest.raises(ValueError, match="run: is a run or a checkpoint. launch/convert_to_hf.py makes the folder of"):
        from_hf.import_model(tmp_path / "run", tmp_path / "imported")
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert from_hf.import_model(tmp_path / "hf", tmp_path / "imported").initialized == []


@pytest.mark.usefixtures("skipped_checks")
def test_max_shard_size_is_obeyed_although_weights_are_views_of_one_partition(corpus, tmp_path):
    """With ZeRO 2 in half precision, a rank's fp32 weights are one tensor per parameter group."""
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer, stage=2, half=True)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf", to_hf.ExportOptions(max_shard_size="100KB"))
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) == 2
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= 100_000
    assert sum(sizes) == index["metadata"]["total_size"]
    exported = from_hf.read_model(tmp_path / "hf").weights
    assert all(torch.equal(exported[name], parameter) for name, parameter in small_model().named_parameters())

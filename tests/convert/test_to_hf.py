import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabert.convert import to_hf
from megabert.convert.checkpoint import read_checkpoint
from tests.conftest import pretrain_command, run_command


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Stage 3, whose weights are in pieces; the end-to-end test exports stage 2."""
    out = tmp_path_factory.mktemp("zero3")
    done = run_command(pretrain_command(corpus, out, "--run.max_steps=2", ds_config="zero3"))
    assert done.code == 0, done.output
    return out


def test_every_parameter_is_exported_and_the_gate_passes(run, tmp_path):
    measured = to_hf.export(run, tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
    assert to_hf.export(run, tmp_path / "hf") == measured
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == before
    assert measured["max_difference"] <= to_hf.TOLERANCE
    weights, config, _ = read_checkpoint(run)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == config.vocab_size
    assert "fill-mask" in (tmp_path / "hf" / "README.md").read_text()


def spoil(function):
    """Damage the weights after they are written, before the gate looks."""

    def write_folder(out, *rest):
        function_before(out, *rest)
        path = out / "model.safetensors"
        save_file(function(load_file(path)), path, metadata={"format": "pt"})

    function_before = to_hf.write_folder
    return write_folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w | {"decoder.bias": w["decoder.bias"] + 0.1}, "logits differ by"),
        (
            lambda w: {name: t for name, t in w.items() if name != "transform.dense.bias"},
            "weights do not match.*missing",
        ),
        (lambda w: w | {"extra": torch.zeros(1)}, "weights do not match.*unexpected"),
    ],
)
def test_a_failed_gate_leaves_nothing(run, tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(to_hf, "write_folder", spoil(damage))
    with pytest.raises(ValueError, match=f"failed its check and was removed: .*{message}"):
        to_hf.export(run, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    victim = copy / "checkpoints" / "step-00000002" / "state.json"
    victim.write_text(victim.read_text() + " ")
    with pytest.raises(ValueError, match=r"not exported: .*state\.json has \d+ bytes, expected \d+"):
        read_checkpoint(copy)


def test_a_folder_of_something_else_is_not_overwritten(run, tmp_path):
    (tmp_path / "config.json").write_text("another model's")
    with pytest.raises(ValueError, match="is not empty and not an export of ours"):
        to_hf.export(run, tmp_path)
    assert (tmp_path / "config.json").read_text() == "another model's"


def test_a_missing_checkpoint_is_one_line(tmp_path):
    done = run_command([sys.executable, "launch/convert_to_hf.py", str(tmp_path), str(tmp_path / "out")])
    assert done.code == 1
    assert "no checkpoint here" in done.output
    assert "Traceback" not in done.output

"""Exports, and the gate that they must pass."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from megabert.convert import from_hf, gate, to_hf, to_onnx
from megabert.convert.checkpoint import read_checkpoint
from megabert.convert.to_hf import Wish
from megabert.model.attention import PLANNERS
from tests.conftest import REPOSITORY, pretrain_command, run_command
from tests.convert.checkpoints import write_checkpoint
from tests.convert.small import BERT, small_model

LAUNCHER = [sys.executable, "launch/convert_to_hf.py"]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Stage 3 on two ranks, whose weights are in pieces; the end-to-end test exports stage 2."""
    out = tmp_path_factory.mktemp("zero3")
    done = run_command(pretrain_command(corpus, out, "--run.max_steps=2", ds_config="zero3", ranks=2))
    assert done.code == 0, done.output
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    to_hf.export(run, out)
    return out


@pytest.fixture(scope="module")
def bert(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """A run of BERT, and its export in several files."""
    folder = tmp_path_factory.mktemp("bert")
    write_checkpoint(folder / "run", small_model(**BERT), corpus.tokenizer)
    to_hf.export(folder / "run", folder / "hf", Wish(max_shard_size="30KB"))
    return folder / "run", folder / "hf"


def test_every_parameter_is_exported_and_the_gate_passes(run, exported):
    before = (exported / "model.safetensors").stat().st_mtime_ns
    measured = to_hf.export(run, exported)
    assert (exported / "model.safetensors").stat().st_mtime_ns == before, "it was written again"
    assert measured["max_difference"] <= gate.TOLERANCE
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


def test_a_checkpoint_is_found_from_within_its_folder_while_its_run_is_writing(run, exported, tmp_path, monkeypatch):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    monkeypatch.chdir(run / "checkpoints")
    to_hf.export(Path("."), tmp_path / "hf")
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
    back = from_hf.read(folder)
    assert back.initialized == back.left_out == []
    assert weights.keys() == back.weights.keys()
    assert all(torch.equal(weights[name], back.weights[name]) for name in weights), "ours -> transformers' -> ours"


@pytest.mark.parametrize("how", [[], ["--with-megabert"]], ids=["trust_remote_code", "megabert"])
def test_a_user_of_transformers_can_do_everything(exported, tmp_path, how):
    """check_transformers_versions.sh does this and more with several versions, and with transformers' own BERT."""
    command = [sys.executable, "tests/convert/hf_user.py", str(exported), str(tmp_path), *how]
    done = run_command(command, HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH=str(REPOSITORY))
    assert done.code == 0, done.output
    facts = json.loads(done.output.strip().splitlines()[-1])
    assert facts["pipelines"][0] == 5


def change(file: str, function):
    """Damage what is written, before the gate looks."""

    def write_folder(out, *rest):
        written = before(out, *rest)
        function(out / file)
        return written

    before = to_hf.write_folder
    return write_folder


def tensors(function):
    return lambda path: save_file(function(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "model.safetensors",
            tensors(lambda w: w | {"decoder.bias": w["decoder.bias"] + 0.1}),
            "parameter decoder.bias is not the checkpoint's",
        ),
        (
            "model.safetensors",
            tensors(lambda w: {name.replace("transform.dense.bias", "extra"): tensor for name, tensor in w.items()}),
            r"weights do not match.*missing_keys.*transform.dense.bias.*unexpected_keys.*extra",
        ),
        (
            "ops.py",
            lambda path: path.write_text(path.read_text().replace("F.gelu(gate) * value", "F.gelu(gate) * value * 1.01")),
            "logits differ by",
        ),
    ],
    ids=["changed", "missing and left over", "another function"],
)  # fmt: skip
def test_a_failed_gate_leaves_nothing(corpus, tmp_path, monkeypatch, file, damage, message):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    monkeypatch.setattr(to_hf, "write_folder", change(file, damage))
    with pytest.raises(ValueError, match=f"hf: the export failed its check and was removed: .*{message}"):
        to_hf.export(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_can_be_verified_later(exported, tmp_path):
    done = run_command([*LAUNCHER, "--verify-only", str(exported)])
    assert done.code == 0, done.output
    assert "logits differ by at most" in done.output
    for file in ("model.safetensors", "layers.py", "tokenizer.json"):
        copy = shutil.copytree(exported, tmp_path / file)
        data = bytearray((copy / file).read_bytes())
        data[-9] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(ValueError, match=f"{file}: was changed since it was exported"):
            gate.verify(copy)
        (copy / file).unlink()
        with pytest.raises(ValueError, match=f"{file}: is missing"):
            gate.verify(copy)
    with pytest.raises(ValueError, match=r"has no export.json and gate.safetensors"):
        gate.verify(tmp_path)


def test_verifying_runs_no_code_from_elsewhere(exported, tmp_path):
    for entry in ("someone/else--modeling.Model", "../evil.Model", "os.path.join", 3, "absent.Model"):
        copy = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        config = json.loads((copy / "config.json").read_text())
        config["auto_map"]["AutoModelForMaskedLM"] = entry
        (copy / "config.json").write_text(json.dumps(config))
        receipt = json.loads((copy / "export.json").read_text())
        receipt["files"]["config.json"] = gate.file_hash(copy / "config.json")
        (copy / "export.json").write_text(json.dumps(receipt))
        with pytest.raises(ValueError, match="expected module.Class of this folder|absent.py: no such file"):
            gate.verify(copy)


def test_onnx_gives_the_same_answers(corpus, tmp_path):
    """Texts of several lengths, one by one and together, asked of transformers and of onnxruntime."""
    import onnxruntime

    run, out = tmp_path / "run", tmp_path / "hf"
    write_checkpoint(run, small_model(), corpus.tokenizer)
    done = run_command([*LAUNCHER, str(run), str(out), "--onnx"])
    assert done.code == 0, done.output
    assert "onnx/model.onnx: its logits differ by at most" in done.output
    import megabert  # noqa: F401 (loads the folder without its code)

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForMaskedLM.from_pretrained(out).eval()
    session = onnxruntime.InferenceSession(out / to_onnx.FILE)
    questions = [
        "the [MASK] of the module",
        "Returns [MASK].",
        "a list of [MASK], which are not " + "very " * 9 + "long",
    ]
    for texts in (questions, *([question] for question in questions)):
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        feed = {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
        (got,) = session.run(["logits"], feed)
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        real = feed["attention_mask"].astype(bool)
        np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-4)
        asked = feed["input_ids"] == tokenizer.mask_token_id
        assert (got[asked].argmax(-1) == expected[asked].argmax(-1)).all()


def test_onnx_of_learned_positions_and_plain_gelu(tmp_path):
    import onnxruntime

    model = small_model(**BERT).eval()
    to_onnx.write_onnx(model, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / to_onnx.FILE)
    for shape in ((1, 1), (3, 40)):
        ids, mask = torch.randint(5, 800, shape), torch.ones(shape, dtype=torch.int64)
        mask[-1, shape[1] // 2 + 1 :] = 0
        (got,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(ids, mask).logits
        torch.testing.assert_close(torch.from_numpy(got)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def test_onnx_without_its_packages_is_one_line(monkeypatch):
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--onnx needs onnx, onnxscript, onnxruntime: pip install 'megabert\[onnx\]'"):
        to_onnx.check_installed()


def test_auto_classes_are_registered_when_transformers_came_first(exported):
    """megabert first is how hf_user.py does it."""
    code = (
        "import transformers.models.auto.modeling_auto, megabert; from transformers import AutoConfig; "
        f"print(type(AutoConfig.from_pretrained({str(exported)!r})).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "megabert.model.configuration_megabert"


def test_an_attention_that_the_model_lacks_is_named(monkeypatch):
    monkeypatch.delitem(PLANNERS, "sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa', expected one of eager, flash_attention_2"):
        small_model()


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
    done = run_command([*LAUNCHER, str(tmp_path), str(tmp_path / "out")])
    assert done.code == 1
    assert "no checkpoint here" in done.output
    assert "Traceback" not in done.output

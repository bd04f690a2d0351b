"""The gate that every export must pass, and its record, with which it can be repeated."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megabert.convert import to_hf
from megabert.convert.check import export_check
from megabert.convert.to_hf import Wish
from tests.conftest import run_command
from tests.convert.checkpoints import write_checkpoint
from tests.convert.small import small_model

LAUNCHER = [sys.executable, "launch/convert_to_hf.py"]


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


def other_pieces(raw: dict) -> dict:
    """Of a unigram tokenizer.json: the pieces after the special ones in another order."""
    pieces = raw["model"]["vocab"]
    return raw | {"model": raw["model"] | {"vocab": pieces[:10] + pieces[:9:-1]}}


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
        (
            "tokenizer.json",
            lambda path: path.write_text(json.dumps(other_pieces(json.loads(path.read_text())))),
            "the tokenizer makes .*input_ids",
        ),
    ],
    ids=["changed", "missing and left over", "another function", "another tokenizer"],
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
            export_check.verify(copy)
        (copy / file).unlink()
        with pytest.raises(ValueError, match=f"{file}: is missing"):
            export_check.verify(copy)
    with pytest.raises(ValueError, match=r"has no export.json and export_check.safetensors of ours"):
        export_check.verify(tmp_path)


def test_verifying_runs_no_code_from_elsewhere(exported, tmp_path):
    for entry in ("someone/else--modeling.Model", "../evil.Model", "os.path.join", 3, "absent.Model"):
        copy = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        config = json.loads((copy / "config.json").read_text())
        config["auto_map"]["AutoModelForMaskedLM"] = entry
        (copy / "config.json").write_text(json.dumps(config))
        receipt = json.loads((copy / "export.json").read_text())
        receipt["files"]["config.json"] = export_check.file_sha256(copy / "config.json")
        (copy / "export.json").write_text(json.dumps(receipt))
        with pytest.raises(ValueError, match="expected module.Class of this folder|absent.py: no such file"):
            export_check.verify(copy)


@pytest.fixture
def quick(monkeypatch) -> list[Path]:
    """The folders that the gate was asked about; it says yes, and takes no time."""
    asked = []

    def run(folder: Path) -> dict:
        asked.append(folder)
        return {"max_difference": 0.0, "transformers": "0"}

    monkeypatch.setattr(export_check, "run", run)
    return asked


def test_an_export_is_reused_only_if_every_file_is_as_it_was(corpus, tmp_path, quick):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    first = to_hf.export(tmp_path / "run", tmp_path / "hf")
    assert to_hf.export(tmp_path / "run", tmp_path / "hf") == first | {"reused": True}
    assert len(quick) == 1
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert to_hf.export(tmp_path / "run", tmp_path / "hf") == first
    assert weights.read_bytes() == whole
    (tmp_path / "hf" / "config.json").unlink()
    assert to_hf.export(tmp_path / "run", tmp_path / "hf") == first
    assert len(quick) == 3
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt: was added to the export that is there, and would be lost"):
        to_hf.export(tmp_path / "run", tmp_path / "hf")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_an_average_is_of_the_checkpoints_that_are_there_now(corpus, tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, small_model(step), corpus.tokenizer, step=step)
    prints = {to_hf.export_fingerprint(tmp_path, Wish(average=count)) for count in (1, 2)}
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    write_checkpoint(tmp_path, small_model(3), corpus.tokenizer, step=1)
    again = [to_hf.export_fingerprint(tmp_path, Wish(average=count)) for count in (1, 2)]
    assert again[0] in prints
    assert again[1] not in prints


def test_what_is_added_to_an_export_is_found(exported, tmp_path):
    for name in ("adapter_config.json", "onnx/model.onnx", "pytorch_model.bin"):
        copy = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        for note in (".gitattributes", ".cache/huggingface/download", "README.md"):
            (copy / note).parent.mkdir(parents=True, exist_ok=True)
            (copy / note).write_text("{}")
        receipt = export_check.read_receipt(copy)
        assert receipt
        assert export_check.difference(copy, receipt) is None
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name}: was added since it was exported"):
            export_check.verify(copy)
        (copy / name).unlink()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["tokenizer.T", None]}},
            "has auto_map, which names code",
        ),
        ("config.json", {"custom_pipelines": {"x": {"impl": "x.Y"}}}, "has custom_pipelines, which names code"),
        ("config.json", {"quantization_config": {"quant_method": "x"}}, "has a quantization_config"),
        ("export.json", {"texts": None}, None),
    ],
)
def test_nothing_but_the_model_may_name_code(exported, tmp_path, file, changes, message):
    copy = shutil.copytree(exported, tmp_path / "copy")
    raw = json.loads((copy / file).read_text()) | changes
    if message is None:
        del raw["texts"]
        message = "was exported by an older version"
    (copy / file).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        export_check.verify(copy)


def test_a_link_out_of_an_export_is_refused(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "layers.py").rename(tmp_path / "layers.py")
    (copy / "layers.py").symlink_to(tmp_path / "layers.py")
    with pytest.raises(ValueError, match=r"layers.py: is a link to .*, outside its folder"):
        export_check.verify(copy)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"files": 3, "checkpoint": "x"}', '{"files": {"a": 1}, "parameters": {}}']
)
def test_an_export_json_of_somebody_else_is_no_receipt(corpus, tmp_path, text):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "export.json").write_text(text)
    with pytest.raises(ValueError, match="is not empty and not an export of ours; choose another folder"):
        to_hf.export(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"has no export.json and export_check.safetensors of ours"):
        export_check.verify(tmp_path / "hf")
    assert (tmp_path / "hf" / "export.json").read_text() == text


def test_an_export_may_be_written_where_a_link_leads(corpus, tmp_path, quick):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to("disk/hf")  # which is not there yet
    for _ in range(2):
        to_hf.export(tmp_path / "run", tmp_path / "hf")
        assert (tmp_path / "hf").is_symlink()
        assert (tmp_path / "disk" / "hf" / "config.json").is_file()
        (tmp_path / "hf" / "config.json").write_text("{}")
    assert len(quick) == 2
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]

"""The check that every export must pass, and its record, from which the check can be repeated."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megabert.convert import to_hf
from megabert.convert.check import export_check, export_record
from megabert.convert.deepspeed_checkpoint import find_checkpoints
from megabert.convert.folder_to_hf import export_folder
from megabert.convert.from_hf import import_model
from megabert.convert.hf import writer
from megabert.convert.targets import compared_texts
from megabert.convert.to_hf import ExportOptions
from megabert.files.checkpoint_format import MANIFEST
from megabert.files.disk import explain
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.folders import edit_json
from tests.convert.helpers.small_model import small_model
from tests.convert.helpers.wordpiece import SPECIALS, wordpiece
from tests.helpers import warm
from tests.model.helpers.architectures import ARCHITECTURES

RUN_CODE = warm.REPOSITORY / "tests/helpers/scripts/run_code.py"


def edit_tensors(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda path: save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_text(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda path: path.write_text(change(path.read_text()))


def reorder_vocabulary(text: str) -> str:
    """Reverse the tokens of a unigram tokenizer.json after the special ones."""
    raw = json.loads(text)
    tokens = raw["model"]["vocab"]
    return json.dumps(raw | {"model": raw["model"] | {"vocab": tokens[:10] + tokens[:9:-1]}})


# Each damage: the file, what is done to it, and what the check says.
DAMAGES = {
    "changed": (
        "model.safetensors",
        edit_tensors(lambda weights: weights | {"decoder.bias": weights["decoder.bias"] + 0.1}),
        "parameter decoder.bias differs from the checkpoint's",
    ),
    "renamed": (
        "model.safetensors",
        edit_tensors(lambda weights: {name.replace("transform.dense.bias", "extra"): t for name, t in weights.items()}),
        r"weights do not match.*missing_keys.*transform.dense.bias.*unexpected_keys.*extra",
    ),
    "another-function": (
        "ops.py",
        edit_text(lambda code: code.replace("F.gelu(gate) * value", "F.gelu(gate) * value * 1.01")),
        "logits differ by",
    ),
    "another-tokenizer": ("tokenizer.json", edit_text(reorder_vocabulary), "the tokenizer gives .*input_ids"),
}


def test_every_kind_of_damage_fails_the_check(exported, tmp_path):
    for name, (file, damage, _) in DAMAGES.items():
        damage(shutil.copytree(exported, tmp_path / name) / file)
    messages = check_folders([tmp_path / name for name in DAMAGES], tmp_path)
    for message, (_, _, expected) in zip(messages, DAMAGES.values(), strict=True):
        assert re.search(expected, message)


CHECK_SEVERAL = """
import runpy, sys
from pathlib import Path
check = runpy.run_path(sys.argv[1])["main"]
for folder in sys.argv[2:]:
    try:
        check(Path(folder))
        print("passed")
    except SystemExit as end:
        print(end.code)
"""


def check_folders(folders: list[Path], scratch: Path) -> list[str]:
    """Check folders in a process without megabert. Returns what it says of each."""
    environment = os.environ | {"HF_MODULES_CACHE": str(scratch / "modules")}
    words = [RUN_CODE, CHECK_SEVERAL, export_check.SUBPROCESS_SCRIPT, *folders]
    done = warm.run_check([sys.executable, "-P", *map(str, words)], scratch, environment)
    messages = done.stdout.splitlines()
    assert len(messages) == len(folders), done.stderr
    return messages


def test_another_window_than_the_published_one_fails_the_check(tmp_path, skipped_checks):
    """With a tokenizer that splits no word, which makes the shortest inputs."""
    sizes = {"num_attention_heads": 2, "local_attention_window": 128, "max_position_embeddings": 512}
    model = small_model(**ARCHITECTURES["modernbert"] | sizes)
    write_checkpoint(tmp_path / "run", model, write_tokenizer_of_words(tmp_path / "tokenizer"))
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    windows = (128, 256, 100)
    for window in windows:
        config = shutil.copytree(tmp_path / "hf", tmp_path / str(window)) / "config.json"
        edit_json(config, local_attention=window)
    messages = check_folders([tmp_path / str(window) for window in windows], tmp_path)
    assert messages[0] == "passed"
    assert all(message.startswith("logits differ by") for message in messages[1:]), messages


# What is changed in a folder before its import: settings of its tokenizer, and of its config.
HABITS = {
    "pads on the left": ({"padding_side": "left"}, {}),
    "cuts on the left": ({"truncation_side": "left", "model_max_length": 12}, {}),
    "asks for no mask": ({"model_input_names": ["input_ids"]}, {}),
    "pads with another token than the model": ({}, {"pad_token_id": 7}),
    "pads, and the model names no token": ({}, {"pad_token_id": None}),
}


def test_habits_of_a_tokenizer_do_not_fail_the_check(tmp_path, skipped_checks):
    """Those of other programs are kept, and the check's texts are padded and cut as its expected outputs were."""
    tokenizer = write_tokenizer_of_words(tmp_path / "tokenizer")
    sizes = {"vocab_size": 832, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    model = transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(**sizes, **ids, intermediate_size=40, max_position_embeddings=64)
    )
    for name, (settings, config) in HABITS.items():
        source, ours = tmp_path / "in" / name, tmp_path / "ours" / name
        model.save_pretrained(source)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / file, source / file)
        edit_json(source / "tokenizer_config.json", **settings)
        edit_json(source / "config.json", **config)
        import_model(source, ours)
        export_folder(ours, tmp_path / name, ExportOptions(max_length=settings.get("model_max_length")))
        kept = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings.items() <= kept.items()
    messages = check_folders([tmp_path / name for name in HABITS], tmp_path)
    assert dict.fromkeys(HABITS, "passed") == dict(zip(HABITS, messages, strict=True))
    whole, cut = (load_file(tmp_path / name / "export_check.safetensors")["input_ids"] for name in list(HABITS)[:2])
    assert cut.shape[1] == 12 < whole.shape[1]
    assert cut[0].tolist() == whole[0][whole[0] != 0].tolist()[-12:]


@pytest.mark.parametrize(("token", "expected"), [("<mask>", "<mask>"), ({"content": "[M]"}, "[M]"), (None, "[MASK]")])
def test_the_checks_texts_have_the_folders_own_mask_token(tmp_path, token, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": token}))
    texts, second = export_record.check_texts(tmp_path)
    assert [expected in text for text in texts] == [False, False, False, True]
    assert second == texts[::-1]
    assert expected == "[MASK]" or not any("[MASK]" in text for text in texts)


def test_a_full_disk_is_an_error_of_the_system_at_every_file_of_tensors(tmp_path, monkeypatch):
    """That of safetensors is another class, which commands do not print as one line."""
    write_checkpoint(tmp_path / "run", small_model(), write_tokenizer_of_words(tmp_path / "tokenizer"))
    out, full, save = tmp_path / "hf", [], writer.save_file

    def save_or_fail(tensors: dict, path: Path, **more: object) -> None:
        if path.name in full:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, **more)

    monkeypatch.setattr(writer, "save_file", save_or_fail)
    monkeypatch.setattr(compared_texts, "NUM_TEXTS", 12)
    for name in ("export_check.safetensors", "target_check.safetensors", "model.safetensors"):
        full[:] = [name]
        with pytest.raises(OSError, match=name) as raised:
            to_hf.export_checkpoint(tmp_path / "run", out, ExportOptions(targets=("sentence-transformers",)))
        assert explain(raised.value).startswith(f"{out / name}: No space left on device. Free some space and run")
        assert not out.exists()


def write_tokenizer_of_words(folder: Path) -> Path:
    splitter = wordpiece(SPECIALS)
    words = {
        word for text in export_record.CHECK_TEXTS for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text.lower())
    }
    tokenizer = wordpiece([*SPECIALS, *sorted(words)])
    tokenizer.add_special_tokens(SPECIALS)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{special[1:-1].lower()}_token": special for special in SPECIALS}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | roles))
    return folder


def test_an_export_that_fails_its_check_is_removed(corpus, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    write_folder = to_hf.write_folder

    def write_damaged_folder(out: Path, *rest):
        written = write_folder(out, *rest)
        file, damage, _ = DAMAGES["changed"]
        damage(out / file)
        return written

    monkeypatch.setattr(to_hf, "write_folder", write_damaged_folder)
    message = "hf: the export failed its check and was removed: parameter decoder.bias differs from the checkpoint's"
    with pytest.raises(ValueError, match=message):
        to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_can_be_verified_later(run_launcher, exported, tmp_path):
    done = run_launcher("convert_to_hf.py", "--verify-only", exported)
    assert done.code == 0, done.output
    assert "logits differ by at most" in done.output
    for file in ("model.safetensors", "layers.py", "tokenizer.json"):
        copy = shutil.copytree(exported, tmp_path / file)
        data = bytearray((copy / file).read_bytes())
        data[-9] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(ValueError, match=f"{file}: was changed since the folder was written"):
            export_check.verify(copy)
        (copy / file).unlink()
        with pytest.raises(ValueError, match=f"{file}: is missing"):
            export_check.verify(copy)
    with pytest.raises(ValueError, match=r"has no export.json by MegaBERT"):
        export_check.verify(tmp_path)


def test_verifying_runs_no_code_from_elsewhere(exported, tmp_path):
    for entry in ("someone/else--modeling.Model", "../evil.Model", "os.path.join", 3, "absent.Model"):
        copy = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        config = json.loads((copy / "config.json").read_text())
        config["auto_map"]["AutoModelForMaskedLM"] = entry
        (copy / "config.json").write_text(json.dumps(config))
        record = json.loads((copy / "export.json").read_text())
        record["files"]["config.json"] = export_record.file_sha256(copy / "config.json")
        (copy / "export.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="expected module.Class of this folder|absent.py: no such file"):
            export_check.verify(copy)


def test_an_export_is_reused_only_if_every_file_is_unchanged(corpus, tmp_path, skipped_checks):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    first = to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf") == first | {"reused": True}
    assert len(skipped_checks) == 1
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf") == first
    assert weights.read_bytes() == whole
    (tmp_path / "hf" / "config.json").unlink()
    assert to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf") == first
    assert len(skipped_checks) == 3
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes.txt: was added to the export there and would be lost"):
        to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_a_fingerprint_depends_on_every_averaged_checkpoint(corpus, tmp_path):
    def fingerprint(average: int) -> str:
        manifests = [folder / MANIFEST for folder in find_checkpoints(tmp_path, average)]
        return to_hf.fingerprint_export(manifests, ExportOptions(average=average))

    for step in (1, 2):
        write_checkpoint(tmp_path, small_model(step), corpus.tokenizer, step=step)
    before = [fingerprint(1), fingerprint(2)]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    write_checkpoint(tmp_path, small_model(3), corpus.tokenizer, step=1)
    assert fingerprint(1) == before[0]
    assert fingerprint(2) not in before


def test_a_file_that_was_added_to_an_export_is_found(exported, tmp_path):
    for name in ("adapter_config.json", "onnx/model.onnx", "pytorch_model.bin"):
        copy = shutil.copytree(exported, tmp_path / "copy", dirs_exist_ok=True)
        for harmless in (".gitattributes", ".cache/huggingface/download", "README.md"):
            (copy / harmless).parent.mkdir(parents=True, exist_ok=True)
            (copy / harmless).write_text("{}")
        record = export_record.read_record(copy)
        assert record
        assert export_record.find_change(copy, record) is None
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name}: was added since the folder was written"):
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
    ],
)
def test_nothing_but_the_models_auto_map_may_name_code(exported, tmp_path, file, changes, message):
    copy = shutil.copytree(exported, tmp_path / "copy")
    edit_json(copy / file, **changes)
    with pytest.raises(ValueError, match=message):
        export_check.verify(copy)


def test_an_export_of_another_format_version_is_refused_but_can_be_replaced(corpus, tmp_path, skipped_checks):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    export_json = tmp_path / "hf" / "export.json"
    record = json.loads(export_json.read_text())
    assert record["format_version"] == export_record.FORMAT_VERSION == 1
    edit_json(export_json, format_version=2)
    with pytest.raises(ValueError, match="export.json: has format_version 2, this .* reads version 1. Update"):
        export_check.verify(tmp_path / "hf")
    # Exports from before format_version: the first lacked the texts, too.
    for lacking in (["format_version"], ["format_version", "texts"]):
        older = {name: value for name, value in record.items() if name not in lacking}
        export_json.write_text(json.dumps(older | {"checkpoint": "that of an older version"}))
        with pytest.raises(ValueError, match="was exported by an older version of MegaBERT, .* Export it again"):
            export_check.verify(tmp_path / "hf")
        to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
        assert json.loads(export_json.read_text())["format_version"] == 1
    assert len(skipped_checks) == 3


def test_a_link_out_of_an_export_is_refused(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "layers.py").rename(tmp_path / "layers.py")
    (copy / "layers.py").symlink_to(tmp_path / "layers.py")
    with pytest.raises(ValueError, match=r"layers.py: is a link to .*, outside its folder"):
        export_check.verify(copy)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"files": 3, "checkpoint": "x"}', '{"files": {"a": 1}, "parameters": {}}']
)
def test_an_export_json_of_another_program_is_not_an_export_record(corpus, tmp_path, text):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "export.json").write_text(text)
    with pytest.raises(ValueError, match="is neither empty nor an export; choose another folder"):
        to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"has no export.json by MegaBERT"):
        export_check.verify(tmp_path / "hf")
    assert (tmp_path / "hf" / "export.json").read_text() == text


def test_an_export_may_be_written_through_a_link(corpus, tmp_path, skipped_checks):
    write_checkpoint(tmp_path / "run", small_model(), corpus.tokenizer)
    (tmp_path / "disk").mkdir()
    # Which does not exist yet.
    (tmp_path / "hf").symlink_to("disk/hf")
    for _ in range(2):
        to_hf.export_checkpoint(tmp_path / "run", tmp_path / "hf")
        assert (tmp_path / "hf").is_symlink()
        assert (tmp_path / "disk" / "hf" / "config.json").is_file()
        (tmp_path / "hf" / "config.json").write_text("{}")
    assert len(skipped_checks) == 2
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]

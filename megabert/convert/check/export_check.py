"""The gate: an exported folder must give the checkpoint's ids and logits in a process that has no megabert.

An export records, beside the weights, what it must reproduce: gate.safetensors holds the token ids of real text, by the
checkpoint's tokenizer, and the checkpoint's logits there; export.json the texts, and the sha256 of every parameter and of every
file. So it can be repeated anywhere, later.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from megabert.convert.hf.folder import save_tensors
from megabert.convert.hf.reading import check_code_stays_inside, read_json
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.checkpoint_format import files_of
from megabert.files.hashing import file_sha256
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

RECEIPT = "export.json"
RECORDED = "gate.safetensors"
PROCESS = Path(__file__).with_name("subprocess_check.py")
TOLERANCE = 1e-5  # fp32 logits, of the largest one where that is above 1
ONNX_TOLERANCE = 1e-4  # onnxruntime's kernels are others
FREE_TO_EDIT = {RECEIPT, "README.md"}

# Real sentences of several lengths; what they say does not matter, that they are text does, and that tokenizers differ on them:
# cases, accents, other scripts, numbers, spaces, the mask.
TEXTS = (
    "Return a new array of given shape and type, filled with zeros.",
    "The optimizer's learning rate.",
    "If the file does not exist, an error is raised; otherwise its contents are read line by line, decoded as UTF-8, and "
    "passed to the function, which must not modify them. Lines that begin with a number sign are comments.",
    "The [MASK] of M\u00fcnchen is na\u00efve:  3.14 \u2264 \u03c0? \u6771\u4eac, don't_stop\u2028(e-mail) \U0001f600!",
)


def build(weights: dict[str, Tensor], config: MegaBertConfig) -> MegaBertForMaskedLM:
    """The model around these weights, which are not copied. Raises ValueError unless they are exactly its parameters."""
    with torch.device("meta"):
        model = MegaBertForMaskedLM(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if expected.keys() != weights.keys():
        raise ValueError(f"the weights' names are not the model's: {sorted(expected.keys() ^ weights.keys())}.")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, but the config says {tuple(shape)}.")
    model.load_state_dict(weights, strict=False, assign=True)
    model.decoder.weight = cast(nn.Parameter, model.bert.embeddings.word_embeddings.weight)
    return model.eval().requires_grad_(False)


def record(model: MegaBertForMaskedLM, folder: Path, checkpoint: Path) -> None:
    """Write down what the folder must reproduce: the ids of real text by the checkpoint's tokenizer, and the logits there."""
    tokenizer = Tokenizer.from_file(str(checkpoint / TOKENIZER))
    tokenizer.enable_padding(pad_id=model.config.pad_token_id)
    tokenizer.enable_truncation(model.config.max_position_embeddings)
    encodings = tokenizer.encode_batch(list(TEXTS))
    input_ids = torch.tensor([encoding.ids for encoding in encodings])
    attention_mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        logits = model(input_ids, attention_mask).logits[attention_mask.bool()]  # (T, V)
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "logits": logits.contiguous()}
    save_tensors(tensors, folder / RECORDED)
    shutil.copymode(folder / TOKENIZER, folder / RECORDED)


def write_receipt(folder: Path, checkpoint: str, max_length: int, parameters: dict[str, Tensor]) -> None:
    """checkpoint: the fingerprint of what was exported; max_length: where texts are cut; parameters: by their names there."""
    receipt = {
        "checkpoint": checkpoint,
        "tolerance": TOLERANCE,
        "onnx_tolerance": ONNX_TOLERANCE,
        "texts": TEXTS,
        "max_length": max_length,
        "files": {name: file_sha256(folder / name) for name in files_of(folder) if name not in FREE_TO_EDIT},
        "parameters": {name: hashlib.sha256(tensor.numpy().data).hexdigest() for name, tensor in parameters.items()},
    }
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")


def check(folder: Path, name: str) -> dict[str, Any]:
    """Pass a folder just written through the gate, and note in its receipt what was measured. name: for the error."""
    try:
        measured = run(folder)
    except ValueError as mistake:
        raise ValueError(f"{name}: the export failed its check and was removed: {mistake}") from mistake
    receipt = read_json(folder / RECEIPT) | {"measured": measured}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")
    return measured


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """What an export of ours says about itself, or None; other programs have an export.json too."""
    if not (folder / RECEIPT).is_file():
        return None
    try:
        receipt = read_json(folder / RECEIPT)
    except ValueError:
        return None
    hashes = [receipt.get("files"), receipt.get("parameters")]
    ours = all(isinstance(part, dict) and all(isinstance(digest, str) for digest in part.values()) for part in hashes)
    return receipt if ours and isinstance(receipt.get("checkpoint"), str) else None


def added_files(folder: Path, receipt: dict[str, Any]) -> list[str]:
    """What is in the folder, and the export did not write."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return sorted(files - receipt["files"].keys() - FREE_TO_EDIT)


def difference(folder: Path, receipt: dict[str, Any]) -> str | None:
    """Compare every file's hash. Returns what is wrong with the first that is not as it was exported, or None."""
    for name, digest in receipt["files"].items():
        if not (folder / name).is_file():
            return f"{folder / name}: is missing; it was exported"
        if file_sha256(folder / name) != digest:
            return f"{folder / name}: was changed since it was exported"
    # A download's own notes, such as .cache/huggingface and .gitattributes, which nothing loads.
    if added := [name for name in added_files(folder, receipt) if not name.startswith(".")]:
        return f"{folder / added[0]}: was added since it was exported"
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Repeat the gate on an exported folder. Returns what it measured; raises ValueError if anything is not as it was."""
    receipt = read_receipt(folder)
    if receipt is None or not (folder / RECORDED).is_file():
        raise ValueError(
            f"{folder}: has no {RECEIPT} and {RECORDED} of ours, so there is nothing to compare with. Only folders that "
            "launch/convert_to_hf.py wrote can be verified."
        )
    if "texts" not in receipt:
        raise ValueError(f"{folder}: was exported by an older version, which recorded less. Export it again.")
    check_code_stays_inside(folder)
    if problem := difference(folder, receipt):
        raise ValueError(f"{problem}.")
    try:
        return run(folder)
    except ValueError as mistake:
        raise ValueError(f"{folder}: failed its check: {mistake}") from mistake


def run(folder: Path) -> dict[str, Any]:
    """Compare the folder, loaded without megabert, with what it records. Raises ValueError if they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        # transformers copies a folder's code into this cache, keyed by the folder's name alone.
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", str(PROCESS), str(folder.resolve())]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ValueError(reason)
    return json.loads(done.stdout.strip().splitlines()[-1])

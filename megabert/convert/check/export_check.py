"""Check that an exported folder gives the checkpoint's ids and logits in a process that cannot import megabert."""

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
from transformers import PreTrainedModel

from megabert.convert.check import export_record
from megabert.convert.check.export_record import RECORD, Measurements, check_texts, token_of
from megabert.convert.hf.heads import ANSWERS, CHOICE
from megabert.convert.hf.reader import check_code_stays_inside, read_json
from megabert.convert.hf.writer import save_tensors
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.process.subprocesses import end_with_parent, last_line, why_ended

# The checkpoint's token ids and logits for a few texts. With export.json, the check can be repeated on any machine.
EXPECTED_OUTPUTS = "export_check.safetensors"
SUBPROCESS_SCRIPT = Path(__file__).with_name("subprocess_check.py")


def build_model(weights: dict[str, Tensor], config: MegaBertConfig) -> MegaBertForMaskedLM:
    """Build a model around weights without copying them. Raises ValueError unless they are exactly its parameters."""
    with torch.device("meta"):
        model = MegaBertForMaskedLM(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if expected.keys() != weights.keys():
        different = sorted(expected.keys() ^ weights.keys())
        raise ValueError(f"the weights do not have the names of the model's parameters: {different}.")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, but the config implies {tuple(shape)}.")
    model.load_state_dict(weights, strict=False, assign=True)
    model.decoder.weight = cast(nn.Parameter, model.bert.embeddings.word_embeddings.weight)
    return model.eval().requires_grad_(False)


def write_expected_outputs(
    model: PreTrainedModel, folder: Path, checkpoint: Path, max_length: int | None = None, pairs: bool = False
) -> None:
    """Write the token ids of the check's texts, from the checkpoint's tokenizer, and the model's logits for them.

    The folder must have its tokenizer, whose settings say which token pads and at which end a text is cut. max_length:
    tokens at which a text is cut, by default the model's maximum; pairs: whether the texts are pairs.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / TOKENIZER))
    settings = read_json(folder / TOKENIZER_CONFIG)
    # The config of a model may name another token than its tokenizer pads with, or none.
    pad = token_of(settings, "pad")
    tokenizer.enable_padding(pad_id=(tokenizer.token_to_id(pad) if pad else None) or 0)
    direction = "left" if settings.get("truncation_side") == "left" else "right"
    tokenizer.enable_truncation(max_length or model.config.max_position_embeddings, direction=direction)
    first, second = check_texts(folder)
    texts: Any = list(zip(first, second, strict=True)) if pairs else first
    encodings = tokenizer.encode_batch(texts)
    inputs = {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }
    if pairs and model.config.type_vocab_size > 1:
        inputs["token_type_ids"] = torch.tensor([encoding.type_ids for encoding in encodings])
    # A config's architectures may name the class that a fine-tuned model began as.
    head = type(model).__name__.removeprefix("MegaBertFor")
    # One question, of which the texts are the choices.
    given = {name: tensor[None] for name, tensor in inputs.items()} if head == CHOICE else inputs
    with torch.no_grad():
        output = model(**given)
    logits = torch.stack([output.start_logits, output.end_logits], dim=-1) if head == ANSWERS else output.logits
    # A model with logits of each token gives them for padding as well, which is left out.
    if logits.dim() == 3:
        logits = logits[inputs["attention_mask"].bool()]  # (T, V)
    save_tensors(inputs | {"logits": logits.contiguous()}, folder / EXPECTED_OUTPUTS)
    shutil.copymode(folder / TOKENIZER, folder / EXPECTED_OUTPUTS)


def check_new_export(folder: Path, name: str) -> Measurements:
    """Check a folder that has just been written, and add the measurements to its export.json.

    name: the export's final path, for the message. Raises ValueError if the check fails.
    """
    try:
        measured = run_in_subprocess(folder)
    except ValueError as error:
        raise ValueError(f"{name}: the export failed its check and was removed: {error}") from error
    export_record.add_measurements(folder, measured)
    return measured


def verify(folder: Path) -> Measurements:
    """Repeat the check of an exported folder. Raises ValueError if it fails or if any file has changed."""
    record = export_record.read_record(folder)
    if record is None:
        raise ValueError(
            f"{folder}: has no {RECORD} by MegaBERT, so there is nothing to compare with. Only folders that "
            "launch/convert_to_hf.py wrote can be verified."
        )
    export_record.check_version(folder, record)
    check_code_stays_inside(folder)
    if problem := export_record.find_change(folder, record):
        raise ValueError(f"{problem}.")
    try:
        return run_in_subprocess(folder)
    except ValueError as error:
        raise ValueError(f"{folder}: failed its check: {error}") from error


def run_in_subprocess(folder: Path) -> Measurements:
    """Load the folder without megabert and compare it with its record. Raises ValueError if they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        # transformers copies a folder's code into this cache, under the folder's name only.
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", str(SUBPROCESS_SCRIPT), str(folder.resolve())]
        done = subprocess.run(
            command,
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            preexec_fn=end_with_parent,
        )
    if done.returncode:
        raise ValueError(why_ended(done.returncode, done.stderr))
    return json.loads(last_line(done.stdout))

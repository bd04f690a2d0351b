"""Write the config, the modelling code and the weights of a MegaBERT model as a Hugging Face folder."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megabert.convert.hf.reader import CONFIG, SAFETENSORS
from megabert.convert.hf.tokenizer import TOKENIZER_CLASS
from megabert.model.configuration_megabert import MegaBertConfig

MODEL_CODE = Path(__file__).parents[2] / "model"
AUTO_CLASSES = {
    "AutoConfig": "configuration_megabert.MegaBertConfig",
    "AutoModel": "modeling_megabert.MegaBertModel",
    "AutoModelForMaskedLM": "modeling_megabert.MegaBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_megabert.MegaBertForSequenceClassification",
    "AutoModelForMultipleChoice": "modeling_megabert.MegaBertForMultipleChoice",
    "AutoModelForTokenClassification": "modeling_megabert.MegaBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_megabert.MegaBertForQuestionAnswering",
}
MAX_SHARD_SIZE = "5GB"
SHARD_SIZE = re.compile(r"(?=.*[1-9])\d{1,6}(\.\d{1,6})?[KMGT]B")


def write_config(folder: Path, config: MegaBertConfig) -> None:
    """Write config.json and the modelling code that its auto_map names."""
    config.architectures = config.architectures or ["MegaBertForMaskedLM"]
    config.auto_map = dict(AUTO_CLASSES)
    config.tokenizer_class = TOKENIZER_CLASS
    config.save_pretrained(folder)
    for file in sorted(MODEL_CODE.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written, for example because the disk is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # It gives the number of the system's error in words: "File too large (os error 27)".
        number = int(match[1]) if (match := re.search(r"\(os error (\d+)\)", str(error))) else 0
        if number:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise OSError(f"{path}: cannot be written: {error}") from error


def write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write model.safetensors, or several files and an index if it would exceed max_shard_size, such as 5GB.

    Raises OSError if they cannot be written, for example because the disk is full.
    """
    # huggingface_hub's save_torch_state_dict() would put all tensors that share a storage into one file. Weights from
    # ZeRO's partitions are views of a few huge storages, so max_shard_size would have no effect. Meta tensors share
    # none.
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weights.items()}
    pattern = SAFETENSORS.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_tensors({name: weights[name].contiguous() for name in names}, folder / file)
        # safetensors creates files that only their owner can read.
        shutil.copymode(folder / CONFIG, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def check_shard_size(size: str) -> None:
    """Raise ValueError unless write_weights() accepts this max_shard_size."""
    if not SHARD_SIZE.fullmatch(size):
        raise ValueError(f"max_shard_size is {size!r}, expected a number and KB, MB, GB or TB, such as 5GB.")

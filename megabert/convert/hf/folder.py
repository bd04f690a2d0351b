"""A Hugging Face folder of ours: written as transformers writes it."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megabert.convert.hf.reading import CONFIG, SAFETENSORS
from megabert.convert.hf.tokenizer import TOKENIZER_CLASS
from megabert.model.configuration_megabert import MegaBertConfig

MODEL_CODE = Path(__file__).parents[2] / "model"
AUTO_CLASSES = {
    "AutoConfig": "configuration_megabert.MegaBertConfig",
    "AutoModel": "modeling_megabert.MegaBertModel",
    "AutoModelForMaskedLM": "modeling_megabert.MegaBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_megabert.MegaBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_megabert.MegaBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_megabert.MegaBertForQuestionAnswering",
}
SHARD_SIZE = re.compile(r"(?=.*[1-9])\d{1,6}(\.\d{1,6})?[KMGT]B")


def write_config(folder: Path, config: MegaBertConfig) -> None:
    """config.json, and beside it the code that it names."""
    config.architectures = ["MegaBertForMaskedLM"]
    config.auto_map = dict(AUTO_CLASSES)
    config.tokenizer_class = TOKENIZER_CLASS
    config.save_pretrained(folder)
    for file in sorted(MODEL_CODE.glob("*.py")):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError where it does not fit on the disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as mistake:
        raise OSError(f"{path}: cannot be written: {mistake}") from mistake


def write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str) -> None:
    """model.safetensors, or several and an index where it would be larger. max_shard_size: such as 5GB.

    Raises OSError where they do not fit on the disk.
    """
    pattern = SAFETENSORS.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, members in plan.filename_to_tensors.items():
        part = {member: weights[member].contiguous() for member in members}
        save_tensors(part, folder / name)
        shutil.copymode(folder / CONFIG, folder / name)  # safetensors' own lets nobody else read it
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def check_shard_size(size: str) -> None:
    """Raises ValueError unless it is a size that write_weights() can do."""
    if not SHARD_SIZE.fullmatch(size):
        raise ValueError(
            f"the largest size of a weights file is {size!r}, expected a number and KB, MB, GB or TB, such as 5GB."
        )

"""Convert the model that fine-tuning starts from, any checkpoint or BERT-like folder, to one folder in our layout."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.convert.from_hf import read_and_resize, write_folder
from megabert.convert.hf.reader import CONFIG, SAFETENSORS, read_weights
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.hf.writer import save_tensors, write_config, write_weights
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.atomic import replace_folder, staged_folder, write_atomically
from megabert.files.checkpoint_format import find_checkpoint
from megabert.files.hashing import file_sha256, texts_sha256
from megabert.files.json_file import read_json
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.task import Task
from megabert.finetune.training import Backend, build_model
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

# In the folder: which files it was converted from. A record of another version is not used: the folder is made again.
ORIGIN = "origin.json"
FORMAT_VERSION = 2
MODEL_FOLDER = "the folder of a BERT, ModernBERT, GTE or MosaicBERT, with config.json and weights"


class BaseModel(NamedTuple):
    """folder: config.json, weights and tokenizer.json; sha256: one hash of these files."""

    folder: Path
    sha256: str


def prepare_base_model(checkpoint: Path, out: Path) -> BaseModel:
    """Convert a training checkpoint, an export or a BERT-like Hugging Face folder to `out`, or reuse `out`.

    Raises ValueError if `checkpoint` is none of these, or has no tokenizer.
    """
    source = checkpoint if (checkpoint / CONFIG).is_file() else find_checkpoint(checkpoint, or_else=MODEL_FOLDER)
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(source.iterdir()) if path.is_file()
    }
    record = {"format_version": FORMAT_VERSION, "source": str(source.resolve()), "files": files}
    if (prepared := _read_prepared(out, record)) is not None:
        return prepared
    if source.resolve() == out.resolve():
        raise ValueError(f"{checkpoint}: this command writes its base model there. Choose another --out.")
    if out.exists() and not (out / ORIGIN).is_file():
        raise ValueError(
            f"{out}: this command would write its base model there. Choose another --out, or move the folder."
        )
    with staged_folder(out) as folder:
        if (source / CONFIG).is_file():
            write_folder(folder, source, read_and_resize(source))
        else:
            _convert_checkpoint(source, folder)
        if not (folder / TOKENIZER).is_file():
            raise ValueError(
                f"{checkpoint}: has no tokenizer.json and no vocab.txt. Copy the one that it was trained with into the "
                "folder, or convert the folder with launch/convert_from_hf.py --tokenizer."
            )
        sha256 = fingerprint(folder)
        write_atomically(folder / ORIGIN, json.dumps(record | {"sha256": sha256}, indent=1).encode())
        replace_folder(folder, out)
    return BaseModel(out, sha256)


def _read_prepared(out: Path, record: dict[str, Any]) -> BaseModel | None:
    """Return the base model of an earlier command, if it is complete and was made from the same files."""
    try:
        found = read_json(out / ORIGIN)
        sha256 = fingerprint(out)
    except (OSError, ValueError):
        # The base model is missing or incomplete.
        return None
    return BaseModel(out, sha256) if found == record | {"sha256": sha256} else None


def _convert_checkpoint(source: Path, out: Path) -> None:
    weights, config, state = read_checkpoint(source)
    # Padding changes only the speed.
    config.padding = "unpadded"
    write_config(out, config)
    write_weights(out, weights, "5GB")
    copy_tokenizer(source, out, state.max_seq_len)


def fingerprint(folder: Path) -> str:
    """Return one hash of a folder's config, tokenizer and weights.

    Raises ValueError without weights, and OSError without one of the other files.
    """
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder}: has no weights.")
    return texts_sha256(["".join(file_sha256(folder / name) for name in (CONFIG, TOKENIZER, *weights))])


def save_model(model: MegaBertForSequenceClassification, base: Path, out: Path) -> None:
    """Save a fine-tuned model with its classifier, which is needed to label more test sets.

    base: folder of the model that it was fine-tuned from, with config and tokenizer.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with staged_folder(out) as folder:
        save_tensors(weights, folder / SAFETENSORS)
        for name in (CONFIG, TOKENIZER):
            shutil.copyfile(base / name, folder / name)
        replace_folder(folder, out)


def load_model(folder: Path, task: Task, settings: Settings, backend: Backend) -> MegaBertForSequenceClassification:
    """Load a model that save_model wrote, with its classifier. Raises ValueError if a parameter is missing."""
    model = build_model(folder, task, settings, backend, seed=0)
    try:
        model.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        raise ValueError(f"{folder}: its weights are not those of a model for {task.name}: {error}") from error
    return model

"""Where fine-tuning starts: any checkpoint that our model can hold, brought into one folder of ours."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from megabert.convert.deepspeed_checkpoint import read_checkpoint
from megabert.convert.from_hf import read_and_resize, write_folder
from megabert.convert.hf.reader import CONFIG, SAFETENSORS, read_weights
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.hf.writer import write_config, write_weights
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.atomic import staged_folder, write_atomically
from megabert.files.checkpoint_format import find_checkpoint
from megabert.files.hashing import file_sha256
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.task import Task
from megabert.finetune.training import Place, build_model
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

ORIGIN = "origin.json"


class Start(NamedTuple):
    """folder: config.json, weights and tokenizer.json; sha256: of these three."""

    folder: Path
    sha256: str


def prepare(checkpoint: Path, out: Path) -> Start:
    """Bring a training checkpoint, an export, or a BERT-like Hugging Face folder into `out`; reused if it is there.

    Raises ValueError if `checkpoint` is none of these, or has no tokenizer.
    """
    source = checkpoint if (checkpoint / CONFIG).is_file() else _newest(checkpoint)
    origin = {str(path.relative_to(source)): [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(source)}
    record = {"source": str(source.resolve()), "files": origin}
    if (start := _there(out, record)) is not None:
        return start
    if source.resolve() == out.resolve():
        raise ValueError(f"{checkpoint}: is where the start of this command's jobs is written. Choose another --out.")
    if out.exists() and not (out / ORIGIN).is_file():
        raise ValueError(f"{out}: is in the way of the start of this command's jobs. Choose another --out, or move it.")
    with staged_folder(out) as folder:
        if (source / CONFIG).is_file():
            write_folder(folder, source, read_and_resize(source))
        else:
            _write_checkpoint(source, folder)
        if not (folder / TOKENIZER).is_file():
            raise ValueError(f"{checkpoint}: has no tokenizer.json and no vocab.txt.")
        sha256 = fingerprint(folder)
        write_atomically(folder / ORIGIN, json.dumps(record | {"sha256": sha256}, indent=1).encode())
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    return Start(out, sha256)


def _there(out: Path, record: dict[str, Any]) -> Start | None:
    """What an earlier command brought there, if it is of the same files and whole."""
    try:
        found = json.loads((out / ORIGIN).read_bytes())
        sha256 = fingerprint(out)
    except (OSError, ValueError):  # not there, or only a part of it
        return None
    return Start(out, sha256) if found == record | {"sha256": sha256} else None


def _newest(checkpoint: Path) -> Path:
    try:
        return find_checkpoint(checkpoint)
    except ValueError as mistake:
        raise ValueError(
            f"{checkpoint}: neither a checkpoint (a run's folder, or one of its checkpoints/step-... folders) nor a Hugging Face "
            "folder (config.json and weights)."
        ) from mistake


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _write_checkpoint(source: Path, out: Path) -> None:
    weights, config, state = read_checkpoint(source)
    config.padding = "unpadded"  # which changes no output, only what it costs
    write_config(out, config)
    write_weights(out, weights, "5GB")
    copy_tokenizer(source, out, state.max_seq_len)


def fingerprint(folder: Path) -> str:
    """One hash of a folder's config, tokenizer and weights. Raises ValueError without weights, OSError without one of the others."""
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder}: has no weights.")
    hashes = [file_sha256(folder / name) for name in (CONFIG, TOKENIZER, *weights)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def save_model(model: MegaBertForSequenceClassification, start: Path, out: Path) -> None:
    """Keep a fine-tuned model, its classifier too: another task starts from it without that, and it can label more."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with staged_folder(out) as folder:
        save_file(weights, folder / SAFETENSORS)
        for name in (CONFIG, TOKENIZER):
            shutil.copyfile(start / name, folder / name)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)


def load_model(folder: Path, task: Task, settings: Settings, place: Place) -> MegaBertForSequenceClassification:
    """A model that save_model kept, as it was. Raises ValueError if anything of it is missing."""
    model = build_model(folder, task, settings, place, seed=0)
    try:
        model.load_state_dict(read_weights(folder))
    except RuntimeError as mistake:
        raise ValueError(f"{folder}: its weights are not those of a model for {task.name}: {mistake}") from mistake
    return model

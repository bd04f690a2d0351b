"""Where fine-tuning starts: any checkpoint that our model can hold, brought into one folder of ours."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

from megabert.checkpoint_format import file_hash, find_checkpoint
from megabert.convert.checkpoint import read_checkpoint
from megabert.convert.from_hf import read_changed, write
from megabert.convert.hf_folder import write_config, write_weights
from megabert.convert.reading import CONFIG, SAFETENSORS
from megabert.convert.staging import staged
from megabert.convert.tokenizer_files import copy_tokenizer
from megabert.data.manifest import TOKENIZER, write_atomically
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

ORIGIN = "origin.json"


class Start(NamedTuple):
    """folder: config.json, weights and tokenizer.json; sha256: of the weights and the config."""

    folder: Path
    sha256: str


def prepare(checkpoint: Path, out: Path) -> Start:
    """Bring a training checkpoint, an export, or a BERT-like Hugging Face folder into `out`; reused if it is there.

    Raises ValueError if `checkpoint` is none of these, or has no tokenizer.
    """
    source = checkpoint if (checkpoint / CONFIG).is_file() else _newest(checkpoint)
    origin = {str(path.relative_to(source)): [path.stat().st_size, path.stat().st_mtime_ns] for path in _files(source)}
    record = {"source": str(source.resolve()), "files": origin}
    if not (out / ORIGIN).is_file() or json.loads((out / ORIGIN).read_text()) != record:
        if source.resolve() == out.resolve():
            raise ValueError(
                f"{checkpoint}: is where the start of this command's jobs is written. Choose another --out."
            )
        with staged(out) as folder:
            if (source / CONFIG).is_file():
                write(folder, source, read_changed(source))
            else:
                _write_checkpoint(source, folder)
            if not (folder / TOKENIZER).is_file():
                raise ValueError(f"{checkpoint}: has no tokenizer.json and no vocab.txt.")
            write_atomically(folder / ORIGIN, json.dumps(record, indent=1).encode())
            shutil.rmtree(out, ignore_errors=True)
            folder.rename(out)
    return Start(out, fingerprint(out))


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
    """One hash of a folder's config and weights."""
    names = [CONFIG, *sorted(path.name for path in folder.glob("*.safetensors"))]
    if len(names) == 1:
        raise ValueError(f"{folder}: has no weights.")
    return hashlib.sha256("".join(file_hash(folder / name) for name in names).encode()).hexdigest()


def save_encoder(model: MegaBertForSequenceClassification, start: Path, out: Path) -> None:
    """Keep a fine-tuned encoder with its pooler, and without its classifier, for another task to start from."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with staged(out) as folder:
        save_file({name: tensor for name, tensor in weights.items() if name.startswith("bert.")}, folder / SAFETENSORS)
        for name in (CONFIG, TOKENIZER):
            shutil.copyfile(start / name, folder / name)
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)

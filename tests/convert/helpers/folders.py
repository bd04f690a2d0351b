"""Folders to import, and a pickle that runs code when it is loaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megabert.convert.weight_names import from_megabert
from tests.convert.helpers.small_model import SHAPE, small_model


def write_published_mosaicbert(folder: Path, **more: object) -> dict[str, torch.Tensor]:
    """Write one pickle, with `more` in it, and a BERT config, as published. Returns the state dict without `more`."""
    folder.mkdir()
    state = from_megabert(small_model().state_dict(), "mosaicbert")
    torch.save(state | more, folder / "pytorch_model.bin")
    config = SHAPE | {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu"}
    config |= {"alibi_starting_size": 512, "auto_map": {"AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    return state


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damages_of_server_files(target: str) -> dict[str, tuple[Callable[[Path], object], str]]:
    """What may be wrong in the files that TEI and others read beside a target's model, and what is said of each."""

    def edit(file: str, **changes: object) -> Callable[[Path], object]:
        return lambda folder: edit_json(folder / target / file, **changes)

    return {
        "no modules": (lambda folder: (folder / target / "modules.json").unlink(), "modules.json is missing"),
        "a shorter text": (edit("sentence_bert_config.json", max_seq_length=5), "max_seq_length is 5, expected"),
        "a shorter text for the tokenizer": (
            edit("tokenizer_config.json", model_max_length=5), "model_max_length is 5, expected"
        ),
    }  # fmt: skip


class MakesFolder:
    """Creates a folder when it is unpickled, which shows that a pickle was executed."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)

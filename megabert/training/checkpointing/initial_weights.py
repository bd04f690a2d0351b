"""Begin a run with the weights of a folder that launch/convert_from_hf.py or launch/convert_to_hf.py wrote."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.source import Source

TIED = "decoder.weight"  # the word embeddings again
OTHER_HEADS = ("bert.pooler.", "classifier.", "qa_outputs.")  # which pretraining has no use for


def load_initial_weights(model: nn.Module, folder: Path, source: Source) -> None:
    """Give the model a folder's weights, in place. source: of the run's shards, whose tokenizer must be the folder's.

    Raises ValueError if the folder is another kind of model, of another shape, or has another vocabulary.
    """
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    files = sorted(folder.glob("model*.safetensors"))
    if config.get("model_type") != "megabert" or not files:
        raise ValueError(f"model.init_from {folder}: not a folder of ours. Make it one with launch/convert_from_hf.py.")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    weights = {name: t for name, t in weights.items() if name != TIED and not name.startswith(OTHER_HEADS)}
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if different := sorted(weights.keys() ^ wanted.keys()):
        raise ValueError(
            f"model.init_from {folder}: its parameters are not this recipe's; {len(different)} are only in one of them, "
            f"such as {different[0]}. Set model.num_hidden_layers, model.position and model.ffn as in its config.json."
        )
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"model.init_from {folder}: {name} is {tuple(weights[name].shape)}, this recipe's is {tuple(shape)}. Set model as "
                "in its config.json, or change its length or vocabulary with launch/convert_from_hf.py."
            )
    check_vocabulary(folder, source)
    model.load_state_dict(weights, strict=False)


def check_vocabulary(folder: Path, source: Source) -> None:
    """Raises ValueError if a row of the embeddings would mean another piece than it was trained for."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"model.init_from {folder}: has no {TOKENIZER} to compare with the shards'.")
    if hashlib.sha256(path.read_bytes()).hexdigest() == source.tokenizer.fingerprint:
        return
    theirs = Tokenizer.from_file(str(path)).get_vocab()
    ours = Tokenizer.from_buffer(source.read_tokenizer_file()).get_vocab()
    if theirs != ours:
        piece = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))[0]
        raise ValueError(
            f"model.init_from {folder}: its tokenizer has {piece!r} as {theirs.get(piece)}, the shards' as {ours.get(piece)}. Use "
            "shards of its tokenizer, or give it theirs with launch/convert_from_hf.py --tokenizer."
        )

"""Start a run with the weights of a folder that launch/convert_from_hf.py or launch/convert_to_hf.py wrote."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.source import Source

TIED_WEIGHT = "decoder.weight"  # the same tensor as the word embeddings
OTHER_HEADS = ("bert.pooler.", "classifier.", "qa_outputs.")  # pretraining does not use these


def load_initial_weights(model: nn.Module, folder: Path, source: Source) -> None:
    """Load a folder's weights into the model. source: the run's shards, whose tokenizer must be the folder's.

    Raises ValueError if the folder holds another kind of model, another shape, or another vocabulary.
    """
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    files = sorted(folder.glob("model*.safetensors"))
    if config.get("model_type") != "megabert" or not files:
        raise ValueError(
            f"model.init_from {folder}: is not a MegaBERT folder. Convert it with launch/convert_from_hf.py first."
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    weights = {name: t for name, t in weights.items() if name != TIED_WEIGHT and not name.startswith(OTHER_HEADS)}
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if different := sorted(weights.keys() ^ expected.keys()):
        raise ValueError(
            f"model.init_from {folder}: its parameters differ from this recipe's: {len(different)} exist in only one "
            f"of them, such as {different[0]}. Set model.num_hidden_layers, model.position and model.ffn as in its "
            "config.json."
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"model.init_from {folder}: {name} has shape {tuple(weights[name].shape)}, this recipe's has "
                f"{tuple(shape)}. Set the model section as in its config.json, or change its length or vocabulary with "
                "launch/convert_from_hf.py."
            )
    check_vocabulary(folder, source)
    model.load_state_dict(weights, strict=False)


def check_vocabulary(folder: Path, source: Source) -> None:
    """Raise ValueError if an id would stand for another token than the one its embedding was trained for."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"model.init_from {folder}: has no {TOKENIZER} to compare with the shards' tokenizer.")
    if hashlib.sha256(path.read_bytes()).hexdigest() == source.tokenizer.fingerprint:
        return
    folder_ids = Tokenizer.from_file(str(path)).get_vocab()
    shard_ids = Tokenizer.from_buffer(source.read_tokenizer_file()).get_vocab()
    if folder_ids != shard_ids:
        token = min(folder_ids.items() ^ shard_ids.items(), key=lambda item: (item[1], item[0]))[0]
        raise ValueError(
            f"model.init_from {folder}: its tokenizer has {token!r} as id {folder_ids.get(token)}, the shards' has it "
            f"as id {shard_ids.get(token)}. Write shards with the folder's tokenizer, or give the folder the shards' "
            "tokenizer with launch/convert_from_hf.py --tokenizer."
        )

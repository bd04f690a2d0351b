"""Start a run with the weights of a folder that launch/convert_from_hf.py or launch/convert_to_hf.py wrote."""

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from megabert.convert.from_hf import read_model
from megabert.convert.hf.reader import CONFIG, read_config
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.source import Source
from megabert.data.shards.tokenizer import read_tokenizer
from megabert.files.checkpoint_format import STATE, list_tags
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

OTHER_HEADS = ("bert.pooler.", "classifier.", "qa_outputs.")  # pretraining does not use these
# What changes the output but no tensor's shape. The recipe calls these settings of the model by the same names.
SAME_SETTINGS = (
    "num_attention_heads", "position", "rope_theta", "local_rope_theta", "norm_position", "bias", "norm_bias",
    "token_types", "global_attention_every", "local_attention_window", "ffn", "layer_norm_eps",
)  # fmt: skip


def load_initial_weights(model: MegaBertForMaskedLM, folder: Path, source: Source) -> None:
    """Load a folder's weights into the model. source: the run's shards, whose tokenizer must be the folder's.

    Raises ValueError if the folder is damaged, or holds another kind of model, another shape, or another vocabulary.
    """
    is_ours = (folder / CONFIG).is_file() and read_config(folder).get("model_type") == MegaBertConfig.model_type
    if not is_ours:
        raise ValueError(f"model.init_from {folder}: is not a MegaBERT folder. {_how_to_convert(folder)}")
    initial = read_model(folder)
    weights = {name: tensor for name, tensor in initial.weights.items() if not name.startswith(OTHER_HEADS)}
    for name in SAME_SETTINGS:
        theirs, ours = getattr(initial.config, name), getattr(model.config, name)
        if theirs != ours:
            wanted = {None: "null", True: "true", False: "false"}.get(theirs, theirs)
            raise ValueError(
                f"model.init_from {folder}: {name} is {theirs!r} in its {CONFIG}, {ours!r} in this recipe. "
                f"Set model.{name} to {wanted}."
            )
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if different := sorted(weights.keys() ^ expected.keys()):
        raise ValueError(
            f"model.init_from {folder}: its parameters differ from this recipe's: {len(different)} exist in only one "
            f"of them, such as {different[0]}. Set model.num_hidden_layers to {initial.config.num_hidden_layers}."
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


def _how_to_convert(folder: Path) -> str:
    if list_tags(folder / "checkpoints") or (folder / STATE).is_file():
        return (
            "It is a run or a checkpoint: run.branch_from continues it, and launch/convert_to_hf.py (for a bert or "
            "modernbert recipe then launch/convert_from_hf.py) makes a folder for init_from."
        )
    if not (folder / CONFIG).is_file():
        return f"It has no {CONFIG}; expected the folder of a model."
    return "Convert it with launch/convert_from_hf.py first."


def check_vocabulary(folder: Path, source: Source) -> None:
    """Raise ValueError if an id would stand for another token than the one its embedding was trained for."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"model.init_from {folder}: has no {TOKENIZER} to compare with the shards' tokenizer. Give it the one that "
            "it was trained with: launch/convert_from_hf.py --tokenizer."
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() == source.tokenizer.fingerprint:
        return
    folder_ids = read_tokenizer(path).get_vocab()
    shard_ids = Tokenizer.from_buffer(source.read_tokenizer_file()).get_vocab()
    if folder_ids != shard_ids:
        token = min(folder_ids.items() ^ shard_ids.items(), key=lambda item: (item[1], item[0]))[0]
        raise ValueError(
            f"model.init_from {folder}: its tokenizer has {token!r} as id {folder_ids.get(token)}, the shards' has it "
            f"as id {shard_ids.get(token)}. Write shards with the folder's tokenizer, or give the folder the shards' "
            "tokenizer with launch/convert_from_hf.py --tokenizer."
        )

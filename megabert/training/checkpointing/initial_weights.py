"""Start a run with the weights of a folder that launch/convert_from_hf.py or launch/convert_to_hf.py wrote."""

from pathlib import Path

from megabert.convert.from_hf import read_model
from megabert.data.shards.source import Source
from megabert.model.modeling_megabert import MegaBertForMaskedLM
from megabert.training.checkpointing.initial_folder import (
    SAME_SETTINGS,
    check_folder,
    check_settings,
    check_vocabulary,
)

# Pretraining does not use the parameters of these heads.
OTHER_HEADS = ("bert.pooler.", "classifier.", "qa_outputs.")


def load_initial_weights(model: MegaBertForMaskedLM, folder: Path, source: Source) -> None:
    """Load a folder's weights into the model. source: the run's shards, whose tokenizer must be the folder's.

    Raises ValueError if the folder is damaged, or holds another kind of model, another shape, or another vocabulary.
    """
    check_folder(folder)
    initial = read_model(folder)
    weights = {name: tensor for name, tensor in initial.weights.items() if not name.startswith(OTHER_HEADS)}
    check_settings(folder, {name: getattr(initial.config, name) for name in SAME_SETTINGS}, model.config)
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

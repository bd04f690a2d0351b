"""Start a run with the weights of a folder that launch/convert_from_hf.py or launch/convert_to_hf.py wrote."""

from pathlib import Path

from megabert.convert.from_hf import read_model
from megabert.convert.weight_names import WORD_EMBEDDINGS
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
    theirs, ours = (
        {name: getattr(config, name) for name in SAME_SETTINGS} for config in (initial.config, model.config)
    )
    check_settings(folder, theirs, ours)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    differing = sorted(weights.keys() ^ expected.keys())
    assert not differing, f"{folder}: equal settings gave other parameters: {differing}"
    check_vocabulary(folder, source)
    for name, shape in expected.items():
        if weights[name].shape != shape:
            remedy = _explain_shape(name, len(weights[name]), source.tokenizer.vocab_size, model.config.position_offset)
            raise ValueError(
                f"model.init_from {folder}: {name} has shape {tuple(weights[name].shape)}, this recipe's has "
                f"{tuple(shape)}. {remedy}"
            )
    model.load_state_dict(weights, strict=False)


def _explain_shape(name: str, rows: int, vocab_size: int, offset: int) -> str:
    """Say how to make a recipe's model have as many rows as the folder's."""
    if name != WORD_EMBEDDINGS:
        other = "change the folder with launch/convert_from_hf.py --max-length"
        return f"Set model.max_position_embeddings to {rows - offset}, or {other}."
    multiple = next(size for size in (64, 128, 32, 16, 8, 1, rows) if -(-vocab_size // size) * size == rows)
    return f"Set model.pad_vocab_to_multiple_of to {multiple}."

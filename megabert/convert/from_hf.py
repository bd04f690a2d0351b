"""Convert a Hugging Face folder to a MegaBERT folder, to continue pretraining (model.init_from) or to fine-tune."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabert.convert.hf.config import detect_architecture, from_bert_config, from_megabert_config
from megabert.convert.hf.reader import CONFIG, read_config, read_weights
from megabert.convert.hf.resize import ImportedModel, resize_positions, resize_vocabulary
from megabert.convert.hf.tokenizer import copy_tokenizer, has_tokenizer, read_hf_tokenizer
from megabert.convert.hf.writer import write_config, write_weights
from megabert.convert.weight_names import TIED_DECODER, WORD_EMBEDDINGS, num_layers, to_megabert
from megabert.files.atomic import replace_folder, staged_folder
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

MLM_HEAD_MODULES = ("transform.dense", "transform.norm")
MLM_HEAD = [f"{module}.{part}" for module in MLM_HEAD_MODULES for part in ("weight", "bias")] + ["decoder.bias"]


@dataclass(frozen=True)
class ImportOptions:
    """max_length: number of positions; tokenizer: a folder or tokenizer.json whose vocabulary the model gets.

    pad_vocab_to_multiple_of: as in the recipe, for the new vocabulary. seed: of the parameters that are initialized.
    """

    max_length: int | None = None
    tokenizer: str | None = None
    pad_vocab_to_multiple_of: int = 64
    seed: int = 17

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed}, expected a number from 0 to 2^63 - 1.")


def import_model(source: Path, out: Path, options: ImportOptions = ImportOptions()) -> ImportedModel:
    """Convert the folder `source` and write the result to `out`.

    source: transformers' BERT with any head or none, the published MosaicBERT, or a MegaBERT folder. Tensors are
    renamed and copied but never computed, unless the options request another length or vocabulary. Raises ValueError if
    our model cannot represent `source` exactly, or if `out` is not empty.
    """
    out = out.resolve()  # it may be a link
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; choose another folder.")
    model = read_and_resize(source, options)
    with staged_folder(out) as folder:
        write_folder(folder, source, model, options)
        replace_folder(folder, out)
    return model


def read_and_resize(source: Path, options: ImportOptions = ImportOptions()) -> ImportedModel:
    """Read a folder, and change length and vocabulary as requested.

    Raises ValueError if our model cannot represent it exactly.
    """
    model = read_model(source, options.seed)
    tokenizer = read_hf_tokenizer(source) if has_tokenizer(source) or options.tokenizer is not None else None
    if tokenizer is not None:
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= model.config.vocab_size:
            raise ValueError(
                f"{source}: its tokenizer has the id {highest}, but its model only {model.config.vocab_size} rows."
            )
    if tokenizer is not None and options.tokenizer is not None:
        new = read_hf_tokenizer(Path(options.tokenizer))
        model = resize_vocabulary(model, tokenizer, new, options.pad_vocab_to_multiple_of, options.seed)
    if options.max_length is not None:
        model = resize_positions(model, options.max_length)
    return model


def write_folder(folder: Path, source: Path, model: ImportedModel, options: ImportOptions = ImportOptions()) -> None:
    """Write the model that was read from `source`, with its code, tokenizer and a README.md."""
    write_config(folder, model.config)
    write_weights(folder, model.weights)
    tokenizer = source if options.tokenizer is None else Path(options.tokenizer)
    copy_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    (folder / "README.md").write_text(_make_readme(source, model))


def read_model(source: Path, seed: int = 17) -> ImportedModel:
    """Read a folder's config and weights, and initialize a masked language modelling head if it has none.

    Raises ValueError if the config and the tensors do not match, or if a tensor is unknown or missing.
    """
    raw = read_config(source)
    weights = read_weights(source)
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and not name.endswith("_ids"):
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected floating-point weights.")
    unused: list[str] = []
    if (kind := detect_architecture(source, raw, set(weights))) == "megabert":
        config = from_megabert_config(source, raw)
        weights = _normalize_names(weights)
        missing = [] if any(name in weights for name in MLM_HEAD) else list(MLM_HEAD)
    else:
        weights, missing, unused = to_megabert(weights, kind)
        config = from_bert_config(source, raw, kind)
    check_shapes(source, weights, config, missing)  # before anything is allocated that has the config's sizes
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    if broken := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{source}: {broken} has values that are not finite: the weights are damaged.")
    weights |= _initialize_head(missing, config, seed)
    return ImportedModel(config, weights, missing, unused)


def check_shapes(source: Path, weights: dict[str, Tensor], config: MegaBertConfig, missing: list[str]) -> None:
    """Raises ValueError unless the tensors, except for the missing ones, have the shapes that the config implies."""
    layers = num_layers(weights, "layers")
    if layers != config.num_hidden_layers:
        raise ValueError(f"{source}: has weights of {layers} layers, but its {CONFIG} has {config.num_hidden_layers}.")
    expected = expected_shapes(config)
    optional = _optional_head_shapes(config)
    modules = {name.rpartition(".")[0] for name in weights}
    required = [name for name in expected if name not in missing]
    required += [name for name in optional if name.rpartition(".")[0] in modules]
    expected |= optional
    for name in required:
        if name not in weights:
            raise ValueError(f"{source}: lacks {name}, expected with shape {expected[name]}.")
        if tuple(weights[name].shape) != expected[name]:
            raise ValueError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, but its {CONFIG} implies {expected[name]}."
            )
    if extra := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{source}: {len(extra)} tensors are not parameters of the model: {', '.join(extra[:3])}.")


def expected_shapes(config: MegaBertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the masked language model except the tied one."""
    with torch.device("meta"):
        model = MegaBertForMaskedLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name != TIED_DECODER}


def _optional_head_shapes(config: MegaBertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that a folder may have in addition to the masked language model."""
    width = config.hidden_size
    assert config.num_labels is not None, "transformers sets it from id2label"
    heads = {"bert.pooler.dense": width, "classifier": config.num_labels, "qa_outputs": 2}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, width) for name, rows in heads.items()}
    return shapes | {f"{name}.bias": (rows,) for name, rows in heads.items()}


def _normalize_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Use the names of MegaBertForMaskedLM: add the prefix that a bare encoder lacks, remove the tied tensor."""
    is_bare_encoder = any(name.startswith("embeddings.") for name in weights)
    named = {f"bert.{name}" if is_bare_encoder else name: tensor for name, tensor in weights.items()}
    if TIED_DECODER in named and not torch.equal(named.pop(TIED_DECODER), named[WORD_EMBEDDINGS]):
        raise ValueError(f"{TIED_DECODER} differs from {WORD_EMBEDDINGS}, but this model ties them.")
    return named


def _initialize_head(missing: list[str], config: MegaBertConfig, seed: int) -> dict[str, Tensor]:
    """Initialize parameters of the masked language modelling head as training does."""
    generator = torch.Generator().manual_seed(seed)
    width = config.hidden_size
    initial = {
        "transform.dense.weight": torch.empty(width, width).normal_(0, config.initializer_range, generator=generator),
        "transform.dense.bias": torch.zeros(width),
        "transform.norm.weight": torch.ones(width),
        "transform.norm.bias": torch.zeros(width),
        "decoder.bias": torch.zeros(config.vocab_size),
    }
    return {name: initial[name] for name in missing}


def _make_readme(source: Path, model: ImportedModel) -> str:
    initialized = ", ".join(f"`{name}`" for name in model.initialized) or "none"
    unused = ", ".join(f"`{name}`" for name in model.unused) or "none"
    vocabulary = f"\n- vocabulary: {model.vocabulary}" if model.vocabulary else ""
    return f"""# A MegaBERT model

Converted from `{source.name}` by launch/convert_from_hf.py.

- not in the source folder, initialized: {initialized}
- in the source folder but unused: {unused}{vocabulary}
"""

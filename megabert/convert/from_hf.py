"""Convert a Hugging Face folder to a MegaBERT folder, to continue pretraining (model.init_from) or to fine-tune."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megabert.convert.check import folder_record
from megabert.convert.check.export_record import find_added_files, find_change
from megabert.convert.check.folder_record import Origin
from megabert.convert.hf.config import check_no_own_code, detect_architecture, from_megabert_config, from_their_config
from megabert.convert.hf.heads import ANSWERS, CHOICE, head_of, read_head
from megabert.convert.hf.reader import CONFIG, check_no_adapter, read_config, read_weights
from megabert.convert.hf.resize import (
    ImportedModel,
    change_rope_theta,
    find_special,
    resize_positions,
    resize_vocabulary,
)
from megabert.convert.hf.tokenizer import copy_tokenizer, has_tokenizer, read_hf_tokenizer, read_max_length
from megabert.convert.hf.writer import write_config, write_weights
from megabert.convert.weight_names import (
    TIED_DECODER,
    add_classifiers_pooler,
    normalize_our_names,
    num_layers,
    strip_wrappers,
    to_megabert,
)
from megabert.files.atomic import replace_folder, staged_folder
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM

# Vocabularies are rounded up to a multiple of at most 128.
MAX_UNUSED_ROWS = 128
MLM_HEAD_MODULES = ("transform.dense", "transform.norm")
MLM_HEAD = [f"{module}.{part}" for module in MLM_HEAD_MODULES for part in ("weight", "bias")] + ["decoder.bias"]


@dataclass(frozen=True)
class ImportOptions:
    """max_length: number of positions; rope_theta: of RoPE in global layers; None: as in the source.

    tokenizer: a folder or tokenizer.json whose vocabulary the model gets. pad_vocab_to_multiple_of: as in the recipe,
    for the new vocabulary. seed: of the parameters that are initialized.
    """

    max_length: int | None = None
    rope_theta: float | None = None
    tokenizer: str | None = None
    pad_vocab_to_multiple_of: int = 64
    seed: int = 17

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed}, expected a number from 0 to 2^63 - 1.")


def import_model(source: Path, out: Path, options: ImportOptions = ImportOptions()) -> ImportedModel:
    """Convert the folder `source` and write the result to `out`.

    source: transformers' BERT, RoBERTa, DistilBERT, ELECTRA, ModernBERT or GTE with any head or none, the published
    MosaicBERT, or a MegaBERT folder. Tensors are renamed and copied but never computed, unless the
    options request another length or vocabulary. Raises ValueError if our model cannot represent `source` exactly, or
    if `out` holds anything else. A finished import of the same folder with the same options is read instead of written
    again.
    """
    # The path may be a link, and its target is what is written.
    out = out.resolve()
    origin = folder_record.describe_origin(source, options)
    if (finished := _read_finished(out, origin)) is not None:
        return finished
    model = read_and_resize(source, options)
    with staged_folder(out) as folder:
        write_folder(folder, source, model, options)
        folder_record.write_import_record(folder, origin, model)
        replace_folder(folder, out, lambda: _read_finished(out, origin))
    return model


def _read_finished(out: Path, origin: Origin) -> ImportedModel | None:
    """Return the finished import of the same origin in `out`, or None if it must be written.

    Raises ValueError if `out` holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    record = folder_record.read_import_record(out)
    if record is None:
        raise ValueError(f"{out}: is not empty; choose another folder.")
    if any(record[name] != origin[name] for name in ("source", "options")):
        raise ValueError(f"{out}: is the import of another source, or with other options; choose another folder.")
    if added := find_added_files(out, record):
        raise ValueError(
            f"{out / added[0]}: was added to the import there and would be lost. Choose another folder, or remove it."
        )
    if record["code"] != origin["code"] or find_change(out, record):
        return None
    return read_model(out)._replace(unused=record["unused"], vocabulary=record["vocabulary"], reused=True)


def read_and_resize(source: Path, options: ImportOptions = ImportOptions()) -> ImportedModel:
    """Read a folder, and change length, theta and vocabulary as requested.

    Raises ValueError if our model cannot represent it exactly.
    """
    model = read_model(source, options.seed)
    tokenizer = read_hf_tokenizer(source) if has_tokenizer(source) else None
    if tokenizer is not None and (highest := _highest_id(tokenizer)) >= model.config.vocab_size:
        raise ValueError(
            f"{source}: its tokenizer has the id {highest}, but its model only {model.config.vocab_size} rows."
        )
    if options.tokenizer is not None:
        new = read_hf_tokenizer(Path(options.tokenizer))
        if tokenizer is not None:
            model = resize_vocabulary(model, tokenizer, new, options.pad_vocab_to_multiple_of, options.seed)
        else:
            model = _adopt_tokenizer(source, model, new, options.tokenizer)
    if options.max_length is not None:
        model = resize_positions(model, options.max_length)
    if options.rope_theta is not None:
        model = change_rope_theta(model, options.rope_theta)
    return model


def _highest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


def _adopt_tokenizer(source: Path, model: ImportedModel, tokenizer: Tokenizer, path: str) -> ImportedModel:
    """Take a tokenizer for the one that a model without a tokenizer was trained with: every row stays.

    Raises ValueError if it cannot be that: its number of tokens, rounded up, must be the model's number of rows, and
    its padding token the model's.
    """
    config, num_tokens = model.config, _highest_id(tokenizer) + 1
    pad, named = find_special(tokenizer, "pad"), config.pad_token_id
    pads_alike = named is None or pad in (None, named)
    if not (0 <= config.vocab_size - num_tokens < MAX_UNUSED_ROWS and pads_alike):
        raise ValueError(
            f"{path}: has {num_tokens:,} tokens and [PAD] as id {pad}, but the model in {source} has "
            f"{config.vocab_size:,} rows and pads with id {config.pad_token_id}. That folder has no tokenizer, so this "
            "cannot be the one that it was trained with. For another vocabulary, first copy that one into the folder."
        )
    summary = (
        f"{source} has no tokenizer: {path} was taken for the one that it was trained with, and no row was changed"
    )
    return model._replace(vocabulary=summary)


def write_folder(folder: Path, source: Path, model: ImportedModel, options: ImportOptions = ImportOptions()) -> None:
    """Write the model that was read from `source`, with its code, tokenizer and a README.md."""
    write_config(folder, model.config)
    write_weights(folder, add_classifiers_pooler(model.weights))
    tokenizer, length = source, model.config.max_position_embeddings
    if options.tokenizer is not None:
        tokenizer = Path(options.tokenizer)
    elif options.max_length is None:
        length = read_max_length(source, length)
    copy_tokenizer(tokenizer, folder, length)
    (folder / "README.md").write_text(_make_readme(source, model), encoding="utf-8")


def read_model(source: Path, seed: int = 17) -> ImportedModel:
    """Read a folder's config and weights, and initialize a masked language modelling head if it has none.

    Raises ValueError if the config and the tensors do not match, or if a tensor is unknown or missing.
    """
    folder_record.check_unchanged(source)
    check_no_adapter(source)
    raw = read_config(source)
    tensors = read_weights(source)
    with _naming(source):
        weights = strip_wrappers(tensors)
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and not name.endswith("_ids"):
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected floating-point weights.")
    unused: list[str] = []
    kind = detect_architecture(source, raw, set(weights))
    check_no_own_code(source, raw, kind)
    head = read_head(source, raw, kind, weights)
    if kind == "megabert":
        config = from_megabert_config(source, raw)
        with _naming(source):
            weights = normalize_our_names(weights)
        missing = _find_missing(config, weights, head)
    else:
        # A setting that our model does not support is named before the tensors that it adds.
        config = from_their_config(source, raw, kind, head)
        with _naming(source):
            weights, missing, unused = to_megabert(weights, kind, answers=head == ANSWERS)
    if head is not None:
        config.architectures = [f"MegaBertFor{head}"]
    # The shapes are checked before anything is allocated that has the config's sizes.
    check_shapes(source, weights, config, missing)
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    if broken := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{source}: {broken} has values that are not finite in fp32: the weights are damaged.")
    weights |= _initialize_head(missing, config, seed)
    earlier = [name for name in folder_record.read_initialized(source) if name not in missing]
    return ImportedModel(config, weights, [*missing, *earlier], unused)


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Name the folder in a ValueError of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _find_missing(config: MegaBertConfig, weights: dict[str, Tensor], task: str | None) -> list[str]:
    """List the parameters of the masked language modelling head that one of our folders with another head lacks.

    task: that of the other head, as read_head() returns it.
    """
    head = [name for name in MLM_HEAD if name in expected_shapes(config)]
    if task is not None and config.has_transform_head:
        return [name for name in head if name not in weights and name.startswith("decoder.")]
    return [] if any(name in weights for name in head) else head


def check_shapes(source: Path, weights: dict[str, Tensor], config: MegaBertConfig, missing: list[str]) -> None:
    """Raise ValueError unless the tensors, except for the missing ones, have the shapes that the config implies."""
    with _naming(source):
        layers = num_layers(weights)
    if layers == 0:
        examples = ", ".join(sorted(weights)[:3])
        raise ValueError(
            f"{source}: no weight is named like a layer's; without a prefix of all names, the first are {examples}. "
            "Remove what stands before the model's own names, and the weights of another model if it has two."
        )
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
    """Return the shape of every parameter of the masked language model except the tied one."""
    with torch.device("meta"):
        model = MegaBertForMaskedLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name != TIED_DECODER}


def _optional_head_shapes(config: MegaBertConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that a folder may have in addition to the masked language model."""
    width = config.hidden_size
    assert config.num_labels is not None, "the config has no num_labels"
    labels = 1 if head_of(config) == CHOICE else config.num_labels
    heads = {"bert.pooler.dense": width, "classifier": labels, "qa_outputs": 2}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, width) for name, rows in heads.items()}
    return shapes | {f"{name}.bias": (rows,) for name, rows in heads.items()}


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

Converted from `{source.name}` by MegaBERT.

- not in the source folder, initialized: {initialized}
- in the source folder but unused: {unused}{vocabulary}
"""

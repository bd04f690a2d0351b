"""Turn a Hugging Face folder into one of ours, to continue pretraining (model.init_from) or to fine-tune.

Reads transformers' BERT with any head or none, the published MosaicBERT, and our own folders. Every tensor is renamed or copied,
never computed, unless a change of length or vocabulary is asked for; what is left over is refused or named.
"""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabert.convert.hf.folder import write_config, write_weights
from megabert.convert.hf.reading import CONFIG, LARGEST, read_config, read_weights
from megabert.convert.hf.resize import Imported, resize_positions, resize_vocabulary
from megabert.convert.hf.tokenizer import VOCAB, copy_tokenizer, read_tokenizer_of
from megabert.convert.weight_names import WORDS, num_layers, translate
from megabert.convert.zero import TIED
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.atomic import replace_folder, staged_folder
from megabert.model.configuration_megabert import MegaBertConfig

# What transformers' BERT can be that ours cannot: the value that ours has, which is also the one when it is not said.
ONLY = {"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Change:
    """max_length: positions that the model shall have; tokenizer: a folder or tokenizer.json to resize the vocabulary to.

    pad_vocab_to_multiple_of: as the recipe's, for the resized vocabulary. seed: of the parameters that the folder lacks.
    """

    max_length: int | None = None
    tokenizer: str | None = None
    pad_vocab_to_multiple_of: int = 64
    seed: int = 17

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed is {self.seed}, expected a number from 0 to 2^63 - 1.")


def convert(source: Path, out: Path, change: Change = Change()) -> Imported:
    """Read `source`, change what is asked for, and write a folder of ours.

    Raises ValueError if `source` is not a model that ours can hold exactly, or if `out` is not empty.
    """
    out = out.resolve()  # a link may be there
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; choose another folder.")
    model = read_changed(source, change)
    with staged_folder(out) as folder:
        write(folder, source, model, change)
        replace_folder(folder, out)
    return model


def read_changed(source: Path, change: Change = Change()) -> Imported:
    """Read `source` and change what is asked for. Raises ValueError if it is not a model that ours can hold exactly."""
    model = read(source, change.seed)
    check_tokenizer(source, model.config.vocab_size)
    if change.tokenizer is not None:
        old = read_tokenizer_of(source)
        new = read_tokenizer_of(Path(change.tokenizer))
        model = resize_vocabulary(model, old, new, change.pad_vocab_to_multiple_of, change.seed)
    if change.max_length is not None:
        model = resize_positions(model, change.max_length)
    return model


def write(folder: Path, source: Path, model: Imported, change: Change = Change()) -> None:
    """A folder of ours, of what was read from `source`."""
    write_config(folder, model.config)
    write_weights(folder, model.weights, "5GB")
    tokenizer = source if change.tokenizer is None else Path(change.tokenizer)
    copy_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    (folder / "README.md").write_text(_card(source, model))


def read(source: Path, seed: int = 17) -> Imported:
    """A folder's model in our names, a head that it lacks initialized.

    Raises ValueError if the config and the tensors do not fit, naming both, or if a tensor is unknown or missing.
    """
    raw = read_config(source)
    weights = read_weights(source)
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and not name.endswith("_ids"):
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected floating-point weights.")
    kind = _kind(source, raw, weights)
    left_out: list[str] = []
    if kind == "megabert":
        config = _our_config(source, raw)
        weights = _our_names(weights)
        missing = [name for name in _head_names() if name not in weights]
        if len(missing) != len(_head_names()):
            missing = []
    else:
        weights, missing, left_out = translate(weights, kind)
        config = _config_of_bert(source, raw, kind)
    check_shapes(source, weights, config, missing)  # before anything of the config's size is allocated
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    if broken := next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{source}: {broken} has values that are not finite: the weights are damaged.")
    weights |= _initialize(missing, config, seed)
    return Imported(config, weights, missing, left_out)


def check_tokenizer(source: Path, rows: int) -> None:
    """Raises ValueError if the folder's tokenizer, should it have one, makes ids that the model has no row for."""
    if not any((source / name).is_file() for name in (TOKENIZER, VOCAB)):
        return
    highest = max(read_tokenizer_of(source).get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= rows:
        raise ValueError(f"{source}: its tokenizer has the id {highest}, its model only {rows} rows.")


def check_shapes(source: Path, weights: dict[str, Tensor], config: MegaBertConfig, missing: list[str]) -> None:
    """Raises ValueError unless the tensors are what the config says, but for the missing ones."""
    found = num_layers(weights, "layers")
    if found != config.num_hidden_layers:
        raise ValueError(f"{source}: its weights have {found} layers, its {CONFIG} says {config.num_hidden_layers}.")
    expected = expected_shapes(config)
    heads = _shapes_of_heads(config)
    begun = {name.rpartition(".")[0] for name in weights}
    wanted = [name for name in expected if name not in missing]
    wanted += [name for name in heads if name.rpartition(".")[0] in begun]
    expected |= heads
    for name in wanted:
        if name not in weights:
            raise ValueError(f"{source}: lacks {name}, expected with shape {expected[name]}.")
        if tuple(weights[name].shape) != expected[name]:
            raise ValueError(f"{source}: {name} is {tuple(weights[name].shape)}, its {CONFIG} says {expected[name]}.")
    if extra := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{source}: {len(extra)} tensors have no place in the model: {', '.join(extra[:3])}.")


def _shapes_of_heads(config: MegaBertConfig) -> dict[str, tuple[int, ...]]:
    """Of what a folder may have beside the masked language model."""
    width = config.hidden_size
    assert config.num_labels is not None, "transformers counts id2label"
    heads = {"bert.pooler.dense": width, "classifier": config.num_labels, "qa_outputs": 2}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, width) for name, rows in heads.items()}
    return shapes | {f"{name}.bias": (rows,) for name, rows in heads.items()}


def expected_shapes(config: MegaBertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the masked language model but the tied one."""
    from megabert.model.modeling_megabert import MegaBertForMaskedLM

    with torch.device("meta"):
        model = MegaBertForMaskedLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name != TIED}


def _kind(source: Path, raw: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """megabert, or a table of published.py. Raises ValueError for another architecture."""
    model_type = raw.get("model_type")
    if model_type == MegaBertConfig.model_type:
        return "megabert"
    if model_type != "bert":
        raise ValueError(f"{source / CONFIG}: model_type is {model_type!r}, expected 'bert' or 'megabert'.")
    return "mosaicbert" if any(".Wqkv." in name for name in weights) else "bert"


def _our_config(source: Path, raw: dict[str, Any]) -> MegaBertConfig:
    """What the config says of the model; of code, classes and files it may name nothing here."""
    if raw.get("tie_word_embeddings", True) is not True:
        raise ValueError(
            f"{source / CONFIG}: tie_word_embeddings is {raw['tie_word_embeddings']!r}; this model ties them."
        )
    known = {*signature(MegaBertConfig.__init__).parameters} - {"self", "kwargs"}
    return _build_config(source, {name: value for name, value in raw.items() if name in known} | _labels(raw))


def _labels(raw: dict[str, Any]) -> dict[str, Any]:
    """What a config says of its classifier."""
    settings = {name: raw[name] for name in ("label2id", "problem_type") if raw.get(name) is not None}
    if raw.get("id2label") is not None:
        settings["id2label"] = {int(number): label for number, label in raw["id2label"].items()}
    elif "num_labels" in raw:
        settings["num_labels"] = raw["num_labels"]
    return settings


def _build_config(source: Path, settings: dict[str, Any]) -> MegaBertConfig:
    try:
        return MegaBertConfig(**settings)
    except ValueError as mistake:
        raise ValueError(f"{source / CONFIG}: {mistake}") from mistake


def _our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the masked language model has them: a bare encoder lacks the prefix."""
    bare = any(name.startswith("embeddings.") for name in weights)
    named = {f"bert.{name}" if bare else name: tensor for name, tensor in weights.items()}
    if TIED in named and not torch.equal(named.pop(TIED), named[WORDS]):
        raise ValueError(f"{TIED} differs from {WORDS}, but this model ties them.")
    return named


def _config_of_bert(source: Path, raw: dict[str, Any], kind: str) -> MegaBertConfig:
    """Our config from BERT's. Raises ValueError for what our model does not compute."""
    for name, value in ONLY.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{source / CONFIG}: {name} is {raw[name]!r}; this model has {value!r} only.")
    if kind == "bert" and (how := raw.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"{source / CONFIG}: position_embedding_type is {how!r}; this model has absolute ones only.")
    if missing := [name for name in SIZES if name not in raw]:
        raise ValueError(f"{source / CONFIG}: does not say {', '.join(missing)}.")
    same = (*LARGEST.keys() - {"num_labels"}, "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "classifier_dropout", "initializer_range", "pad_token_id")  # fmt: skip
    settings = {name: raw[name] for name in same if raw.get(name) is not None} | _labels(raw)
    if kind == "mosaicbert":
        settings |= {"position": "alibi", "ffn": "geglu", "layer_norm_dtype": "bfloat16"}
    else:
        settings |= {"position": "learned", "ffn": "gelu", "layer_norm_dtype": "float32"}
    return _build_config(source, settings)


def _head_names() -> list[str]:
    modules = ("transform.dense", "transform.norm")
    return [f"{module}.{part}" for module in modules for part in ("weight", "bias")] + ["decoder.bias"]


def _initialize(missing: list[str], config: MegaBertConfig, seed: int) -> dict[str, Tensor]:
    """The parameters of a head as training would begin with them."""
    generator = torch.Generator().manual_seed(seed)
    width = config.hidden_size
    fresh = {
        "transform.dense.weight": torch.empty(width, width).normal_(0, config.initializer_range, generator=generator),
        "transform.dense.bias": torch.zeros(width),
        "transform.norm.weight": torch.ones(width),
        "transform.norm.bias": torch.zeros(width),
        "decoder.bias": torch.zeros(config.vocab_size),
    }
    return {name: fresh[name] for name in missing}


def _card(source: Path, model: Imported) -> str:
    initialized = ", ".join(f"`{name}`" for name in model.initialized) or "none"
    left_out = ", ".join(f"`{name}`" for name in model.left_out) or "none"
    changed = f"\n- vocabulary: {model.vocabulary}" if model.vocabulary else ""
    return f"""# Converted to MegaBERT's layout

From `{source.name}`, by launch/convert_from_hf.py.

- initialized, not trained: {initialized}
- left out: {left_out}{changed}
"""

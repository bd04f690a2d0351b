"""Export an import, an export or a fine-tuned model, with any head, as transformers' own class if one is the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megabert.convert.check import export_check, export_record
from megabert.convert.check.export_record import Measurements
from megabert.convert.check.folder_record import is_model_file
from megabert.convert.from_hf import read_model
from megabert.convert.hf.config import set_max_length
from megabert.convert.hf.heads import MASKED_LM, class_of, head_of
from megabert.convert.hf.model_card import reuse_card
from megabert.convert.hf.native import native_class
from megabert.convert.hf.reader import CONFIG, read_config, read_json
from megabert.convert.hf.resize import ImportedModel
from megabert.convert.hf.tokenizer import copy_tokenizer, read_max_length
from megabert.convert.targets import compared_texts, registry
from megabert.convert.to_hf import (
    ExportOptions,
    add_targets,
    check_replaceable,
    fingerprint_export,
    read_finished,
    write_model,
)
from megabert.convert.weight_names import POOLER, TIED_DECODER
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.atomic import replace_folder, staged_folder
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertModel

README = """# {name}

Exported by MegaBERT from a folder of its own layout.

- never trained, initialized by an import: {initialized}
- in the MegaBERT folder but no part of this class: {left_out}
"""


class FolderExport(NamedTuple):
    """name: of the class; initialized: its parameters that an import had initialized.

    left_out: our names of trained parameters that the class does not have.
    """

    measured: Measurements
    name: str
    initialized: list[str]
    left_out: list[str]


def is_model_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def export_folder(
    source: Path, out: Path, options: ExportOptions, tell: Callable[[str], None] = lambda note: None
) -> FolderExport:
    """Export the folder `source`: an export, an import, a fine-tuned model, or a MegaBERT of save_pretrained().

    `out` may be `source` itself, which then keeps the targets that it has. tell: gets each line that a user should know
    of the targets before they are written. Raises ValueError if the folder cannot be exported, or if the check fails,
    in which case `out` stays as it was.
    """
    record = _check_source(source, options)
    name, out = str(out), out.resolve()
    options = _keep_targets(source, out, options)
    files = sorted(path for path in source.iterdir() if is_model_file(path.name))
    fingerprint = fingerprint_export(files, options)
    model = read_model(source)
    config, weights = model.config, select_weights(model)
    left_out = sorted(model.weights.keys() - set(model.initialized) - {POOLER.get(key, key) for key in weights})
    initialized = [key for key in model.initialized if key in weights]
    class_name = native_class(config) or f"MegaBertFor{head_of(config)}"
    max_length = read_max_length(source, config.max_position_embeddings)
    if options.max_length is not None:
        max_length = set_max_length(config, max_length, options.max_length)
    for note in registry.check_targets(options.targets, config, read_json(source / TOKENIZER), max_length):
        tell(note)
    if (measured := read_finished(out, fingerprint)) is not None:
        return FolderExport(measured, class_name, initialized, left_out)
    # The texts of a classifier may be pairs.
    pairs = {"pairs": True, "texts": False}.get(record.get("classifies", ""))
    with staged_folder(out) as folder:
        copy_tokenizer(source, folder, max_length)
        module = build_head(weights, config)
        export_check.write_expected_outputs(module, folder, folder, max_length, bool(pairs))
        if options.targets:
            compared_texts.write_expected(cast(MegaBertModel, module.base_model), folder, max_length)
        written = write_model(folder, weights, config, options.max_shard_size)
        card = _make_card(source, record, class_name, max_length, {"initialized": initialized, "left_out": left_out})
        (folder / "README.md").write_text(card, encoding="utf-8")
        export_record.write_export_record(folder, fingerprint, max_length, written, pairs, head_of(config), initialized)
        # The check's process loads the weights again, so they are freed here.
        del model, weights, written, module
        measured = export_check.check_new_export(folder, name)
        if options.targets:
            add_targets(folder, options.targets)
        replace_folder(folder, out, lambda: check_replaceable(out, export_record.read_record(out)))
    return FolderExport(measured, class_name, initialized, left_out)


def _keep_targets(source: Path, out: Path, options: ExportOptions) -> ExportOptions:
    """Add the targets that `out` has, if it is the source itself."""
    if source.resolve() != out:
        return options
    kept = {name for name, outcome in registry.read_outcomes(source).items() if "failed" not in outcome}
    return replace(options, targets=registry.parse_names(",".join({*options.targets, *kept} & registry.TARGETS.keys())))


def _make_card(
    source: Path, record: dict[str, Any], class_name: str, max_length: int, parts: dict[str, list[str]]
) -> str:
    """Return the card of an earlier export, which has the numbers of its training, or a new one.

    record: the export.json of the source, if it has one. parts: names of parameters, see README.
    """
    if record and (source / "README.md").is_file():
        return reuse_card((source / "README.md").read_text(encoding="utf-8"), max_length)
    lines = {key: ", ".join(f"`{part}`" for part in names) or "none" for key, names in parts.items()}
    return README.format(name=class_name, **lines)


def _check_source(source: Path, options: ExportOptions) -> dict[str, Any]:
    """Return the folder's export.json, which is empty if it has none."""
    record = export_record.read_record(source)
    if (kind := read_config(source).get("model_type")) != MegaBertConfig.model_type and record is None:
        raise ValueError(
            f"{source / CONFIG}: model_type is {kind!r}, expected a MegaBERT folder, an export or a run. Convert it "
            "with launch/convert_from_hf.py first."
        )
    if options.average != 1:
        raise ValueError(f"{source}: is a folder with one model; --average needs a run with several checkpoints.")
    if not (source / TOKENIZER).is_file():
        raise ValueError(
            f"{source}: has no {TOKENIZER}, with which an export is checked. launch/convert_from_hf.py --tokenizer "
            "gives a folder the one that it was trained with."
        )
    return record or {}


def select_weights(model: ImportedModel) -> dict[str, Tensor]:
    """Return the weights of our class with the folder's head, by its names. Raises ValueError if one is missing."""
    with torch.device("meta"):
        names = [name for name, _ in class_of(model.config)(model.config).named_parameters() if name != TIED_DECODER]
    if missing := [name for name in names if POOLER.get(name, name) not in model.weights]:
        raise ValueError(f"the folder lacks {missing[0]}, which {class_of(model.config).__name__} has.")
    return {name: model.weights[POOLER.get(name, name)] for name in names}


def build_head(weights: dict[str, Tensor], config: MegaBertConfig) -> PreTrainedModel:
    """Build our class with the config's head around weights without copying them."""
    if head_of(config) == MASKED_LM:
        return export_check.build_model(weights, config)
    with torch.device("meta"):
        module = class_of(config)(config)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)

"""Every mutation of every target makes the target's proof fail, and nothing of the target is left.

The product is complete: what is not here says why in NO_SUCH.
"""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from megabert.convert import to_hf
from megabert.convert.check import export_check
from megabert.convert.check.export_check import build_model
from megabert.convert.targets import compared_texts, onnx_graphs, registry
from megabert.convert.targets.target import ExportedFolder
from megabert.files.checkpoint_format import files_of
from megabert.model.configuration_megabert import MegaBertConfig
from tests.convert.helpers.checkpoints import write_checkpoint
from tests.convert.helpers.folders import edit_json
from tests.convert.helpers.small_model import small_model

ALWAYS = registry.ALWAYS
# Of the files that were written, and not of what they are made from.
OF_FILES = ("a lost tensor", "a wrong shape")
MUTATIONS = ("a wrong weight", "swapped halves", "another slope", "another pooling", "shifted ids", *OF_FILES)
POOLED_BY_CALLER = "it gives the states of tokens, and its caller pools them"
# Other slopes change embeddings of a small model by 1 - cosine 8e-4, and 8 bits may change them by 1e-2.
BELOW_8_BITS = "the graph that is quantized has the proof of onnx, which finds it"
NO_SUCH = {
    **dict.fromkeys(product((ALWAYS, "onnx", "onnx-int8", "transformers.js"), ("another pooling",)), POOLED_BY_CALLER),
    ("onnx-int8", "another slope"): BELOW_8_BITS,
}
# What opens these is not everywhere. Proofs that take seconds are nightly.
MARKS = {
    "sentence-transformers": [pytest.mark.serving, pytest.mark.nightly],
    "gguf": [pytest.mark.serving, pytest.mark.nightly],
    "transformers.js": [pytest.mark.node, pytest.mark.nightly],
    **{name: [pytest.mark.nightly] for name in (ALWAYS, "onnx", "onnx-int8")},
}
WEIGHT, HALVES = "bert.encoder.layers.1.attention.out.weight", "bert.encoder.layers.1.mlp.up.weight"
WORDS = "bert.embeddings.word_embeddings.weight"


# The file of each target and a tensor in it, any matrix of a graph.
FILES = {
    "sentence-transformers": ("model.safetensors", WEIGHT),
    "jina": ("jina/model.safetensors", "encoder.layer.1.mlp.wo.bias"),
    "encoder": ("encoder/model.safetensors", "layers.1.mlp.Wi.weight"),
    "onnx": (onnx_graphs.MASKED_LM, None),
    "onnx-int8": (onnx_graphs.QUANTIZED, None),
    "transformers.js": (f"transformers.js/{onnx_graphs.ENCODER}", None),
    "gguf": ("", "blk.1.ffn_down.bias"),
}


def swap(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


# Of our tensors. 8 bits hide what is smaller than their own error.
TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a wrong weight": (WEIGHT, lambda weight: weight * 1.01),
    "swapped halves": (HALVES, swap),
    "shifted ids": (WORDS, lambda rows: rows.roll(1, 0)),
}
INT8 = TENSORS | {"a wrong weight": (WEIGHT, torch.neg)}


def mutate_config(config: MegaBertConfig) -> MegaBertConfig:
    """Give every head another slope, or without slopes, another theta."""
    changed = MegaBertConfig(**config.to_dict())
    if config.position == "alibi":
        changed.num_attention_heads = 2
    else:
        changed.rope_theta = 50.0
    return changed


def mutate_exported(exported: ExportedFolder, target: str, mutation: str) -> ExportedFolder:
    if mutation == "another slope":
        return exported._replace(config=mutate_config(exported.config))
    name, change = (INT8 if target == "onnx-int8" else TENSORS)[mutation]
    return exported._replace(weights=exported.weights | {name: change(exported.weights[name]).contiguous()})


def shift_vocabulary(path: Path) -> None:
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = [*vocab[:10], vocab[-1], *vocab[10:-1]]
    path.write_text(json.dumps(raw))


def mutate_folder(folder: Path, mutation: str) -> None:
    """Change the exported folder itself, in our names."""
    if mutation == "another slope":
        edit_json(folder / "config.json", num_attention_heads=2)
    elif mutation == "shifted ids":
        shift_vocabulary(folder / "tokenizer.json")
    elif mutation in OF_FILES:
        damage_tensor(folder / "model.safetensors", WEIGHT, mutation)
    else:
        name, change = TENSORS[mutation]
        tensors = load_file(folder / "model.safetensors")
        changed = tensors | {name: change(tensors[name]).contiguous()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def damage_tensor(path: Path, name: str | None, mutation: str) -> None:
    """Remove a tensor from a file, or its last row or column."""
    if name is not None:
        tensors = load_file(path)
        tensor = tensors.pop(name)
        if mutation == "a wrong shape":
            tensors[name] = tensor[:-1].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        return
    graph = onnx.load(path)
    tensors = graph.graph.initializer
    number = next(number for number, tensor in enumerate(tensors) if len(tensor.dims) == 2)
    tensor = tensors.pop(number)
    if mutation == "a wrong shape":
        tensors.append(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :-1].copy(), tensor.name))
    onnx.save(graph, path)


def damage_gguf(mutation: str, monkeypatch) -> None:
    import gguf

    add, damaged = gguf.GGUFWriter.add_tensor, FILES["gguf"][1]

    def add_tensor(self, name, data, **options):
        if name != damaged:
            add(self, name, data, **options)
        elif mutation == "a wrong shape":
            add(self, name, data[:-1], **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)


def pool_by_first(folder: Path) -> None:
    edit_json(folder / "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)


def write_mutated(target: str, mutation: str | None, exported: ExportedFolder, folder: Path, monkeypatch) -> str:
    """Write a target with an error in what it is made from, or in its files."""
    write = WRITERS[target]
    if mutation is None:
        write_graphs(exported, folder, target)
        return write(exported, folder)
    if target == "gguf" and mutation in OF_FILES:
        damage_gguf(mutation, monkeypatch)
        return write(exported, folder)
    if mutation in OF_FILES:
        write_graphs(exported, folder, target)
        wrote, (file, name) = write(exported, folder), FILES[target]
        damage_tensor(folder / file, name, mutation)
        return wrote
    if target == "gguf" and mutation == "another pooling":
        import gguf

        add = gguf.GGUFWriter.add_pooling_type
        monkeypatch.setattr(gguf.GGUFWriter, "add_pooling_type", lambda self, kind: add(self, type(kind)(kind + 1)))
        return write(exported, folder)
    files = {"jina": "jina", "encoder": "encoder", "sentence-transformers": "."}
    if target == "sentence-transformers" and mutation != "another pooling":
        mutate_folder(folder, mutation)
        return write(exported, folder)
    if target == "transformers.js" and mutation == "shifted ids":
        # Of the vocabulary; a graph with other rows is the same to it as to onnx.
        shift_vocabulary(folder / "tokenizer.json")
        write_graphs(exported, folder, target)
        return write(exported._replace(tokenizer=json.loads((folder / "tokenizer.json").read_text())), folder)
    if target in files and mutation in ("another pooling", "shifted ids"):
        wrote, place = write(exported, folder), folder / files[target]
        if mutation == "another pooling":
            pool_by_first(place)
        else:
            shift_vocabulary(place / "tokenizer.json")
        return wrote
    mutated = mutate_exported(exported, target, mutation)
    write_graphs(mutated, folder, target)
    return write(mutated, folder)


def write_graphs(exported: ExportedFolder, folder: Path, target: str) -> None:
    """Write the graph that the target is made from, if it is made from one."""
    if target not in ("onnx-int8", "transformers.js"):
        return
    (folder / "onnx").mkdir()
    model = build_model(exported.weights, exported.config)
    if target == "onnx-int8":
        onnx_graphs.write_graph(onnx_graphs.EncoderGraph(model), folder / onnx_graphs.ENCODER, [onnx_graphs.STATES])
    else:
        outputs = [onnx_graphs.LOGITS, onnx_graphs.STATES]
        onnx_graphs.write_graph(onnx_graphs.MaskedLmGraph(model), folder / onnx_graphs.MASKED_LM, outputs)


WRITERS = {name: target.write for name, target in registry.TARGETS.items()}


@pytest.fixture(scope="session")
def export_mosaicbert(corpus, tmp_path_factory) -> Callable[[int], Path]:
    """Export a MosaicBERT whose MLP's first layer is multiplied by a number. Copy the folder to change it."""

    @functools.cache
    def export_mosaicbert(factor: int) -> Path:
        folder = tmp_path_factory.mktemp("mosaicbert")
        model = small_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.up.weight"):
                    parameter.mul_(factor)
        write_checkpoint(folder / "run", model, corpus.tokenizer)
        passed = {"max_difference": 0.0, "transformers": "0"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_check, "run_in_subprocess", lambda folder: passed)
            patch.setattr(compared_texts, "NUM_TEXTS", 200)
            to_hf.export_checkpoint(folder / "run", folder / "hf", to_hf.ExportOptions(targets=("jina",)))
        return folder / "hf"

    return export_mosaicbert


@pytest.fixture
def base(export_mosaicbert, export_native, tmp_path) -> Callable[[str], Path]:
    """A copy of an export without targets. 8 bits do not tell a GLU's halves apart that are nearly alike."""

    def base(target: str) -> Path:
        sharp = target == "onnx-int8"
        made = export_native("modernbert") if target == "encoder" else export_mosaicbert(5 if sharp else 1)
        folder = shutil.copytree(made, tmp_path / "hf")
        for name in ("jina", "encoder"):
            shutil.rmtree(folder / name, ignore_errors=True)
        return folder

    return base


def params(names) -> list:
    cases = [(target, mutation) for target, mutation in product(names, MUTATIONS) if (target, mutation) not in NO_SUCH]
    return [pytest.param(*case, marks=MARKS.get(case[0], [])) for case in cases]


def write_target(target: str, mutation: str | None, folder: Path, monkeypatch) -> registry.Outcome:
    def write(exported: ExportedFolder, folder: Path) -> str:
        return write_mutated(target, mutation, exported, folder, monkeypatch)

    monkeypatch.setitem(registry.TARGETS, target, replace(registry.TARGETS[target], write=write, requires=()))
    return registry.write_targets(folder, (target,))[target]


@pytest.mark.parametrize(("target", "mutation"), params(registry.TARGETS))
def test_a_mutated_target_fails_its_proof_and_leaves_nothing(target, mutation, base, monkeypatch):
    folder = base(target)
    before = files_of(folder)
    outcome = write_target(target, mutation, folder, monkeypatch)
    assert "failed" in outcome, outcome
    words = ("differ", "cosine", "other ids", "pools by", "pooling_type is", "has shape", "missing", "cannot")
    words += ("tensors are not those of the model",)
    assert any(word in outcome["failed"] for word in words), outcome
    assert files_of(folder) == before
    assert not [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]


@pytest.mark.parametrize("target", [pytest.param(name, marks=MARKS.get(name, [])) for name in registry.TARGETS])
def test_the_same_target_without_a_mutation_passes(target, base, monkeypatch):
    outcome = write_target(target, None, base(target), monkeypatch)
    assert "opened" in outcome, outcome


@pytest.mark.parametrize(("target", "mutation"), params([ALWAYS]))
def test_a_mutated_folder_is_not_exported(target, mutation, checkpoint, tmp_path, monkeypatch):
    check = export_check.check_new_export

    def mutate_and_check(folder: Path, name: str):
        mutate_folder(folder, mutation)
        return check(folder, name)

    monkeypatch.setattr(export_check, "check_new_export", mutate_and_check)
    with pytest.raises(
        ValueError,
        match="the export failed its check and was removed: .*(differ|other input_ids|mismatch|do not match)",
    ):
        to_hf.export_checkpoint(checkpoint, tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_the_product_is_complete():
    covered = {(target, mutation) for target, mutation in product((ALWAYS, *registry.TARGETS), MUTATIONS)}
    tested = {param.values for param in params((ALWAYS, *registry.TARGETS))}
    assert covered == tested | NO_SUCH.keys()
    assert not tested & NO_SUCH.keys()

"""The layout of JinaBERT v2 computes what the model does; every kind of damage is found, and then nothing is left."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from megabert.convert.targets import jina_port
from megabert.model.modeling_megabert import MegaBertModel
from megabert.model.ops import alibi_slopes
from tests.convert.helpers.folders import damages_of_server_files, edit_json


def test_a_query_for_a_key_is_found(write_damaged):
    """test_mutations.py has the other kinds of damage."""

    def damage(folder):
        path, name = folder / "jina/model.safetensors", "encoder.layer.1.attention.self.key.weight"
        tensors = load_file(path)
        save_file(tensors | {name: tensors[name].flip(0)}, path)

    assert "differ by" in write_damaged("jina", damage)


def edit_tensors(change):
    def damage(folder):
        path = folder / "jina/model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


def edit_config(**changes):
    return lambda folder: edit_json(folder / "jina/config.json", **changes)


DAMAGES = {
    "a broken config": (lambda folder: (folder / "jina/config.json").write_text("{"), "^jina/config.json: damaged"),
    "no number of layers": (
        lambda folder: (folder / "jina/config.json").write_text('{"model_type": "bert"}'),
        "config.json lacks vocab_size",
    ),
    "heads that do not fit": (edit_config(num_attention_heads=5), "no multiple"),
    "a text for a number": (
        edit_config(layer_norm_eps="1"),
        "layer_norm_eps",
    ),
    "fewer positions": (edit_config(max_position_embeddings=5), "max_position_embeddings is 5, expected"),
    **{
        f"another {name}": (edit_config(**{name: "another"}), f"{name} is 'another', expected")
        for name in ("position_embedding_type", "hidden_act", "feed_forward_type", "_name_or_path")
    },
    **damages_of_server_files("jina"),
    "an extra tensor": (edit_tensors(lambda tensors: tensors | {"x": torch.zeros(2)}), "x has shape .* imply none"),
    "no guard": (edit_tensors(lambda tensors: {n: t for n, t in tensors.items() if "position" not in n}), "one row"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_that_cannot_be_read_or_does_not_fit_is_found(name, write_damaged):
    damage, reason = DAMAGES[name]
    assert re.search(reason, write_damaged("jina", damage))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_the_slopes_are_ours(heads):
    torch.testing.assert_close(torch.tensor(jina_port.slopes(heads)), alibi_slopes(heads), rtol=1e-6, atol=0)


def test_the_port_gives_our_states_in_fp64(served):
    """To rounding errors of fp64: what the proof measures is the rounding of fp32."""
    model = MegaBertModel.from_pretrained(served, dtype=torch.float64, add_pooling_layer=False).eval()
    ids = torch.randint(5, 800, (3, 40))
    mask = (torch.arange(40) < torch.tensor([[40], [7], [1]])).long()
    with torch.no_grad():
        ours = model(ids, mask).last_hidden_state
    theirs = jina_port.encode(jina_port.read_folder(served / "jina"), ids, mask)
    torch.testing.assert_close(theirs[mask.bool()], ours[mask.bool()], rtol=0, atol=1e-12)


def test_teis_tanh_approximation_changes_states_by_little(served):
    """By the difference that the proof prints, of at most 2e-4."""
    model = jina_port.read_folder(served / "jina")
    ids, mask = torch.randint(5, 800, (3, 40)), torch.ones(3, 40, dtype=torch.int64)
    exact = jina_port.encode(model, ids, mask)
    difference = (jina_port.encode(model.to(torch.float32), ids, mask, tanh=True) - exact).abs().max()
    assert 1e-7 < difference <= 2e-4


def test_programs_that_do_not_know_the_layout_refuse_it(served):
    """They would take it for a BERT, draw what it lacks at random, and answer."""
    for auto_class in (AutoModel, AutoModelForMaskedLM):
        with pytest.raises(RuntimeError, match=r"size mismatch|mismatched|ignore_mismatched_sizes"):
            auto_class.from_pretrained(served / "jina")


def test_the_servers_settings(served):
    """TEI tells the layout by these settings."""
    config = json.loads((served / "jina/config.json").read_text())
    assert config["_name_or_path"] == "jinaai/jina-bert-implementation"
    assert (config["model_type"], config["position_embedding_type"]) == ("bert", "alibi")
    assert config["max_position_embeddings"] <= 2048

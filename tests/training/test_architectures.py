"""Architectures train at every ZeRO stage and on two ranks, and resume to the same bits."""

import json

import pytest

from megabert.files.json_file import read_json
from tests.helpers.runs import pretrain_command, run_command, run_ranks
from tests.training.helpers.checkpoints import assert_same_end

FLAGS = {
    "neighbors": ["--model.embedding_neighbors=2", "--optimizer.name=muon", "--optimizer.max_grad_norm=0"],
    "rope-mosaicbert": ["--model.position=rope"],
    "modernbert": [
        "--model.position=rope", "--model.rope_theta=160000", "--model.local_rope_theta=10000",
        "--model.norm_position=pre", "--model.bias=false", "--model.norm_bias=false", "--model.token_types=false",
        "--model.global_attention_every=2", "--model.local_attention_window=8", "--model.layer_norm_dtype=float32",
        "--model.layer_norm_eps=1e-5", "--model.num_hidden_layers=3", "--model.attention_output_dropout=0.1",
    ],
}  # fmt: skip


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def trained(corpus, out, architecture, *more, ds_config="zero2"):
    done = run_command(pretrain_command(corpus, out, *FLAGS[architecture], *more, ds_config=ds_config))
    assert done.code == 0, done.output
    return losses(out)


@pytest.mark.parametrize("architecture", ["modernbert", "neighbors"])
def test_a_run_resumes_to_the_same_bits(corpus, tmp_path, architecture):
    whole = trained(corpus, tmp_path / "whole", architecture, "--run.max_steps=4", "--run.save_every_steps=2")
    first = ["--run.resume=" + str(tmp_path / "whole/checkpoints/step-00000002"), "--run.max_steps=4"]
    again = trained(corpus, tmp_path / "again", architecture, *first)
    assert again[-2:] == whole[-2:]
    assert_same_end(tmp_path / "whole", tmp_path / "again", 4)
    first_result, second_result = (read_json(tmp_path / name / "result.json") for name in ("whole", "again"))
    assert first_result["heldout_loss"] == second_result["heldout_loss"]


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", FLAGS)
def test_every_stage_two_ranks_padding_and_recomputing_give_the_same_losses(corpus, tmp_path, architecture):
    """Without dropout, whose masks depend on shapes."""
    plain = ["--model.hidden_dropout=0", "--model.attention_output_dropout=0", "--run.max_steps=3"]
    if architecture == "rope-mosaicbert":
        plain.remove("--model.attention_output_dropout=0")
    expected = trained(corpus, tmp_path / "zero2", architecture, *plain)
    variants = {
        "zero0": ([], "zero0"), "zero1": ([], "zero1"), "zero3": ([], "zero3"),
        "padded": (["--model.padding=padded"], "zero2"),
        "recomputed": (["--model.gradient_checkpointing=every_layer"], "zero2"),
    }  # fmt: skip
    for name, (flags, ds_config) in variants.items():
        got = trained(corpus, tmp_path / name, architecture, *plain, *flags, ds_config=ds_config)
        assert got == pytest.approx(expected, rel=2e-3), name
    done = run_ranks(corpus, tmp_path / "ranks", *FLAGS[architecture], *plain, ranks=2)
    assert done.code == 0, done.output
    assert losses(tmp_path / "ranks") == pytest.approx(expected, rel=2e-3)

"""data.micro_batch_tokens auto: chosen from the card's memory at the first start, kept afterwards."""

import dataclasses

import pytest
import torch

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import ds_config_path, load_recipe
from megabert.data.ranks import micro_batch_sizes
from megabert.files.checkpoint_format import find_checkpoint, read_state
from megabert.training.micro_batch import choose
from megabert.training.micro_batch.batch import batch_of_web_pages, largest_batch
from megabert.training.micro_batch.choose import MicroBatchChooser, resolve_micro_batch
from megabert.training.telemetry.cards import card_named
from tests.helpers.runs import pretrain_command, run_command


def chooser(recipe, card=None, ranks=1, zero=1, memory=None, fused=True):
    ds_config = read_ds_config(ds_config_path(f"zero{zero}"))
    return MicroBatchChooser(recipe, ds_config, ranks, memory or (card and card_named(card).memory), True, fused)


@pytest.fixture
def base(corpus):
    def make(name="mosaicbert-base", **settings):
        return load_recipe(name, **{"data.train": str(corpus.tokens)}, **settings)

    return make


@pytest.mark.parametrize(
    ("card", "ranks", "tokens"),
    [("h100", 1, 117_760), ("h100", 8, 58_880), ("h100", 32, 14_720), ("a10", 1, 29_440), (None, 1, 14_720)],
)
def test_the_largest_that_fits_and_divides_the_batch(base, card, ranks, tokens):
    recipe = base(data={"ranks": [ranks]})
    assert chooser(recipe, card, ranks).choose() == tokens
    resolved = recipe.with_micro_batch(tokens).data
    assert (resolved.bin_tokens, resolved.global_batch_tokens) == (tokens, 471_040)


def test_it_suits_other_numbers_of_ranks_and_a_growing_batch(base):
    assert chooser(base(data={"ranks": [1, 64]}), "h100").choose() == 7360
    assert chooser(base(data={"batch_warmup": 0.1, "batch_warmup_from": 94_208}), "h100").choose() == 94_208
    assert micro_batch_sizes(4096, 1024, 100, [2, 3], 4096) == [128, 256, 512]


def test_plain_pytorch_gets_a_smaller_one(base):
    assert chooser(base(), memory=20e9, fused=False).choose() < chooser(base(), memory=20e9).choose()


@pytest.mark.parametrize("rate", [0.9, 0.1])
def test_a_phase_that_masks_more_counts(base, rate):
    """For the memory, the highest masking rate of any phase counts."""
    recipe = base(data={"phases": [{"until": 0.5}, {"until": 1.0, "mlm_probability": rate}]})
    for batch in (largest_batch(recipe, 1000, {}), batch_of_web_pages(recipe, 1000)):
        assert batch.masked == 1000 * max(0.3, rate)


@pytest.mark.parametrize(
    ("ops", "missing", "fused"), [("auto", None, True), ("auto", "no compiler", False), ("torch", None, False)]
)
def test_a_card_that_runs_plain_pytorch_is_told_apart(base, monkeypatch, ops, missing, fused):
    made = []
    monkeypatch.setattr(choose, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(choose, "memory_bytes", lambda device: 24e9)
    monkeypatch.setattr(choose, "has_fast_bf16", lambda device: True)
    monkeypatch.setattr(choose, "why_not_all_fused", lambda *arguments: missing)
    monkeypatch.setattr(choose, "gather_dicts", lambda own: own)
    monkeypatch.setattr(choose, "broadcast_from_rank0", lambda make, *_: make())
    monkeypatch.setattr(MicroBatchChooser, "choose", lambda self: made.append(self.fused) or 1024)
    resolve_micro_batch(base(run={"ops": ops}), read_ds_config(ds_config_path("zero1")), 0, 1)
    assert made == [fused]


def test_a_padded_model_counts_its_padding_by_the_corpus(base):
    """The corpus has short documents, each of which is computed at 128 tokens."""
    padded, unpadded = (chooser(base(name), memory=18.5e9).choose() for name in ("bert-base", "mosaicbert-base"))
    assert padded < unpadded


def test_where_nothing_fits_the_advice_helps(base):
    recipe = base("mosaicbert-large")
    with pytest.raises(ValueError, match=r"even 128 tokens need about .* the card has 9.0 GB. Set model.gradient"):
        chooser(recipe, memory=9e9).choose()
    assert chooser(recipe, memory=9e9, zero=3, ranks=8).choose() >= 128
    with pytest.raises(
        ValueError, match=r"between 7 ranks. Set data.global_batch_tokens 473088, or use 4, 5 or 8 ranks"
    ):
        chooser(recipe, "h100", 7).choose()
    assert chooser(base(data={"global_batch_tokens": 473_088}), "h100", 7).choose() == 67_584


def test_both_cannot_be_auto():
    with pytest.raises(ValueError, match="are both auto, expected a number for one of them"):
        load_recipe("quickstart", data={"micro_batch_tokens": "auto"})


def test_a_run_keeps_it_or_says_why_it_cannot(corpus, tmp_path):
    flags = ["--data.micro_batch_tokens=auto", "--data.global_batch_tokens=20480", "--run.max_steps=1"]
    done = run_command(pretrain_command(corpus, tmp_path, *flags))
    assert done.code == 0, done.output
    assert "data.micro_batch_tokens auto is 10240 on CPUs" in done.output
    state = read_state(find_checkpoint(tmp_path))
    assert state.recipe["data"]["micro_batch_tokens"] == 10_240
    recipe = load_recipe("mosaicbert-base", run={"output_dir": str(tmp_path)})
    assert resolve_micro_batch(recipe.with_micro_batch(58_880), read_ds_config(ds_config_path("zero1")), 0, 1)
    assert chooser(recipe, "h100").choose() == 10_240
    branch = {"output_dir": str(tmp_path / "branch"), "branch_from": str(tmp_path)}
    assert chooser(dataclasses.replace(recipe, run=load_recipe("mosaicbert-base", run=branch).run)).choose() == 10_240
    with pytest.raises(ValueError, match=r"has 10240, .* To resume, use cards with more memory, or set") as error:
        chooser(recipe, memory=4e9).choose()
    large = load_recipe("mosaicbert-large", run={"output_dir": str(tmp_path)})
    with pytest.raises(ValueError, match=r"To resume, use ds_configs/zero2.json, use cards with more memory"):
        chooser(large, ranks=8, memory=18.6e9).choose()
    assert chooser(large, ranks=8, zero=2, memory=18.6e9).choose() == 10_240
    assert "--run.resume none" in str(error.value)
    anew = {"output_dir": str(tmp_path), "resume": "none"}
    assert chooser(dataclasses.replace(recipe, run=load_recipe("mosaicbert-base", run=anew).run)).choose() == 14_720
    (find_checkpoint(tmp_path) / "state.json").write_text("{")
    assert chooser(recipe).choose() == 14_720

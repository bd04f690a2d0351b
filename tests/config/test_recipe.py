"""Recipes are read strictly, and errors name the nearest setting."""

import pytest
import yaml

from megabert.config.recipe import ModelConfig, OptimizerConfig, Recipe, RunConfig, may_change_at_resume
from megabert.config.recipe_parser import recipe_names
from megabert.config.settings import flatten
from tests.helpers.recipes import read_recipe

TWO_LENGTHS = '[{"max_seq_len": 32, "until": 0.5}, {"max_seq_len": 64, "until": 1}]'


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        read_recipe(*argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return captured


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads(name):
    assert read_recipe("--recipe", name).run.output_dir


def test_flags_override_the_recipe_and_the_recipe_overrides_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {hidden_size: 96, num_attention_heads: 4}\nrun: {max_steps: 5}\n")
    recipe = read_recipe("--recipe", str(path), "--model.hidden-size=64")
    assert (recipe.model.hidden_size, recipe.model.num_attention_heads) == (64, 4)
    assert recipe.model.num_hidden_layers == ModelConfig().num_hidden_layers


@pytest.mark.parametrize("flags", [["--resume", "none"], ["--resume=none"], ["--run.resume=none"]])
def test_resume_has_a_short_name(flags):
    assert read_recipe(*flags).run.resume == "none"


def test_a_flag_for_one_length_replaces_the_length_in_the_recipe():
    recipe = read_recipe("--run.max-steps", "7")
    assert (recipe.run.max_steps, recipe.run.max_tokens) == (7, None)


def test_the_saved_recipe_reads_back(tmp_path):
    recipe = read_recipe("--optimizer.lr=0.25")
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read_recipe("--recipe", str(tmp_path / "saved.yaml")) == recipe


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.lrr=1"], "unknown setting --optimizer.lrr. Did you mean --optimizer.lr?"),
        (["--lr=1"], "Did you mean --optimizer.lr?"),
        (["--zzz=1"], "unknown setting --zzz. See --help."),
        (["--optimizer.lr=fast"], "fast"),
        (["--recipe=mosaicbert-bse"], "Did you mean mosaicbert-base?"),
        (["--model.gradient_checkpointing=every_0"], "expected none, every_layer or every_K"),
        (["--model.num_attention_heads=7"], "expected a multiple of model.num_attention_heads (7)"),
        (["--model.hidden_dropout=1"], "model.hidden_dropout is 1.0, expected a number in [0, 1)"),
        (["--data.max_seq_len=2"], "data.max_seq_len is 2, expected a number in [3, 1048576]"),
        (["--data.micro_batch_tokens=64"], "expected at least data.max_seq_len (128)"),
        (["--data.global_batch_tokens=1500"], "expected a multiple of data.micro_batch_tokens (2048)"),
        (["--data.num_workers=-1"], "data.num_workers is -1"),
        (["--masking.mlm_probability=0"], "masking.mlm_probability is 0.0, expected a number in (0, 1)"),
        (["--optimizer.final_lr=2"], "optimizer.final_lr is 2.0, expected a number in [0, 1]"),
        (["--optimizer.lr=0"], "optimizer.lr is 0.0, expected a number in (0, 10]"),
        (["--run.max_steps=1", "--run.max_tokens=1"], "expected only one of them"),
        (["--model.num_attention_heads=0"], "model.num_attention_heads is 0, expected a number in [1, 1024]"),
        (
            ["--model.pad_vocab_to_multiple_of=0"],
            "model.pad_vocab_to_multiple_of is 0, expected a number in [1,",
        ),
        (["--run.seed=-1"], "run.seed is -1"),
        (["--run.keep_checkpoints=0"], "run.keep_checkpoints is 0, expected a number in [1, 1e6]"),
        (
            ["--run.save_every_steps=4", "--run.keep_every_steps=6"],
            "expected a multiple of run.save_every_steps (4), or 0",
        ),
        (["--recipe=bert-base", "--data.max_seq_len=1024"], "has only model.max_position_embeddings = 512 positions"),
        (["--run.save_every_steps=0"], "run.save_every_steps is 0, expected a number in [1, 1e12]"),
        (["--run.rollback_after=-1"], "run.rollback_after is -1, expected a number in [0, 1e6]"),
        (["--data.ranks=[0]"], "data.ranks is [0], expected numbers of ranks from 1 on, such as [48, 64]"),
        (["--data.ranks=[]"], "data.ranks is [], expected numbers of ranks from 1 on, such as [48, 64]"),
        (["--run.log_every_steps=0"], "run.log_every_steps is 0, expected a number in [1, 1e12]"),
        (['--data.phases=[{"until": 0.5}]'], "data.phases has phases until [0.5], expected rising shares, the last"),
        (['--data.phases=[{"until": 1, "tarin": "x"}]'], "Did you mean --data.phases.0.train?"),
        (['--data.phases=[{"until": 1}]', f"--data.max_seq_len={TWO_LENGTHS}"], "Put the lengths into data.phases"),
        (
            ['--data.phases=[{"until": 1, "mlm_probability": 0.2}]', "--masking.schedule=linear"],
            "both change the masking. Leave one of them out",
        ),
        (['--data.phases=[{"until": 1, "max_seq_len": 4096}]'], "expected at least data.max_seq_len (4096)"),
        (["--model.rope_theta=3"], "model.rope_theta has no effect with model.position alibi"),
        (["--model.position=rope", "--model.hidden_size=35"], "Set model.hidden_size to a multiple of"),
        (["--model.global_attention_every=3"], "a window needs local layers. Set both, or neither"),
        (["--model.position=rope", "--model.local_rope_theta=3"], "Leave it out"),
    ],
)
def test_a_wrong_flag_gives_a_one_line_error(capsys, argv, message):
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hiden_size: 3}", "unknown key 'model.hiden_size'. Did you mean model.hidden_size?"),
        ("lr: 1", "Did you mean optimizer.lr?"),
        ("[1, 2]", "is [1, 2], expected keys and values"),
        ("run: {seed: 1, seed: 2}", "line 1: duplicate key seed"),
        ("run: {output_dir: 2026-01-31}", "line 1: YAML reads 2026-01-31 as a timestamp: quote it"),
        ("model: {", "not valid YAML"),
        ("model: {hidden_size: big}", "big"),
        ("model: 3", "model is 3, expected settings below it"),
        ("model:", "model is None, expected settings below it"),
        ("model: {hidden_size: 96}", "does not say how long to train"),
    ],
)
def test_a_wrong_recipe_file_gives_a_one_line_error(capsys, tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message in error_of(capsys, "--recipe", str(path))


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        read_recipe("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for group, settings in Recipe(run=RunConfig(max_steps=1)).to_dict().items():
        assert all(f"--{group}.{name}" in text for name in settings)
    assert "peak learning rate" in " ".join(text.split())
    assert "tokens" in text


def test_checkpointing_every_kth_layer():
    values = {"none": 0, "every_layer": 1, "every_3": 3}
    assert {name: ModelConfig(gradient_checkpointing=name).checkpoint_every for name in values} == values


def test_configs_are_immutable():
    with pytest.raises(AttributeError):
        OptimizerConfig().lr = 1.0  # type: ignore[misc]


def test_every_setting_has_an_answer_to_whether_it_may_change_at_a_resume():
    names = flatten(Recipe(run=RunConfig(max_steps=1)).to_dict())
    may_change = {name for name in names if may_change_at_resume(name)}
    probe = {"task", "data", "protocol", "every_steps", "max_examples"}
    data = {"train", "heldout", "tokenizer", "num_workers", "on_bad_shard", "cache_dir", "cache_gb", "ranks"}
    data |= {"store_patience_s"}
    run = {
        "output_dir", "log_every_steps", "eval_every_steps", "eval_tokens", "save_every_steps", "keep_checkpoints",
        "keep_every_steps", "keep_best", "async_save", "resume", "trackers", "max_norm_ratio", "rollback_after", "ops",
        "branch_from", "hang_timeout_s", "cuda_graphs",
    }  # fmt: skip
    model = {"gradient_checkpointing", "init_from"}
    assert may_change == {f"model.{n}" for n in model} | {f"probe.{n}" for n in probe} | {f"data.{n}" for n in data} | {
        f"run.{n}" for n in run
    }
    assert not may_change_at_resume("run.unknown")
    assert not may_change_at_resume("unknown")


def test_phases_share_the_mixtures_that_they_have_in_common():
    phases = '[{"until": 0.5}, {"until": 0.8, "train": [{"shards": "a"}, {"shards": "b", "weight": 3}]}, {"until": 1}]'
    data = read_recipe(f"--data.phases={phases}", "--data.train=a", "--data.max_seq_len=64").data
    assert data.mixtures == [[("a", 1.0)], [("a", 1.0), ("b", 3.0)]]
    assert data.mixture_numbers == [0, 1, 0]
    assert data.lengths == [(64, 0.5), (64, 0.8), (64, 1.0)]

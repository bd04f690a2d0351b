import pytest
import yaml

from megabert.config.parser import RecipeParser, recipe_names
from megabert.config.recipe import (
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    batches_per_step,
    total_steps,
)


def read(*argv: str) -> Recipe:
    return RecipeParser("pretrain", "").read(list(argv))[0]


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        read(*argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    return captured


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads(name):
    assert read("--recipe", name).run.output_dir


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {hidden_size: 96, num_attention_heads: 4}\nrun: {max_steps: 5}\n")
    recipe = read("--recipe", str(path), "--model.hidden-size=64")
    assert (recipe.model.hidden_size, recipe.model.num_attention_heads) == (64, 4)
    assert recipe.model.num_hidden_layers == ModelConfig().num_hidden_layers


@pytest.mark.parametrize("flags", [["--resume", "none"], ["--resume=none"], ["--run.resume=none"]])
def test_resume_has_a_short_name(flags):
    assert read(*flags).run.resume == "none"


def test_a_flag_for_one_length_replaces_the_recipes_other():
    recipe = read("--run.max-steps", "7")
    assert (recipe.run.max_steps, recipe.run.max_tokens) == (7, None)


def test_the_saved_recipe_reads_back(tmp_path):
    recipe = read("--optimizer.lr=0.25")
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read("--recipe", str(tmp_path / "saved.yaml")) == recipe


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
        (["--data.max_seq_len=2"], "data.max_seq_len is 2, expected at least 3"),
        (["--data.micro_batch_tokens=64"], "expected at least data.max_seq_len (128)"),
        (["--data.global_batch_tokens=1500"], "expected a multiple of data.micro_batch_tokens (1024)"),
        (["--data.num_workers=-1"], "data.num_workers is -1"),
        (["--masking.mlm_probability=0"], "masking.mlm_probability is 0.0, expected a number in (0, 1)"),
        (["--optimizer.final_lr=2"], "optimizer.final_lr is 2.0, expected a number in [0, 1]"),
        (["--optimizer.lr=0"], "optimizer.lr is 0.0, expected more than 0"),
        (["--run.max_steps=1", "--run.max_tokens=1"], "expected only one of them"),
        (["--model.num_attention_heads=0"], "model.num_attention_heads is 0, expected at least 1"),
        (["--model.pad_vocab_to_multiple_of=0"], "model.pad_vocab_to_multiple_of is 0, expected at least 1"),
        (["--run.seed=-1"], "run.seed is -1"),
        (["--run.keep_checkpoints=0"], "run.keep_checkpoints is 0, expected at least 1"),
        (
            ["--run.save_every_steps=4", "--run.keep_every_steps=6"],
            "expected a multiple of run.save_every_steps (4), or 0",
        ),
        (["--recipe=bert-base", "--data.max_seq_len=1024"], "has only model.max_position_embeddings = 512 positions"),
        (["--run.log_every_steps=0"], "run.log_every_steps is 0, expected at least 1"),
    ],
)
def test_a_users_mistake_is_one_line(capsys, argv, message):
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hiden_size: 3}", "unknown key 'model.hiden_size'. Did you mean model.hidden_size?"),
        ("lr: 1", "Did you mean optimizer.lr?"),
        ("[1, 2]", "holds a list, expected keys such as model: and data:"),
        ("model: {", "not valid YAML"),
        ("model: {hidden_size: big}", "big"),
        ("model: 3", "model is 3, expected settings below it"),
        ("model:", "model is None, expected settings below it"),
        ("model: {hidden_size: 96}", "does not say how long to train"),
    ],
)
def test_a_wrong_recipe_file_is_one_line(capsys, tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message in error_of(capsys, "--recipe", str(path))


def test_help_shows_every_setting_with_its_default(capsys):
    parser = RecipeParser("pretrain", "")
    with pytest.raises(SystemExit) as exit_info:
        parser.read(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for group, settings in Recipe(run=RunConfig(max_steps=1)).to_dict().items():
        assert all(f"--{group}.{name}" in text for name in settings)
    assert "peak learning rate" in " ".join(text.split())
    assert "tokens" in text


def test_ranks_share_a_global_batch():
    recipe = read("--data.global_batch_tokens=8192")
    assert [batches_per_step(recipe, world_size) for world_size in (1, 2, 8)] == [8, 8, 8]
    with pytest.raises(
        ValueError, match=r"8 micro-batches of 1024 tokens, which 3 ranks cannot share.*3 x 1024 = 3072"
    ):
        batches_per_step(recipe, 3)
    assert batches_per_step(read(), 5) == 5


@pytest.mark.parametrize("name", ["mosaicbert-base", "mosaicbert-large", "bert-base", "bert-large"])
def test_the_documented_clusters_share_a_published_batch(name):
    """8 GPUs, the two machines of launch/hostfile.example, and four nodes of 8 under SLURM."""
    assert {batches_per_step(read("--recipe", name), ranks) for ranks in (1, 8, 16, 32)} == {32}


def test_the_runs_length():
    assert total_steps(read("--run.max_tokens=10000"), 2) == 4
    assert total_steps(read("--run.max_steps=9"), 2) == 9


def test_checkpointing_every_kth_layer():
    values = {"none": 0, "every_layer": 1, "every_3": 3}
    assert {name: ModelConfig(gradient_checkpointing=name).checkpoint_every for name in values} == values


def test_configs_are_immutable():
    with pytest.raises(AttributeError):
        OptimizerConfig().lr = 1.0

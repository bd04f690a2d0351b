"""The recipe's flags obey the rules of tests/config/test_cli.py, whatever the recipe file says."""

import pytest

from megabert.config.ds_config import read_ds_config
from megabert.config.recipe_parser import RecipeParser, ds_config_names, ds_config_path, load_recipe
from tests.helpers.recipes import read_recipe


def test_switches_of_a_recipe_need_no_value_but_take_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {max_steps: 5, async_save: false, keep_best: true}\n")
    assert read_recipe("--recipe", str(path)).run.async_save is False
    run = read_recipe("--recipe", str(path), "--run.async_save", "--run.compile", "--run.keep_best", "false").run
    assert (run.async_save, run.compile, run.keep_best) == (True, True, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", ""], "--recipe is empty"),
        (["--recipe="], "--recipe is empty"),
        (["--rec", "bert-base"], "unknown setting --rec. Did you mean --recipe?"),
        (["--recipe=bert-base", "--recipe", "bert-large"], "--recipe is given twice"),
        (["--resume=none", "--run.resume", "auto"], "--run.resume is given twice"),
        (["--model.init_from="], "--model.init_from is empty"),
        (["--model.norm_bias", " "], "--model.norm_bias is empty"),
        (
            ["--model.init_from", "~"],
            "--model.init_from is '~'. Pass null for no value, or for a file of this name ./~",
        ),
        (
            ["--data.tokenizer=# a"],
            "--data.tokenizer is '# a'. Pass null for no value, or for a file of this name ./# a",
        ),
        (["--data.train=\t"], "--data.train is empty"),
        ([" "], "a word of the command is empty"),
        (["bert-base"], "unexpected word 'bert-base'"),
        # What Python makes of an argument's byte 0xff.
        (
            ["--data.train", "a\udcff"],
            "--data.train is 'a\\udcff', which is not UTF-8. Rename the file, or pass a link",
        ),
    ],
)
def test_flags_that_could_be_misread_are_refused_in_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        read_recipe(*argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "model.init_from is empty"),
        (
            "null",
            "model.init_from is 'null'. Write null without quotes for no value, or for a file of this name ./null",
        ),
        ("# a", "model.init_from is '# a'. Write null without quotes"),
    ],
)
def test_a_value_in_a_recipe_file_that_would_be_none_is_refused(capsys, tmp_path, value, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: {{max_steps: 5}}\nmodel: {{init_from: '{value}'}}\n")
    with pytest.raises(SystemExit):
        read_recipe("--recipe", str(path))
    assert message in capsys.readouterr().err
    path.write_text(f"run: {{max_steps: 5}}\nmodel: {{init_from: './{value}'}}\n")
    assert read_recipe("--recipe", str(path)).model.init_from == f"./{value}"


def test_load_recipe_gives_what_the_command_line_gives():
    given = load_recipe("mosaicbert-base", model={"hidden_size": 96}, run={"max_tokens": 5}, **{"data.cache_gb": 3})
    flags = ["--model.hidden_size=96", "--run.max_tokens=5", "--data.cache_gb=3"]
    assert given == read_recipe("--recipe=mosaicbert-base", *flags)
    assert given.run.max_steps is None
    assert load_recipe() == read_recipe()


def test_load_recipe_takes_lists_switches_none_and_paths(tmp_path):
    (tmp_path / "mine.yaml").write_text("run: {max_steps: 5}\n")
    phases = [{"max_seq_len": 32, "until": 0.5}, {"max_seq_len": 64, "until": 1}]
    settings = {"model.init_from": None, "optimizer.betas": (0.8, 0.9)}
    recipe = load_recipe(
        tmp_path / "mine.yaml", data={"max_seq_len": phases, "train": tmp_path}, run={"compile": True}, **settings
    )
    assert recipe.data.lengths == [(32, 0.5), (64, 1.0)]
    assert recipe.data.train == str(tmp_path)
    assert (recipe.run.compile, recipe.model.init_from, recipe.optimizer.betas) == (True, None, (0.8, 0.9))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("quickstrat", {}, "recipe 'quickstrat' is neither a file nor one of: .* Did you mean quickstart?"),
        ("", {}, "--recipe is empty"),
        ("quickstart", {"model": {"hiden_size": 3}}, "unknown setting --model.hiden_size. Did you mean"),
        ("quickstart", {"model": {"hidden_size": "big"}}, "big"),
        ("quickstart", {"model": 3}, "model"),
        ("quickstart", {"model.hidden_size": 0}, "model.hidden_size is 0, expected a number in"),
        ("quickstart", {"run": {"seed": 1}, "run.seed": 2}, "--run.seed is given twice"),
        ("quickstart", {"run": {"max_steps": 1, "max_tokens": 1}}, "expected only one of them"),
    ],
)
def test_load_recipe_raises_a_value_error_with_the_message_of_the_command_line(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(name, **overrides)


def test_ds_configs_are_found_by_name_and_by_path(tmp_path):
    assert ds_config_names() == ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]
    assert read_ds_config(ds_config_path("zero2")).values.zero_optimization.stage == 2
    (tmp_path / "mine.json").write_text("{}")
    assert ds_config_path(str(tmp_path / "mine.json")) == tmp_path / "mine.json"
    with pytest.raises(ValueError, match=r"ds_config 'zero22' is neither a file nor one of: .* Did you mean zero2\?"):
        ds_config_path("zero22")


def test_one_parser_reads_several_recipes_as_new_ones_do():
    parser = RecipeParser("pretrain")
    for flags in (
        ["--recipe=modernbert-base"],
        ["--run.max_hours=2"],
        ["--recipe=bert-base", "--optimizer.lr=1e-3"],
        [],
    ):
        assert parser.read(flags) == RecipeParser("pretrain").read(flags)

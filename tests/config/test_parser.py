"""The recipe's flags obey the rules of tests/config/test_cli.py, whatever the recipe file says."""

import pytest

from megabert.config.parser import RecipeParser
from megabert.config.recipe import Recipe


def read(*argv: str) -> Recipe:
    return RecipeParser("pretrain", "").read(list(argv))[0]


def test_switches_of_a_recipe_need_no_value_but_take_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {max_steps: 5, async_save: false, keep_best: true}\n")
    assert read("--recipe", str(path)).run.async_save is False
    run = read("--recipe", str(path), "--run.async_save", "--run.compile", "--run.keep_best", "false").run
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
        (["bert-base"], "unexpected word 'bert-base'"),
    ],
)
def test_flags_that_could_be_misread_are_refused_in_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        read(*argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_value_in_a_recipe_file_is_refused(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {max_steps: 5}\nmodel: {init_from: ''}\n")
    with pytest.raises(SystemExit):
        read("--recipe", str(path))
    assert "--model.init_from is empty" in capsys.readouterr().err

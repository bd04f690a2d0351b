"""Command lines: switches need no value, and whatever could be misread is one line of error and exit code 2."""

import errno
import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megabert.config import cli
from megabert.config.cli import Parser, normalize_flags, read_flags
from megabert.files.atomic import write_atomically


@dataclass(frozen=True)
class Options:
    source: str
    """folder to read"""
    out: str
    """folder to write"""
    onnx: bool = False
    """a switch"""
    deduplicate: bool = True
    """a switch that is on by default"""
    average: int = 1
    """a number"""
    most: int | None = None
    """a number or none"""


def read(*argv: str) -> Options:
    return read_flags(Options, "command", "What it does.", argv)


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        read(*argv)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("command: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    "words", [["--onnx"], ["--onnx", "true"], ["--onnx=true"], ["--onnx", "yes"], ["--onnx=1"], ["--onnx", "True"]]
)
@pytest.mark.parametrize("before", [True, False])
def test_a_switch_is_on_with_and_without_a_value(words, before):
    paths = ["in", "out"]
    options = read(*words, *paths) if before else read(*paths, *words)
    assert options == Options("in", "out", onnx=True)


@pytest.mark.parametrize("words", [["--deduplicate", "false"], ["--deduplicate=no"], ["--deduplicate", "0"]])
def test_a_switch_is_turned_off_with_a_value(words):
    assert read("in", *words, "out") == Options("in", "out", deduplicate=False)


def test_the_word_after_a_switch_is_its_value_only_if_it_is_a_truth_value():
    assert read("--onnx", "truth", "--deduplicate", "1.0") == Options("truth", "1.0", onnx=True)
    assert read("--deduplicate", "no", "in", "--onnx", "out").deduplicate is False
    assert read("in", "out", "--average", "1").average == 1


def test_a_switch_with_a_third_value_takes_that_too():
    @dataclass(frozen=True)
    class Graphs:
        graphs: bool | Literal["auto"] = False
        out: str = "here"

    read_graphs = functools.partial(read_flags, Graphs, "command", "")
    assert read_graphs(["--graphs", "--out=b"]) == Graphs(True, "b")
    assert read_graphs(["--graphs", "auto"]) == read_graphs(["--graphs=auto"]) == Graphs("auto")
    assert read_graphs(["--graphs", "no"]) == Graphs(False)


def test_a_positional_list_takes_one_or_more_words(capsys):
    @dataclass(frozen=True)
    class Several:
        sources: list[str]
        out: str = "here"

    assert read_flags(Several, "command", "", ["a", "1", "--out=b"]) == Several(["a", "1"], "b")
    assert read_flags(Several, "command", "", ["[a]"]) == Several(["[a]"])
    with pytest.raises(SystemExit):
        read_flags(Several, "command", "", ["--out=b"])
    assert capsys.readouterr().err == "command: the following arguments are required: sources\n"


def test_dashes_and_underscores_are_the_same_flag():
    assert normalize_flags(["--a-b=c-d", "e-f", "--g-h"]) == ["--a_b=c-d", "e-f", "--g_h"]


def test_words_after_two_dashes_are_left_alone():
    assert normalize_flags(["--x", "--", "--x", "--x", ""], {"--x": ()}) == ["--x=true", "--", "--x", "--x", ""]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["in", "out", "--average", ""], "--average is empty, expected a value"),
        (["in", "out", "--average="], "--average is empty, expected a value"),
        (["in", "out", "--onnx", ""], "--onnx is empty, expected a value"),
        (["in", ""], "a word of the command is empty"),
        (["in", "out", "--average=1", "--average", "2"], "--average is given twice"),
        (["in", "out", "--onnx", "--onnx=false"], "--onnx is given twice"),
        (["in", "out", "--aver=2"], "unknown setting --aver. Did you mean --average?"),
        (["in", "out", "--onnx", "maybe"], "unexpected word 'maybe': a value follows its --flag"),
        (["in", "out", "--onnx=maybe"], "maybe"),
        (["in", "out", "--average"], "--average has no value. One that begins with a dash is written as --average=-"),
        (["in", "out", "--average", "-x"], "--average has no value. One that begins with a dash is written as"),
        (["in", "out", "--average=many"], "--average is many, expected an integer. See --help."),
        (["in", "out", "--most=many"], "--most is many, expected an integer. See --help."),
        (["in", "out", "--most=1e18"], "--most is 1e18, expected an integer. See --help.\n"),
        (["in", "out", "--most=true"], "--most is true, expected an integer. See --help.\n"),
        (["in", "out", "--most", "~"], "--most is '~'. Pass null for no value"),
        (["in", "out", "--most=#x"], "--most is '#x'. Pass null for no value, or for a file of this name ./#x."),
        (["in"], "out"),
    ],
)
def test_what_could_be_misread_is_refused_in_one_line(capsys, argv, message):
    assert message in error_of(capsys, *argv)


def test_a_flag_that_appends_may_be_repeated():
    parser = Parser("command")
    parser.add_argument("--names", type=list[str], default=[])
    assert parser.parse_args(["--names+=a", "--names+", "b"]).names == ["a", "b"]


def test_help_says_that_the_value_of_a_switch_is_optional(capsys):
    with pytest.raises(SystemExit) as exit_info:
        read("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--onnx [{true,false}]" in text
    assert "--average AVERAGE" in text


def test_messages_name_what_is_there_with_and_without_a_checkout(capsys, monkeypatch, tmp_path):
    message = "No shards. Write them with data_prep/write_shards.py, not with /home/me/write_shards.py."

    def fail() -> None:
        raise ValueError(message)

    def printed() -> str:
        with pytest.raises(SystemExit):
            cli.run(fail, "command")
        return capsys.readouterr().err

    assert printed() == f"command: {message}\n"
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    assert printed() == "command: No shards. Write them with megabert-shards, not with /home/me/write_shards.py.\n"
    assert cli.name_commands("Run python launch/convert_to_hf.py RUN OUT") == "Run megabert-export RUN OUT"
    assert cli.name_commands("Use ds_configs/zero2.json, or --ds_config ds_configs/zero0.json.") == (
        "Use --ds_config zero2, or --ds_config zero0."
    )
    assert cli.name_commands("See data_prep/README.md.") == "See data_prep/README.md of MegaBERT's repository."
    assert (
        cli.name_commands("/home/me/launch/a.sh data/ds_configs/b.json")
        == "/home/me/launch/a.sh data/ds_configs/b.json"
    )


def test_what_a_command_logs_names_what_is_there_without_a_checkout(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    before = logging.getLogRecordFactory()
    with pytest.raises(SystemExit):
        cli.run(lambda: logging.getLogger("anything").warning("Run %s.", "launch/convert_to_hf.py"), "command")
    logging.setLogRecordFactory(before)
    assert caplog.messages == ["Run megabert-export."]


def test_the_installed_commands_are_those_of_setup():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert set(re.findall(r'"(megabert-\w+)":', setup)) == {name for name in cli.INSTALLED.values() if " " not in name}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda folder: (folder / "sub").write_text(""), "sub: Is a directory. A file belongs there: rename or remove"),
        (lambda folder: os.replace(folder / "file", folder / "sub"), "sub: Is a directory. A file belongs there"),
        (lambda folder: (folder / "file/x").write_text(""), "x: Not a directory. A folder belongs there: rename or"),
        (lambda folder: (folder / ("x" * 300)).write_text(""), "xx: File name too long. Choose a shorter name."),
        (lambda folder: (folder / "loop").read_text(), "loop: Too many levels of symbolic links. It is a link to"),
        (lambda folder: (folder / "none").read_text(), "[Errno 2] No such file or directory: "),
        (lambda folder: (folder / "a\nb\r" / "none").mkdir(), r"a\nb\r/none"),
        (lambda folder: (folder / ("x" * 10_000)).read_text(), "xxx ... xxx"),
    ],
)
def test_an_error_of_the_file_system_is_one_line_with_the_file_and_a_remedy(tmp_path, capsys, action, message):
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit):
        cli.run(lambda: action(tmp_path), "prog")
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"prog: {tmp_path}") or "[Errno 2]" in error
    assert error.count("\n") == 1
    assert "\r" not in error
    assert len(error) < 2500


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EROFS, 2),
        (errno.ENAMETOOLONG, 2),
        (errno.EACCES, 2),
        (errno.ENOSPC, 74),
        (errno.EDQUOT, 74),
        (errno.EFBIG, 74),
        (errno.EADDRINUSE, 1),
    ],
)
def test_a_training_run_that_another_attempt_cannot_save_is_not_started_again(number, code):
    assert cli.exit_code(OSError(number, os.strerror(number), "file")) == code
    error = OSError(number, os.strerror(number))
    error.exit_code = 75  # type: ignore[attr-defined]
    assert cli.exit_code(error) == 75


def test_a_folder_that_is_gone_is_named_as_the_one_of_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        cli.run(lambda: Path("out").resolve(), "prog")
    assert "prog: the folder that the command was started in is gone: change to another one" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_with_the_file_and_a_remedy(tmp_path, capsys, monkeypatch, number):
    """A write that fails does not name its file."""

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit):
        cli.run(lambda: write_atomically(tmp_path / "file", b"x"), "prog")
    error = capsys.readouterr().err
    assert error.startswith(f"prog: {tmp_path / 'file'}: {os.strerror(number)}. ")
    assert "run the same command again" in error
    assert not list(tmp_path.iterdir())


def test_what_a_command_logs_holds_no_secrets(capsys, caplog):
    def main() -> int:
        logging.getLogger("anything").warning("%s: still retrying", "https://me:pw@host/x?sig=1")
        return 0

    before = logging.getLogRecordFactory()
    with pytest.raises(SystemExit):
        cli.run(main, "prog")
    logging.setLogRecordFactory(before)
    assert caplog.messages == ["https://host/x?... still retrying"]

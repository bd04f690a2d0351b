"""The installed commands exist, and import nothing slow before Ctrl-C ends them without a traceback."""

import importlib
import re
import signal
import types
from functools import partial

import pytest

from megabert.commands import start
from tests.helpers.runs import REPOSITORY

FUNCTIONS = {name: value for name, value in vars(start).items() if isinstance(value, partial)}


def test_every_installed_command_is_a_function_that_exists():
    modules = re.findall(r'"megabert-\w+": "([\w.]+)"', (REPOSITORY / "setup.py").read_text())
    assert {module.split(".")[-1]: (module,) for module in modules} == {
        name: function.args for name, function in FUNCTIONS.items()
    }
    assert all(callable(importlib.import_module(*function.args).command) for function in FUNCTIONS.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ctrl_c_has_its_default_while_a_command_is_imported(name, monkeypatch):
    before, found = signal.getsignal(signal.SIGINT), []

    def import_module(module: str) -> types.SimpleNamespace:
        found.append((module, signal.getsignal(signal.SIGINT)))
        return types.SimpleNamespace(command=lambda: found.append("ran"))

    monkeypatch.setattr(importlib, "import_module", import_module)
    try:
        FUNCTIONS[name]()
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == [(*FUNCTIONS[name].args, signal.SIG_DFL), "ran"]

"""MegaBERT pretrains BERT-style encoders: MosaicBERT, and BERT as its baseline, under DeepSpeed.

Where this is imported, transformers' Auto classes load a folder of ours without trust_remote_code. transformers takes seconds to
load and has no plug-ins, so registering waits, as an import hook, until somebody imports its Auto classes.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"


def _register_config() -> None:
    from megabert.model import register_auto_classes

    register_auto_classes()


def _register_models() -> None:
    from megabert.model import register_auto_classes

    register_auto_classes()


_WHEN_IMPORTED = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _ThenRegister(Loader):
    """Loads a module as its own loader does, and registers."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "an imported module has a spec"
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _WHEN_IMPORTED[module.__name__]()


class _Watch(MetaPathFinder):
    """Finds only the modules of _WHEN_IMPORTED, each once."""

    def __init__(self):
        self.waiting = set(_WHEN_IMPORTED)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        self.waiting.discard(fullname)  # so that this asks the other finders
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


for _name, _register in _WHEN_IMPORTED.items():
    if _name in sys.modules:
        _register()
sys.meta_path.insert(0, _Watch())

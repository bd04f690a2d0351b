"""Fixtures of all tests: a small real corpus with its tokenizer and shards; and which tests are skipped, and why."""

import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

from data_prep import train_tokenizer, write_shards
from data_prep.sources.docstrings import docstrings
from tests.helpers.runs import Corpus
from tests.helpers.shared import make_once

# A busy machine must not fail a property that holds, nor chance fail a change that did not cause it: examples are the
# same in every run. Other examples: pytest --hypothesis-profile=random.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("fixed")

# A shell that runs the tests in the background makes them ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB_SIZE = 800

# Programs of tests that make a cluster on this machine, as root; and packages of other projects that prepare text.
PROGRAMS = {"slurm": ["slurmctld", "slurmd", "sbatch", "munged"], "namespaces": ["ip"]}
PREPARATION = {"foreign_tokens": "megatron streaming datatrove", "ray": "ray", "datatrove": "datatrove nltk spacy"}

# Where the tests start whole runs. They go first, so that no core waits for the last of them.
SLOW = (
    "test_end_to_end.py",
    "test_readme.py",
    "test_wheel.py",
    "training/",
    "launch/",
    "cluster/",
    "commands/",
    "gpu_walk/",
    "kernels/test_interpreter.py",
    "finetune/",
    "convert/",
    "model/test_graphs.py",
    "data_prep/test_interrupted.py",
)


def reasons_to_skip() -> dict[str, str]:
    """Return the marks whose tests cannot run on this machine, each with the reason."""
    from megabert.convert.targets.transformers_js import find_node

    def lacks(*packages: str) -> bool:
        return not all(find_spec(name) for name in packages)

    reasons = {}
    for mark, programs in PROGRAMS.items():
        missing = [name for name in programs if shutil.which(name) is None]
        if missing or os.geteuid():
            reasons[mark] = f"needs {', '.join(missing) or 'root'}: see tests/cluster/README.md"
    if lacks("triton"):
        reasons["triton"] = "needs Triton: bash launch/install.sh dev,kernels"
    if shutil.which("g++") is None:
        reasons["compiler"] = "needs a C++ compiler: apt-get install g++"
    if lacks("peft"):
        reasons["peft"] = "needs peft: pip install peft"
    if lacks("torchao"):
        reasons["fp8"] = "needs torchao: pip install '.[fp8]'"
    for mark, packages in PREPARATION.items():
        if lacks(*packages.split()):
            reasons[mark] = f"needs {packages}: see data_prep/README.md"
    if missing := [name for name in ("gguf", "sentence_transformers") if lacks(name)]:
        reasons["serving"] = f"needs {', '.join(missing)}: pip install '.[serving]'"
    if lacks("llama_cpp"):
        reasons["llama_cpp"] = "needs llama-cpp-python: pip install '.[serving]'"
    if find_node() is None:
        reasons["node"] = (
            "needs Node.js and ONNXRUNTIME_NODE_INSTALL=skip npm install @huggingface/transformers, NODE_PATH"
        )
    if shutil.which("chromium") is None or lacks("playwright"):
        reasons["browser"] = "needs Chromium and playwright: apt-get install chromium; pip install playwright"
    if "MOSAIC_REFERENCE" not in os.environ:
        reasons["mosaic"] = "needs MOSAIC_REFERENCE: see tests/convert/published/test_mosaic_reference.py"
    for mark, count in {"gpu": 1, "multi_gpu": 2}.items():
        if torch.cuda.device_count() < count:
            reasons[mark] = f"needs {count} GPU, this machine has {torch.cuda.device_count()}"
    return reasons


def pytest_configure() -> None:
    # nohup and some schedulers start a process with SIGHUP ignored, and what it starts inherits that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path.relative_to(Path(__file__).parent)).startswith(SLOW))
    reasons = reasons_to_skip()
    for item in items:
        for mark in list(item.iter_markers()):
            if mark.name in reasons:
                item.add_marker(pytest.mark.skip(reason=reasons[mark.name]))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Docstrings of a part of PyTorch: real text, the same wherever these versions are installed."""
    found: list[str] = []
    for package in ("torch.nn.modules", "torch.optim"):
        spec = find_spec(package)
        assert spec is not None
        folder = Path(str(spec.submodule_search_locations[0]))  # type: ignore[index]
        found += [text for path in sorted(folder.glob("*.py")) for text in docstrings(path) if len(text) >= 80]
    return sorted(set(found))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Corpus:
    """The documents as .jsonl, a tokenizer learnt from them, and token shards with a held-out part."""

    def write(folder: Path) -> None:
        jsonl, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
        jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_tokenizer.main([f"--source={jsonl}", f"--out={tokenizer}", f"--vocab_size={VOCAB_SIZE}"])
        out = [f"--out={folder / 'tokens'}", "--heldout=0.1", "--chunk_tokens=2048"]
        write_shards.main([f"--source={jsonl}", f"--tokenizer={tokenizer}", *out])

    folder = make_once(tmp_path_factory, "corpus", write)
    return Corpus(folder / "corpus.jsonl", folder / "tokenizer", folder / "tokens", texts)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

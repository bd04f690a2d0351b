"""Every flag, setting, command, extra and file that a message, --help or a README names exists."""

import argparse
import ast
import importlib.util
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn, get_type_hints

import pytest
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from megabert.config import cli
from megabert.config.cli import Parser, split_flag
from megabert.config.ds_config import NOT_SUPPORTED
from megabert.config.ds_schema import DsSettings
from megabert.config.recipe_parser import RecipeParser
from megabert.training.distributed.signals import SIGNALS

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = ("megabert", "launch", "data_prep")
OTHER_TEXTS = ("*.md", "*.sh", "*.sbatch", "*.yaml", "*.yml", "hostfile.example", "justfile")

# The options of other programs that our texts name.
FOREIGN = {
    "deepspeed": "num_gpus num_nodes hostfile include exclude launcher master_addr master_port module no_local_rank",
    "torchrun": "nproc_per_node nnodes standalone module rdzv_backend rdzv_endpoint rdzv_id max_restarts",
    "srun": "output open_mode cpus_per_task kill_on_bad_exit wait nodes ntasks nodelist container_image"
    " container_mounts mem",
    "apptainer": "nv",
    "sbatch": "nodes ntasks ntasks_per_node gpus_per_node cpus_per_task time signal requeue open_mode output job_name"
    " array parsable dependency exclude gpus_per_task gpu_bind",
    "pip": "no_binary disable_pip_version_check extra_index_url no_build_isolation no_deps target",
    "apt-get": "no_install_recommends",
    "pytest": "durations dist no_loadscope_reorder",
    "ruff": "check fix select force_exclude",
    "just": "list",
    "hf": "repo_type include local_dir",
    "git": "porcelain",
    "docker": "shm_size model_id",
    "tensorboard": "logdir",
    "setpriv": "pdeathsig",
    "ray": "head address ray_address",
    "llama-server": "embedding pooling",
    "infinity_emb": "model_id trust_remote_code",
    "vllm": "runner",
    "python -m http.server": "bind",
}
# The options of shell scripts.
OWN_ARGUMENTS = {"install_gpu.sh": "no_apex", "run.sh": "lint"}
# Words for flags in general.
PLACEHOLDERS = {"flag", "some_flag", "x_y"}
RECIPE_SECTION = re.compile(r"(?<![\w./-])(model|data|masking|optimizer|run|probe)\.([a-z][a-z0-9_]*)(?![\w(/-]|\.\w)")
DS_CONFIG_KEY = re.compile(
    r"(?<![\w./-])(zero_optimization|torch_autocast|checkpoint|bf16|fp16)((?:\.[a-z][a-z0-9_]*)+)(?![\w(/-])"
)
FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w.-]*[\w+])(?!\0)")
SCRIPT_OF_A_CHECKOUT = re.compile(
    r"\b((launch|data_prep)/\w+\.py|ds_configs/\w+\.json)\b"
    r"|\b(launch|data_prep)/[\w/]+\.(sh|sbatch|md)\b(?! of MegaBERT's repository)"
)
EXTRAS = re.compile(r"(?:megabert|\.)\[(\w+(?:,\w+)*)\](?=')")
PATH_OF_A_FILE = re.compile(
    r"(?<![\w./*{\0-])(?:megabert|launch|data_prep|ds_configs|tests)/[\w./-]+\.(?:py|sh|sbatch|json|yaml|md)\b(?!\*)"
)
# What follows the dot in the name of a file.
SUFFIXES = {"adj", "adv", "bin", "json", "noun", "onnx", "pt", "py", "safetensors", "verb"}
DS_CONFIG_SECTIONS = {
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
    "checkpoint": {"load_universal"},
    "bf16": set(DeepSpeedBF16Config.model_fields),
    "fp16": set(DeepSpeedFP16Config.model_fields),
    "zero_optimization": {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()},
    "zero_optimization.offload_optimizer": set(DeepSpeedZeroOffloadOptimizerConfig.model_fields),
    "zero_optimization.offload_param": set(DeepSpeedZeroOffloadParamConfig.model_fields),
}


class Text(NamedTuple):
    place: str
    text: str


class Found(Exception):
    """Carries the parser of a script from where it would parse."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def strings_of(path: Path) -> Iterator[Text]:
    """Yield every string of a Python file; a NUL stands for each value of an f-string."""
    code = path.read_text()
    installed = re.search(r'prog: str = "(megabert-\w+)"', code)
    tree = ast.parse(code)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        text = None
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        if text and installed:
            text = text.replace("{command}", installed[1]).replace("{zero2}", "zero2")
        if text:
            yield Text(f"{path.relative_to(REPOSITORY)}:{node.lineno}", text)


@cache
def texts_of_code(folder: str) -> list[Text]:
    return [text for path in sorted((REPOSITORY / folder).rglob("*.py")) for text in strings_of(path)]


def all_texts() -> Iterator[Text]:
    for folder in CODE:
        yield from texts_of_code(folder)
    folders = [*CODE, "ds_configs", "tests", ".github"]
    for pattern in OTHER_TEXTS:
        paths = [*REPOSITORY.glob(pattern), *(path for name in folders for path in (REPOSITORY / name).rglob(pattern))]
        yield from (Text(str(path.relative_to(REPOSITORY)), path.read_text()) for path in sorted(paths))


def module_of(path: Path) -> ModuleType:
    """Import a file; those of launch/ are in no package."""
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    if not name.startswith("launch."):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsers_of(path: Path) -> list[argparse.ArgumentParser]:
    """Return the parsers of a script: run it up to the point where it parses, once for each kind of command."""
    imported = re.search(r"^ +from (megabert\.commands\.\w+) import command$", path.read_text(), re.MULTILINE)
    module = importlib.import_module(imported[1]) if imported else module_of(path)
    start = getattr(module, "command", None) or module.main
    found = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for argv in (["command"], ["command", "--verify-only=folder"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            patch.setattr(sys, "excepthook", raise_again)
            patch.setattr(Parser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Found) as caught:
                start()
        found.append(caught.value.parser)
    # Training handles signals before it parses its flags.
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return found


def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
    raise Found(parser)


def raise_again(_: object, error: BaseException, __: object) -> NoReturn:
    """Replace sys.excepthook: pretraining ends its process after an unexpected exception."""
    raise error


@cache
def parsers() -> dict[str, list[argparse.ArgumentParser]]:
    """Return the parsers of every script, by the script's file name."""
    paths = [path for folder in CODE for path in (REPOSITORY / folder).rglob("*.py")]
    started = re.compile(
        r'^if __name__ == "__main__":\n( +(end_at_ctrl_c|from ).*\n|\n)* +(cli\.run|command)', re.MULTILINE
    )
    scripts = [path for path in paths if started.search(path.read_text())]
    found = {path.name: parsers_of(path) for path in sorted(scripts)}
    for name, module in re.findall(r'"(megabert-\w+)": "([\w.]+)"', (REPOSITORY / "setup.py").read_text()):
        found[name] = found[module] = found[f"{module.split('.')[-1]}.py"]
    return found


@cache
def known_flags() -> dict[str, set[str]]:
    """Return the flags that each command accepts, without dashes, by the command's file name or name."""
    flags = {
        name: {option.removeprefix("--") for parser in found for option in parser._option_string_actions}
        for name, found in parsers().items()
    }
    flags["pretrain.py"] |= {"max_hours", "resume"}
    flags |= {name: set(options.split()) for name, options in (FOREIGN | OWN_ARGUMENTS).items()}
    for path in (REPOSITORY / "tests").rglob("*.py"):
        code = path.read_text()
        if added := re.findall(r"add_argument\(\s*\"--([\w-]+)\"", code):
            of_benchmarks = {"json", "quick"} if "make_parser(" in code else set()
            flags[path.name] = {name.replace("-", "_") for name in added} | of_benchmarks
    flags["pretrain.sbatch"] = flags["keep_running.sh"] = flags["pretrain.py"]
    flags["finetune_glue.sbatch"] = flags["finetune_glue.py"]
    flags["write_shards.sbatch"] = flags["write_shards.py"]
    return flags


@cache
def every_flag() -> set[str]:
    return {"help"}.union(PLACEHOLDERS, *known_flags().values())


def commands_in(text: str) -> Iterator[tuple[str, str]]:
    """Yield (command, arguments) for every command in a text; arguments end at the next command."""
    ours = "|".join(sorted((re.escape(name) for name in known_flags() if name not in FOREIGN), key=len, reverse=True))
    names = rf"(?<![\w.-])(?:[\w./-]*/)?({ours}|(?<!/)(?:{'|'.join(FOREIGN)}))(?![\w.:-])"
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"[`|;()]|&&|(?<!-)#", line):
            _, *pieces = re.split(names, part)
            yield from zip(pieces[::2], pieces[1::2], strict=True)


def problems_of_flags(text: str) -> Iterator[str]:
    for name in FLAG.findall(text):
        if split_flag(f"--{name}")[0].removeprefix("--") not in every_flag():
            yield f"no parser knows --{name}"
    for command, arguments in commands_in(text):
        for name in FLAG.findall(arguments):
            if split_flag(f"--{name}")[0].removeprefix("--") not in known_flags()[command] | {"help"}:
                yield f"{command} does not know --{name}"


def problems_of_keys(text: str) -> Iterator[str]:
    for match in RECIPE_SECTION.finditer(text):
        if match[2] not in SUFFIXES and match[0] not in known_flags()["pretrain.py"]:
            yield f"no recipe has {match[0]}"
    for match in DS_CONFIG_KEY.finditer(text):
        section, *keys = f"{match[1]}{match[2]}".split(".")
        for key in keys:
            known = f"{section}.{key}" in NOT_SUPPORTED or key in SUFFIXES | DS_CONFIG_SECTIONS.get(section, set())
            if not known:
                yield f"no ds_config has {match[0]}"
            section = f"{section}.{key}"


def problems_of_commands(text: str) -> Iterator[str]:
    """Parse the complete commands of a text: lines that begin with one and leave nothing out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = re.sub(r"  +# .*", "", line.strip().removeprefix("# ").removeprefix("$ "))
        match = re.match(r"(?:(?:python|deepspeed) [^|;&`$]*?\b(?=\w+\.py\b))?([\w-]+(?:\.py)?)\b([^|;&`$]*)$", words)
        if not match or match[1] not in parsers() or not match[2] or re.search(r"\.\.\.|\0|[\[\]]", match[2]):
            continue
        arguments = shlex.split(match[2])
        if not any(accepts(parser, arguments) for parser in parsers()[match[1]]):
            yield f"{match[1]} refuses: {words}"


def accepts(parser: argparse.ArgumentParser, arguments: list[str]) -> bool:
    try:
        if isinstance(parser, RecipeParser):
            parser.read(arguments)
        else:
            parser.parse_args(arguments)
    except SystemExit:
        return False
    return True


@cache
def extras() -> set[str]:
    """The extras that setup.py defines."""
    [found] = [
        keyword.value
        for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "extras_require"
    ]
    assert isinstance(found, ast.Dict)
    return {str(ast.literal_eval(key)) for key in found.keys if key is not None}


def problems_of_names(text: str) -> Iterator[str]:
    """Report extras that setup.py does not define, and files that do not exist."""
    for match in EXTRAS.finditer(text):
        for name in match[1].split(","):
            if name not in extras():
                yield f"setup.py has no extra {name}"
    for match in PATH_OF_A_FILE.finditer(text):
        # Capital letters stand for any name, as in zeroN.json.
        is_pattern = not match[0].endswith(".md") and match[0] != match[0].lower()
        if not is_pattern and not (REPOSITORY / match[0]).exists():
            yield f"there is no {match[0]}"


def problems(text: str) -> list[str]:
    return [
        *problems_of_flags(text), *problems_of_keys(text), *problems_of_commands(text), *problems_of_names(text)
    ]  # fmt: skip


def test_every_flag_and_setting_that_a_text_names_exists():
    found = [f"{place}: {problem}" for place, text in all_texts() for problem in problems(text)]
    assert not found, "\n".join(found)


def test_no_message_installs_from_the_folder_in_which_it_is_read():
    left = [place for folder in CODE for place, text in texts_of_code(folder) if "pip install -e" in text]
    assert not left, "\n".join(left)


def test_no_message_names_a_script_where_there_is_no_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    texts = [*texts_of_code("megabert"), *texts_of_code("data_prep")]
    left = [f"{place}: {text}" for place, text in texts if SCRIPT_OF_A_CHECKOUT.search(cli.name_commands(text))]
    assert not left, "\n".join(left)


@pytest.mark.parametrize(
    "text",
    [
        "Pass --blank-linez if blank lines separate its documents.",
        "Nothing reads it. Set model.checkpoint_every in the recipe.",
        "zero_optimization.offload_optimiser is not supported.",
        "Or `python launch/convert_to_hf.py RUN OUT --replace`.",
        "python data_prep/write_shards.py --source a.txt --out b --min-chars",
        "    deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json --recipe mosaicbert-bse",
        "    python launch/convert_to_hf.py runs/quickstart",
        "    python tests/gpu/accept.py --out DIR --quick",
        "Triton is not installed (pip install 'megabert[kernel]')",
        "Run bash launch/instal.sh first.",
    ],
)
def test_a_text_that_names_what_no_parser_knows_is_found(text):
    assert problems(text)


def test_what_the_parsers_know_is_not_reported():
    assert not problems(
        "python launch/convert_to_hf.py --for onnx RUN OUT\nSet --run.resume=none or zero_optimization.stage."
    )
    assert not problems("--\0 and --run.\0 are made while it runs; model.safetensors and data.noun are files.")


def test_the_keys_of_deepspeed_are_top_level_keys_here():
    assert {section.split(".")[0] for section in DS_CONFIG_SECTIONS} <= {*get_type_hints(DsSettings), *NOT_SUPPORTED}

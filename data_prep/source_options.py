"""Define the command-line options of a corpus, the same for every command that reads one."""

from dataclasses import dataclass
from typing import Literal

from data_prep.sources.base import ReadOptions
from data_prep.sources.text_encoding import check_encoding


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    source: str = "docstrings"
    """docstrings; a file, folder or URL of .txt, .jsonl (also .gz, .zst), .parquet or .arrow; tokens; hf:OWNER/NAME"""
    text_key: str = "text"
    """field (.jsonl) or column (.parquet, .arrow, hf:) that holds the text; meta.text is the field text in meta"""
    blank_lines: bool = False
    """whether blank lines separate the documents of a .txt; otherwise each file is one document"""
    encoding: str | None = None
    """encoding of .txt and .jsonl files without a byte order mark, such as latin-1; the default is UTF-8"""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """stop: what is damaged ends the command; skip: it is left out and counted"""
    dataset_config: str | None = None
    """configuration of a data set hf:OWNER/NAME, such as en"""
    dataset_split: str = "train"
    """split of a data set, from the hub or from save_to_disk"""

    def __post_init__(self):
        if self.encoding:
            check_encoding(self.encoding)

    @property
    def read(self) -> ReadOptions:
        return ReadOptions(
            self.text_key,
            self.blank_lines,
            self.dataset_config,
            self.dataset_split,
            self.encoding,
            self.on_bad_document == "skip",
        )

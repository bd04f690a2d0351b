"""Read and write import.json, where an import came from, and compare a folder's files with their recorded hashes."""

from pathlib import Path
from typing import Any, TypedDict

from megabert.convert.check import export_record
from megabert.convert.check.export_record import IMPORT_RECORD, RECORD
from megabert.convert.hf.reader import CONFIG, read_json
from megabert.convert.hf.resize import ImportedModel
from megabert.convert.hf.tokenizer import FILES as TOKENIZER_FILES
from megabert.convert.hf.tokenizer import find_tokenizer_files
from megabert.convert.hf.writer import MODEL_CODE
from megabert.files.bounded_reads import has_file
from megabert.files.checkpoint_format import files_of
from megabert.files.hashing import file_sha256, texts_sha256
from megabert.files.json_file import check_format_version, write_json

# Version of import.json.
FORMAT_VERSION = 1
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".index.json")


class Origin(TypedDict):
    """What determines an import, each as one hash: the files of the source, the options, and the code."""

    source: str
    options: str
    code: str


class ImportRecord(Origin):
    """The contents of import.json. initialized, unused, vocabulary: as in ImportedModel; files: name to sha256."""

    format_version: int
    initialized: list[str]
    unused: list[str]
    vocabulary: str | None
    files: dict[str, str]


def is_model_file(name: str) -> bool:
    """Return whether a file of a folder is read as its config, weights or tokenizer."""
    return Path(name).name == name and (name in (CONFIG, *TOKENIZER_FILES) or name.endswith(WEIGHTS_SUFFIXES))


def check_unchanged(folder: Path) -> None:
    """Compare the config, the weights and the tokenizer with the hashes that export.json or import.json has of them.

    Raises ValueError naming the first file that is missing or differs, or a record that cannot be read.
    """
    records = {RECORD: export_record.read_record, IMPORT_RECORD: read_import_record}
    for name, read in records.items():
        if not has_file(folder / name):
            continue
        if (record := read(folder)) is None:
            raise ValueError(
                f"{folder / name}: is damaged, so the files cannot be compared with it. Copy the folder again, or "
                f"remove {name} to use them unchecked."
            )
        known = {file: digest for file, digest in record["files"].items() if is_model_file(file)}
        if problem := export_record.find_change(folder, {"files": known}, added=False):
            raise ValueError(
                f"{problem}. Copy the folder again, or if the change is yours, remove {name} to use it unchecked."
            )


def read_import_record(folder: Path) -> ImportRecord | None:
    """Read import.json, or return None if there is none or it is damaged.

    Raises ValueError if a newer version of MegaBERT wrote it.
    """
    if not (folder / IMPORT_RECORD).is_file():
        return None
    try:
        record: Any = read_json(folder / IMPORT_RECORD)
    except ValueError:
        return None
    version = record.get("format_version")
    if isinstance(version, int):
        check_format_version(folder / IMPORT_RECORD, record, FORMAT_VERSION, "Update MegaBERT.")
    types = {"source": str, "options": str, "code": str, "initialized": list, "unused": list, "files": dict}
    valid = all(isinstance(record.get(name), kind) for name, kind in types.items())
    valid = valid and isinstance(record.get("vocabulary"), str | None) and version == FORMAT_VERSION
    texts = [*record["initialized"], *record["unused"], *record["files"].values()] if valid else []
    return record if valid and all(isinstance(text, str) for text in texts) else None


def read_initialized(folder: Path) -> list[str]:
    """Return the parameters that an import initialized because its source lacked them, by our names.

    An export of such an import lists them too; other folders have none.
    """
    if (record := read_import_record(folder)) is not None:
        return record["initialized"]
    listed = (export_record.read_record(folder) or {}).get("initialized", [])
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def describe_origin(source: Path, options: Any) -> Origin:
    """Hash what determines an import. options: ImportOptions. Raises ValueError for a tokenizer outside its folder."""
    files = sorted(path for path in source.iterdir() if is_model_file(path.name)) if source.is_dir() else []
    if options.tokenizer is not None:
        files += sorted(find_tokenizer_files(Path(options.tokenizer)).values())
    # Files that are missing are reported when they are read.
    files = [path for path in files if path.is_file()]
    code = [*sorted(MODEL_CODE.glob("*.py")), *sorted(Path(__file__).parents[1].rglob("*.py"))]
    return Origin(
        source=texts_sha256([str(source.resolve()), *(f"{path.name} {file_sha256(path)}" for path in files)]),
        options=texts_sha256([repr(options)]),
        code=texts_sha256([path.read_text(encoding="utf-8") for path in code]),
    )


def write_import_record(folder: Path, origin: Origin, model: ImportedModel) -> None:
    """Write import.json, last of all files."""
    record = ImportRecord(
        format_version=FORMAT_VERSION,
        **origin,
        initialized=model.initialized,
        unused=model.unused,
        vocabulary=model.vocabulary,
        files={name: file_sha256(folder / name) for name in files_of(folder) if name != "README.md"},
    )
    write_json(folder / IMPORT_RECORD, record)

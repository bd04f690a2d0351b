"""Write token files in the formats of other projects, from the descriptions of the formats; and with their packages."""

import importlib.machinery
import json
import struct
import sys
import types
from pathlib import Path

import numpy as np

Documents = list[list[int]]


def write_megatron(path: Path, documents: Documents, dtype: str = "uint16", sentences: int = 1) -> Path:
    """Write path.bin and path.idx; each document is cut into `sentences` sequences."""
    parts = [[part.tolist() for part in np.array_split(document, sentences)] for document in documents]
    lengths = [len(part) for document in parts for part in document]
    begins = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    code = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}[dtype]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents) + 1)
    index += np.array(lengths, np.int32).tobytes() + begins.astype(np.int64).tobytes()
    index += (np.arange(len(documents) + 1) * sentences).astype(np.int64).tobytes()
    path.with_suffix(".idx").write_bytes(index)
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    return path.with_suffix(".bin")


def write_datatrove(path: Path, documents: Documents, dtype: str = "uint16") -> Path:
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    Path(f"{path}.index").write_bytes(np.cumsum([len(d) for d in documents]).astype("<u8").tobytes())
    return path


def write_mds(folder: Path, documents: Documents, encoding: str = "ndarray:int32", shards: int = 2) -> Path:
    """Write a folder with the columns "number" (int) and "tokens"."""
    folder.mkdir(parents=True)
    entries = []
    for number in range(shards):
        samples = [_sample(n, document, encoding) for n, document in enumerate(documents[number::shards])]
        header = b"{}"
        offsets = np.cumsum([4 + 4 * (len(samples) + 1) + len(header), *map(len, samples)]).astype("<u4")
        data = struct.pack("<I", len(samples)) + offsets.tobytes() + header + b"".join(samples)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(data)
        columns = {"column_names": ["number", "tokens"], "column_encodings": ["int", encoding]}
        raw = {"basename": name, "bytes": len(data), "hashes": {}}
        entries.append(
            {"format": "mds", "samples": len(samples), "raw_data": raw, "zip_data": None, "column_sizes": [8, None]}
            | columns
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def _sample(number: int, document: list[int], encoding: str) -> bytes:
    if encoding == "bytes":
        value = np.array(document, np.int64).tobytes()
    elif encoding == "ndarray":
        value = bytes([33, 1 << 2 | 1]) + struct.pack("<H", len(document)) + np.array(document, "<i4").tobytes()
    else:
        dtype = encoding.partition(":")[2]
        value = bytes([1 << 2 | 2]) + struct.pack("<I", len(document)) + np.array(document, dtype).tobytes()
    return struct.pack("<I", len(value)) + struct.pack("<q", number) + value


def write_with_the_packages(folder: Path, documents: Documents) -> dict[str, Path]:
    """Write with megatron-core, mosaicml-streaming and datatrove. Returns {name: source}."""
    import torch
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile  # pyrefly: ignore[missing-import]
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # pyrefly: ignore[missing-import]

    for name in ("megatron", "datatrove"):
        (folder / name).mkdir()
    builder = IndexedDatasetBuilder(str(folder / "megatron/a.bin"), dtype=np.int32)
    for document in documents:
        builder.add_item(torch.tensor(document[:1]))
        builder.add_item(torch.tensor(document[1:]))
        builder.end_document()
    builder.finalize(str(folder / "megatron/a.idx"))
    file = TokenizedFile(str(folder / "datatrove"), "a.ds", save_final_metadata=True, tokenizer_name_or_path="mine")
    for document in documents:
        file.write(document, None)
    file.close()
    streaming = _import_streaming()
    for name, options in (("mds", {"hashes": ["sha1", "xxh64"]}), ("mds_zstd", {"compression": "zstd"})):
        columns = {"tokens": "ndarray:uint16", "number": "int"}
        with streaming.MDSWriter(out=str(folder / name), columns=columns, size_limit=1 << 14, **options) as writer:
            for number, document in enumerate(documents):
                writer.write({"tokens": np.array(document, np.uint16), "number": number})
    return {name: folder / name for name in ("megatron", "datatrove", "mds", "mds_zstd")}


def _import_streaming() -> types.ModuleType:
    """Import mosaicml-streaming with an empty torchvision, which only its image data sets use."""
    for name in ("", ".transforms", ".transforms.functional", ".datasets"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.VisionDataset, module.to_tensor = object, None  # pyrefly: ignore[missing-attribute]
        sys.modules.setdefault(module.__name__, module)
    import streaming  # pyrefly: ignore[missing-import]

    return streaming

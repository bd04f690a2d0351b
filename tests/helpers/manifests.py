"""Change the manifest.json of a folder of shards, and sign it again so that only the change itself can be found."""

import json
from collections.abc import Callable
from pathlib import Path

from megabert.data.shards.manifest import MANIFEST, own_hash


def change_manifest(folder: Path, change: Callable[[dict], object], sign: bool = True) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw | ({"sha256": own_hash(raw)} if sign else {})))

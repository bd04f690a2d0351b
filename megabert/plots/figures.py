"""Write figures, and escape names that matplotlib would read as formulas."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from megabert.files.atomic import write_atomically


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure, completely or not at all, in the format that the end of its name says.

    Raises ValueError if that is no format of images.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # A link stays, and its target is written.
    out = out.resolve()
    if out.exists() and not out.is_file():
        raise ValueError(f"{out}: exists and is not a file. Name an image to write, such as runs.png.")
    image = io.BytesIO()
    try:
        figure.savefig(image, format=out.suffix[1:] or "png", dpi=120)
    except ValueError as error:
        raise ValueError(f"{out}: {error}") from error
    write_atomically(out, image.getvalue())


def as_label(name: str) -> str:
    """Escape a name for matplotlib, which reads $ as a formula and leaves names that begin with _ out of legends."""
    return (" " if name.startswith("_") else "") + name.replace("$", "\\$")

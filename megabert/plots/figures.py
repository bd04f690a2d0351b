"""Write figures, and prepare names for them, which matplotlib would read as formulas."""

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
    """Return a name to draw as it is: dollars would begin a formula, and "_" a line that the legend leaves out."""
    return (" " if name.startswith("_") else "") + name.replace("$", "\\$")

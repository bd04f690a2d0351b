"""Summarize and plot the lengths of documents."""

import io
from typing import Any

import numpy as np

# Documents longer than this share the last bin.
LONGEST_COUNTED = 65_535
BINS_PER_OCTAVE = 4
PLOT = "statistics.png"
# Common values of data.max_seq_len.
CAPS = (128, 512, 1024)


def summarize(lengths: np.ndarray, total: int, unit: str, read: int) -> dict[str, Any]:
    """Return the statistics of `lengths[n]` documents of n tokens each, as JSON for the manifest.

    total: tokens of all documents; unit: what a length counts, "tokens" or "bytes"; read: documents before copies and
    empty ones were dropped.
    """
    below = lengths.cumsum()
    documents = int(below[-1])
    sizes = np.arange(len(lengths))
    tokens = lengths * sizes
    if unit == "tokens":
        # Documents in the last bin may be longer than it says.
        tokens[-1] += total - int(tokens.sum())
    edges = np.unique(np.round(2.0 ** (np.arange(16 * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE)).astype(int))
    edges = np.minimum(edges, LONGEST_COUNTED)
    bins = np.searchsorted(edges, sizes, side="right") - 1
    bins[0] = 0
    by_bin = [
        np.bincount(bins, weights=weights, minlength=len(edges)).astype(int).tolist() for weights in (lengths, tokens)
    ]
    return {
        "documents": documents,
        "tokens": total,
        "dropped_documents": read - documents,
        "length_unit": unit,
        "median_document_tokens": int(np.searchsorted(below, documents / 2)),
        "mean_document_tokens": round(float(tokens.sum()) / max(1, documents), 1),
        "documents_of_length_at_most": {str(1 << k): int(below[min(1 << k, LONGEST_COUNTED)]) for k in range(4, 17)},
        "length_histogram": {"from": edges.tolist(), "documents": by_bin[0], "tokens": by_bin[1]},
    }


def plot(statistics: dict[str, Any]) -> bytes:
    """Plot documents and tokens by document length as a PNG.

    At common values of data.max_seq_len the plot shows the share of documents, and of tokens, beyond that length.
    """
    from matplotlib.figure import Figure

    histogram, unit = statistics["length_histogram"], statistics["length_unit"]
    edges = np.array([*histogram["from"], 2 * histogram["from"][-1]])
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for axes, name, color in ((upper, "documents", "tab:blue"), (lower, "tokens", "tab:orange")):
        counts = np.array(histogram[name])
        axes.stairs(counts, edges, fill=True, color=color)
        axes.set_ylabel("documents" if name == "documents" else f"{unit} in them")
        for cap in CAPS if unit == "tokens" else ():
            axes.axvline(cap, color="gray", linestyle=":")
            share = counts[edges[:-1] >= cap].sum() / max(1, counts.sum())
            note = axes.annotate(
                f" {share:.0%}\n >{cap}", (cap, 0.98), xycoords=("data", "axes fraction"), va="top", fontsize=7
            )
            # Beyond the longest document it is not drawn, and would leave no room for the axes.
            note.set_in_layout(False)
    lower.set_xscale("log", base=2)
    lower.xaxis.set_major_formatter("{x:,.0f}")
    lower.set_xlim(1, 2 * edges[:-1][np.array(histogram["documents"]) > 0].max(initial=1))
    lower.set_xlabel(f"length of a document, {unit}")
    upper.set_title(f"{statistics['documents']:,} documents, median {statistics['median_document_tokens']} {unit}")
    image = io.BytesIO()
    # Without the version of matplotlib in its metadata, the image has the same bytes each time.
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None})
    return image.getvalue()

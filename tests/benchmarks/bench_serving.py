"""Compare the speed and the answers of each target of an export with transformers' BertModel of the same size.

    python tests/benchmarks/bench_serving.py [--quick] [--json FILE]

A MosaicBERT of base size with random weights is exported to transformers and ONNX, in fp32 and int8. Each encodes
the same sentences, paragraphs of docstrings, one batch at a time, in turn with BertModel: as they come, and sorted by
length. serve_TARGET_vs_hf_bert is the ratio of sentences a second as they come, _sorted that of sorted sentences,
cosine_min the smallest cosine with the exported folder's embeddings, and ids_equal the share of sentences with equal
ids, which the folder's tokenizer gives for all of them. The batches of 1,000 sentences come in a random order, and no
batch begins after 100 s for either order of sentences; the output says how many sentences that were. --quick: 64
sentences and a smaller model. Not compared here: llama.cpp, transformers.js and servers, which are measured in their
own processes.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_convert import read_texts
from support.report import machine, read_arguments, write
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

sys.path.append(str(Path(__file__).resolve().parents[2]))

from data_prep import train_tokenizer
from megabert.convert import to_hf
from megabert.convert.targets import compared_texts, onnx_graphs, registry
from megabert.convert.targets.target import batches, mean_of_tokens
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.model.modeling_megabert import MegaBertForMaskedLM, MegaBertModel
from tests.convert.helpers.checkpoints import write_checkpoint

BATCH = 32
LONGEST = 512
MOST_SECONDS = 100
QUICK = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
Encode = Callable[[np.ndarray, np.ndarray], Any]


def by_torch(model: torch.nn.Module) -> Encode:
    @torch.inference_mode()
    def encode(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()

    return encode


def by_onnx(path: Path) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: np.asarray(
        session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})[0]
    )


def make_export(folder: Path, quick: bool, texts: list[str]) -> Path:
    """Export a model with random weights; only what can be written and opened here."""
    sample = folder / "sample.txt"
    sample.write_text("\n\n".join(texts[:4000]))
    train_tokenizer.main([f"--source={sample}", f"--out={folder / 'tokenizer'}", "--vocab_size=4000"])
    torch.manual_seed(0)
    model = MegaBertForMaskedLM(MegaBertConfig(vocab_size=4032, **(QUICK if quick else {})))
    write_checkpoint(folder / "run", model, folder / "tokenizer")
    out = folder / "hf"
    # The proofs of the targets would take longer than the measurements.
    with mock.patch.object(compared_texts, "NUM_TEXTS", 100):
        to_hf.export_checkpoint(folder / "run", out, to_hf.ExportOptions(targets=("onnx", "onnx-int8")))
    for name, outcome in registry.read_outcomes(out).items():
        print(registry.describe(name, outcome), flush=True)
    return out


def cut(ids: list[list[int]], ordered: bool) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Cut texts into padded batches, as they come or sorted by length, and shuffle the batches."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row])) if ordered else list(range(len(ids)))
    groups = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    random.Random(0).shuffle(groups)
    return [(group, *batches([ids[row] for row in group], 0, tokens=BATCH * LONGEST)[0][1:]) for group in groups]


def measure(encoders: dict[str, Encode], ids: list[list[int]], ordered: bool) -> dict[str, tuple[float, np.ndarray]]:
    """Let the encoders take turns on batches. Returns sentences a second and embeddings (N, E) of each."""
    deadline = time.perf_counter() + MOST_SECONDS
    seconds = dict.fromkeys(encoders, 0.0)
    embeddings: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    for _, rows, mask in cut(ids, ordered):
        if time.perf_counter() > deadline:
            break
        for name, encode in encoders.items():
            began = time.perf_counter()
            states = encode(rows, mask)
            seconds[name] += time.perf_counter() - began
            embeddings[name].append(mean_of_tokens(states, mask))
    pooled = {name: np.concatenate(parts) for name, parts in embeddings.items()}
    return {name: (len(pooled[name]) / seconds[name], pooled[name]) for name in encoders}


def main() -> None:
    options = read_arguments(__doc__ or "")
    texts = read_texts()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        out = make_export(Path(name), options.quick, texts)
        tokenizer = compared_texts.read_tokenizer(out, LONGEST)
        sentences = texts[: 64 if options.quick else 1000]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
        config = MegaBertConfig.from_pretrained(out)
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        theirs = BertModel(BertConfig(**{size: getattr(config, size) for size in sizes}), add_pooling_layer=False)
        encoders: dict[str, Encode] = {
            "hf_bert": by_torch(theirs.eval()),
            "transformers": by_torch(MegaBertModel.from_pretrained(out, add_pooling_layer=False).eval()),
            "onnx": by_onnx(out / onnx_graphs.ENCODER),
            "onnx_int8": by_onnx(out / onnx_graphs.QUANTIZED),
        }
        for encode in encoders.values():
            # The first call of each is slower.
            encode(*batches(ids[:2], 0)[0][1:])
        # The graphs have no tokenizer but the folder's.
        equal = share_equal(ids, sentences, out)
        measured = {kind: measure(encoders, ids, kind == "sorted") for kind in ("as they come", "sorted")}
    counts = " and ".join(f"{len(part['hf_bert'][1])} {kind}" for kind, part in measured.items())
    print(f"\n{counts} of {len(sentences)} sentences, in batches of {BATCH}; {config.num_hidden_layers} x ", end="")
    print(f"{config.hidden_size}; {machine()['cores']} cores of {machine()['cpu']}\n")
    print("| target | sentences/s | over BertModel | sorted | over BertModel | smallest cosine |")
    print("|---|---|---|---|---|---|")
    for target in encoders:
        speeds = [measured[kind][target][0] for kind in measured]
        ratios = [measured[kind][target][0] / measured[kind]["hf_bert"][0] for kind in measured]
        cosine = float("nan")
        if target != "hf_bert":
            cosine = cosine_min(measured["as they come"][target][1], measured["as they come"]["transformers"][1])
            figures[f"serve_{target}_vs_hf_bert"] = ratios[0]
            figures[f"serve_{target}_vs_hf_bert_sorted"] = ratios[1]
            figures[f"serve_{target}_cosine_min"] = cosine
            figures[f"serve_{target}_ids_equal"] = equal
        print(f"| {target} | {speeds[0]:.1f} | {ratios[0]:.2f} | {speeds[1]:.1f} | {ratios[1]:.2f} | {cosine:.6f} |")
    write(figures, options.json)


def share_equal(ids: list[list[int]], sentences: list[str], folder: Path) -> float:
    """Return the share of sentences with the checkpoint's ids, by the folder's own tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder.parent / "tokenizer/tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    wanted = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    return sum(map(list.__eq__, ids, wanted)) / len(ids)


def cosine_min(got: np.ndarray, wanted: np.ndarray) -> float:
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((got * wanted).sum(axis=1) / lengths).min())


if __name__ == "__main__":
    main()

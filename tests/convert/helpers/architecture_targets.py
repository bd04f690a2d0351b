"""The targets that can be exported for each architecture."""

EVERYWHERE = ("sentence-transformers", "onnx", "onnx-int8", "transformers.js")
TARGETS_OF = {
    "mosaicbert": (*EVERYWHERE, "jina", "gguf"),
    "bert": (*EVERYWHERE, "encoder", "gguf"),
    "rope-mosaicbert": (*EVERYWHERE, "encoder"),
    "modernbert": (*EVERYWHERE, "encoder", "gguf"),
    "roberta": (*EVERYWHERE, "encoder", "gguf"),
    "neighbors": EVERYWHERE,
    "distilbert": (*EVERYWHERE, "encoder", "gguf"),
}

"""Metadata, dependencies and commands of the package; pyproject.toml has the tools' settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megabert/version.py").read_text())[1]

# For data_prep only: .parquet files, and data sets of the Hugging Face hub.
PREP = ["datasets>=3", "pyarrow>=16"]

# For megabert-export --for only: to write ONNX and GGUF, and to open what is written with the programs themselves.
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
GGUF = ["gguf>=0.17"]
SERVING = ["sentence-transformers>=5", "llama-cpp-python>=0.3.16", *ONNX, *GGUF]

# megabert/commands/start.py has a function for each, named after the module.
COMMANDS = {
    "megabert-pretrain": "megabert.commands.pretrain",
    "megabert-export": "megabert.commands.export",
    "megabert-import": "megabert.commands.import_hf",
    "megabert-finetune": "megabert.commands.finetune",
    "megabert-shards": "data_prep.write_shards",
    "megabert-tokenizer": "data_prep.train_tokenizer",
}

setup(
    name="megabert",
    version=VERSION,
    description="Pretrain BERT-style encoders: MosaicBERT, and BERT as its baseline, under DeepSpeed",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megabert*", "data_prep*"]), "megabert.ds_configs"],
    package_dir={"megabert.ds_configs": "ds_configs"},
    package_data={
        "megabert": ["recipes/*.yaml", "finetune/protocols/*.yaml", "convert/targets/programs/*.mjs"],
        "megabert.ds_configs": ["*.json"],
        "data_prep": ["tasks/*.yaml"],
    },
    entry_points={
        "console_scripts": [
            f"{name} = megabert.commands.start:{module.split('.')[-1]}" for name, module in COMMANDS.items()
        ]
    },
    install_requires=[
        "braceexpand",
        "deepspeed>=0.19.8,<0.20",
        "docstring-parser",
        "filelock>=4.2",
        "fsspec[http]",
        "huggingface-hub",
        "jsonargparse>=4.49",
        "matplotlib",
        "ninja",
        "numpy>=2",
        "packaging",
        "protobuf",
        "psutil",
        "pydantic>=2.12",
        "pyyaml",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "tenacity",
        "tensorboard",
        "tokenizers>=0.21",
        # Private operations of torch are used (megabert/kernels/cpu/, megabert/model/buckets.py).
        "torch>=2.8,<2.14",
        "tqdm",
        "transformers>=4.50",
        "webdataset>=1.0",
        "zstandard",
    ],
    extras_require={
        # flash-attn builds against the installed torch: pip install flash-attn --no-build-isolation.
        "cuda": ["flash-attn>=2.4"],
        "kernels": ["triton==3.7.1"],
        # For run.fp8 torchao only.
        "fp8": ["torchao>=0.18"],
        "prep": PREP,
        # For write_shards.py --engine ray only.
        "ray": ["ray>=2.40"],
        # For data_prep/datatrove_writer.py only; nltk, spacy and an old xxhash for datatrove's filters and its MinHash.
        "datatrove": ["datatrove>=0.10", "nltk", "orjson", "spacy", "xxhash<4"],
        "onnx": ONNX,
        "gguf": GGUF,
        "serving": SERVING,
        # setuptools: a test builds the wheel.
        "dev": ["hypothesis", "pyrefly", "pytest", "pytest-xdist", "ruff", "setuptools>=70.1", *PREP, *ONNX],
    },
)

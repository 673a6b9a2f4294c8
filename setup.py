"""Packaging; metadata of tools lives in pyproject.toml.

Packages are named one by one: a search would take the folder gin/ for a package and shadow the gin
library. Its files travel as data of `saejax.gin`, so that `--gin_file=gin/quickstart.gin` works
from any directory after an install.
"""

import pathlib
import re

from setuptools import setup

ROOT = pathlib.Path(__file__).parent

PACKAGES = [
    "saejax",
    "saejax.data",
    "saejax.data.foreign",
    "saejax.evals",
    "saejax.gin",
    "saejax.latents",
    "saejax.model",
    "saejax.plan",
    "saejax.processes",
    "saejax.subjects",
    "saejax.subjects.families",
    "saejax.train",
    "saejax.viewer",
    "launch",
    "pallas_kernels",
    "pallas_kernels.bench",
    "pallas_kernels.decode_loss",
    "pallas_kernels.dense_sparse_matmul",
    "pallas_kernels.matmul_at_sparse_indices",
    "pallas_kernels.pair_list",
    "pallas_kernels.row_update",
    "pallas_kernels.sparse_transpose_matmul",
    "pallas_kernels.top_k",
    "pallas_kernels.top_k_mask",
    "pallas_kernels.topk_encode",
    "pallas_kernels.weight_grads",
    "pallas_kernels.weight_grads_update",
]

PACKAGE_DIR = {"saejax.gin": "gin"}

PACKAGE_DATA = {
    "saejax": ["py.typed"],
    "saejax.gin": ["*.gin", "hardware/*.gin"],
    "saejax.subjects": ["embedded/*"],
    "saejax.viewer": ["static/*"],
}

REQUIRES = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "gin-config==0.5.0",
    "tensorstore>=0.1.80,<0.2",
    "absl-py>=2.1",
    "numpy>=2.0",
    "ml_dtypes>=0.5",
    "safetensors>=0.5",
    "tensorboardX>=2.6.2",
    "matplotlib>=3.9",
]

EXTRAS = {
    "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.12"],
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "hub": ["huggingface_hub>=0.30"],
    # .zst and .parquet files, tokenizers other than GPT-2's, streamed datasets (4.0: no scripts).
    "text": ["zstandard>=0.22", "pyarrow>=16", "tokenizers>=0.20", "datasets>=4.0"],
    # Image files, for vision towers; their preprocessing is that of transformers.
    "images": ["pillow>=10", "transformers>=5"],
    # Subject models without a decoder in JAX; PyTorch brings CUDA unless its CPU index is named.
    "torch": ["torch>=2.6", "transformers>=5"],
    # What the benchmarks can race against; the README says what else and how.
    "bench": ["torch==2.13.0", "sae-lens==6.54.12", "eai-sparsify==1.3.3"],
}


def _version() -> str:
    text = (ROOT / "saejax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


def _readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


if __name__ == "__main__":
    setup(
        name="saejax",
        version=_version(),
        description="Sparse autoencoders in JAX: train, measure and look at them",
        long_description=_readme(),
        long_description_content_type="text/markdown",
        python_requires=">=3.11",
        packages=PACKAGES,
        package_dir=PACKAGE_DIR,
        package_data=PACKAGE_DATA,
        install_requires=REQUIRES,
        extras_require=EXTRAS,
        entry_points={"console_scripts": ["saejax=saejax.main:console"]},
        zip_safe=False,
    )

"""Packaging. tests/constraints.txt has the versions that the test suite runs on."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="moram",
    # Run and not imported: what the package needs is not installed yet.
    version=run_path(str(ROOT / "moram" / "_version.py"))["__version__"],
    author="MoRAM contributors",
    # The paper of the method.
    url="https://arxiv.org/abs/2506.21035",
    description="Continual learning with incremental mixtures of rank-1 associative memory experts",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["moram", "moram.*", "moram_kernels", "moram_kernels.*"]),
    package_data={
        "moram": ["py.typed"],
        "moram.demo": ["data/*/*.json"],
        "moram_kernels": ["py.typed"],
        "moram_kernels.triton_backend": ["tuned.json"],
    },
    # Triton comes with torch on Linux and is pinned there; asking for it again can only conflict.
    install_requires=["torch>=2.6", "safetensors>=0.4", "tqdm"],
    extras_require={
        "llm": ["transformers>=4.57"],
        "clip": ["open_clip_torch>=2.30", "torchvision"],
        "peft": ["peft>=0.20", "transformers>=4.57"],
        "demo": ["transformers>=4.57", "accelerate", "gguf>=0.10", "matplotlib", "numpy"],
        "trace": [
            "transformers>=4.57",
            "accelerate",
            "gguf>=0.10",
            "matplotlib",
            "numpy",
            "pyyaml",
        ],
        "xtail": [
            "open_clip_torch>=2.30",
            "torchvision",
            "pillow>=10.1",
            "scikit-learn",
            "matplotlib",
            "numpy",
            "pyyaml",
        ],
        "bench": ["matplotlib", "pytest-benchmark"],
        "dev": [
            "transformers>=4.57",
            "open_clip_torch>=2.30",
            "peft>=0.20",
            "torchvision",
            "torchao",
            "bitsandbytes",
            "accelerate",
            "gguf>=0.10",
            "matplotlib",
            "numpy",
            "pyyaml",
            "scikit-learn",
            "tensorboard",
            "trl",
            "pytest",
            "pytest-benchmark",
            "ruff",
            "basedpyright",
        ],
    },
    entry_points={"console_scripts": ["moram=moram.cli:main"]},
)

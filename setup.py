from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="hpt_hf",
    version="0.1.0",
    description="Adversarially robust CLIP by heterogeneous proxy transfer, the Hugging Face way",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The recipes lie beside the package, where accelerate's users look for them, and in it once it is installed.
    packages=[*find_packages(include=["hpt_hf", "hpt_hf.*"]), "hpt_hf.recipes"],
    package_dir={"hpt_hf.recipes": "recipes"},
    entry_points={"console_scripts": ["hpt-hf = hpt_hf.cli:main"]},
    package_data={
        "hpt_hf": ["*/*.json", "*/*.j2"],
        "hpt_hf.lab": ["weights/*/*"],
        "hpt_hf.recipes": ["*.yaml", "*/*.yaml"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6,<3",
        "transformers>=5.20,<6",
        "datasets>=5.0,<6",
        "accelerate>=1.12,<2",
        "evaluate>=0.4.6,<0.5",
        "safetensors>=0.6",
        "huggingface_hub>=1.31,<3",
        # Nothing above pulls Pillow, and without it no image processor and no pipeline works.
        "Pillow>=11,<14",
        "filelock>=3.16",
        "jaxtyping>=0.3",
        "PyYAML>=6",
        # The lab draws its pictures with the fonts that matplotlib ships, reports their plots with it.
        "matplotlib>=3.9",
        "Jinja2>=3.1",
    ],
    extras_require={
        # AutoAttack by its own authors, to compare our attacks with (benchmarks/independent.py).
        "attack": ["pyautoattack==0.2.0"],
        # Models in open_clip's form (hpt_hf/models/open_clip_models.py); it needs torchvision. Without an
        # underscore: the pip that Python 3.11 brings (23.2) does not find an extra that has one, and goes on.
        "openclip": ["open_clip_torch>=3.3,<4"],
        # LoRA students (hpt_hf/models/lora.py).
        "lora": ["peft>=0.17"],
        "track": ["tensorboard>=2.19"],
        # recipes/demo.py
        "demo": ["gradio>=6.31,<7"],
        "test": [
            *("pytest>=8", "pytest-cov>=6", "pytest-timeout>=2.3", "pytest-xdist>=3.6"),
            *("beartype>=0.20", "ruff>=0.12", "mypy>=1.15", "peft>=0.17", "playwright>=1.50"),
            *("mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30"),
        ],
    },
    classifiers=["License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3"],
)

"""Robust CLIP by heterogeneous proxy transfer (arXiv 2601.12865). The public nouns are imported when asked for."""

import importlib
from importlib.metadata import version

_HOMES = {
    "ZeroShotClassifier": "models.zero_shot",
    "ThreatModel": "attacks.threat_model",
    "TrainingAttack": "attacks.pgd",
    "EvaluationAttack": "attacks.suite",
    "OBJECTIVES": "method.objectives",
    "Schedule": "method.schedule",
    "load_images": "data.dataset",
    "Collator": "data.collator",
    "HPTConfig": "training.config",
    "HPTTrainer": "api",
    "Results": "evaluation.tables",
    "evaluate": "api",
    "attack": "api",
    "compare": "evaluation.comparison",
}
__all__ = ["__version__", *_HOMES]
__version__ = version("hpt_hf")


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hpt_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hpt_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

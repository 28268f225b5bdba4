"""The multiplier of an objective's constraint, by dual ascent: raised while it is violated, lowered while it holds."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

RATE = 0.1


class Multiplier(TrainerCallback, ExportableState):
    """`value <- max(0, value + RATE * violation)` after each step; kept in each checkpoint's trainer_state.json."""

    def __init__(self) -> None:
        self.value = 0.0
        self.violations: list[torch.Tensor] = []  # of the step's micro-batches

    def on_step_end(self, args, state, control, **kwargs):
        if self.violations:
            violation = torch.stack(self.violations).mean().item()
            self.value, self.violations = max(0.0, self.value + RATE * violation), []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"value": self.value}}

    def load(self, checkpoint: str | Path) -> None:
        saved = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).stateful_callbacks
        self.value = saved.get("Multiplier", self.state())["attributes"]["value"]

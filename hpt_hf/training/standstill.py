"""Standstill: a run that cannot learn is stopped, instead of exporting the weights that it began with."""

from __future__ import annotations

import torch
from transformers import TrainerCallback


class Standstill(TrainerCallback):
    """Stops a run whose gradient was exactly 0 in every step of a logging interval, or since the last ones."""

    def __init__(self):
        self.moved: list[torch.Tensor] = []  # of each step since one that moved: has it any gradient?

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]  # sharded by FSDP2
        self.moved.append(torch.stack([g.any() for g in local]).any() if local else torch.tensor(False))

    def on_log(self, args, state, control, **kwargs):
        if len(self.moved) > 1 and not torch.stack(self.moved).any():
            raise FloatingPointError(
                f"the gradient was exactly 0 in {len(self.moved)} steps before step {state.global_step}: nothing is "
                "learned. Fix: another attack (a random start, a larger eps) or objective"
            )
        if len(self.moved) > 1 or self.moved and self.moved[0]:
            self.moved = []

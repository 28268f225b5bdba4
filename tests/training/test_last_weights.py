"""What becomes of the last weights: their mean, one more pull, and rates that fall from layer to layer."""

from __future__ import annotations

import pytest
import torch
from conftest import gpd_schedule, largest_difference, single_schedule, trainer_from_disk, weights
from transformers import TrainerCallback

from hpt_hf.method.gpd import PIVOT_FILE
from hpt_hf.training.layer_rates import depths


class Steps(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = weights(model)


def gpd(share):
    """Ten steps, the second stage from step 6."""
    return gpd_schedule(average_last=share, final_pull=True, pull=0.7)


@pytest.mark.parametrize(
    ("schedule", "steps", "cut"),
    [
        (gpd(0.4), (9, 10), 9),
        (gpd(1.0), (6, 7, 8, 9, 10), 8),
        (gpd(0.01), (10,), 10),
        (gpd(None), (10,), None),
        (single_schedule("tecoa", average_last=0.5), (4, 5), None),
    ],
)
def test_the_result_is_the_mean_of_the_last_weights_then_pulled_once_more(schedule, steps, cut, tmp_path, paths):
    """Of a run left alone, and of one resumed at the cut."""
    saving = {"save_strategy": "steps", "save_steps": cut} if cut else {}
    trainer = trainer_from_disk(tmp_path, paths, schedule, callbacks=[after := Steps()], **saving)
    trainer.train()
    ends = [weights(trainer.model)]
    if cut:
        resumed = trainer_from_disk(tmp_path, paths, schedule)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
        ends.append(weights(resumed.model))
    last, pivot = schedule.phases[-1], trainer.gpd.average
    for name in ends[0]:
        expected = torch.stack([after.seen[step][name] for step in steps]).mean(0)
        if last.final_pull and name in pivot:
            expected = 0.7 * expected + 0.3 * pivot[name]
        assert all(torch.allclose(end[name], expected, atol=1e-6) for end in ends), name
    assert largest_difference(ends[0], after.seen[steps[-1]]) > 1e-5


def test_lores_multiplier_rises_while_clean_embeddings_move_too_far_and_a_resumed_run_has_it(tmp_path, paths):
    """And the anchor is the vanilla student, not the checkpoint's."""

    def run(**how):
        schedule = single_schedule("lore", steps=6, learning_rate=3e-3)
        trainer = trainer_from_disk(tmp_path, paths, schedule, save_strategy="steps", save_steps=4)
        trainer.train(**how)
        return trainer

    whole = run()
    told = [entry["loss_constraint"] for entry in whole.state.log_history if "loss_constraint" in entry]
    assert told[0] == 0 and told[-1] > 0 and whole.multiplier.value > 0
    assert not list(tmp_path.rglob(PIVOT_FILE))
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.multiplier.value == whole.multiplier.value
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0


def test_each_layer_learns_at_its_share_of_the_rate(tmp_path, paths):
    """One step of plain SGD: what a weight moves is its rate times the same gradient."""
    moved = []
    for decay in (1.0, 0.5):
        schedule = single_schedule("tecoa", steps=1)
        trainer = trainer_from_disk(tmp_path / str(decay), paths, schedule, layer_rate_decay=decay, optim_args=None)
        before, deep = weights(trainer.model), depths(trainer.model)
        trainer.train()
        named = dict(trainer.model.model.named_parameters())
        moved.append({n: (weights(trainer.model)[n] - before[n], deep[p]) for n, p in named.items()})
    for name, (whole, depth) in moved[0].items():
        assert torch.allclose(moved[1][name][0], 0.5**depth * whole, rtol=1e-2, atol=1e-6), name
    layers = len(trainer.model.model.vision_model.encoder.layers)
    assert {d for n, (_, d) in moved[0].items() if n.startswith("vis")} == set(range(2 + layers))

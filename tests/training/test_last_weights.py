"""What becomes of the last weights: their mean, one more pull, and rates that fall from layer to layer."""

from __future__ import annotations

import pytest
import torch
from conftest import gpd_schedule, largest_difference, single_schedule, trainer_from_disk, weights
from safetensors.torch import load_file

from hpt_hf.method.gpd import PIVOT_FILE
from hpt_hf.training.layer_rates import depths

SAVE = {"save_strategy": "steps", "save_steps": 1}


def saved(folder, step, name="model.safetensors"):
    return load_file(folder / f"checkpoint-{step}" / name)


@pytest.mark.parametrize(
    ("share", "steps", "resumed_at"),
    [(0.4, (9, 10), None), (0.4, (9, 10), 9), (1.0, (6, 7, 8, 9, 10), 8), (0.01, (10,), 10), (None, (10,), None)],
)
def test_the_result_is_the_mean_of_the_last_weights_then_pulled_once_more(share, steps, resumed_at, tmp_path, paths):
    """Ten steps, the second stage from step 6; a resumed run ends there, too, also from the last checkpoint."""
    schedule = gpd_schedule(average_last=share, final_pull=True, pull=0.7)
    trainer = trainer_from_disk(tmp_path, paths, schedule, **SAVE)
    trainer.train()
    if resumed_at:
        trainer = trainer_from_disk(tmp_path, paths, schedule, **SAVE)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resumed_at}"))
    pivot, end = saved(tmp_path, 10, PIVOT_FILE), weights(trainer.model)
    for name, got in end.items():
        mean = torch.stack([saved(tmp_path, step)[name] for step in steps]).mean(0)
        pulled = 0.7 * mean + 0.3 * pivot[name] if name in pivot else mean
        assert torch.allclose(got, pulled, atol=1e-6), name
    assert largest_difference(end, saved(tmp_path, 10)) > 1e-5


def test_a_baseline_ends_at_its_mean_as_well(tmp_path, paths):
    trainer = trainer_from_disk(tmp_path, paths, single_schedule("tecoa", average_last=0.5), **SAVE)
    trainer.train()
    for name, got in weights(trainer.model).items():
        assert torch.allclose(got, torch.stack([saved(tmp_path, s)[name] for s in (4, 5)]).mean(0), atol=1e-6), name


def test_lores_multiplier_rises_while_clean_embeddings_move_too_far_and_a_resumed_run_has_it(tmp_path, paths):
    def run(**how):
        trainer = trainer_from_disk(tmp_path, paths, single_schedule("lore", steps=6, learning_rate=3e-3), **SAVE)
        trainer.train(**how)
        return trainer

    whole = run()
    told = [entry["loss_constraint"] for entry in whole.state.log_history if "loss_constraint" in entry]
    assert told[0] == 0 and told[-1] > 0 and whole.multiplier.value > 0
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
    assert {d for n, (_, d) in moved[0].items() if n.startswith("vis")} == {0, *range(1, 2 + len_layers(trainer))}


def len_layers(trainer) -> int:
    return len(trainer.model.model.vision_model.encoder.layers)

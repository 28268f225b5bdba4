"""Proves that student, proxy and anchor spread over two processes (FSDP2) train as on one, resume and export.

Run by torchrun this file is its own worker: gloo on CPU. Accelerate shards for GPUs alone and falls back to DDP on
CPUs, so the worker tells it that these processes have GPUs; the rest is accelerate's, the Trainer's and torch's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import gpd_schedule, largest_difference, launch, make_images, single_schedule, trainer_from_disk
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor

from hpt_hf.method.gpd import PIVOT_FILE
from hpt_hf.models.fsdp import check_plugin, full_tensor, parameters
from hpt_hf.training.trainer import HPTTrainer
from hpt_hf.utils import shutdown_distributed

pytestmark = pytest.mark.multiprocess
FSDP2 = Path(__file__).parent.parent.parent / "recipes" / "accelerate" / "fsdp2.yaml"
CUT = 7  # the step of the checkpoint
# What is trained, and how.
CASES = {
    "hpt_gpd": lambda: (gpd_schedule(interval=4, warm_up_learning_rate=3e-4, learning_rate=1e-3), {}),
    "anchor": lambda: (single_schedule("anchor_clean", learning_rate=1e-3), {"gradient_accumulation_steps": 2}),
    "checkpointing": lambda: (single_schedule("hpt", learning_rate=1e-3), {"activation_checkpointing": True}),
    "bf16": lambda: (single_schedule("hpt", learning_rate=1e-3), {"bf16": True}),
}


def build(folder, paths, case: str, world: int) -> HPTTrainer:
    """The held-out slice is looked at between the steps, since that leaves gathered weights behind."""
    schedule, settings = CASES[case]()
    settings |= {"save_strategy": "steps", "save_steps": CUT, "eval_strategy": "steps", "eval_steps": 3}
    settings |= {f"per_device_{kind}_batch_size": 8 // world for kind in ("train", "eval")}
    return trainer_from_disk(folder, paths, schedule, held_out=make_images(24, seed=3), **settings)


def train(trainer: HPTTrainer, **resume) -> dict:
    """Trained weights, metrics, and what the first attack made."""
    made, attack = [], trainer.attack
    trainer.attack = lambda *args, **kwargs: made.append(attack(*args, **kwargs)) or made[-1]
    trainer.train(**resume)
    metrics = trainer.evaluate()
    return {
        "weights": {n: full_tensor(t).clone() for n, t in trainer.model.model.state_dict().items()},
        "metrics": {k: metrics[k] for k in ("eval_loss", "eval_clean_accuracy", "eval_robust_accuracy")},
        "grad_norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
        "attacked": made[0],
    }


def worker(folder: str, *paths: str) -> None:
    create = HPTTrainer.create_accelerator_and_postprocess

    def as_if_on_gpus(self):
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(self)

    HPTTrainer.create_accelerator_and_postprocess = as_if_on_gpus
    # As `accelerate launch --config_file` hands on what the file says.
    config = yaml.safe_load(FSDP2.read_text())["fsdp_config"]
    os.environ.update({n.upper(): str(v) for n, v in config.items()}, ACCELERATE_USE_FSDP="true")
    results = {}
    for case in CASES:
        trainer = build(f"{folder}/{case}", paths, case, 2)
        results[case] = train(trainer)
        if case == "hpt_gpd":
            trainer.save_model()
            parts = parameters(trainer.model)
            named = (*parts.items(), *parameters(trainer.proxy).items())
            copies = (*trainer.gpd.vanilla.values(), *trainer.gpd.average.values())
            results["sharded"] = {
                "whole": [n for n, p in named if not isinstance(p, DTensor)],
                "copies": [isinstance(t, DTensor) for t in copies],
                "here": sum(p.to_local().numel() for p in parts.values() if isinstance(p, DTensor)),
                "all": sum(p.numel() for p in parts.values()),
            }
            again = build(f"{folder}/{case}", paths, case, 2)
            results["resumed"] = train(again, resume_from_checkpoint=f"{folder}/{case}/checkpoint-{CUT}")
    torch.save(results, f"{folder}/rank{os.environ['RANK']}.pt")
    shutdown_distributed()


@pytest.fixture(scope="module")
def two(tmp_path_factory, paths) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, __file__, str(folder), *paths)
    return SimpleNamespace(folder=folder, ranks=[torch.load(folder / f"rank{r}.pt") for r in (0, 1)])


@pytest.fixture(scope="module")
def vanilla(student_path) -> dict:
    return load_file(Path(student_path) / "model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory, paths) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    return {case: train(build(folder / case, paths, case, 1)) for case in CASES}


def test_every_process_holds_half_of_the_weights_and_of_all_copies(two):
    """Without this the rest would compare DDP with one process."""
    for rank in two.ranks:
        found = rank["sharded"]
        assert found["whole"] == ["logit_scale"] * 2 and found["copies"] and all(found["copies"])
        assert found["here"] < 0.6 * found["all"]


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_end_as_whole_ones(one, two, vanilla, case):
    whole, (sharded, other) = one[case], (rank[case] for rank in two.ranks)
    bound, tolerance = (3e-4, 0.02) if case == "bf16" else (1e-6, 1e-3)
    assert largest_difference(other["weights"], sharded["weights"]) == 0
    assert largest_difference(whole["weights"], sharded["weights"]) < bound
    assert largest_difference(whole["weights"], vanilla) > 30 * bound
    assert sharded["grad_norms"] == pytest.approx(whole["grad_norms"], rel=tolerance)
    assert sharded["metrics"] == pytest.approx(whole["metrics"], rel=tolerance)
    assert sharded["metrics"] == other["metrics"]


def test_the_attack_stays_in_float32(one, two):
    """FSDP's own mixed precision casts the weights, which no autocast undoes: 5% of the signs would differ."""
    whole = one["bf16"]["attacked"]
    sharded = torch.cat([rank["bf16"]["attacked"] for rank in two.ranks])
    assert sharded.shape == whole.shape and sharded.dtype == torch.float32
    assert float((sharded != whole).float().mean()) < 0.002


def test_resumed_training_ends_as_uninterrupted_and_checkpoint_pivot_and_export_are_whole(two, vanilla):
    folder, straight = two.folder / "hpt_gpd", two.ranks[0]["hpt_gpd"]["weights"]
    assert largest_difference(two.ranks[0]["resumed"]["weights"], straight) == 0
    assert largest_difference(load_file(folder / "model.safetensors"), straight) == 0
    checkpoint, pivot = (load_file(folder / f"checkpoint-{CUT}" / n) for n in ("model.safetensors", PIVOT_FILE))
    assert {n: t.shape for n, t in checkpoint.items()} == {n: t.shape for n, t in vanilla.items()}
    assert pivot and all(t.shape == vanilla[n].shape for n, t in pivot.items())
    assert (folder / "parity.json").is_file()


def test_settings_that_would_spoil_the_numbers_are_refused():
    fine = {"fsdp_version": 2, "state_dict_type": StateDictType.FULL_STATE_DICT, "cpu_ram_efficient_loading": False}
    fine |= {"activation_checkpointing": False, "mixed_precision_policy": "half"}
    check_plugin(plugin := SimpleNamespace(**fine))
    assert plugin.mixed_precision_policy is None
    wrong = {"fsdp_version": 1, "state_dict_type": StateDictType.SHARDED_STATE_DICT}
    for setting, value in {**wrong, "cpu_ram_efficient_loading": True, "activation_checkpointing": True}.items():
        with pytest.raises(ValueError, match=f"{setting}: got"):
            check_plugin(SimpleNamespace(**fine | {setting: value}))


if __name__ == "__main__":
    worker(*sys.argv[1:])

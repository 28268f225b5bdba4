"""What trackers are told of a run (`run_name`, `args.to_dict()`), and its curve for the card."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir

from hpt_hf.publishing.model_card import CURVE
from hpt_hf.utils import read_json


def tell(trainer, args, data) -> None:
    """Sets `args.told`, the recipe's flags and what they have come to, and the run's name if it has none."""
    recipe, begun = trainer.recipe or {}, trainer.beginning
    objectives = "+".join(p.objective.name for p in trainer.schedule.phases)
    sources = {name: begun[name] and begun[name]["source"] for name in ("student", "proxy")}
    attack = {k if k in ("norm", "eps") else f"attack_{k}": v for k, v in begun["attack"].items()}
    found = {"method": recipe.get("method", objectives), "dataset": getattr(data, "name", type(data).__name__)}
    args.told = recipe.get("recipe", {}) | found | sources | attack
    # The folder first: trackio goes on with a run of the same name, as a resumed one should.
    args.run_name = args.run_name or f"{args.output_dir}: {_in_words(args.told)}"


def keep_beside(trainer) -> None:
    """TensorBoard's files lie in `output_dir`; before training the callback would take the current folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and not callback.logging_dir:
            words = re.sub("[^0-9A-Za-z_.]+", "-", _in_words(trainer.args.told))
            callback.logging_dir = str(Path(trainer.args.output_dir, f"{default_logdir()}_{words}"))


def draw_log(folder: str | Path) -> None:
    """`training.png` from the log of a run: loss, and robust accuracy of the training batches, over steps."""
    from matplotlib.figure import Figure

    state = Path(folder, "trainer_state.json")
    rows = [row for row in read_json(state)["log_history"] if "loss" in row] if state.is_file() else []
    Path(folder, CURVE).unlink(missing_ok=True)  # an earlier run's
    if len(rows) < 2:
        return
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "robust_batch_accuracy"), strict=True):
        axes.plot([row["step"] for row in rows], [row.get(name) for row in rows])
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.savefig(Path(folder, CURVE), metadata={"Software": None})


def _in_words(told: dict) -> str:
    proxies = [f"proxy {Path(source).name}" for source in (told["proxy"] or "").split(" + ") if source]
    attack = f"{told['norm']} {told['eps']}, {told['attack_steps']} attack steps"
    return ", ".join((told["method"], attack, *proxies, told["dataset"]))

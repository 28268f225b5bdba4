"""HPTTrainer: transformers' Trainer; its loss crafts adversarial images and asks the schedule's objective of them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, set_seed

from hpt_hf.attacks.engine import frozen
from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.data.streaming import StreamedImages
from hpt_hf.method.gpd import GPDCallback
from hpt_hf.method.multiplier import Multiplier
from hpt_hf.method.objectives import Views
from hpt_hf.method.schedule import Schedule
from hpt_hf.models.ensemble import Ensemble, members
from hpt_hf.models.fast_layers import compile_layers
from hpt_hf.models.fsdp import shard_models
from hpt_hf.models.lora import anchor_of
from hpt_hf.models.zero_shot import ZeroShotClassifier
from hpt_hf.training.checkpoints import CheckpointTrainer, VouchForCheckpoint
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.layer_rates import split_by_depth
from hpt_hf.training.record import accuracies, agreements, beginning, check_attack, check_proxy, check_student
from hpt_hf.training.standstill import Standstill
from hpt_hf.training.timing import Stopwatch
from hpt_hf.training.tracking import keep_beside, tell
from hpt_hf.types import Images
from hpt_hf.utils import kept_random_state


class HPTTrainer(CheckpointTrainer):
    """Adversarial fine-tuning of a `ZeroShotClassifier` by a schedule of objectives.

    Batches are those of `hpt_hf.data.collator.Collator`: `images` (batch, 3, height, width) in [0, 1], `image_ids`
    (batch,) and, unless the data has none, `labels` (batch,).

    Args:
        model: the student with its vanilla weights and its classes set; only its vision side is trained.
        args: not changed.
        schedule: the phases; what they leave open is taken from `args`.
        attack: how training images are attacked.
        proxy: a vanilla classifier of another architecture with the same classes, several as one, or None if no
            objective needs one; it is frozen, and stays on an accelerator of its own if it lies on one.
        recipe: what train.json tells beside the run's own record.
        shortened: at most so many steps of each phase, to see what the run would cost.

    Raises:
        ValueError: a reference is missing, class lists differ, or the repository holds a model.
    """

    # The loss is a mean over its micro-batch, so the Trainer must divide it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: ZeroShotClassifier,
        args: HPTConfig,
        *,
        schedule: Schedule,
        attack: TrainingAttack,
        proxy: ZeroShotClassifier | Ensemble | None = None,
        recipe: dict | None = None,
        shortened: int | None = None,
        **kwargs,
    ):
        if not isinstance(args, HPTConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected HPTConfig: its defaults are the method's")
        student = model
        check_student(student)
        needed = {name for phase in schedule.phases for name in phase.objective.references}
        # Only what an objective asks for is kept: a frozen model that nobody asks costs memory on every device.
        self.proxy = proxy if "proxy" in needed else None
        for model in members(self.proxy):
            check_proxy(student, model)
        if "proxy" in needed and self.proxy is None:
            raise ValueError(f"{schedule.phases[-1].objective.name} learns from a proxy: got none. Fix: --proxy")
        check_attack((phase.objective for phase in schedule.phases), attack)
        self.vanilla: dict[str, float] = {}  # what the vanilla student gets on the held-out slice, if it was asked
        self.attack, self.recipe, self.beginning = attack, recipe, beginning(student, self.proxy, attack)
        args = copy.copy(args)
        self.full_schedule = args.resolve(schedule, args.steps_per_epoch(len(kwargs["train_dataset"])))
        self.schedule = self.full_schedule.shortened(shortened) if shortened else self.full_schedule
        args.max_steps = self.schedule.total_steps
        tell(self, args, kwargs["train_dataset"])
        # The Trainer's own would compile the wrapped forward alone: neither attack nor references go through it.
        compiled = args.torch_compile and {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        self.gpd = GPDCallback(self.schedule, student.freeze_text())
        self.multiplier = Multiplier()
        self.stopwatch = Stopwatch(self.schedule, args.device)
        kwargs.setdefault("compute_metrics", accuracies)
        with kept_random_state():  # which the Trainer's own would seed
            super().__init__(model=student, args=args, processing_class=student.processor, **kwargs)
        keep_beside(self)
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed: GPD cannot follow its sharding. Fix: FSDP2 (accelerate/fsdp2.yaml)")
        self.anchor: Any = None
        if "anchor" in needed:
            self.anchor = anchor_of(student) if student.lora else student.with_weights(student.plain_state())
        # `.to`, not accelerator.prepare_model, after which evaluate() would not prepare the student.
        references = [
            (m if m.device.type != "cpu" else m.to(args.device)).eval().requires_grad_(False)
            for m in (*members(self.proxy), *(() if student.lora else members(self.anchor)))
        ]
        if compiled:
            for model in (student, *references):
                compile_layers(model.model, **compiled)
        shard_models((student, *references), self.accelerator, asked=args.fsdp)
        for callback in (self.gpd, self.multiplier, VouchForCheckpoint(), self.stopwatch, Standstill()):
            self.add_callback(callback)
        self._told: list[dict[str, torch.Tensor]] = []  # of each micro-batch since the last log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """min over theta of L(theta, x_adv), where x_adv maximises the attack's loss in the ball around each image.

        Args:
            model: the wrapped student.
            inputs: a batch of `Collator`.

        Returns:
            A scalar; with `return_outputs` also (batch, classes) logits on `adversarial` and `clean` images.
        """
        step, images = self.state.global_step, inputs["images"]
        objective = self.schedule.phase(step).objective
        if objective.needs_labels and "labels" not in inputs:
            raise ValueError(f"{objective.name} needs labels: the data has none. Fix: hpt, ga, fare or anchor_clean")
        student, proxy, anchor = (m and self._in_autocast(m) for m in (model, self.proxy, self.anchor))
        references = {"proxy": proxy, "anchor": anchor, "multiplier": self.multiplier.value}
        views = Views(images, student=student, labels=inputs.get("labels"), **references)
        attacked = self.accelerator.unwrap_model(model) if objective.attack_on == "student" else self.proxy
        # The attack calls a method of the unwrapped model: no autocast, no gradient sync. Sharded weights come
        # together in forward alone, as copies that never ask for gradients again if the first pass did not.
        classify, still = (attacked, nullcontext()) if self.is_fsdp_enabled else (attacked.classify, frozen(attacked))
        target = objective.attack_target(views)
        # Evaluations at different steps see the same attack.
        noise = {"seed": self.args.seed, "round": step if model.training else -1}
        with still:
            x_adv = self.attack(
                lambda x: objective.attack_loss(classify(x), target), images, inputs["image_ids"], **noise
            )
        terms = objective(views.attacked(x_adv))
        loss = sum(terms.values())
        if views.violation is not None and model.training:
            self.multiplier.violations.append(self.accelerator.reduce(views.violation, "mean"))
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step} of {self.schedule.total_steps}, in phase {objective.name} "
                f"({values}), at learning rate {self.schedule.learning_rate(step):.3g}. Fix: a lower rate"
            )
        adversarial = views.student.adversarial.logits
        if model.training:
            robust = (adversarial.detach().argmax(1) == views.labels).float().mean()
            told = {f"loss_{n}": t.detach() for n, t in terms.items()} | {"robust_batch_accuracy": robust}
            self._told.append(told | agreements(self.proxy, views, inputs.get("labels")))
        return (loss, {"adversarial": adversarial, "clean": views.student.clean.logits}) if return_outputs else loss

    def _in_autocast(self, model: torch.nn.Module):
        """Accelerate wraps the student in it, but neither a frozen reference nor what it shards."""

        def forward(images: Images):
            with self.accelerator.autocast():
                return model(images)

        return forward

    def log(self, logs, start_time=None):
        """Beside the Trainer's: the phase, and means of the loss terms and the robust accuracy since the last log."""
        if "loss" in logs and self._told:
            names = sorted(self._told[-1])  # after a switch between two logs: the new phase's
            told = [torch.stack([terms[n] for n in names]) for terms in self._told if sorted(terms) == names]
            means = self.accelerator.reduce(torch.stack(told).mean(0), "mean")
            logs |= {n: round(v, 5) for n, v in zip(names, means.tolist(), strict=True)}
            logs["phase"] = self.schedule.phase(max(0, self.state.global_step - 1)).objective.name
            self._told = []
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """LambdaLR over the global step, times a base rate of 1, or of each layer's share."""
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.args.layer_rate_decay != 1:
            split_by_depth(optimizer, self.accelerator.unwrap_model(self.model), self.args.layer_rate_decay)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = group.get("share", 1.0)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.learning_rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As Trainer.train; True: from the last whole checkpoint; None: as `args.resume_from_checkpoint` says.

        Raises:
            FileNotFoundError, ValueError: no such checkpoint, or one that does not belong to this run.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
        if resume is True:
            resume = self.last_checkpoint()
        if resume and not Path(resume).is_dir():
            raise FileNotFoundError(f"no checkpoint at {resume}")
        self.check_run(resume)
        if resume:
            self.gpd.load(resume)
            self.multiplier.load(resume)
        if resume and isinstance(self.train_dataset, StreamedImages):
            done = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json")).global_step
            steps = self.args.steps_per_epoch(len(self.train_dataset))
            self.train_dataset.fast_forward(done // steps, done % steps * self.args.gradient_accumulation_steps)
        # An evaluation before has marked the student as prepared, and so DDP would leave its gradients alone.
        vars(self.accelerator.unwrap_model(self.model)).pop("_is_accelerate_prepared", None)
        with self.sole_run(), kept_random_state():
            set_seed(self.args.seed)
            return super().train(resume_from_checkpoint=resume or None, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """Of the whole held-out slice: `dataloader_drop_last` is for training, where every step weighs the same."""
        self.args.dataloader_drop_last, drop_last = False, self.args.dataloader_drop_last
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

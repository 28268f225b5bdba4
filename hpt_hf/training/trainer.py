"""HPTTrainer: transformers' Trainer, whose loss crafts adversarial images and asks the schedule's objective about them.

Few hooks and no formula: the loss is in `objectives.py`, the attack in `attacks.py`, what happens when in `schedule.py`.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import EvalPrediction, HubStrategy, sort_checkpoints
from transformers.utils import logging

from hpt_hf.attacks.engine import frozen
from hpt_hf.attacks.pgd import TrainingAttack
from hpt_hf.data.dataset import LabelledImages
from hpt_hf.data.streaming import StreamedImages
from hpt_hf.method.gpd import PIVOT_FILE, GPDCallback
from hpt_hf.method.objectives import Views
from hpt_hf.method.schedule import Schedule
from hpt_hf.models.fast_layers import compile_layers, keep_memory
from hpt_hf.models.fsdp import asked_for, check, full_tensor, load_weights, shard
from hpt_hf.models.zero_shot import ZeroShotClassifier, fingerprint
from hpt_hf.publishing.export import export
from hpt_hf.publishing.hub import holds_model, open_repo, push, push_checkpoint
from hpt_hf.publishing.model_card import TRAINED, write_model_card
from hpt_hf.training.timing import Stopwatch
from hpt_hf.types import Images
from hpt_hf.utils import commit, hardware, versions

logger = logging.get_logger(__name__)


class HPTTrainer(Trainer):
    """Adversarial fine-tuning of a `ZeroShotClassifier` by a schedule of objectives.

    Batches hold `images` (batch, 3, height, width) in [0, 1], `image_ids` (batch,) and, unless the data has none, `labels` (batch,): what
    `hpt_hf.data.collator.Collator` makes.

    Args:
        student: with its vanilla weights and its classes set; only its vision side is trained.
        args: transformers' TrainingArguments; `max_steps` is taken from the schedule.
        schedule: the phases.
        attack: how training images are attacked.
        proxy: a vanilla CLIP of another architecture with the same classes set, or None if no objective asks for one.
        hub_overwrite: with `args.push_to_hub`, go on although the repository holds a model already.

    Raises:
        ValueError: a reference is missing, class lists differ, an objective needs labels that the data lacks, or the repository holds a model.
    """

    # The loss is a mean over its micro-batch, so the Trainer must divide it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        student: ZeroShotClassifier,
        args,
        *,
        schedule: Schedule,
        attack: TrainingAttack,
        proxy: ZeroShotClassifier | None = None,
        hub_overwrite: bool = False,
        **kwargs,
    ):
        if args.hub_token:  # the message must not repeat it
            raise ValueError(
                "hub_token would be stored in clear in training_args.bin: leave it out, and log in with `hf auth login` or set HF_TOKEN"
            )
        if not student.classes:
            raise ValueError("the student has no classes: call student.set_classes(names, templates) first")
        needed = {r for phase in schedule.phases for r in phase.objective.references}
        if "proxy" in needed and proxy is None:
            raise ValueError(
                f"{schedule.phases[0].objective.name} learns from a proxy and none was given: pass a vanilla CLIP of another architecture"
            )
        # Only what an objective asks for is kept: a frozen model nobody asks costs memory on every device.
        proxy = proxy if "proxy" in needed else None
        self._origins = {"student": _origin(student), "proxy": None if proxy is None else _origin(proxy)}
        if proxy is not None:
            self._check_proxy(student, proxy)
        # Batches carry PIL rows that the model's signature does not name, and labels that the stock evaluation must find.
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        args.max_steps = schedule.total_steps
        self.schedule, self.attack, self.hub_overwrite = schedule, attack, hub_overwrite
        self.gpd = GPDCallback(schedule, student.freeze_text().model)
        self._seconds, self._exported = 0.0, None
        data = kwargs.get("train_dataset")
        if isinstance(data, StreamedImages):
            data.seed, data.chunk = args.seed, args.train_batch_size * args.world_size
            # Every process reads the stream and decodes its own share, instead of one that decodes for all.
            args.accelerator_config.dispatch_batches = False
        if args.device.type == "cpu":
            keep_memory()
        elif args.dataloader_pin_memory:
            args.accelerator_config.non_blocking = (
                True  # the copy of a batch goes on while the step before is computed
            )
        kwargs.setdefault("compute_metrics", accuracies)
        # The Trainer's own would compile the wrapped forward alone: neither the attack, which is most of a step, nor the references go through it.
        compiling = (
            {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode} if args.torch_compile else None
        )
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        super().__init__(model=student, args=args, processing_class=student.processor, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed shards the weights, and GPD's average, its restart and the export do not know its way: use FSDP2 (recipes/accelerate/fsdp2.yaml)"
            )
        # `.to`, not accelerator.prepare_model: that would make a later evaluate() skip preparing the student, in fp32 silently.
        self.proxy = None if proxy is None else proxy.to(args.device).eval().requires_grad_(False)
        self.anchor = None
        if "anchor" in needed:
            self.anchor = student.with_weights(student.model.state_dict()).to(args.device).requires_grad_(False)
        models = [m for m in (student, self.proxy, self.anchor) if m is not None]
        if compiling:
            for model in models:
                compile_layers(model.model, **compiling)
        if asked_for(args.fsdp) and not self.is_fsdp_enabled:
            logger.warning(
                "FSDP was asked for, and accelerate gives it to several GPUs alone: here every process holds all weights"
            )
        if self.is_fsdp_enabled:
            check(plugin := self.accelerator.state.fsdp_plugin)
            for model in models:
                shard(model, args.device, plugin)
        self.stopwatch = Stopwatch(schedule, args.device)
        self.add_callback(self.gpd)
        self.add_callback(self.stopwatch)
        self._sums: dict[str, torch.Tensor] = {}
        self._counted = 0

    def _check_proxy(self, student: ZeroShotClassifier, proxy: ZeroShotClassifier) -> None:
        if proxy.classes != student.classes:
            raise ValueError(
                f"student and proxy have different classes ({len(student.classes)} and {len(proxy.classes)} names): call set_classes with the same list on both"
            )
        if self._origins["proxy"]["fingerprint"] == self._origins["student"]["fingerprint"]:
            logger.warning(
                "proxy and student are the same model: an attack on the student is an attack on this proxy, so it has nothing to teach. "
                "HPT needs a proxy of another architecture."
            )
        elif proxy.config.vision_config.to_dict() == student.config.vision_config.to_dict():
            logger.warning(
                "proxy and student have the same architecture: attacks transfer between such models, and HPT needs them not to"
            )
        if proxy.image_size != student.image_size:
            logger.warning(
                f"the proxy reads {proxy.image_size} px, the student {student.image_size} px: the student's images are resized for the proxy, inside the proxy"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step = self.state.global_step
        phase = self.schedule.phase(step)
        objective = phase.objective
        if objective.needs_labels and "labels" not in inputs:
            raise ValueError(
                f"{objective.name} needs labels and the data has none; hpt, ga, fare and anchor_clean do without"
            )
        views = Views(
            inputs["images"],
            student=self._in_autocast(model),
            proxy=self._in_autocast(self.proxy),
            anchor=self._in_autocast(self.anchor),
            labels=inputs.get("labels"),
        )
        attacked = self.accelerator.unwrap_model(model) if objective.attack_on == "student" else self.proxy
        # The attack calls a method of the unwrapped model: no autocast, no gradient sync. The loss goes through the wrapped model.
        # Sharded weights come together in forward alone, as copies that never ask for gradients again if the first pass did not.
        classify, still = (attacked, nullcontext()) if self.is_fsdp_enabled else (attacked.classify, frozen(attacked))
        with still:
            views.adversarial_images = self.attack(
                lambda images: objective.attack(classify(images), views),
                inputs["images"],
                inputs["image_ids"],
                seed=self.args.seed,
                round=step if model.training else -1,  # evaluations at different steps see the same attack
            )
        terms = objective(views)
        loss = sum(terms.values())
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step} of {self.schedule.total_steps}, in phase {objective.name} ({values}) at learning rate "
                f"{self.schedule.learning_rate(step):.3g}: lower the rate, or resume from the last checkpoint in {self.args.output_dir}"
            )
        if model.training:
            self._count(terms, views)
        if not return_outputs:
            return loss
        return loss, {"adversarial": views.student.adversarial.logits, "clean": views.student.clean.logits}

    def _in_autocast(self, model: torch.nn.Module | None):
        """Accelerate wraps the student in it, but neither a frozen reference nor what it shards."""
        if model is None:
            return None

        def forward(images: Images):
            with self.accelerator.autocast():
                return model(images)

        return forward

    @torch.no_grad()
    def _count(self, terms: dict[str, torch.Tensor], views: Views) -> None:
        robust = (views.student.adversarial.logits.argmax(1) == views.labels).float().mean()
        values = {f"loss_{name}": value.detach() for name, value in terms.items()} | {"robust_batch_accuracy": robust}
        if set(values) != set(self._sums):  # the first batch, or a new phase
            self._sums, self._counted = {k: torch.zeros_like(v, dtype=torch.float32) for k, v in values.items()}, 0
        for name, value in values.items():
            self._sums[name] += value
        self._counted += 1

    def log(self, logs, start_time=None):
        if "loss" in logs and self._counted:
            names = sorted(self._sums)
            means = self.accelerator.reduce(torch.stack([self._sums[n] for n in names]) / self._counted, "mean")
            logs |= {n: round(v, 5) for n, v in zip(names, means.tolist(), strict=True)}
            logs["phase"] = self.schedule.phase(max(0, self.state.global_step - 1)).objective.name
            self._sums, self._counted = {}, 0
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """LambdaLR over the global step, times a base rate of 1 that the optimizer got from TrainingArguments."""
        optimizer = self.optimizer if optimizer is None else optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 1.0
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.learning_rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As Trainer.train; the pivot is read from the checkpoint too.

        Raises:
            FileNotFoundError, ValueError: no such checkpoint, or one that does not belong to this run.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint()
        if resume_from_checkpoint:
            if not Path(resume_from_checkpoint).is_dir():
                raise FileNotFoundError(f"no checkpoint at {resume_from_checkpoint}")
            self.gpd.load(resume_from_checkpoint)
            if isinstance(self.train_dataset, StreamedImages):
                self._fast_forward(self.train_dataset, resume_from_checkpoint)
        start = time.time()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        finally:
            self._seconds += time.time() - start

    def _fast_forward(self, stream: StreamedImages, checkpoint: str) -> None:
        """Let the stream pass over what was trained on before the checkpoint; the Trainer counts those places, and nobody decodes them."""
        done = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step
        per_step = stream.chunk * self.args.gradient_accumulation_steps
        steps = math.ceil(len(stream) / stream.chunk / self.args.gradient_accumulation_steps)
        stream.epoch, stream.start = done // steps, done % steps * per_step

    def shorten(self, steps: int) -> None:
        """Cut every phase to at most `steps` steps: enough to see what the run would cost, see `hpt_hf.commands.estimate`."""
        self.schedule = self.gpd.schedule = self.stopwatch.schedule = self.schedule.shortened(steps)
        self.args.max_steps, self.stopwatch.quiet = self.schedule.total_steps, True

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint holds the plain model, which opens like any other, and no pickle of the arguments."""
        classifier = self.accelerator.unwrap_model(self.model)
        state = {n: full_tensor(t) for n, t in classifier.model.state_dict().items()}
        if self.args.should_save:
            classifier.save_pretrained(output_dir or self.args.output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.accelerator.unwrap_model(model or self.model).model, resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def last_checkpoint(self) -> str:
        """The newest checkpoint that is whole: a run that was killed while saving left one that is not.

        Raises:
            FileNotFoundError: there is none.
        """
        checkpoints = sort_checkpoints(self.args.output_dir)[::-1]
        if not checkpoints:
            raise FileNotFoundError(
                f"nothing to resume: {self.args.output_dir} holds no checkpoint; start without resume_from_checkpoint"
            )
        # Written last, by the Trainer and by the callback.
        last = ["trainer_state.json", *([PIVOT_FILE] if self.gpd.vanilla else [])]
        for checkpoint in checkpoints:
            if all((Path(checkpoint) / name).is_file() for name in last):
                return checkpoint
            logger.warning(f"{checkpoint} was cut off while being saved; looking for an earlier one")
        raise FileNotFoundError(
            f"nothing to resume: no checkpoint in {self.args.output_dir} has its {' and '.join(last)}: they were cut off while being saved, "
            "or not made by this recipe"
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """Of the whole held-out slice: `dataloader_drop_last` is for training, where every step must weigh the same."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def record(self) -> dict:
        """How the model was made, as JSON: what `train.json` holds and the model card tells."""
        args, data = self.args, self.train_dataset
        return {
            "method": "+".join(p.objective.name for p in self.schedule.phases),
            **self._origins,
            "dataset": data.name if isinstance(data, (LabelledImages, StreamedImages)) else type(data).__name__,
            "pictures": len(data),
            "classes": len(self.accelerator.unwrap_model(self.model).classes),
            "phases": [
                {
                    "objective": p.objective.name,
                    "steps": p.steps,
                    "learning_rate": p.learning_rate,
                    "warmup_steps": p.warmup_steps,
                }
                for p in self.schedule.phases
            ],
            "attack": {
                "norm": self.attack.threat.norm,
                "eps": self.attack.threat.eps,
                "steps": self.attack.steps,
                "step_size": self.attack.step_size,
                "random_start": self.attack.random_start,
            },
            "steps": self.schedule.total_steps,
            "learning_rate": args.learning_rate,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "processes": args.world_size,
            "seed": args.seed,
            "seconds": round(self._seconds, 1),  # of this run; one that was resumed leaves out what came before
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(),
        }

    def whole(self) -> ZeroShotClassifier | None:
        """The student with all its weights; None on every process but the first where each has only a part. All must ask."""
        student = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return student
        state = {n: full_tensor(t) for n, t in student.model.state_dict().items()}
        return student.with_weights(state) if self.is_world_process_zero() else None

    def export(self, **record) -> Path:
        """`output_dir` as a folder that `pipeline` opens, checked and with its card; `record` is added to what train.json tells.

        To be called on every process: the first one writes, the others give their parts and wait.
        """
        student = self.whole()
        if self.is_world_process_zero():
            self._write(student, record)
        self.accelerator.wait_for_everyone()
        return Path(self.args.output_dir)

    def _write(self, student: ZeroShotClassifier, record: dict) -> None:
        self._exported = fingerprint(student)
        export(student, self.args.output_dir, records={TRAINED: self.record() | record})

    def create_model_card(self) -> None:
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Before the hours of training: is there a token that may write to the repository, and is that free?"""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.hub_model_id = open_repo(
            name, private=self.args.hub_private_repo if private is None else private, token=token
        )
        taken = holds_model(self.hub_model_id, self.args.hub_revision, token=token)
        if taken and not self.hub_overwrite:
            raise ValueError(
                f"{self.hub_model_id} holds a model already ({', '.join(taken[:3])}): choose another --hub_model_id or --hub_revision, or pass --hub_overwrite true "
                "to replace it (its commits stay in the history). A resumed run that pushed checkpoints needs it, too"
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        """Export `output_dir` unless that is done, and upload what `hpt_hf.publishing.hub` lets out; always waits. Returns the commit's address.

        The Trainer's own would send whatever lies there, `training_args.bin` included.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        student = self.whole()
        if not self.is_world_process_zero():
            return None
        if self._exported != fingerprint(student):
            self._write(student, {})
        return push(
            self.args.output_dir,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            message=commit_message,
            overwrite=True,  # it was free, or may be replaced: `init_hf_repo` looked
            token=token,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer's own would send `training_args.bin`, and from a thread whose files may be gone by then."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        message = f"Training in progress, step {self.state.global_step}"
        push_checkpoint(folder, self.hub_model_id, message=message, revision=self.args.hub_revision)
        if path := paths.get(self.args.hub_strategy):
            push_checkpoint(folder, self.hub_model_id, message=message, path=path, revision=self.args.hub_revision)


def _origin(model: ZeroShotClassifier) -> dict:
    """What a model was before training."""
    return {"source": model.model.name_or_path, "revision": model.revision, "fingerprint": fingerprint(model)}


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Clean and robust accuracy in percent, on the held-out slice of the training data."""
    adversarial, clean = prediction.predictions
    labels = prediction.label_ids
    return {
        name: 100 * float((logits.argmax(1) == labels).mean())
        for name, logits in (("clean_accuracy", clean), ("robust_accuracy", adversarial))
    }

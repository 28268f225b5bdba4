"""What of a run lies in folders and on the Hub: every save is a folder to publish, and only what may leave is sent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, sort_checkpoints
from transformers.utils import logging

from hpt_hf.method.gpd import PIVOT_FILE, GPDCallback
from hpt_hf.models.fsdp import load_weights
from hpt_hf.models.lora import ADAPTER, load_adapter
from hpt_hf.publishing.export import export, export_adapter
from hpt_hf.publishing.hub import holds_model, open_repo, push, push_checkpoint
from hpt_hf.publishing.model_card import TRAINED, write_model_card
from hpt_hf.training.config import HPTConfig
from hpt_hf.training.record import decided_by, differences, training_record
from hpt_hf.training.tracking import draw_log
from hpt_hf.utils import file_digests, no_space, processes, read_json, write_json

DIGESTS = "digests.json"
UNSEALED = (DIGESTS, "README.md")  # a person may edit the card
logger = logging.get_logger(__name__)


class VouchForCheckpoint(TrainerCallback):
    """Writes, last of all, digests of a checkpoint's files: what was torn or changed since is not gone on from."""

    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()  # each writes its own random state
        if args.should_save:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            write_json(folder / DIGESTS, file_digests(folder, but=UNSEALED))


class CheckpointTrainer(Trainer):
    """The Trainer's own would store pickles, send whatever lies in `output_dir`, and load weights of any names."""

    args: HPTConfig
    gpd: GPDCallback
    _lock: FileLock | None = None
    hub_model_id: str | None  # type: ignore[assignment]

    def record(self) -> dict:
        """How the model was made: what `train.json` holds."""
        return training_record(self)

    def _save(self, output_dir=None, state_dict=None):
        """The plain model with processor, record and card, checked against `pipeline`."""
        if self.args.should_save:
            student = self.accelerator.unwrap_model(self.model)
            if state_dict is not None:  # gathered from its parts
                student = student.with_weights({n.removeprefix("model."): t for n, t in state_dict.items()})
            folder = Path(output_dir or self.args.output_dir)
            plain = student.with_weights(student.plain_state()) if student.lora else student
            records = {TRAINED: self.record()}
            export(plain, folder, records=records)
            if student.lora:
                export_adapter(student, folder / ADAPTER, records)

    def create_model_card(self, *args, **kwargs) -> None:
        if self.is_world_process_zero():
            draw_log(self.args.output_dir)
            write_model_card(self.args.output_dir)

    def last_checkpoint(self) -> str:
        """The newest checkpoint that is whole: neither cut off while being saved nor changed since.

        Raises:
            FileNotFoundError: there is none.
        """
        for checkpoint in sort_checkpoints(self.args.output_dir)[::-1]:
            if not (reason := self._not_whole(checkpoint)):
                return checkpoint
            logger.warning(f"{checkpoint} {reason}; looking for an earlier one")
        raise FileNotFoundError(f"nothing to resume: {self.args.output_dir} holds no whole checkpoint")

    def _not_whole(self, checkpoint: str | Path) -> str | None:
        """Why a checkpoint cannot be gone on from, or None."""
        last = ["trainer_state.json", *([PIVOT_FILE] if self.gpd.vanilla else [])]  # what was written last
        if not all(Path(checkpoint, name).is_file() for name in last):
            return "was cut off while being saved"
        try:
            read_json(Path(checkpoint, "trainer_state.json"))
            expected = read_json(file) if (file := Path(checkpoint, DIGESTS)).is_file() else {}
        except ValueError as error:
            return f"cannot be used ({error})"
        found = file_digests(Path(checkpoint), but=UNSEALED)
        odd = [name for name, digest in expected.items() if found.get(name) != digest]
        return f"is damaged: {', '.join(odd)} {'is' if len(odd) == 1 else 'are'} not what was saved" if odd else None

    def _save_checkpoint(self, model, trial):
        """On a full disk one line, and nothing half-written: the checkpoint before still stands."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not no_space(error):
                raise
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"no space left for {folder}. Fix: make room, then the same command with --resume_from_checkpoint true"
            ) from error

    def check_run(self, resume: str | None) -> None:
        """Before the first step: does the checkpoint belong to this run, and nobody else's lie in `output_dir`?

        Raises:
            ValueError: another run's; the message names every field that differs.
        """
        now = decided_by(self)
        if resume:
            if reason := self._not_whole(resume):
                raise ValueError(f"{resume} {reason}. Fix: an earlier checkpoint, or --resume_from_checkpoint true")
            if odd := differences(resume, now):
                raise ValueError(
                    f"{resume} is of another run: {'; '.join(odd)}. Fix: its settings, or a new --output_dir"
                )
            if not any(Path(resume).glob("optimizer*")):
                raise ValueError(f"{resume} holds no optimizer (save_only_model). Fix: begin again, or another one")
            return
        whole = [c for c in sort_checkpoints(self.args.output_dir) if Path(c, "trainer_state.json").is_file()]
        for checkpoint in whole:
            if odd := differences(checkpoint, now):
                if not self.args.overwrite:
                    fix = "Fix: a new --output_dir, or --overwrite true"
                    raise ValueError(f"{checkpoint} is of another run: {'; '.join(odd)}. {fix}")
                if self.args.should_save:
                    shutil.rmtree(checkpoint)

    @contextmanager
    def sole_run(self) -> Iterator[None]:
        """Two runs in one folder would take each other's checkpoints. Raises ValueError for the second."""
        if not self.args.should_save:
            yield
            return
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or FileLock(Path(self.args.output_dir, ".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"output_dir: {self.args.output_dir} is in use by another run. Fix: another --output_dir"
            ) from None
        try:
            yield
        finally:
            if self._lock.lock_counter == 1:
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        student = self.accelerator.unwrap_model(self.model)
        (load_adapter if student.lora else load_weights)(student, resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Before the hours of training: is there a token that may write to the repository, and is that free?"""
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        self.hub_model_id = open_repo(name, private=private, token=token)
        taken = holds_model(self.hub_model_id, args.hub_revision, token=token)
        if taken and not args.hub_overwrite:
            raise ValueError(
                f"{self.hub_model_id} holds a model already ({', '.join(taken[:3])}). Fix: another --hub_model_id or "
                "--hub_revision, or --hub_overwrite true (also for a resumed run that pushed checkpoints)"
            )

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, private=None):
        """Save `output_dir` and upload it; always waits. Returns the commit's address."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        # overwrite: it was free, or may be replaced, as `init_hf_repo` saw.
        options = {"revision": revision or self.args.hub_revision, "overwrite": True, "token": token}
        return push(self.args.output_dir, self.hub_model_id, message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, folder = self.args.hub_strategy, Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        resumable = {HubStrategy.CHECKPOINT: ["last-checkpoint"], HubStrategy.ALL_CHECKPOINTS: [folder.name]}
        message = f"Training in progress, step {self.state.global_step}"
        for path in (None, *resumable.get(HubStrategy(strategy), [])):
            push_checkpoint(folder, self.hub_model_id, message=message, path=path, revision=self.args.hub_revision)

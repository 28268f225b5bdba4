"""The Trainer's doors to the Hub, with only what `hpt_hf.publishing.hub` lets out; the Trainer's own would send whatever lies there."""

from __future__ import annotations

from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from hpt_hf.publishing.hub import holds_model, open_repo, push, push_checkpoint


class HubTrainer(Trainer):
    """`push_to_hub` and its checkpoints, checked and by a short list of files."""

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

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None
    ) -> str | None:
        """Save `output_dir` and upload it; always waits. Returns the commit's address."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        revision = revision or self.args.hub_revision
        # overwrite: it was free, or may be replaced, as `init_hf_repo` saw.
        return push(
            self.args.output_dir,
            self.hub_model_id,
            revision=revision,
            message=commit_message,
            overwrite=True,
            token=token,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, name = Path(checkpoint_folder), self.hub_model_id
        paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        options = {
            "message": f"Training in progress, step {self.state.global_step}",
            "revision": self.args.hub_revision,
        }
        push_checkpoint(folder, name, **options)
        if path := paths.get(self.args.hub_strategy):
            push_checkpoint(folder, name, path=path, **options)

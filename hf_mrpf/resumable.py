"""A Trainer whose checkpoints count once they are whole, and which stops where weights or loss are no longer finite."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from .averaging import AveragingTrainer
from .checkpoints import best_beside, check_complete, discard, mark_complete, misfit, newest_complete, rotate
from .config import MRPFConfig
from .faults import is_out_of_memory, out_of_memory
from .processes import Processes, check_same_model
from .sensitivity import check_finite_weights

LOGGER = logging.getLogger("hf_mrpf")


class ResumableTrainer(AveragingTrainer):
    """`Trainer` that writes complete checkpoints and goes on from them; its arguments are those of `Trainer`."""

    args: MRPFConfig
    _checked_checkpoint: str | None = None
    _resumed_from: Path | None = None

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args, **kwargs):
        """
        As in `Trainer`; a ValueError where loss or weights are no longer finite, a MemoryError where memory ends.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                A checkpoint to go on from; `True` for the newest complete one in `output_dir`. Torn ones are skipped,
                and so are those of other shapes, such as of the model before it was pruned.

        Raises:
            ValueError: also where the checkpoint is torn or of another shape, or `True` was given and there is none.
        """
        self._resumed_from = self._place(resume_from_checkpoint)
        place = None if self._resumed_from is None else str(self._resumed_from)
        self._checked_checkpoint = place
        try:
            output = super().train(place, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(out_of_memory(self._train_batch_size)) from error
        self._without_autocast()
        self._check_weights()
        self._check_same("after training")
        return output

    def evaluation_loop(self, *args, **kwargs):
        """As in `Trainer`; outside of a training the model computes afterwards in the dtype of its weights."""
        output = super().evaluation_loop(*args, **kwargs)
        if not self.is_in_train:
            self._without_autocast()
        return output

    def _without_autocast(self) -> nn.Module:
        """The bare model, its forward as before accelerate put the autocast of `bf16` around it."""
        model = self.accelerator.unwrap_model(self.model)
        # Not by unwrap_model, which takes off decorators of the model's own as well.
        if (own := vars(model).pop("_original_forward", None)) is not None:
            vars(model)["forward"] = own
        return model

    def _place(self, wanted: str | Path | bool | None) -> Path | None:
        # The main process looks: the others could see the folder in another state, and go on from another step.
        found, error = None, None
        if wanted and self.is_world_process_zero():
            try:
                found = self._newest() if wanted is True else self._forced(str(wanted))
            except ValueError as refusal:
                error = str(refusal)
        found, error = Processes.of(self.args.world_size > 1).from_main((found, error))
        if error:
            raise ValueError(error)
        return found

    def _newest(self) -> Path:
        folder, model = str(self.args.output_dir), self.accelerator.unwrap_model(self.model)
        said: list[str] = []
        found = newest_complete(folder, model=model, say=said.append)
        if found is None:
            other = newest_complete(folder, say=lambda line: None)
            raise ValueError(
                f"resume_from_checkpoint=True, but {folder} holds no complete checkpoint"
                + (f" of this model. {_other_shape(other, model)}" if other else " to go on from.")
                + "".join(f" {line}" for line in said if not other)
            )
        for line in said:
            LOGGER.warning(line)
        return found

    def _forced(self, place: str) -> Path:
        found, model = check_complete(place), self.accelerator.unwrap_model(self.model)
        if misfit(found, model):
            raise ValueError(_other_shape(found, model))
        return found

    def _init_training_state(self, *args, **kwargs):
        position = super()._init_training_state(*args, **kwargs)
        if self._resumed_from is not None:
            # The path in the state is that of the machine and working directory where it was written.
            model = self.accelerator.unwrap_model(self.model)
            best = best_beside(self._resumed_from, self.state.best_global_step, model)
            recorded = self.state.best_model_checkpoint
            if best is None and recorded is not None and misfit(Path(recorded), model):
                # Another training, of the pruned model, has written over it: the best is sought afresh.
                self.state.best_global_step = self.state.best_metric = recorded = None
            self.state.best_model_checkpoint = best or recorded
        return position

    def _run_epoch(self, *args, **kwargs) -> None:
        # Gone on with at its last step in mid-epoch, Trainer would do one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _check_weights(self) -> None:
        try:
            check_finite_weights(self.accelerator.unwrap_model(self.model))
        except ValueError as error:
            self._stop(f"After step {self.state.global_step}, {error}")

    def _check_same(self, when: str) -> None:
        check_same_model(self.accelerator.unwrap_model(self.model), Processes.of(self.args.world_size > 1), when)

    @contextlib.contextmanager
    def _nothing_removed(self) -> Iterator[None]:
        """Within, `Trainer` removes no checkpoint."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _save_checkpoint(self, model, trial):
        self._check_weights()
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            discard(checkpoint)
        self.accelerator.wait_for_everyone()
        # Trainer removes older checkpoints before this one is known to be whole, and takes the times of folders for
        # their order.
        with self._nothing_removed():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_settings(checkpoint)  # with the limit that was held back
            mark_complete(checkpoint, world_size=self.args.world_size, model_only=bool(self.args.save_only_model))
            rotate(folder, self.args.save_total_limit, checkpoint, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._checked_checkpoint = str(checkpoint)

    def _finalize_training(self, *args, **kwargs):
        # Trainer removes the last checkpoint here if another is the best: a run killed before it has saved its model
        # would then train again since the best.
        with self._nothing_removed():
            return super()._finalize_training(*args, **kwargs)

    def _stop(self, reason: str) -> None:
        raise ValueError(
            f"{reason}; training stopped. Last checkpoint with finite weights: "
            f"{self._checked_checkpoint or 'none was saved yet'}. Lower the learning rate, or give it a warm-up"
            f"{', or train without --bf16' if self.args.bf16 else ''}."
        )


def _other_shape(checkpoint: Path, model: nn.Module) -> str:
    return (
        f"{checkpoint} is a checkpoint of another model, or of this one before or after a pruning: "
        f"{misfit(checkpoint, model)}. To go on from it, build the model with from_pretrained({str(checkpoint)!r})."
    )

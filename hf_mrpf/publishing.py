"""What a trainer leaves behind: its best and last figures, a folder without pickles, a repository on the Hub."""

import json
from concurrent.futures import Future
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedModel, Trainer

from .config import MRPFConfig
from .evaluation import evaluate_robustness
from .hub import create_repository, push_folder, write_record
from .modeling import PrunedForImageClassification
from .plan import PruningPlan
from .report import RobustnessReport


class PublishingTrainer(Trainer):
    """
    `Trainer` that saves a model as safetensors and JSON alone, and sends a finished result with its own card.

    Attributes:
        plans (`list[PruningPlan]`):
            The plans that were applied, in order.
        pruning_report (`dict`):
            What each step of pruning did to the accuracy on the validation split.
        horizontal_flip (`bool`):
            Whether training mirrors images.
    """

    args: MRPFConfig
    plans: list[PruningPlan]
    pruning_report: dict[str, dict[str, Any]]
    horizontal_flip: bool
    _has_trained: bool = False  # since it was made, or last pruned by `prune()`

    def _trained(self) -> bool:
        """Whether the model is what a training left, not pruned since."""
        return self._has_trained

    def best_and_last(self) -> dict[str, dict[str, float]]:
        """
        Validation figures of the best and of the last evaluation of the last `train()`.

        The best is the one that `metric_for_best_model` picked, or else that of the highest robust accuracy.

        Returns:
            `dict`: `{"best": {...}, "last": {...}}` with `epoch`, `step`, `eval_accuracy`, `eval_robust_accuracy` each;
            empty where nothing was evaluated, and from a pruning to the next `train()`.
        """
        if not self._trained():
            return {}
        rows: dict[int, dict[str, float]] = {}
        # The training's own last row has its time; what is evaluated later may be another checkpoint's.
        for row in takewhile(lambda row: "train_runtime" not in row, self.state.log_history):
            figures = {key: value for key, value in row.items() if key.startswith("eval_") and key.endswith("accuracy")}
            # Several validation splits log one row each; with prediction_loss_only one has that of the training alone.
            if any(not name.endswith("_train_robust_accuracy") for name in figures):
                rows.setdefault(int(row["step"]), {"epoch": row["epoch"], "step": row["step"]}).update(figures)
        if not rows:
            return {}
        last = max(rows)
        best = self.state.best_global_step
        if best not in rows:
            name = next((key for key in rows[last] if key.endswith("robust_accuracy")), "eval_accuracy")
            best = max(rows, key=lambda step: rows[step].get(name, 0.0))
        return {"best": rows[best], "last": rows[last]}

    # ---- Saving -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Trainer's own writes training_args.bin, a pickle.
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            # Under the names that the model's tensors have now, by which a checkpoint is loaded.
            model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        else:
            from safetensors.torch import save_model

            save_model(model, str(folder / "model.safetensors"))
        self._save_settings(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Of a weight that a plain network has under two names the file holds one, and `Trainer` looks for attributes of
        # transformers' own models there.
        if isinstance(self.model, PreTrainedModel):
            super()._issue_warnings_after_load(load_result)

    def _save_settings(self, folder: Path) -> None:
        (folder / "training_args.json").write_text(json.dumps(self.args.to_dict(), indent=2, default=str) + "\n")

    # ---- Hub --------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `Trainer`: makes sure, before any training, that the repository can be written to."""
        self.push_in_progress = None
        if self.is_world_process_zero():
            self.hub_model_id = create_repository(  # type: ignore[assignment]
                self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
                private=self.args.hub_private_repo if private is None else private,
                token=self.args.hub_token if token is None else token,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own sends training_args.bin, a pickle, and may send optimizer states. Only a finished model is sent.
        pass

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        report: RobustnessReport | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Sends the model as it now is, with plan, report, figure and card, see [`push_folder`]; never a pickle.

        Everything is written to `output_dir` first, so that a push that fails can be made again from there. Settings of
        a training are on the card only where there was one since the model was last pruned.

        Args:
            commit_message, blocking, token, revision, private:
                As in `Trainer`.
            report ([`RobustnessReport`], *optional*):
                What the card says of the model, measured on the test split. Without one, clean accuracy and PGD-20 are
                measured on the validation split, the first of several.

        Raises:
            ValueError: where the model is no [`PrunedForImageClassification`].
            OSError: where the push failed; the message says how to make it again.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PrunedForImageClassification):
            raise ValueError(
                f"push_to_hub sends a PrunedForImageClassification, and this is a {type(model).__name__}: "
                "make the model with PrunedForImageClassification.from_backbone."
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._write_record(model, report)
        push = partial(
            push_folder,
            Path(str(self.args.output_dir)),
            str(self.hub_model_id),
            private=private,
            revision=self.args.hub_revision if revision is None else revision,
            token=token,
            commit_message=commit_message or "End of training",
        )
        return push() if blocking else HfApi().run_as_future(push)

    def create_model_card(self, *args: Any, report: RobustnessReport | None = None, **kwargs: Any) -> None:
        """
        Writes to `output_dir` what [`~PublishingTrainer.push_to_hub`] sends beside the weights, with its card.

        Args:
            report ([`RobustnessReport`], *optional*):
                As there.
            args, kwargs:
                Those of `Trainer`, for other models, whose card is its own; that of a
                [`PrunedForImageClassification`] finds what they say by itself.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PrunedForImageClassification):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
            self._write_record(model, report)

    def _write_record(self, model: PrunedForImageClassification, report: RobustnessReport | None) -> None:
        settings = self.args.to_dict() | {"processes": self.args.world_size, "horizontal_flip": self.horizontal_flip}
        split = "test"
        images: Any = self.eval_dataset
        images = next(iter(images.values()), None) if isinstance(images, dict) else images
        if report is None and isinstance(images, Dataset):
            batch_size, split = self.args.per_device_eval_batch_size, "validation"
            report = evaluate_robustness(
                model, images, attack=self.args.eval_attack, seed=self.args.seed, batch_size=batch_size
            )
        write_record(
            Path(str(self.args.output_dir)),
            model,
            self.hub_model_id or self.args.hub_model_id,
            plans=self.plans,
            report=report,
            split=split,
            settings=settings if self._trained() else {},
            pruning_steps=self.pruning_report,
            selection=self.best_and_last(),
            seed=self.args.seed,
        )

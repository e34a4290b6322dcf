"""`MeasuringTrainer`: evaluation under attack, and what trainings and prunings send to the log."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from .attacks import keyed_start, logits_of, pgd_attack
from .callbacks import OverfittingWatch
from .config import MRPFConfig
from .loader import as_float
from .logs import TrainingMeter, open_reporters, plan_figures
from .modes import in_own_dtype
from .pixel_trainer import PixelTrainer
from .plan import PruningPlan

# Of every evaluation; that of the training images is there only in some.
METRICS = ("robust_accuracy", "accuracy", "adversarial_loss_gap", "loss")


class MeasuringTrainer(PixelTrainer):
    """
    `Trainer` that evaluates under attack and logs robustness through every reporter.

    A row of the training log has `train_accuracy`, `train_robust_accuracy` (under the training attack) and
    `adversarial_loss_gap` (adversarial minus clean cross-entropy, nats), each where the objective ran those images. An
    evaluation has `eval_accuracy`, `eval_robust_accuracy` and `eval_adversarial_loss_gap`, all images counted once, and
    in a training `eval_train_robust_accuracy`, that of the batches since the evaluation before. Every one of them is
    over all processes.

    `predict(dataset).predictions` is a pair: the logits of the clean images and those of the images under attack, each
    `[N, number of classes]`. `compute_metrics` is given the first of them.
    """

    def __init__(self, *, compute_metrics: Callable | None = None, **kwargs: Any):
        if kwargs.get("preprocess_logits_for_metrics") is not None:
            raise ValueError(
                "preprocess_logits_for_metrics has no place here: accuracy is measured from the logits of clean images "
                "and of those under attack, both whole. Reduce the former in compute_metrics."
            )
        if compute_metrics is None:
            _check_best_metric(kwargs["args"], kwargs.get("eval_dataset"))
        if "inputs" in kwargs["args"].include_for_metrics and not hasattr(kwargs["model"], "main_input_name"):
            kwargs["model"].main_input_name = "pixel_values"  # where `Trainer` looks for them
        self._meter = TrainingMeter()
        self._clean_metrics = compute_metrics
        super().__init__(compute_metrics=self._metrics, **kwargs)
        self.add_callback(OverfittingWatch())

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What the [`OverfittingWatch`] noticed in the last `train()`: `kind`, `epoch`, `step` and `message`."""
        watches = (callback for callback in self.callback_handler.callbacks if isinstance(callback, OverfittingWatch))
        return [warning for watch in watches for warning in watch.warnings]

    # ---- Evaluation -------------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Clean logits and logits under PGD of `eval_num_steps` steps; the loss is the clean cross-entropy."""
        inputs = self._prepare_inputs(inputs)
        images, labels = inputs["pixel_values"], inputs["labels"]
        attacked, attack = self.accelerator.unwrap_model(model), self.args.eval_attack
        start = keyed_start(images, inputs.get("index", range(len(images))), attack, self.args.seed)
        with in_own_dtype(attacked):
            adversarial = pgd_attack(attacked, images, labels, attack, start=start)
            with torch.no_grad():
                # Copies: a network compiled into CUDA graphs writes its next output over the last one.
                logits, adversarial_logits = (
                    logits_of(attacked(x)).to(torch.float32, copy=True) for x in (images, adversarial)
                )
        loss = nn.functional.cross_entropy(logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, (logits, adversarial_logits), labels)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, adversarial_logits = (torch.as_tensor(array) for array in prediction.predictions)
        labels = torch.as_tensor(prediction.label_ids)
        correct = logits.argmax(-1) == labels
        robust = correct & (adversarial_logits.argmax(-1) == labels)
        clean_loss, adversarial_loss = (
            nn.functional.cross_entropy(part, labels) for part in (logits, adversarial_logits)
        )
        metrics = {
            "accuracy": correct.double().mean().item(),
            "robust_accuracy": robust.double().mean().item(),
            "adversarial_loss_gap": (adversarial_loss - clean_loss).item(),
        }
        if self._clean_metrics is not None:
            images = prediction.inputs  # where include_for_metrics asks for them; in bytes, as they cross to the device
            images = None if images is None else as_float(torch.as_tensor(images)).numpy()
            metrics |= self._clean_metrics(
                EvalPrediction(prediction.predictions[0], prediction.label_ids, images, prediction.losses)
            )
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        """As in `Trainer`; in a training with the robust accuracy of the training batches since the last one."""
        # A training that goes on from a checkpoint of before must not depend on what was measured since.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            output = super().evaluation_loop(*args, **kwargs)
        if self.is_in_train and output.metrics is not None:
            prefix, figures = kwargs.get("metric_key_prefix", "eval"), self._meter.read("evaluation", self._sum)
            if "train_robust_accuracy" in figures:
                output.metrics[f"{prefix}_train_robust_accuracy"] = figures["train_robust_accuracy"]
        return output

    # ---- Logs -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; a row of the training log is told what the objective did to accuracy and loss."""
        if self.is_in_train and "loss" in logs:
            logs = logs | self._meter.read("log", self._sum)
        super().log(logs, start_time)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _log_pruning(self, plan: PruningPlan) -> None:
        """One row of the plan, and one of each step's accuracies on the validation split."""
        with open_reporters(self):
            self.log(plan_figures(plan))
            for step, figures in self.pruning_report.items():
                self.log({f"pruning/{step}/{name}": value for name, value in figures.items() if name != "num_samples"})


def _check_best_metric(args: MRPFConfig, eval_dataset: Any) -> None:
    """Refuse (ValueError) a `metric_for_best_model` that no evaluation gives; `Trainer` finds out after an epoch."""
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    splits = eval_dataset if isinstance(eval_dataset, dict) else ()
    name = next((metric.removeprefix(f"{split}_") for split in splits if metric.startswith(f"{split}_")), metric)
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    if name not in METRICS:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured; choose one of {', '.join(METRICS)}."
        )
    if args.prediction_loss_only and name != "loss":
        raise ValueError(
            f"prediction_loss_only measures the loss alone, and metric_for_best_model={args.metric_for_best_model!r} "
            "picks the best epoch: give metric_for_best_model='loss', or leave prediction_loss_only out."
        )

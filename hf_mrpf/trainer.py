"""`MRPFTrainer`: the Trainer that prunes by robustness sensitivity and fine-tunes adversarially."""

import contextlib
import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast, broadcast_object_list, is_compiled_module
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from .allocation import reads
from .augmentation import augment, mirror_keeps_class
from .batchnorm import average_statistics, recalibrate_batchnorm
from .callbacks import SeedEachRank
from .config import MRPFConfig
from .data import calibration_batches, stratified_subset
from .efficiency import count_macs, count_parameters
from .loader import batches
from .modeling import PrunedForImageClassification, check_class, describe_pruning
from .objectives import Objective, ObjectiveOutput, get_objective
from .optimizing import OptimizingTrainer
from .pixels import own_class_names
from .plan import PruningPlan, removed_fraction
from .processes import Processes
from .progress import shows_progress
from .pruning import plan_pruning, prune
from .repair import RepairReport, repair
from .rollback import rolled_back_on_failure
from .sensitivity import SensitivityResult, check_finite_weights, module_robustness_sensitivity
from .units import pruning_units
from .weight_perturbation import adversarial_weights

LOGGER = logging.getLogger("hf_mrpf")

# What each step of pruning is reported with.
MEASURED = ("accuracy", "robust_accuracy", "adversarial_loss_gap")


class AverageBatchNorm(TrainerCallback):
    """Keeps the running statistics of BatchNorm the same on every process: each would attack another network else."""

    # Not at the end of the step: other callbacks look at the model then.
    def on_optimizer_step(self, args, state, control, **kwargs):
        average_statistics(kwargs["model"], Processes.of(args.world_size > 1))


class MRPFTrainer(OptimizingTrainer):
    r"""
    `Trainer` with `prune()`: Module Robustness Sensitivity, structured removal, repair; then adversarial fine-tuning.

    Pruning hooks are callback events. A [`~transformers.TrainerCallback`] that defines any of
    `on_sensitivity_end(args, state, control, *, sensitivity, **kwargs)`,
    `on_plan_end(args, state, control, *, plan, **kwargs)` (a plan it returns replaces the given one) and
    `on_prune_end(args, state, control, *, plan, **kwargs)` is called; `model` is among the keywords.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`):
            Classifier of pixels [N, 3, H, W] in [0, 1] that returns logits, or an output with `.logits`. Only a
            [`PrunedForImageClassification`] can be loaded again after it was pruned.
        args ([`MRPFConfig`]):
            All settings.
        train_dataset (`datasets.Dataset`):
            One Image (or `pixel_values`) column and one ClassLabel column. Calibration images are drawn from it, and
            a config that calls the classes `LABEL_0` and so on gets its names.
        eval_dataset (`datasets.Dataset`, *optional*):
            The validation split, in the same schema; never the test split. Of both, images are decoded once: a
            `data_collator` of your own, among the other arguments of [`~transformers.Trainer`], gets rows of
            `pixel_values` and `labels`.
        compute_metrics (`Callable`, *optional*):
            Further metrics, of the clean logits, as in [`~transformers.Trainer`].
        teacher (`torch.nn.Module`, *optional*):
            What the objective `rslad` distils from: a robust network with the same classes, such as the dense parent.
            It is moved to the device of the model and never changed.

    Attributes:
        horizontal_flip (`bool`):
            Whether training mirrors images: what `args` say, or else what the class names say (digits are not).

    Raises:
        ValueError: where there is no model or one that was loaded by the code beside its weights, weights are not
            finite, a label lies outside the model's classes, the data set numbers the classes otherwise than the model,
            or `teacher` is `model`.
    """

    args: MRPFConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: MRPFConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        compute_metrics=None,
        teacher: nn.Module | None = None,
        **kwargs,
    ):
        if not isinstance(args, MRPFConfig):
            raise ValueError(f"args is a {type(args).__name__}; MRPFTrainer needs an MRPFConfig.")
        if model is None or kwargs.get("model_init") is not None:
            raise ValueError(
                "MRPFTrainer needs a model, and takes no model_init: that would build the dense model anew at each "
                "train(), and what prune() did would be lost. Give model=model_init()."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func would not be called: the loss is that of an objective, which makes its adversarial "
                "images as well. Give MRPFConfig(objective=...), a name or a function."
            )
        if is_compiled_module(model):
            raise ValueError(
                "model is compiled, and what is pruned and saved is the network inside. Give that "
                "(model._orig_mod), and MRPFConfig(torch_compile=True)."
            )
        check_class(model)
        check_finite_weights(model)
        if isinstance(model, PrunedForImageClassification):
            describe_pruning(model)  # what could not be saved is refused before it is trained
        if teacher is not None and teacher is model:
            raise ValueError("teacher is the model that is trained; give another one, or copy.deepcopy(model).")
        self.teacher = teacher if teacher is None else teacher.to(args.device)
        self._until_backward: contextlib.ExitStack | None = None
        self.objective: Objective = get_objective(args.objective)
        self.plans: list[PruningPlan] = []
        self.pruning_report: dict[str, dict[str, Any]] = {}
        self.repair_report: RepairReport | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        self._settle_flip()
        # Every objective is a mean over its batch: the Trainer divides it by the accumulation steps.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.add_callback(SeedEachRank())
        self.add_callback(AverageBatchNorm())

    def _settle_flip(self) -> None:
        given, images = self.args.horizontal_flip, self.train_dataset
        names = own_class_names(images) if isinstance(images, Dataset) else None
        self.horizontal_flip = mirror_keeps_class(names) if given is None else given
        if given is None and _may_be_digits(images):
            LOGGER.warning("Ten classes without names are mirrored in training; digits need horizontal_flip=False.")

    def _adopt_training_images(self) -> bool:
        replaced = super()._adopt_training_images()
        if replaced:
            self._settle_flip()
        return replaced

    # ---- Pruning ----------------------------------------------------------------------------------------------------

    def prune(self, plan: PruningPlan | None = None) -> PruningPlan:
        """
        Measures sensitivities, plans, removes channels, repairs consumers and recalibrates BatchNorm, in place.

        Sensitivities are kept in `sensitivity.jsonl` of `output_dir` as they are measured, and a pruning of the same
        weights that was interrupted goes on from there. Afterwards the trainer is as new: the optimizer and the
        schedule are made afresh by the next `train()`. What each step did to the accuracy on the validation split is in
        `pruning_report`, and which layers the repair re-fitted or left in `repair_report`. Where anything ends it
        early, Ctrl-C too, model and trainer are as before; once `on_prune_end` is called, it is done.

        Args:
            plan ([`PruningPlan`], *optional*):
                A plan to apply as it is; without it one is made from the settings in `args`.

        Returns:
            [`PruningPlan`]: the plan that was applied, the same on every rank.

        Raises:
            ValueError: where there is no training data to calibrate on, the target cannot be met, the plan is none or
                belongs to another model, or an optimizer was handed to the trainer (it would go on training the old
                weights).
        """
        if not isinstance(plan, PruningPlan | None):
            raise ValueError(
                f"plan is {plan!r}; give a PruningPlan (PruningPlan.load reads a file), or none to make one from args: "
                "the fraction to keep is MRPFConfig(target=...)."
            )
        if self.optimizer is not None and not self._made_own_optimizer:
            raise ValueError(
                "This trainer was given an optimizer, which points at the weights before pruning. "
                "Prune with a trainer without `optimizers`, then make the optimizer from the pruned model."
            )
        self._adopt_training_images()
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"prune() draws its calibration images from train_dataset, a datasets.Dataset; here it is "
                f"{type(self.train_dataset).__name__}."
            )
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel) and not isinstance(model, PrunedForImageClassification):
            LOGGER.warning(
                "%s has no record of what is pruned: from_pretrained will refuse what this trainer saves. To load the "
                "pruned model again, train PrunedForImageClassification.from_backbone(model) in its place.",
                type(model).__name__,
            )
        calibration = calibration_batches(
            self.train_dataset, args.calibration_sets, args.calibration_set_size, seed=args.seed
        )
        calibration = [(images.to(args.device), labels.to(args.device)) for images, labels in calibration]
        if plan is None:
            plan = self._plan(model, calibration)
        replaced = self._fire("on_plan_end", plan=plan)
        if not isinstance(replaced, PruningPlan | None):
            raise ValueError(
                f"on_plan_end returned a {type(replaced).__name__}; return a PruningPlan, or None to keep it."
            )
        if replaced is not None:
            # A latency was measured of what the plan kept then.
            plan = replaced if replaced.kept == plan.kept else dataclasses.replace(replaced, latency=None)
        plan = PruningPlan.from_dict(broadcast_object_list([plan.to_dict()])[0])

        earlier = self.pruning_report, self.repair_report
        self.pruning_report, self.repair_report = {}, None
        try:
            with rolled_back_on_failure(model):
                plan = self._apply(plan, model, calibration)
                self._check_same("after pruning")
        except BaseException:
            self.pruning_report, self.repair_report = earlier
            raise
        self._start_afresh(model)
        self.plans.append(plan)
        self._log_pruning(plan)
        self._fire("on_prune_end", plan=plan)
        return plan

    def _apply(self, plan: PruningPlan, model: nn.Module, calibration: list) -> PruningPlan:
        """Removal, repair and statistics, each measured; the plan with the sizes that came of it."""
        args, training_images = self.args, cast(Dataset, self.train_dataset)
        dense = copy.deepcopy(model) if args.repair else None
        self._report("before")
        before = _size(model, plan)
        prune(model, plan)
        plan = _with_measured_size(plan, before, _size(model, plan))
        self._report("removed")
        if dense is not None:
            distributed = args.world_size > 1
            self.repair_report = repair(
                model, dense, plan, calibration, args.attack, seed=args.seed, distributed=distributed
            )
            self._report("repaired")
        if args.recalibration_samples:
            size = min(args.recalibration_samples, len(training_images))
            batch = min(args.per_device_train_batch_size, size)
            # Whole batches only: each counts the same in the statistics.
            subset = stratified_subset(training_images, size - size % batch, seed=args.seed)
            recalibrate_batchnorm(model, [(images.to(args.device), y) for images, y in batches(subset, batch)])
            self._report("recalibrated")
        if args.world_size > 1:
            for tensor in model.state_dict().values():
                tensor.copy_(broadcast(tensor))
        return plan

    def _plan(self, model: nn.Module, calibration: list) -> PruningPlan:
        args, example = self.args, calibration[0][0][:1]

        def measure() -> SensitivityResult:
            joint = args.combine == "joint"
            units = pruning_units(model, example, heads=args.prune_heads) if joint else []
            groups = {unit.name: unit.members for unit in units} if joint else None
            scores = module_robustness_sensitivity(
                model,
                calibration,
                args.attack,
                method=args.sensitivity_method,
                gamma=args.gamma,
                num_steps=args.sensitivity_steps,
                seed=args.seed,
                groups=groups,
                progress=shows_progress(args),
                distributed=args.world_size > 1,
                journal=Path(str(args.output_dir)) / "sensitivity.jsonl",
            )
            self._fire("on_sensitivity_end", sensitivity=scores)
            return scores

        return plan_pruning(
            model,
            example,
            target=args.target,
            target_metric=args.target_metric,
            allocation=args.allocation,
            scores=measure if "sensitivities" in reads(args.allocation) else None,
            combine=args.combine,
            importance=args.importance,
            batches=calibration,
            attack=args.attack,
            max_ratio=args.max_ratio,
            min_channels=args.min_channels,
            round_to=args.round_to,
            latency_batch_size=args.latency_batch_size,
            ignore=tuple(args.ignore),
            heads=args.prune_heads,
            seed=args.seed,
            distributed=args.world_size > 1,
            progress=shows_progress(args),
        )

    def _fire(self, event: str, **payload: Any) -> Any:
        """Calls `event` on the callbacks that define it; what the last one returns, if anything."""
        result = None
        for callback in self.callback_handler.callbacks:
            if callable(handler := getattr(callback, event, None)):
                answer = handler(self.args, self.state, self.control, model=self.model, **payload)
                result = answer if answer is not None else result
                if "plan" in payload and answer is not None:
                    payload["plan"] = answer
        return result

    def _report(self, step: str) -> None:
        splits = self.eval_dataset
        first = next(iter(splits.values())) if isinstance(splits, dict) else splits
        if first is None or self.args.prediction_loss_only:
            return
        output = self.evaluation_loop(self.get_eval_dataloader(first), description=step, metric_key_prefix=step)
        metrics = output.metrics or {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):  # closes its bar; other callbacks would take it for an epoch
                callback.on_evaluate(self.args, self.state, self.control)
        self.pruning_report[step] = {
            name: metrics[f"{step}_{name}"] for name in MEASURED if f"{step}_{name}" in metrics
        } | {"num_samples": output.num_samples}

    # ---- Training ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective on one batch: images augmented as a tensor, attack on the unwrapped model."""
        images, labels = inputs["pixel_values"], inputs["labels"]
        if model.training:
            images = augment(images, padding=self.args.crop_padding, flip=self.horizontal_flip)
        found = {}
        if self._until_backward is not None and self.args.awp_gamma is not None:
            found = self._perturb_weights(self._until_backward, self.args.awp_gamma, model, images, labels)
        output = self._objective_on(model, images, labels, **found)
        if model.training:
            self._meter.add(output, labels)
        return (output.loss, {"logits": output.logits}) if return_outputs else output.loss

    def _objective_on(self, model: nn.Module, images, labels, **found: Any) -> ObjectiveOutput:
        if self.teacher is not None:
            found["teacher"] = self.teacher
        attacked = self.accelerator.unwrap_model(model)
        # Accelerate's autocast is inside of the model: an attack that is told of it casts each weight once.
        attack = dataclasses.replace(self.args.attack, dtype="bfloat16") if self.args.bf16 else self.args.attack
        output = self.objective(model, images, labels, attack, beta=self.args.beta, attacked=attacked, **found)
        if not isinstance(getattr(output, "loss", None), torch.Tensor):
            raise ValueError(f"The objective returned a {type(output).__name__}; it must return an ObjectiveOutput.")
        if not torch.isfinite(output.loss):
            self._stop(f"The loss is {output.loss.item()} at step {self.state.global_step + 1}")
        return output

    def _perturb_weights(
        self, until: contextlib.ExitStack, gamma: float, model: nn.Module, images, labels
    ) -> dict[str, Any]:
        """Puts the weights where the objective is worse, until the backward pass is done; the images it attacked."""
        bare = self.accelerator.unwrap_model(model)
        outputs: list[ObjectiveOutput] = []

        def loss() -> torch.Tensor:
            outputs.append(self._objective_on(bare, images, labels))
            return outputs[0].loss

        processes = Processes.of(self.args.world_size > 1)
        until.enter_context(adversarial_weights(bare, loss, gamma, processes))
        return {"adversarial_images": outputs[0].adversarial_images}

    def training_step(self, *args, **kwargs):
        """As in `Trainer`; weights that were perturbed for it are back before the optimizer moves them."""
        if self.args.awp_gamma is None:
            return super().training_step(*args, **kwargs)
        try:
            with contextlib.ExitStack() as self._until_backward:
                return super().training_step(*args, **kwargs)
        finally:
            self._until_backward = None


def _may_be_digits(dataset: Any) -> bool:
    """Whether it has the labels 0 to 9, and no names of them."""
    labels = dataset.features["labels"] if isinstance(dataset, Dataset) else None
    return getattr(labels, "num_classes", None) == 10 and own_class_names(dataset) is None


def _size(model: nn.Module, plan: PruningPlan) -> dict[str, int]:
    weight = next(model.parameters())
    example = torch.zeros(plan.example_shape, device=weight.device, dtype=weight.dtype)
    return {"macs": count_macs(model, example), "params": count_parameters(model)}


def _with_measured_size(plan: PruningPlan, before: dict[str, int], after: dict[str, int]) -> PruningPlan:
    """The plan with the sizes that were measured and the ratios of what it keeps, whatever a hook made of it."""
    achieved = {metric: after[metric] / before[metric] for metric in after}
    if plan.latency is not None:
        achieved["latency"] = plan.latency["fraction"]
    ratios = {unit.name: removed_fraction(unit, plan.kept[unit.name]) for unit in plan.units}
    return dataclasses.replace(plan, ratios=ratios, before=before, after=after, achieved=achieved)

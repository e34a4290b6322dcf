"""`MRPFConfig`: every setting of pruning, attack and adversarial fine-tuning, on top of `TrainingArguments`."""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import TrainingArguments

from .attacks import DTYPES, AttackConfig
from .efficiency import has_bfloat16
from .importance import IMPORTANCES
from .latency import TARGET_METRICS
from .measured_allocation import MEASURED, check_measurable, known_allocations
from .objectives import OBJECTIVES
from .optimizer_arguments import SGD_ARGUMENTS, adam_arguments, check_sgd_arguments
from .sensitivity import COMBINERS, METHODS

LOGGER = logging.getLogger("hf_mrpf")
ADAM_LEARNING_RATE = 1e-3
SGD_LEARNING_RATE = 0.05


def _known(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class MRPFConfig(TrainingArguments):
    r"""
    Settings of [`MRPFTrainer`]: what to prune, which attack to train against, and everything `TrainingArguments` holds.

    Pixels are in [0, 1] everywhere, so `eps` and `step_size` are in those units (`8/255`, not `8`).

    Args:
        objective (`str` or `Callable`, *optional*, defaults to `"trades"`):
            What fine-tuning minimises: a key of `OBJECTIVES` or a function with the same signature.
        beta (`float`, *optional*, defaults to `6.0`):
            Weight of the robust term of TRADES (arXiv 1901.08573, eq. 5) and MART (called lambda there).
        awp_gamma (`float`, *optional*):
            Adversarial weight perturbation (arXiv 2004.05884): each step's gradient is taken where the weights are
            moved against the objective by this fraction of their norm, in (0, 1); the paper's code has 0.01 with
            `pgd` and 0.005 with `trades`. Costs one forward and backward pass more. With gradient accumulation each
            of the smaller batches is perturbed on its own. None for no perturbation.
        ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the weights, in (0, 1): after every optimizer step the average
            is `ema_decay * average + (1 - ema_decay) * weights`. It is what is evaluated, saved and left in the model
            at the end. None for no average.
        norm (`str`, *optional*, defaults to `"linf"`):
            Norm of the attack, `"linf"` or `"l2"`.
        eps (`float`, *optional*, defaults to `8/255`):
            Radius of the attack, in pixels in [0, 1].
        step_size (`float`, *optional*):
            Step of the attack; `2.5 * eps / num_steps` where it is not given (2/255 at the defaults).
        num_steps (`int`, *optional*, defaults to `10`):
            Steps of the training attack.
        random_start (`bool`, *optional*, defaults to `True`):
            Whether attacks start at a random point of the ball. TRADES has its own small Gaussian start.
        attack_dtype (`str`, *optional*, defaults to `"float32"`):
            What the model computes in during the training attack and the measurement of sensitivities: `"float32"` or
            `"bfloat16"`. With `bf16` training steps and their attacks are in bfloat16 whatever is said here. Evaluation
            is in float32, and so is pruning but for these measurements.
        eval_num_steps (`int`, *optional*, defaults to `10`):
            Steps of the PGD attack that `evaluate()` runs to measure `eval_robust_accuracy`.
        target (`float`, *optional*, defaults to `0.5`):
            Fraction of `target_metric` that pruning **keeps**, in (0, 1).
        target_metric (`str`, *optional*, defaults to `"macs"`):
            `"macs"`, `"params"` or `"latency"`, which is measured on this machine (see [`plan_pruning`]).
        allocation (`str`, *optional*, defaults to `"mrs"`):
            How the pruning ratio is shared out between units: a key of `ALLOCATIONS` or, as `netadapt` and `damage`, of
            `MEASURED`, whose search prunes and attacks copies by the dozen. Which pays hangs on the network and the
            budget: in benchmarks/README.md `mrs` loses to `uniform` in six cells of seven.
        combine (`str`, *optional*, defaults to `"sum"`):
            How the sensitivities of a unit's members make the unit's score: `sum`, `max`, `mean` or `joint`.
        importance (`str`, *optional*, defaults to `"magnitude"`):
            Which channels of a unit go first: a key of `IMPORTANCES`.
        max_ratio (`float`, *optional*, defaults to `0.85`):
            Largest fraction of channels removed from any unit.
        min_channels (`int`, *optional*, defaults to `4`):
            Fewest channels left in any unit.
        round_to (`int` or `"auto"`, *optional*, defaults to `1`):
            Kept widths are multiples of this; `"auto"` measures which of several is fastest on this machine.
        latency_batch_size (`int`, *optional*, defaults to `1`):
            Images in a pass that is timed for the two.
        ignore (`list[str]`, *optional*):
            Names of modules or units that are never pruned.
        prune_heads (`bool`, *optional*, defaults to `False`):
            Whether attention loses whole heads, rather than the same number of channels of every head.
        sensitivity_method (`str`, *optional*, defaults to `"ascent"`):
            How Module Robustness Sensitivity is measured: `ascent`, `exact` or `first_order`.
        gamma (`float`, *optional*, defaults to `0.1`):
            Radius of the weight perturbation, relative to the norm of the module's weights.
        sensitivity_steps (`int`, *optional*):
            Ascent steps; the method's own number where it is not given (3 for `ascent`, 10 for `exact`).
        calibration_sets (`int`, *optional*, defaults to `3`):
            Disjoint sets of training images the sensitivities are averaged over.
        calibration_set_size (`int`, *optional*, defaults to `128`):
            Images in each of them.
        repair (`bool`, *optional*, defaults to `True`):
            Whether the layers that read pruned channels are re-fitted in closed form after pruning.
        recalibration_samples (`int`, *optional*, defaults to `1024`):
            Clean training images BatchNorm statistics are measured on again after pruning; 0 leaves them.
        crop_padding (`int`, *optional*):
            Zero padding of the random crop in training; an eighth of the image where it is not given, 0 for no crops.
        horizontal_flip (`bool`, *optional*):
            Whether training images are flipped at random. By default they are, except where the class names are the
            ten digits.

    The defaults of these `TrainingArguments` differ: `optim` (`"sgd"` with Nesterov momentum 0.9; `"adam"` is
    `torch.optim.Adam`, whose `optim_args` are `beta1`, `beta2`, `eps` and `amsgrad`), `learning_rate` (0.05 for SGD,
    1e-3 for the Adam family), `weight_decay` (5e-4), cosine schedule with 5 % warm-up, `per_device_train_batch_size`
    and `per_device_eval_batch_size` (128), `max_grad_norm` (0), `remove_unused_columns` (`False`), `label_names`
    (`["labels"]`), `metric_for_best_model` (`"robust_accuracy"`).

    Raises:
        ValueError: where a value is out of its range or a name is not known, or `awp_gamma` or `ema_decay` comes with
            FSDP or DeepSpeed, which keep a part of the weights on each process, or `awp_gamma` with `fp16`; also for
            `label_smoothing_factor`, `remove_unused_columns`, `batch_eval_metrics`, `eval_do_concat_batches=False`,
            `bf16_full_eval` and `fp16_full_eval`, which have no place here.
    """

    objective: str = field(default="trades", metadata={"help": f"What to minimise: {', '.join(OBJECTIVES)}."})
    beta: float = field(default=6.0, metadata={"help": "Weight of the robust term of TRADES and MART."})
    awp_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Radius of adversarial weight perturbation, relative to each weight's norm, such as 0.005 with "
            "trades; none if not given."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the weights, such as 0.999, which is then evaluated and saved; none "
            "if not given."
        },
    )

    norm: str = field(default="linf", metadata={"help": "Norm of the attack: linf or l2."})
    eps: float = field(
        default=8 / 255, metadata={"help": "Radius of the attack in pixels in [0, 1]; recipes read 8/255."}
    )
    step_size: float | None = field(
        default=None, metadata={"help": "Step of the attack; 2.5 * eps / num_steps if not given. recipes read 2/255."}
    )
    num_steps: int = field(default=10, metadata={"help": "Steps of the training attack."})
    random_start: bool = field(default=True, metadata={"help": "Start attacks at a random point of the ball."})
    attack_dtype: str = field(
        default="float32", metadata={"help": f"What training attacks and MRS compute in: {', '.join(DTYPES)}."}
    )
    eval_num_steps: int = field(default=10, metadata={"help": "Steps of PGD in the evaluations during training."})

    target: float = field(default=0.5, metadata={"help": "Fraction of the target metric that is KEPT, in (0, 1)."})
    target_metric: str = field(
        default="macs", metadata={"help": f"What the target counts: {', '.join(TARGET_METRICS)}."}
    )
    allocation: str = field(default="mrs", metadata={"help": f"Ratio per unit by: {', '.join(known_allocations())}."})
    combine: str = field(default="sum", metadata={"help": f"Members' scores to unit's: {', '.join(COMBINERS)}, joint."})
    importance: str = field(default="magnitude", metadata={"help": f"Channels ranked by: {', '.join(IMPORTANCES)}."})
    max_ratio: float = field(default=0.85, metadata={"help": "Largest fraction removed from any unit."})
    min_channels: int = field(default=4, metadata={"help": "Fewest channels left in any unit."})
    round_to: int | str = field(
        default=1, metadata={"help": "Kept widths are multiples of this, or auto: what is fastest on this machine."}
    )
    latency_batch_size: int = field(
        default=1, metadata={"help": "Images in a pass timed for --target_metric latency and --round_to auto."}
    )
    ignore: list[str] = field(default_factory=list, metadata={"help": "Modules or units that are never pruned."})
    prune_heads: bool = field(
        default=False, metadata={"help": "Attention loses whole heads, not channels of every head."}
    )
    sensitivity_method: str = field(default="ascent", metadata={"help": f"MRS by: {', '.join(METHODS)}."})
    gamma: float = field(default=0.1, metadata={"help": "Weight perturbation, relative to the module's norm."})
    sensitivity_steps: int | None = field(
        default=None, metadata={"help": "Ascent steps of MRS; by method if not given."}
    )
    calibration_sets: int = field(default=3, metadata={"help": "Disjoint calibration sets the MRS is averaged over."})
    calibration_set_size: int = field(default=128, metadata={"help": "Training images in each calibration set."})
    repair: bool = field(default=True, metadata={"help": "Re-fit the consumers of pruned channels in closed form."})
    recalibration_samples: int = field(
        default=1024, metadata={"help": "Clean training images for BatchNorm recalibration after pruning; 0: none."}
    )

    crop_padding: int | None = field(
        default=None, metadata={"help": "Padding of random crops; an eighth of the image if not given, 0 for none."}
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={"help": "Flip training images at random, or not (false); if not given, all but digits are."},
    )

    optim: str = field(default="sgd", metadata={"help": "Optimizer: sgd, adam, or any name transformers knows."})
    optim_args: str | None = field(
        default=None, metadata={"help": f"Arguments of the optimizer; {SGD_ARGUMENTS} for sgd if not given."}
    )
    learning_rate: float = field(
        default=None,  # type: ignore[assignment]  # known once the optimizer is
        metadata={"help": f"Peak learning rate; {SGD_LEARNING_RATE} for sgd, {ADAM_LEARNING_RATE} else, if not given."},
    )
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule of transformers."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: steps, or a fraction of all if below 1."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Training batch size on each device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Evaluation batch size on each device."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Left to the collator."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Label columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "As in DistributedDataParallel."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "As in DistributedDataParallel."})
    log_level_replica: str = field(default="error", metadata={"help": "As --log_level, on processes above 0."})
    metric_for_best_model: str | None = field(
        default="robust_accuracy", metadata={"help": "Metric of the validation split that picks the best epoch."}
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if isinstance(value := getattr(self, item.name), np.generic):
                setattr(self, item.name, value.item())  # JSON knows no numbers of numpy's
        self._check_values()
        self._check_combinations()
        if self.disable_tqdm is None and self.log_level in ("error", "critical"):
            self.disable_tqdm = True
        wanted = str(getattr(self.optim, "value", self.optim))
        if self.optim_args is None and wanted == "sgd":
            self.optim_args = SGD_ARGUMENTS
        elif self.optim_args == SGD_ARGUMENTS and wanted != "sgd":
            self.optim_args = None  # those of a configuration for SGD that this one is a changed copy of
        if self.learning_rate is None:
            self.learning_rate = SGD_LEARNING_RATE if wanted == "sgd" else ADAM_LEARNING_RATE
        if wanted == "sgd":
            check_sgd_arguments(self.optim_args)
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("adversarial_loss_gap"):
            self.greater_is_better = False  # transformers knows this of what ends in loss
        # transformers knows AdamW only; plain Adam is what the pruning literature compares SGD with.
        self.optim = "adamw_torch" if wanted == "adam" else wanted
        super().__post_init__()
        if wanted == "adam":
            self.optim = "adam"
            adam_arguments(self)
        if self.fp16:
            LOGGER.warning("--fp16: gradients of training attacks underflow in part; give --bf16 if the device has it.")
        if self.n_gpu > 1:
            LOGGER.warning(
                "%d GPUs in one process: attacks, which are most of the work, run on the first of them alone, on "
                "batches %d times as large. Start one process for each (accelerate launch --multi_gpu), or show this "
                "one a single GPU (CUDA_VISIBLE_DEVICES=0).",
                *(self.n_gpu, self.n_gpu),
            )
        if self.device.type in ("cpu", "mps"):
            self.dataloader_pin_memory = False  # torch warns at every loader otherwise
        in_half = self.device.type == "cpu" and self.attack_dtype == "bfloat16"
        if in_half and not has_bfloat16():
            LOGGER.warning(
                "--attack_dtype bfloat16: this processor has no instructions for it and will be slower than in "
                "float32; leave the option out."
            )

    def _check_values(self) -> None:
        if not callable(self.objective):
            _known("objective", self.objective, OBJECTIVES)
        _known("allocation", self.allocation, known_allocations())
        check_measurable(self.allocation, self.target_metric, self.round_to)
        _known("importance", self.importance, IMPORTANCES)
        _known("combine", self.combine, (*COMBINERS, "joint"))
        _known("sensitivity_method", self.sensitivity_method, METHODS)
        _known("target_metric", self.target_metric, TARGET_METRICS)
        if not (_is_number(self.target) and 0 < self.target < 1):
            raise ValueError(
                f"target={self.target} is not a fraction kept in (0, 1): 0.5 keeps half of the {self.target_metric}."
            )
        if not (_is_number(self.max_ratio) and 0 < self.max_ratio < 1):
            raise ValueError(f"max_ratio={self.max_ratio} must be in (0, 1): the largest fraction a unit may lose.")
        for name, least in {
            "min_channels": 1,
            "round_to": 1,
            "latency_batch_size": 1,
            "calibration_sets": 1,
            "calibration_set_size": 1,
            "eval_num_steps": 1,
            "recalibration_samples": 0,
            "crop_padding": 0,
            "seed": 0,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
        }.items():
            value = getattr(self, name)
            if (name, value) in (("round_to", "auto"), ("crop_padding", None)):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                other = ", or auto" if name == "round_to" else ""
                raise ValueError(f"{name}={value} must be a whole number, at least {least}{other}.")
        if self.allocation in MEASURED and not (self.repair and self.recalibration_samples):
            raise ValueError(
                f"allocation {self.allocation!r} searches among copies that are repaired and recalibrated: leave "
                "repair on and recalibration_samples above 0, or choose another allocation."
            )
        if self.allocation == "damage" and self.calibration_sets < 2:
            raise ValueError(
                f"calibration_sets={self.calibration_sets}, and allocation 'damage' measures on some sets and decides "
                "on another: give at least 2."
            )
        if self.sensitivity_steps is not None and (self.sensitivity_steps < 1 or METHODS[self.sensitivity_method] == 0):
            raise ValueError(
                f"sensitivity_steps={self.sensitivity_steps} must be at least 1, and goes with ascent or exact only."
            )
        if not (_is_number(self.gamma) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma={self.gamma} must be in [0, 1]: a fraction of the norm of a module's weights.")
        for name in ("beta", "num_train_epochs", "weight_decay", "learning_rate"):
            value = getattr(self, name)
            if value is None and name == "learning_rate":
                continue  # that of the optimizer
            if not (_is_number(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number, at least 0.")
        if isinstance(self.ignore, str):
            raise ValueError(f"ignore={self.ignore!r} is one name; give a list of names, such as [{self.ignore!r}].")
        for name in ("awp_gamma", "ema_decay"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (_is_number(value) and 0 < value < 1):
                raise ValueError(f"{name}={value} must be a number in (0, 1), or left out.")
            if self.fsdp or self.deepspeed:
                raise ValueError(
                    f"{name}={value} needs all weights on every process, and FSDP and DeepSpeed share them out; leave "
                    f"{name} out, or train with DistributedDataParallel."
                )
        if self.awp_gamma is not None and self.fp16:
            raise ValueError(
                f"awp_gamma={self.awp_gamma} takes a gradient that fp16 would let underflow; give bf16 instead of fp16."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} would change nothing: each objective has a loss "
                "of its own. Leave it at 0, or give an objective that smooths the labels."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would take away columns that are no arguments of the model's forward, and "
                "images are made pixels after that. Leave it out; other columns than images and labels are not read."
            )
        if self.batch_eval_metrics or not self.eval_do_concat_batches:
            name, usual = ("batch_eval_metrics", False) if self.batch_eval_metrics else ("eval_do_concat_batches", True)
            raise ValueError(
                f"{name}={not usual} would hand over a batch at a time, and accuracy under attack is measured over all "
                f"images at once: leave {name} at {usual}."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} would turn the weights themselves into half precision, for good; evaluation and pruning "
                    f"are in float32 here. Leave {name} out; bf16 speeds up the training."
                )
        if self.norm == "l2" and self.eps == AttackConfig.eps:
            raise ValueError("eps=8/255, the usual radius in linf, is hardly an attack in l2: give eps, such as 0.5.")
        _ = self.attack

    def _check_combinations(self) -> None:
        """Those of transformers' own options, which it checks only after five seconds of imports."""
        check = getattr(TrainingArguments, "_validate_args", None)  # not in every version; it then checks them later
        if check is not None:
            trial = copy.copy(self)
            trial.eval_steps = trial.eval_steps or trial.logging_steps
            check(trial)

    @property
    def attack(self) -> AttackConfig:
        """The training attack."""
        return AttackConfig(self.norm, self.eps, self.step_size, self.num_steps, self.random_start, self.attack_dtype)

    @property
    def eval_attack(self) -> AttackConfig:
        """The attack of `evaluate()`: PGD of `eval_num_steps` steps, its step size 2.5 * eps / steps unless given."""
        return AttackConfig(self.norm, self.eps, self.step_size, self.eval_num_steps, self.random_start)

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`; an objective that is a function is written as its qualified name."""
        settings = super().to_dict()
        objective: str | Callable = self.objective
        if callable(objective):
            settings["objective"] = (
                f"{objective.__module__}.{getattr(objective, '__qualname__', type(objective).__qualname__)}"
            )
        return settings

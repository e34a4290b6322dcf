"""What the recipes share on their command lines: options in groups, and how their values are read."""

import dataclasses
import json
import math
from argparse import ArgumentTypeError
from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from .config import MRPFConfig

RECOVERY_EPOCHS = 5.0
REPORT_SPLITS = ("validation", "test")
FRACTIONS = ("eps", "step_size")
ATTACK_OPTIONS = (
    "objective",
    "beta",
    "awp_gamma",
    "norm",
    "eps",
    "step_size",
    "num_steps",
    "random_start",
    "eval_num_steps",
)
TRAINING_OPTIONS = (
    "output_dir",
    "seed",
    "use_cpu",
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "ema_decay",
    "bf16",
    "resume_from_checkpoint",
)
# Settings that may change between two calls on one folder: they change what is shown or sent, not what is computed.
NOT_PART_OF_A_RUN = (
    "card_note",
    "output_dir",
    "overwrite_output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "resume_from_checkpoint",
    "cache_dir",
    "local_rank",
    "dataloader_num_workers",
    "push_to_hub",
    "expected_world_size",
)


@dataclass
class DataArguments:
    """Which images."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a local folder in the same schema; handwritten digits if not given."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the data set on the Hub."})
    train_split: str = field(
        default="train", metadata={"help": "Split to train on, or several, such as SVHN's train+extra."}
    )
    test_split: str | None = field(
        default=None, metadata={"help": "Split to measure on at the end; found if not given: test, or validation."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Image column; found if not given."})
    label_column_name: str | None = field(default=None, metadata={"help": "Label column; found if not given."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Stratified subset of the training split."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Stratified subset of validation and test."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where decoded images are kept."})


@dataclass
class ModelArguments:
    """Which dense model to start from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a model of this library, a timm name (timm/resnet18), or a transformers id; "
            "a narrow ResNet if not given."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    backbone_kwargs: str | None = field(
        default=None, metadata={"help": "JSON object of further arguments of the backbone's constructor."}
    )
    pretrained: bool = field(default=False, metadata={"help": "Start a timm architecture from its Hub weights."})
    small_images: bool = field(default=False, metadata={"help": "Stem for images of 16 to 64 pixels."})
    image_size: int | None = field(
        default=None, metadata={"help": "Resize images to this; their own size if not given."}
    )
    control_epochs: float = field(
        default=0.0, metadata={"help": "Epochs of ordinary training of a control of the same shape; 0 for no control."}
    )
    base_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs of adversarial training of the dense model; 0 for one of ours with these classes, else 20."
        },
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None:
            check_place(self.model_name_or_path)
        if self.backbone_kwargs is not None:
            backbone_options(self.backbone_kwargs)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size {self.image_size} must be a number of pixels, at least 1.")
        for name in ("control_epochs", "base_epochs"):
            _check_epochs(name, getattr(self, name))


@dataclass
class RoundArguments:
    """In how many steps the recipe prunes. A trainer prunes once for each call of `prune()`."""

    pruning_rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds of pruning; MRS is measured again in each, and max_ratio holds for each. 1 is one-shot."
        },
    )
    recovery_epochs: float | None = field(
        default=None,
        metadata={"help": f"Epochs of adversarial training between rounds; {RECOVERY_EPOCHS:g} if not given."},
    )

    def __post_init__(self) -> None:
        if self.pruning_rounds < 1:
            raise ValueError(f"--pruning_rounds {self.pruning_rounds} must be at least 1, which is one-shot pruning.")
        if self.pruning_rounds == 1 and self.recovery_epochs is not None:
            raise ValueError(
                f"--recovery_epochs {self.recovery_epochs:g} is about the time between rounds, and there is one round: "
                "give --pruning_rounds 2 or more, or --num_train_epochs for the fine-tuning."
            )
        if self.pruning_rounds > 1 and self.recovery_epochs is None:
            self.recovery_epochs = RECOVERY_EPOCHS
        _check_epochs("recovery_epochs", self.recovery_epochs)


@dataclass
class ControlArguments:
    """What makes of a training the control of a pruned model: its shape, its compute, its images."""

    fresh_weights: bool = field(
        default=False,
        metadata={"help": "Keep only the shape of the model that is named, pruned or not, and train it from scratch."},
    )
    dense_epochs: float = field(
        default=0.0,
        metadata={
            "help": "With --fresh_weights: train longer by what so many epochs of the dense network cost in "
            "multiply-accumulates, so that the total is that of training dense, pruning and fine-tuning."
        },
    )
    report_split: str = field(
        default="validation",
        metadata={"help": f"Split of the final figures: {' or '.join(REPORT_SPLITS)}, for a control of finished runs."},
    )

    def __post_init__(self) -> None:
        if self.report_split not in REPORT_SPLITS:
            raise ValueError(f"--report_split {self.report_split} is not known; give {' or '.join(REPORT_SPLITS)}.")
        _check_epochs("dense_epochs", self.dense_epochs)
        if self.dense_epochs and not self.fresh_weights:
            raise ValueError(
                f"--dense_epochs {self.dense_epochs:g} is the compute of a model that --fresh_weights trains again; "
                "give both, or --num_train_epochs alone."
            )


@dataclass
class RunArguments:
    """What happens to the output folder, and how many processes write to it."""

    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start again in a folder that holds a run."})
    card_note: str | None = field(
        default=None, metadata={"help": "A sentence for the card, such as what is special about a copy of the data."}
    )
    expected_world_size: int | None = field(
        default=None, metadata={"help": "Stop where the launcher started another number of processes."}
    )


def _check_epochs(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"--{name} {value} must be a number of epochs, at least 0.")


def number(text: str) -> float:
    """Reads `0.03` and `8/255` alike."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError) as error:
        raise ArgumentTypeError(f"{text!r} is no number; write 0.031 or 8/255") from error


def multiple(text: str) -> int | str:
    """Reads a whole number, or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no whole number; write 8, or auto") from error


def json_object(text: str) -> str:
    """Checks what `TrainingArguments` reads later, and names no option where it fails."""
    if _object_of(text) is None:
        raise ArgumentTypeError(f"{text!r} is no JSON object; write for instance '{{\"num_cycles\": 2}}'")
    return text.strip()


def _object_of(text: str) -> dict[str, Any] | None:
    """The object that is written as JSON; None where it is anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def json_object_or_file(text: str) -> str:
    """As [`json_object`]; what begins with no brace is the name of a file."""
    return json_object(text) if text.lstrip().startswith("{") else text


class GroupedParser(HfArgumentParser):
    """
    `HfArgumentParser` whose help shows the options of this library first, by subject.

    Subjects or single options named in `without` are no options: their fields keep their defaults.
    """

    def __init__(self, dataclass_types, *, without: Collection[str] = (), **kwargs):
        self._option_groups: dict[str, Any] = {}
        self._without = without
        super().__init__(dataclass_types, **kwargs)

    def _add_dataclass_arguments(self, dtype):
        titles = {DataArguments: "data", ModelArguments: "model", RoundArguments: "pruning", RunArguments: "training"}
        titles[ControlArguments] = "training"
        if not self._option_groups:
            for title in ("data", "model", "pruning", "attack", "training", "Hub", "transformers"):
                if title not in self._without:
                    self._option_groups[title] = self.add_argument_group(title)
        self._title = titles.get(dtype)
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser, field):  # type: ignore[override]
        title = self._title or self._subject(field.name)
        if title in self._without or field.name in self._without:
            # `HfArgumentParser` looks for every field among what was parsed.
            missing = field.default is dataclasses.MISSING
            self.set_defaults(**{field.name: field.default_factory() if missing else field.default})
            return
        if field.name in FRACTIONS:
            field.type = number
        if field.name == "round_to":
            field.type = multiple
        if field.name in TrainingArguments._VALID_DICT_FIELDS:
            field.type = json_object if field.name.endswith("_kwargs") else json_object_or_file
        HfArgumentParser._parse_dataclass_field(self._option_groups[title], field)

    @staticmethod
    def _subject(name: str) -> str:
        own = set(MRPFConfig.__annotations__)
        inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
        if name in ATTACK_OPTIONS:
            return "attack"
        if name.startswith(("hub_", "push_to_hub")):
            return "Hub"
        if name in TRAINING_OPTIONS or (name in own and name in (*inherited, "crop_padding", "horizontal_flip")):
            return "training"
        return "pruning" if name in own else "transformers"


def run_settings(*arguments: Any) -> dict[str, Any]:
    """Every setting that a run's result depends on, as JSON values."""
    settings: dict[str, Any] = {}
    for group in arguments:
        settings |= group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
    return {name: value for name, value in settings.items() if changes_result(name)}


def changes_result(option: str) -> bool:
    """Whether an option of a recipe changes what is computed, and not only what is shown or sent of it."""
    return option not in NOT_PART_OF_A_RUN and not option.startswith(("hub_", "log", "trackio"))


def check_place(name: str, option: str = "--model_name_or_path") -> None:
    """Refuse (ValueError) the name of a model, given as `option`, that is a path to none."""
    if name.startswith("timm/"):
        return
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{option} {name} is a folder without config.json, so it holds no model.")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"{option} {name}: there is no such folder.")


def backbone_options(text: str) -> dict[str, Any]:
    """What `--backbone_kwargs` says. A ValueError where that is no JSON object."""
    value = _object_of(text)
    if value is None:
        raise ValueError(
            f"--backbone_kwargs {text!r} is not a JSON object; write for instance '{{\"drop_rate\": 0.1}}'."
        )
    return value

"""What the recipes share: command-line options in groups, the data and the model that they name."""

import dataclasses
import json
import math
from argparse import ArgumentTypeError
from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser, TrainingArguments

from .class_names import check_class_names, config_class_names, model_class_names
from .config import MRPFConfig
from .run_folder import STAGES

if TYPE_CHECKING:  # what is wrong with an argument is said before these are loaded
    from .data import ImageData
    from .modeling import PrunedConfig, PrunedForImageClassification

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


# Of what `from_backbone` takes, what the options settle.
SETTLED = {"num_labels", "id2label", "image_size", "small_images", "pretrained", "revision"}


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
            _json_object(self.backbone_kwargs)
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
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"{text!r} is no JSON object; write for instance '{{\"num_cycles\": 2}}'")
    return text.strip()


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


def load_data(arguments: DataArguments, image_size: int | None) -> "ImageData":
    """The images the options name, cut the same for every seed of a run."""
    from .data import load_image_data

    return load_image_data(
        arguments.dataset_name,
        arguments.dataset_config_name,
        train_split=arguments.train_split,
        test_split=arguments.test_split,
        image_column_name=arguments.image_column_name,
        label_column_name=arguments.label_column_name,
        image_size=image_size,
        max_train_samples=arguments.max_train_samples,
        max_eval_samples=arguments.max_eval_samples,
        cache_dir=arguments.cache_dir,
        revision=arguments.dataset_revision,
    )


def own_config(name: str | None, revision: str | None = None) -> "PrunedConfig | None":
    """The config of `name` where it is a folder or Hub id of a model that this library saved, else None."""
    if name is None or name.startswith("timm/") or ("/" not in name and not Path(name).is_dir()):
        return None
    check_place(name)
    from .modeling import PrunedConfig

    # Not AutoConfig: of a model that is not ours it may ask whether to run code.
    values, _ = PrunedConfig.get_config_dict(name, revision=revision)
    if values.get("model_type") != PrunedConfig.model_type:
        return None
    return PrunedConfig.from_dict(values)


def starting_config(arguments: ModelArguments) -> "PrunedConfig | None":
    """
    As [`own_config`], of the model that the options name.

    Raises:
        ValueError: where that is a model of this library and an option asks for another network than the saved one.
    """
    config = own_config(arguments.model_name_or_path, arguments.model_revision)
    if config is None:
        return None
    asked = {
        f"--backbone_kwargs '{arguments.backbone_kwargs}'": arguments.backbone_kwargs is not None,
        "--pretrained": arguments.pretrained,
        "--small_images": arguments.small_images and not config.small_images,
        f"--image_size {arguments.image_size}": arguments.image_size not in (None, config.image_size),
    }
    if others := [option for option, differs in asked.items() if differs]:
        raise ValueError(
            f"{', '.join(others)}: {arguments.model_name_or_path} is a model of this library, which stays the network "
            f"that was saved, for images of {config.image_size} pixels. Leave that out, or start from an architecture, "
            "such as timm/resnet18."
        )
    return config


def starts_fresh(arguments: ModelArguments) -> bool:
    """Whether the named model is a bare architecture, with random weights."""
    name = str(arguments.model_name_or_path).removeprefix("timm/")
    return not (arguments.pretrained or "/" in name or "." in name or Path(name).is_dir())


def base_model(arguments: ModelArguments) -> str | None:
    """The Hub id of the weights that the options name; None for fresh weights and those of a folder."""
    name = arguments.model_name_or_path
    if name is None or Path(name).is_dir() or starts_fresh(arguments):
        return None
    import timm

    architecture = name.removeprefix("timm/")
    if not timm.is_model(architecture.partition(".")[0]):
        return name
    weights = timm.get_pretrained_cfg(architecture)
    return str(weights.hf_hub_id).partition("@")[0] if weights and weights.hf_hub_id else None


def build_model(arguments: ModelArguments, data: "ImageData") -> "PrunedForImageClassification":
    """The dense (or already pruned) model that the options name, with the classes of the data set."""
    from .modeling import PrunedForImageClassification, with_new_head

    name = arguments.model_name_or_path
    if name is None:
        raise ValueError(
            "--model_name_or_path is missing; give a timm name such as timm/resnet18, or a model's folder."
        )
    if config := starting_config(arguments):
        model = PrunedForImageClassification.from_pretrained(name, revision=arguments.model_revision)
        if config.num_labels != len(data.class_names):
            return with_new_head(model, dict(enumerate(data.class_names)))
        advice = f"give the data set that {name} was trained on, or a backbone to train from scratch."
        check_class_names(model_class_names(model), data.class_names, advice)
        return model
    kwargs = _json_object(arguments.backbone_kwargs) if arguments.backbone_kwargs else {}
    if settled := sorted(SETTLED & kwargs.keys()):
        raise ValueError(
            f"--backbone_kwargs holds {', '.join(settled)}: classes are those of the data set, and image_size, "
            "small_images, pretrained and model_revision are options of their own."
        )
    # Trained weights expect the normalisation they were trained with, fresh ones the data's own.
    own = data if starts_fresh(arguments) else None
    image_mean = kwargs.pop("image_mean", own and own.image_mean)
    image_std = kwargs.pop("image_std", own and own.image_std)
    return PrunedForImageClassification.from_backbone(
        name,
        id2label=dict(enumerate(data.class_names)),
        image_size=data.image_size,
        small_images=arguments.small_images,
        pretrained=arguments.pretrained,
        image_mean=image_mean,
        image_std=image_std,
        revision=arguments.model_revision,
        **kwargs,
    )


def check_default_data(name: str | None, config: "PrunedConfig | None", arguments: DataArguments) -> None:
    """Refuse (ValueError) the embedded digits, which nobody named, for a trained model `name` of other things."""
    names = config_class_names(config)
    if arguments.dataset_name is None and names and names != [str(number) for number in range(len(names))]:
        raise ValueError(
            f"{name} tells {', '.join(names[:3])} and so on apart, and without --dataset_name the data are handwritten "
            "digits: give the data set that it was trained on."
        )


def check_place(name: str, option: str = "--model_name_or_path") -> None:
    """Refuse (ValueError) the name of a model, given as `option`, that is a path to none."""
    if name.startswith("timm/"):
        return
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{option} {name} is a folder without config.json, so it holds no model.")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"{option} {name}: there is no such folder.")


def check_outlives_overwriting(name: str | None, output_dir: str, overwrite: bool) -> None:
    """Refuse (ValueError) to begin a folder anew that holds the model which the run is to start from."""
    if not (overwrite and name and Path(name).is_dir()):
        return
    place, folder = Path(name).resolve(), Path(output_dir).resolve()
    if place == folder or folder / STAGES in place.parents:
        raise ValueError(
            f"--overwrite_output_dir would remove {name}, which this run starts from: give another --output_dir, or "
            "copy the model out of there."
        )


def check_comparable(model: "PrunedForImageClassification", dense: "PrunedForImageClassification", parent: str) -> None:
    """
    Refuse a dense model that does another job than `model`: figures of both side by side would mean nothing.

    Raises:
        ValueError: with image sizes and numbers of classes of both.
    """
    ours, theirs = ((other.config.image_size, other.config.num_labels) for other in (model, dense))
    if ours != theirs:
        raise ValueError(
            f"{parent} takes images of {theirs[0]} pixels and has {theirs[1]} classes, the model {ours[0]} pixels and "
            f"{ours[1]} classes: give the dense model that it was pruned from."
        )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"--backbone_kwargs {text!r} is not a JSON object; write for instance '{{\"drop_rate\": 0.1}}'."
        )
    return value

"""What a recipe takes on its command line, and the defaults that follow from the data, the model and the optimizer."""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .cli import ControlArguments, DataArguments, GroupedParser, ModelArguments, RoundArguments, RunArguments
from .config import MRPFConfig

# A ResNet of one block a stage; its stem has 2 * stem_width channels. About 0.3 M parameters.
NARROW_RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8}
# The embedded digits: eps at which a normally trained net fails, and settings for a few minutes on two cores.
DIGITS = {"eps": 0.2, "num_steps": 5, "per_device_train_batch_size": 32, "crop_padding": 1}
DIGITS_MODEL = {
    "backbone_kwargs": json.dumps(NARROW_RESNET | {"channels": [16, 32, 32, 32]}),  # 59 k parameters
    "control_epochs": 8.0,
    "base_epochs": 28.0,
    "num_train_epochs": 20.0,
}
EVERY_RUN = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "report_to": "none",
    "num_train_epochs": 20.0,
}


class Recipe(NamedTuple):
    """
    What a recipe takes.

    Attributes:
        groups (`tuple`):
            Dataclasses of options.
        without (`tuple[str, ...]`):
            Subjects and options that the recipe has not, as in [`GroupedParser`]. One without `base_epochs` trains the
            dense model alone: `num_train_epochs` is then about that.
        suffix (`str`):
            What the name of the default output folder ends in.
    """

    groups: tuple
    without: tuple[str, ...] = ()
    suffix: str = ""


@cache
def option_names(recipe: str) -> frozenset[str]:
    """Names of all options of a recipe, without their dashes."""
    groups, without, _ = RECIPES[recipe]
    actions = GroupedParser(groups, without=without)._actions
    return frozenset(action.dest for action in actions if action.option_strings and action.dest != "help")


def parse_recipe(recipe: str, arguments: Sequence[str] | None = None, **texts: Any) -> tuple:
    """
    Reads the command line of a recipe.

    Args:
        recipe (`str`):
            A key of `RECIPES`.
        arguments (`Sequence[str]`, *optional*):
            The options; those that this process was started with if not given.
        texts:
            `usage` and `description` of the help.

    Returns:
        `tuple`: one object for each of the recipe's groups.

    Raises:
        ValueError: where an option is not known, or a value is refused by what holds it.
    """
    groups, without, suffix = RECIPES[recipe]
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = GroupedParser(groups, without=without, **texts)
    parser.set_defaults(**EVERY_RUN)
    # Defaults follow from the data and the model; with none named, --help shows those of the embedded run.
    options = [option for option in arguments if option not in ("-h", "--help")]
    known, unknown = parser.parse_known_args(options)
    if unknown and len(options) == len(arguments):  # the parser says so too, after seconds of imports
        raise ValueError(f"Some specified arguments are not used by the HfArgumentParser: {unknown}")
    embedded, named = known.dataset_name in (None, "digits"), known.model_name_or_path
    folder = "digits" if embedded else Path(known.dataset_name).absolute().name
    parser.set_defaults(
        output_dir=f"outputs/{folder}-{Path(named).name}{suffix}" if named else f"outputs/{folder}{suffix}"
    )
    if named is None:
        narrow = {"model_name_or_path": "timm/resnet18", "small_images": True}
        parser.set_defaults(**narrow, backbone_kwargs=json.dumps(NARROW_RESNET))
    if embedded:
        defaults = DIGITS if named else DIGITS | DIGITS_MODEL
        if "base_epochs" in without and not named:
            defaults = defaults | {"num_train_epochs": DIGITS_MODEL["base_epochs"]}
        # The radius is one of linf.
        without = (*without, "eps") if known.norm == "l2" else without
        parser.set_defaults(**{name: value for name, value in defaults.items() if name not in without})
        if known.optim == "sgd":
            parser.set_defaults(learning_rate=0.2)
    return parser.parse_args_into_dataclasses(args=list(arguments))


RECIPES = {
    "prune": Recipe((DataArguments, ModelArguments, RoundArguments, RunArguments, MRPFConfig)),
    "train": Recipe(
        (DataArguments, ModelArguments, ControlArguments, RunArguments, MRPFConfig),
        without=("pruning", "base_epochs", "control_epochs"),
        suffix="-dense",
    ),
}

"""What a recipe takes on its command line, and the defaults that follow from the data, the model and the optimizer."""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .cli import GroupedParser

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


def parse_recipe(groups: list, *, without: Collection[str] = (), suffix: str = "", **texts: Any) -> tuple:
    """
    Reads the command line of a recipe.

    Args:
        groups (`list`):
            Dataclasses of options.
        without (`Collection[str]`, *optional*):
            Subjects and options that the recipe has not, as in [`GroupedParser`]. One without `base_epochs` trains the
            dense model alone: `num_train_epochs` is then about that.
        suffix (`str`, *optional*):
            What the name of the default output folder ends in.
        texts:
            `usage` and `description` of the help.

    Returns:
        `tuple`: one object for each of `groups`.
    """
    parser = GroupedParser(groups, without=without, **texts)
    parser.set_defaults(**EVERY_RUN)
    # Defaults follow from the data and the model; with none named, --help shows those of the embedded run.
    options = [option for option in sys.argv[1:] if option not in ("-h", "--help")]
    known, unknown = parser.parse_known_args(options)
    if unknown and len(options) == len(sys.argv[1:]):  # the parser says so too, after seconds of imports
        raise ValueError(f"Some specified arguments are not used by the HfArgumentParser: {unknown}")
    embedded, named = known.dataset_name in (None, "digits"), known.model_name_or_path
    folder = "digits" if embedded else Path(known.dataset_name).name
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
        parser.set_defaults(**{name: value for name, value in defaults.items() if name not in without})
        if known.optim == "sgd":
            parser.set_defaults(learning_rate=0.2)
    return parser.parse_args_into_dataclasses()

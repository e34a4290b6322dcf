"""What a run starts from: the data and the model that its options name."""

from pathlib import Path
from typing import TYPE_CHECKING

from .class_names import check_class_names, config_class_names, model_class_names
from .cli import DataArguments, ModelArguments, backbone_options, check_place
from .run_folder import STAGES

if TYPE_CHECKING:  # what is wrong with an argument is said before these are loaded
    from .data import ImageData
    from .modeling import PrunedConfig, PrunedForImageClassification

# Of what `from_backbone` takes, what the options settle.
SETTLED = {"num_labels", "id2label", "image_size", "small_images", "pretrained", "revision"}


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
    kwargs = backbone_options(arguments.backbone_kwargs) if arguments.backbone_kwargs else {}
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

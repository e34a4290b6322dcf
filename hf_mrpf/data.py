"""Image data sets: a Hub id, a local folder or the embedded digits, as pixels in [0, 1] and integer labels."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from .attacks import check_pixels

logger = logging.getLogger(__name__)

DIGITS = "digits"
TEST_NAMES = ("test", "valid", "validation", "val")
VALIDATION_NAMES = ("validation", "valid", "val")
LABEL_NAMES = ("labels", "label")


@dataclass(frozen=True)
class ImageData:
    """
    An image classification data set, ready for training.

    Args:
        train, validation, test ([`datasets.Dataset`]):
            Pixel data sets as [`as_pixel_dataset`] makes them. No image stands in two of them unless the source
            repeats it.
        class_names (`list[str]`):
            Name of each label.
        image_size (`int`):
            Height and width of every image.
        image_mean, image_std (`list[float]`):
            Mean and standard deviation per channel over the pixels of `train`, in [0, 1].
        name (`str`):
            Hub id, name of the local folder, or `"digits"`.
        flip (`bool`):
            Whether a mirrored image keeps its class: False where the classes are the ten digits.
        description (`dict`):
            What was read, as JSON: configuration, revision, splits, columns, sizes, limits, seed. Holds no local path.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    class_names: list[str]
    image_size: int
    image_mean: list[float]
    image_std: list[float]
    name: str
    flip: bool
    description: dict[str, Any]


def load_image_data(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    image_size: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ImageData:
    """
    Load a data set and cut it into train, validation and test.

    `train` is needed; the test split is the first found of `test`, `valid`, `validation`, `val`; any other split
    (SVHN's `extra`) is left out. A data set that has both a test and a validation split uses its own validation.
    From any other, 1,000 training images or a tenth of them, whichever is less, are cut as validation, stratified by
    class, before `max_train_samples` applies: the limit changes what trains, not what validates.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, or folder that `datasets.load_dataset` reads. None or `"digits"` is [`digits_dataset`].
        dataset_config_name (`str`, *optional*):
            Configuration of the data set, such as `"cropped_digits"` of SVHN.
        image_column_name, label_column_name (`str`, *optional*):
            Columns to read. By default the one image column, and of the class label columns the one with most
            classes (`fine_label` of CIFAR-100); an integer column `labels` or `label` where there is no class label.
        image_size (`int`, *optional*):
            Height and width that every image is resized to (see [`as_pixel_dataset`]). By default the images' own,
            which must then be square and all the same.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Most images to keep for training, and for each of validation and test. The kept ones are stratified.
        seed (`int`):
            Seed of every cut.
        cache_dir, revision, token:
            As in `datasets.load_dataset`.

    Raises:
        ValueError: where a split, a column, a label, an image or an argument does not fit; the message names it.
        OSError: where the data set cannot be reached.
    """
    for argument, value in {
        "image_size": image_size,
        "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples,
    }.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument} must be a positive whole number, got {value!r}")
    source = _load_splits(dataset_name, dataset_config_name, cache_dir=cache_dir, revision=revision, token=token)
    name = _public_name(dataset_name)
    test_name = _test_split(source, name)
    validation_name = next((s for s in VALIDATION_NAMES if s in source and s != test_name), None)
    sources = {"train": "train", "validation": validation_name or "train", "test": test_name}

    # Everything that can be refused is refused before the first image is decoded in bulk.
    image_column, label_column = find_columns(source["train"], image_column_name, label_column_name)
    class_names: list[str] | None = None
    labels, shapes = {}, {}
    for split in dict.fromkeys(sources.values()):
        try:
            find_columns(source[split], image_column, label_column)
            labels[split], class_names = _checked_labels(source[split], label_column, class_names)
            shapes[split] = _first_shape(source[split], image_column, image_size)
        except ValueError as error:
            raise ValueError(f"data set {name}, split {split}: {error}") from error
    if len(set(shapes.values())) > 1 or len(set(shapes["train"])) > 1:
        found = ", ".join(f"{height}x{width} in {split}" for split, (height, width) in shapes.items())
        raise ValueError(f"data set {name}: images must be square and of one size, found {found}; give image_size")

    order = stratified_order(labels["train"], seed)
    cut = 0 if validation_name else min(1000, len(order) // 10)
    if not validation_name and not cut:
        raise ValueError(f"data set {name}: a tenth of {len(order)} training images leaves no validation image")
    rows = {
        "train": order[cut:][:max_train_samples],
        "validation": order[:cut][:max_eval_samples],
        "test": stratified_order(labels[test_name], seed)[:max_eval_samples],
    }
    if validation_name:
        rows["validation"] = stratified_order(labels[validation_name], seed)[:max_eval_samples]
    parts = {
        part: _pixels_of_rows(source[split], rows[part], image_size, image_column, label_column, class_names)
        for part, split in sources.items()
    }
    mean, std = pixel_statistics(parts["train"])
    label_feature = source["train"].features[label_column]
    description = {
        "dataset_name": name,
        "dataset_config_name": dataset_config_name,
        "revision": revision,
        "splits": {part: {"from": split, "num_images": len(parts[part])} for part, split in sources.items()},
        "image_column": image_column,
        "label_column": label_column,
        "num_classes": len(class_names or ()),
        "image_size": shapes["train"][0],
        "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples,
        "seed": seed,
    }
    return ImageData(
        **parts,
        class_names=list(class_names or ()),
        image_size=shapes["train"][0],
        image_mean=mean,
        image_std=std,
        name=name,
        flip=not (isinstance(label_feature, ClassLabel) and set(label_feature.names) == set("0123456789")),
        description=description,
    )

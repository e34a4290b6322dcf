"""Image data sets: a Hub id, a local folder or the embedded digits, as pixels in [0, 1] and integer labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PillowImage
from torch import Tensor

from .augmentation import augment, mirror_keeps_class
from .loader import batches, collate_pixels, with_index
from .pixels import as_pixel_dataset, checked_labels, find_columns, first_shape, pack

__all__ = [
    "ImageData",
    "as_pixel_dataset",
    "augment",
    "batches",
    "calibration_batches",
    "collate_pixels",
    "digits_dataset",
    "load_image_data",
    "stratified_order",
    "stratified_split",
    "stratified_subset",
    "with_index",
]

DIGITS = "digits"
TEST_SPLITS = ("test", "valid", "validation", "val")
VALIDATION_SPLITS = ("validation", "valid", "val")


@dataclass(frozen=True)
class ImageData:
    """
    An image classification data set, ready for training.

    Args:
        train, validation, test ([`datasets.Dataset`]):
            Pixel data sets, see [`as_pixel_dataset`]. They share no row.
        class_names (`list[str]`):
            Name of each label.
        image_size (`int`):
            Height and width of every image.
        image_mean, image_std (`list[float]`):
            Mean and standard deviation of each channel over the pixels of `train`, in [0, 1]. The deviation of a
            constant channel is given as 1: normalising then shifts it only.
        name (`str`):
            Hub id, name of the local folder (never its path), or `"digits"`.
        flip (`bool`):
            Whether a mirrored image keeps its class, see [`mirror_keeps_class`]: not where the classes are the digits.
        description (`dict`):
            What was read, fit for JSON: configuration, revision, splits, columns, sizes, limits, seed.
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
    train_split: str = "train",
    test_split: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    image_size: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
    cache_dir: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ImageData:
    """
    Loads a data set and cuts it into train, validation and test.

    The test split is `test_split`, or the first found of `test`, `valid`, `validation` and `val`; a data set
    that has both a test and a validation split uses its own validation. From any other, 1,000 training images or a
    tenth of them, whichever is less, become the validation, stratified by class. They are cut before
    `max_train_samples` applies, so that the limit never changes what validates. Other splits (SVHN's `extra`) are
    left out unless `train_split` names them.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, or a folder that `datasets.load_dataset` reads. None and `"digits"` are [`digits_dataset`].
        dataset_config_name (`str`, *optional*):
            Configuration of the data set, such as SVHN's `"cropped_digits"`.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, or several joined by a plus sign, such as SVHN's `"train+extra"`.
        test_split (`str`, *optional*):
            Split to measure on, such as `"validation"` where the labels of `test` are kept secret (-1).
        image_column_name, label_column_name (`str`, *optional*):
            Columns to read. By default the one image column, and the class label column with most classes
            (`fine_label` of CIFAR-100) or else an integer column called `labels` or `label`.
        image_size (`int`, *optional*):
            Height and width to bring every image to, see [`as_pixel_dataset`]. By default the images' own, which must
            then be square and all the same.
        max_train_samples, max_eval_samples (`int`, *optional*):
            Most images for training, and for each of validation and test: a stratified choice.
        seed (`int`, *optional*, defaults to 42):
            Seed of every cut and choice. The recipes always cut by the default, whatever their `--seed`: what validates
            one model must not have trained its parent.
        cache_dir, revision, token:
            As in `datasets.load_dataset`.

    Returns:
        [`ImageData`]

    Raises:
        ValueError: where a split, a column, a label, an image or an argument does not fit.
        OSError: where the data set cannot be found or reached.
        ImportError: where the embedded digits are asked for and scikit-learn is missing.
    """
    counts = {"image_size": image_size, "max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}
    for argument, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{argument} is {count!r}; a whole number of 1 or more is needed.")
    name = DIGITS if dataset_name is None else dataset_name
    splits = _load_splits(name, dataset_config_name, cache_dir=cache_dir, revision=revision, token=token)
    if name != DIGITS and Path(name).expanduser().is_dir():
        name = Path(name).expanduser().resolve().name
    origin = _choose_splits(splits, name, train_split, test_split)
    # Splits of one configuration have the same columns and classes: `load_dataset` sees to that.
    source = {
        split: splits[split] if split in splits else concatenate_datasets([splits[part] for part in split.split("+")])
        for split in dict.fromkeys(origin.values())
    }

    # Whatever can be refused cheaply is refused before any split is decoded.
    class_names: list[str] = []
    labels, shapes = {}, {}
    columns = (image_column_name, label_column_name)
    for split in source:
        try:
            columns = image_column, label_column = find_columns(source[split], *columns)
            labels[split], class_names = checked_labels(source[split], label_column, class_names or None)
            shapes[split] = first_shape(source[split], image_column, image_size)
        except ValueError as error:
            unlabelled = split == origin["test"] and split not in labels
            advice = " Name another split to measure on as test_split, or label this one." if unlabelled else ""
            raise ValueError(f"Data set {name}, split {split}: {error}{advice}") from error
    size = shapes[train_split][0]
    if set(shapes.values()) != {(size, size)}:
        found = ", ".join(f"{height}x{width} in {split}" for split, (height, width) in shapes.items())
        raise ValueError(f"Data set {name}: images must be square and of one size, found {found}; give image_size.")

    parts: dict[str, Dataset] = {}
    chosen = _choose_rows(origin, labels, max_train_samples, max_eval_samples, seed)
    for split, dataset in source.items():
        rows = {part: chosen[part] for part in chosen if origin[part] == split}
        try:
            parts |= _decoded(dataset, rows, columns, (size, size), class_names, image_size)
        except ValueError as error:
            raise ValueError(f"Data set {name}, split {split}: {error}") from error
    mean, std = _pixel_statistics(parts["train"])
    names = getattr(source[train_split].features[label_column], "names", None)
    description = {
        "dataset_name": name,
        "dataset_config_name": dataset_config_name,
        "revision": revision,
        "splits": {part: {"from": split, "num_images": len(parts[part])} for part, split in origin.items()},
        "image_column": image_column,
        "label_column": label_column,
        "num_classes": len(class_names),
        **counts,
        "image_size": size,
        "seed": seed,
    }
    return ImageData(
        **parts,
        class_names=class_names,
        image_size=size,
        image_mean=mean,
        image_std=std,
        name=name,
        flip=mirror_keeps_class(names),
        description=description,
    )


def digits_dataset() -> DatasetDict:
    """
    scikit-learn's handwritten digits (no download) as 16x16 RGB images: columns `image` and `label`, 1,197 train, 100
    validation and 500 test images, stratified by class, always the same ones.

    Raises:
        ImportError: where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The embedded digits come with scikit-learn, which is missing: install scikit-learn or name a data set."
        ) from error
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = [
        PillowImage.fromarray(pixels).resize((16, 16), PillowImage.Resampling.BILINEAR).convert("RGB")
        for pixels in grey
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    dataset = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    test, validation, train = np.split(stratified_order(digits.target, seed=0), [500, 600])
    return DatasetDict(train=dataset.select(train), validation=dataset.select(validation), test=dataset.select(test))


def _load_splits(name: str, config: str | None, **options: Any) -> DatasetDict:
    if name == DIGITS:
        if config is not None:
            raise ValueError(f"The embedded digits have no configurations, got dataset_config_name={config!r}.")
        return digits_dataset()
    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no data set folder {name}.")
    advice = 'Give the id of a data set on the Hub, a folder that datasets.load_dataset reads, or "digits".'
    try:
        return load_dataset(str(folder.absolute()) if folder.is_dir() else name, config, **options)
    except OSError as error:
        raise OSError(
            f"Data set {name} cannot be loaded: {_one_line(error)}. {advice} A private one needs a token, and without "
            "a network only what the cache holds can be read."
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"Data set {name} cannot be loaded: {_one_line(error.__cause__ or error)}. {advice}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".!")


def _choose_splits(source: DatasetDict, name: str, train: str, test: str | None) -> dict[str, str]:
    """The source split of each part."""
    trained = train.split("+")
    for split in (*trained, *([test] if test else [])):
        if split not in source:
            raise ValueError(f"Data set {name} has no split {split}; it has {', '.join(source)}.")
    if len(set(trained)) < len(trained):
        raise ValueError(f"train_split is {train!r}, which names a split twice.")
    if test in trained:
        raise ValueError(f"test_split is {test!r}, which is trained on: train_split is {train!r}.")
    test = test or next((split for split in TEST_SPLITS if split in source and split not in trained), None)
    if test is None:
        raise ValueError(
            f"Data set {name} has no test split (one called {', '.join(TEST_SPLITS)}); it has {', '.join(source)}."
        )
    validation = next(
        (split for split in VALIDATION_SPLITS if split in source and split not in (test, *trained)), train
    )
    return {"train": train, "validation": validation, "test": test}


def _choose_rows(
    origin: Mapping[str, str], labels: Mapping[str, np.ndarray], max_train: int | None, max_eval: int | None, seed: int
) -> dict[str, np.ndarray | None]:
    """The rows of each part in its source split; None is all of them in their own order."""
    limits = {"train": max_train, "validation": max_eval, "test": max_eval}
    chosen: dict[str, np.ndarray | None] = {}
    for part, split in origin.items():
        limit = limits[part]
        everything = limit is None or limit >= len(labels[split])
        chosen[part] = None if everything else stratified_order(labels[split], seed)[:limit]
    if origin["validation"] == origin["train"]:
        total = len(labels[origin["train"]])
        cut = min(1000, total // 10)
        if not cut:
            raise ValueError(f"{total} training images are too few: validation takes a tenth of them, 10 are needed.")
        order = stratified_order(labels[origin["train"]], seed)
        chosen["validation"], chosen["train"] = order[:cut][:max_eval], order[cut:][:max_train]
    return chosen


def _decoded(dataset: Dataset, parts: Mapping[str, np.ndarray | None], *settings: Any) -> dict[str, Dataset]:
    """
    The parts of a split, no image decoded twice: a few are decoded alone, more come from the whole split, which every
    seed finds in the cache.
    """
    chosen = [rows for rows in parts.values() if rows is not None]
    if len(chosen) == len(parts) and 2 * sum(map(len, chosen)) < len(dataset):
        return {part: pack(dataset, rows, *settings) for part, rows in parts.items()}
    whole = pack(dataset, None, *settings)
    return {part: whole if rows is None else whole.select(rows) for part, rows in parts.items()}


def _pixel_statistics(dataset: Dataset) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel; 1 for the deviation of a constant one."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    least, most = torch.ones(3), torch.zeros(3)
    for images, _ in batches(dataset, 1024):
        total += images.sum((0, 2, 3)).double()
        squares += images.square().sum((0, 2, 3)).double()
        count += images.numel() // 3
        least = torch.minimum(least, images.amin((0, 2, 3)))
        most = torch.maximum(most, images.amax((0, 2, 3)))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    # Not where it is 0: rounding leaves a constant channel a tiny deviation.
    std[least == most] = 1
    return mean.tolist(), std.tolist()


# ---- Stratified choices ---------------------------------------------------------------------------------------------


def stratified_order(labels: Sequence[int] | np.ndarray, seed: int = 0) -> np.ndarray:
    """
    A random order of the rows in which every stretch, so every prefix too, has the classes in proportion.

    Images of a class are shuffled and the classes interleaved as Webster's method apportions seats: the k-th of a
    class of n comes at (k - 1/2) / n. So it needs no least number of images a class, as a stratified split does.

    Returns:
        `np.ndarray`: row numbers, int64.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    _, classes, sizes = np.unique(np.asarray(labels)[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(classes, kind="stable")
    place = np.empty(len(labels))
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return shuffled[np.argsort((place + 0.5) / sizes[classes], kind="stable")]


def stratified_split(dataset: Dataset, n: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Splits a pixel data set into `n` images with the classes in proportion, and the rest.

    Raises:
        ValueError: where `n` is not in 1 ... number of images.
    """
    if not 1 <= n <= len(dataset):
        raise ValueError(f"{n} images were asked for; the data set has {len(dataset)}, 1 or more are needed.")
    order = stratified_order(dataset["labels"][:], seed)
    return dataset.select(order[:n]), dataset.select(order[n:])


def stratified_subset(dataset: Dataset, n: int, seed: int = 0) -> Dataset:
    """`n` images of a pixel data set with the classes in proportion, see [`stratified_split`]."""
    return stratified_split(dataset, n, seed)[0]


def calibration_batches(dataset: Dataset, sets: int = 3, size: int = 128, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """
    Draws calibration sets from a pixel data set, each stratified by class, no image in two of them.

    Returns:
        `list[tuple[Tensor, Tensor]]`: `sets` pairs of images (float32 `[size, 3, H, W]` in [0, 1]) and labels.

    Raises:
        ValueError: where the data set has fewer than `sets * size` images.
    """
    if sets * size > len(dataset):
        raise ValueError(
            f"{sets} calibration sets of {size} need {sets * size} images, the data set has {len(dataset)}; "
            "ask for fewer sets or smaller ones."
        )
    order = stratified_order(dataset["labels"][:], seed)
    return list(batches(dataset, size, order[: sets * size]))

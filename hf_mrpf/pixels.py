"""Pixel data sets: images decoded once, as bytes in the memory-mapped cache of `datasets`."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage

logger = logging.getLogger(__name__)

HEADER_BYTES = 8
# The `id` of a feature of labels that came as plain integers: its class names are no more than their numbers.
NUMBERED = "numbered"


def as_pixel_dataset(
    dataset: Dataset,
    image_size: int | None = None,
    *,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
) -> Dataset:
    """
    Decodes a data set once, to columns `pixel_values` (uint8 tensors `[3, H, W]`) and `labels` (a `ClassLabel`).
    Where labels are plain integers, the classes are named by their numbers, up to the highest that occurs.

    The result is an ordinary memory-mapped data set in the cache of `datasets`, found again by the next call. Images
    become RGB (grey is repeated, transparency dropped). With `image_size` they are resized to a square of that size
    where they are of another one (bilinear with antialiasing; the aspect is not kept). A `pixel_values` column of
    integers in [0, 255] is taken as it is, and one of floats in [0, 1] as float32. A data set that went through here
    before is returned as it is.

    Args:
        dataset ([`datasets.Dataset`]):
            A data set with an image (or `pixel_values`) column and a column of class labels.
        image_size (`int`, *optional*):
            Height and width wanted. By default the images' own, which must all be the same.
        image_column_name, label_column_name (`str`, *optional*):
            Columns to read, see [`load_image_data`].

    Raises:
        ValueError: where a column is missing, a label is out of range, an image is broken or has more than 8 bits a
            channel (the row is named), images are of several sizes, or `pixel_values` have another shape or range.
    """
    if is_packed(dataset):
        dataset = dataset.with_transform(unpack)
        if image_size is not None and len(dataset):
            decoded = list(dataset[0]["pixel_values"].shape)
            if decoded != [3, image_size, image_size]:
                raise ValueError(
                    f"pixels were decoded to {decoded}; for {image_size} pixels give the images themselves."
                )
        return dataset
    if dataset.format["format_kwargs"].get("transform") not in (None, unpack):
        raise ValueError(
            "The data set has a transform set, whose result cannot be cached: hand over the data set without it "
            "(dataset.with_format(None)); images are resized by image_size and augmented during training."
        )
    columns = find_columns(dataset, image_column_name, label_column_name)
    _, class_names = checked_labels(dataset, columns[1], None)
    shape = first_shape(dataset, columns[0], image_size)
    return pack(dataset, None, columns, shape, class_names, image_size)


def is_packed(dataset: Dataset) -> bool:
    """Whether a data set is one that [`as_pixel_dataset`] gives, or a selection of it."""
    return dataset.features.get("pixel_values") == Value("binary")


def find_columns(dataset: Dataset, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the image and the label column."""
    features = dataset.features
    known = f"the columns are {', '.join(features)}"
    for column in (image, label):
        if column is not None and column not in features:
            raise ValueError(f"there is no column {column}; {known}.")
    if image is None:
        images = [name for name, kind in features.items() if isinstance(kind, Image)]
        images = images or [name for name in features if name == "pixel_values"]
        if len(images) != 1:
            raise ValueError(f"{len(images)} image columns were found and one is needed: {known}; name the column.")
        image = images[0]
    classes = {name: kind.num_classes for name, kind in features.items() if isinstance(kind, ClassLabel)}
    integers = [name for name, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype]
    if label is None:
        candidates = sorted(classes, key=lambda name: -classes[name])
        candidates = candidates or [name for name in ("labels", "label") if name in integers]
        if not candidates:
            raise ValueError(
                f"no column of class labels was found: {known}. Attacks need one: call it labels, of whole numbers "
                "from 0 on or made classes of by dataset.class_encode_column; load_image_data takes its name too."
            )
        label = candidates[0]
        if len(classes) > 1:
            others = ", ".join(f"{name} ({classes[name]})" for name in candidates[1:])
            logger.warning(
                "Labels: %s (%d classes), not %s; name the column to change it.", label, classes[label], others
            )
    if label not in classes and label not in integers:
        raise ValueError(
            f"column {label} is {features[label]}; class labels or integers are needed, as "
            "dataset.class_encode_column makes them."
        )
    return image, label


def checked_labels(dataset: Dataset, column: str, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """The labels, and the class names: those given or the data set's own, and all labels within them."""
    if not len(dataset):
        raise ValueError("the data set is empty: it has no rows.")
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        raise ValueError(f"row {values.is_null().to_pylist().index(True)} has no label in column {column}.")
    labels = values.to_numpy()
    if names is None:
        names = getattr(dataset.features[column], "names", None)
        names = names or [str(index) for index in range(min(max(labels.max(), 0), 99_999) + 1)]
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        raise ValueError(
            f"label {labels[wrong[0]]} in row {wrong[0]} of column {column} is out of range: {len(names)} classes "
            f"are numbered 0 to {len(names) - 1} ({len(wrong)} such rows)."
        )
    return labels, names


def own_class_names(dataset: Dataset) -> list[str] | None:
    """The class names of a pixel data set; None where its labels were plain integers, whose names are made up."""
    labels = dataset.features["labels"]
    return None if labels.id == NUMBERED else getattr(labels, "names", None)


def first_shape(dataset: Dataset, column: str, image_size: int | None) -> tuple[int, int]:
    """Height and width that the pixels will have, as far as the first row tells."""
    if isinstance(dataset.features[column], Image):
        if image_size is not None:
            return image_size, image_size
        image = _decode(dataset.with_format(None).cast_column(column, Image(decode=False))[0][column], 0)
        return image.height, image.width
    shape = np.shape(dataset.with_format("numpy")[0][column])
    if len(shape) != 3 or shape[0] != 3:
        advice = "; repeat the grey channel three times" if len(shape) == 3 and shape[0] == 1 else ""
        raise ValueError(f"{column} has shape {list(shape)}; [3, H, W] is needed{advice}.")
    if image_size is not None and shape[1:] != (image_size, image_size):
        raise ValueError(f"{column} has shape {list(shape)}, image_size is {image_size}: resize the images first.")
    return shape[1], shape[2]


def _decode(value: dict[str, Any] | None, row: int) -> PillowImage.Image:
    if value is None:
        raise ValueError(f"row {row} has no image.")
    try:
        image = Image().decode_example(value)
    except (OSError, SyntaxError, ValueError, PillowImage.DecompressionBombError) as error:
        raise ValueError(f"the image in row {row} cannot be decoded: {error}.") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"the image in row {row} has mode {image.mode}; 8 bits a channel are needed.")
    return image.convert("RGB")


def pack(
    dataset: Dataset,
    rows: np.ndarray | None,
    columns: tuple[str, str],
    shape: tuple[int, int],
    class_names: list[str],
    image_size: int | None,
) -> Dataset:
    """The rows (None: all) as bytes, each behind a header of its shape, under the format that unpacks them."""
    decode = isinstance(dataset.features[columns[0]], Image)
    mark = None if isinstance(dataset.features[columns[1]], ClassLabel) else NUMBERED
    if decode:
        dataset = dataset.with_format(None).cast_column(columns[0], Image(decode=False))
    else:
        dataset = dataset.with_format("numpy")
    packed = (dataset if rows is None else dataset.select(rows)).map(
        _pack_images if decode else _pack_arrays,
        batched=True,
        with_indices=True,
        fn_kwargs={"columns": columns, "shape": shape, "rows": rows, "image_size": image_size},
        remove_columns=dataset.column_names,
        features=Features({"pixel_values": Value("binary"), "labels": ClassLabel(names=class_names, id=mark)}),
        desc="Decoding images",
    )
    return packed.with_transform(unpack)


def _pack_images(
    batch: Mapping[str, Any],
    indices: list[int],
    columns: tuple[str, str],
    shape: tuple[int, int],
    rows: np.ndarray | None,
    image_size: int | None,
) -> dict[str, list]:
    header = np.array([1, 3, *shape], "<u2").tobytes()
    packed = []
    for value, index in zip(batch[columns[0]], indices, strict=True):
        row = index if rows is None else rows[index]
        image = _decode(value, row)
        if (image.height, image.width) != shape:
            if image_size is None:
                found = f"{shape[0]}x{shape[1]} in the first row, {image.height}x{image.width} in row {row}"
                raise ValueError(f"images are of several sizes ({found}); give image_size.")
            image = image.resize((image_size, image_size), PillowImage.Resampling.BILINEAR)
        packed.append(header + np.asarray(image).transpose(2, 0, 1).tobytes())
    return {"pixel_values": packed, "labels": batch[columns[1]]}


def _pack_arrays(
    batch: Mapping[str, Any],
    indices: list[int],
    columns: tuple[str, str],
    shape: tuple[int, int],
    rows: np.ndarray | None,
    image_size: int | None,
) -> dict[str, list]:
    pixels = np.asarray(batch[columns[0]])
    where = f"{columns[0]}, {len(indices)} rows from {indices[0]}"
    if pixels.dtype == object or pixels.shape[1:] != (3, *shape):
        raise ValueError(f"{where}: arrays of several shapes; all must be {[3, *shape]}, as the first is.")
    if np.issubdtype(pixels.dtype, np.integer):
        if pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"{where}: integers run from {pixels.min()} to {pixels.max()}; 0 to 255 are needed.")
        pixels = pixels.astype(np.uint8)
    else:
        pixels = pixels.astype(np.float32)
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"{where}: floats run from {pixels.min():.4g} to {pixels.max():.4g}; [0, 1] is needed, plain pixels: "
                "the model normalises them itself."
            )
    header = np.array([pixels.itemsize, 3, *shape], "<u2").tobytes()
    return {"pixel_values": [header + image.tobytes() for image in pixels], "labels": batch[columns[1]]}


def unpack(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The format of a pixel data set: what [`pack`] wrote, as tensors `[N, 3, H, W]`."""
    # Arrow hands bytes out seven times as fast as nested lists or Array3D, which are rebuilt row by row.
    unpacked = dict(batch)
    packed = unpacked.get("pixel_values")
    if packed and isinstance(packed[0], bytes):
        width, *shape = np.frombuffer(packed[0], "<u2", count=4).tolist()
        rows = torch.frombuffer(bytearray().join(packed), dtype=torch.uint8).view(len(packed), -1)[:, HEADER_BYTES:]
        pixels = rows if width == 1 else rows.contiguous().view(torch.float32)
        unpacked["pixel_values"] = pixels.unflatten(1, shape)
    elif packed:  # `map` and `flatten_indices` write down what they read through this format: nested lists.
        pixels = torch.tensor(packed)
        unpacked["pixel_values"] = pixels if pixels.is_floating_point() else pixels.to(torch.uint8)
    return unpacked

"""Batches of a pixel data set, each read at once out of the memory-mapped file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from .pixels import HEADER_BYTES, is_packed, unpack


class PixelRows(torch.utils.data.Dataset):
    """
    A pixel data set for a `DataLoader`, which fetches each batch as one tensor rather than row by row.

    A batch is a dict of `pixel_values` (`[N, 3, H, W]`, uint8, or float32 where the data set holds floats), and of
    `labels` and `index` (int64 `[N]`), the latter where the data set has it. Nothing is held in memory but labels and
    positions; a worker process maps the file anew.

    Args:
        dataset ([`datasets.Dataset`]):
            As [`as_pixel_dataset`] gives it, or a selection of that.

    Raises:
        ValueError: where the data set is not one of packed pixels, or holds images of several sizes.
    """

    def __init__(self, dataset: Dataset):
        if not is_packed(dataset):
            raise ValueError(
                f"The columns {', '.join(dataset.column_names)} hold no packed pixels; pass the data set through "
                "as_pixel_dataset first."
            )
        self.dataset = dataset
        table = dataset.data.table
        # The mapping of a selection has no public name; reading rows through it costs five times the rest.
        chosen = dataset._indices
        self._rows = np.arange(len(dataset)) if chosen is None else chosen.column(0).to_numpy().astype(np.int64)
        self._chunks = [_as_matrix(chunk) for chunk in table.column("pixel_values").chunks if len(chunk)]
        if len({chunk.shape[1] for chunk in self._chunks}) > 1:
            raise ValueError("The data set holds images of several sizes; bring them to one before they are joined.")
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self._integers = {
            name: table.column(name).to_numpy() for name in ("labels", "index") if name in dataset.column_names
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.dataset[row]

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        places = self._rows[np.asarray(rows)]
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        packed = np.empty((len(places), self._chunks[0].shape[1]), np.uint8)
        for row, (number, place) in enumerate(
            zip(numbers.tolist(), (places - self._starts[numbers]).tolist(), strict=True)
        ):
            packed[row] = self._chunks[number][place]
        if (packed[:, :HEADER_BYTES] != packed[0, :HEADER_BYTES]).any():
            raise ValueError("The data set holds images of several sizes; bring them to one before they are joined.")
        width, *shape = packed[0, :HEADER_BYTES].view("<u2").tolist()
        pixels = torch.from_numpy(packed[:, HEADER_BYTES:].copy())
        pixels = pixels if width == 1 else pixels.view(torch.float32)
        integers = {name: torch.from_numpy(values[places]) for name, values in self._integers.items()}
        return {"pixel_values": pixels.unflatten(1, shape), **integers}

    def __reduce__(self) -> tuple:
        # The views of the file would be pickled as copies of all of it.
        return PixelRows, (self.dataset,)


def _as_matrix(chunk: pa.BinaryArray) -> np.ndarray:
    """A view of the bytes of a chunk, a row each; all rows are of one length."""
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    if len(np.unique(np.diff(ends))) > 1:
        raise ValueError("The data set holds images of several sizes; bring them to one before they are joined.")
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(len(chunk), -1)


def with_index(dataset: Dataset) -> Dataset:
    """The pixel data set with a column `index`: 0 to the number of rows - 1."""
    # `add_column` rewrites a selection as it is formatted; without the format it copies the bytes.
    return dataset.with_format(None).add_column("index", np.arange(len(dataset))).with_transform(unpack)


def collate_pixels(examples: Sequence[Mapping[str, Any]] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Collates rows of a pixel data set. A batch that [`PixelRows`] fetched is passed on as it is, in bytes: they cross to
    workers and devices at a quarter of the size, and [`as_float`] makes pixels of them there.

    Args:
        examples (`Sequence[Mapping]`):
            Rows with `pixel_values` (`[3, H, W]`, a tensor, an array or bytes of [`as_pixel_dataset`]; integers in
            [0, 255] or floats in [0, 1]) and `labels` or `label`.

    Returns:
        `dict`: `pixel_values` (float32 `[N, 3, H, W]` in [0, 1]), `labels` (int64 `[N]`), and `index` (int64 `[N]`)
        where the rows have it.

    Raises:
        ValueError: for rows without these, such as pairs or rows with images that nobody decoded.
    """
    if isinstance(examples, Mapping):
        return dict(examples)
    examples = [_checked_row(example) for example in examples]
    values = [example["pixel_values"] for example in examples]
    # A data set may lose its format, as to `concatenate_datasets`; the bytes know their shape.
    if isinstance(values[0], bytes):
        pixels = unpack({"pixel_values": values})["pixel_values"]
    else:
        pixels = torch.stack([torch.as_tensor(value) for value in values])
    collated = {"pixel_values": as_float(pixels)}
    for column in ("labels", "index"):
        if column in examples[0]:
            collated[column] = torch.tensor([int(example[column]) for example in examples])
    return collated


def _checked_row(example: Any) -> Mapping[str, Any]:
    columns = list(example) if isinstance(example, Mapping) else []
    if "pixel_values" in columns and "labels" in columns:
        return example
    if "pixel_values" in columns and "label" in columns:
        return {**example, "labels": example["label"]}
    held = f"the columns {', '.join(map(str, columns))}" if columns else f"no columns: it is a {type(example).__name__}"
    raise ValueError(
        f"A sample has {held}; pixel_values and labels are needed. Columns of images are decoded of a datasets.Dataset "
        "alone, not of one that streams (load it without streaming); of other data sets give dicts "
        '{"pixel_values": pixels, "labels": label}, or a data_collator that makes them.'
    )


def batches(
    dataset: Dataset, batch_size: int, indices: Sequence[int] | np.ndarray | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Yields `(images, labels)` of a pixel data set in order: float32 `[n, 3, H, W]` in [0, 1] and int64 `[n]`, `n` being
    `batch_size` except perhaps in the last batch. With `indices`, of these rows alone, in their order.
    """
    rows = PixelRows(dataset)
    order = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    for start in range(0, len(order), batch_size):
        batch = rows.__getitems__(order[start : start + batch_size])
        yield as_float(batch["pixel_values"]), batch["labels"]


def as_float(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], float32, of bytes or of pixels of any other float type."""
    return pixels.float() if pixels.is_floating_point() else pixels.float().div_(255)

"""Images for an evaluation, whatever they come in: checked batches with the index of each image."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attacks import check_pixels
from .class_names import check_class_names
from .data import as_pixel_dataset, batches, stratified_order
from .fingerprint import images_sha256
from .pixels import own_class_names

_KINDS = "give (images, labels) tensors, one split of a data set (such as ImageData.test), or batches of such tensors"
_ALIGN = (
    "figures of other classes, or of the same in another order, mean nothing. Give the data set of the model, or "
    "number its labels as the model does: dataset.align_labels_with_mapping(model.config.label2id, column)."
)
# Of pixels that are held at a time: every image of CIFAR-10's test set, or 400 of 224 pixels.
POOL_BYTES = 2**28


@dataclass
class Pool:
    """Images of one size that are evaluated together: indices in the data, pixels, labels, and a key for each."""

    indices: list[int]
    images: Tensor
    labels: Tensor
    keys: list[str]


def pools(batches: Iterable[tuple[list[int], Tensor, Tensor]], pool_bytes: int = POOL_BYTES) -> Iterator[Pool]:
    """Gather batches of `(indices, images, labels)` up to so many bytes of pixels, one batch at least."""
    held: list[tuple[list[int], Tensor, Tensor]] = []
    size = 0
    for batch in batches:
        if held and (size + batch[1].nbytes > pool_bytes or batch[1].shape[1:] != held[0][1].shape[1:]):
            yield _pool(held)
            held, size = [], 0
        held.append(batch)
        size += batch[1].nbytes
    if held:
        yield _pool(held)


def _pool(held: list[tuple[list[int], Tensor, Tensor]]) -> Pool:
    indices = [index for some, _, _ in held for index in some]
    images, labels = torch.cat([batch[1] for batch in held]), torch.cat([batch[2] for batch in held])
    keys = [f"{index} {digest}" for index, digest in zip(indices, images_sha256(images, labels), strict=True)]
    return Pool(indices, images, labels, keys)


def indexed_batches(
    data: Any,
    num_samples: int | None,
    seed: int,
    batch_size: int,
    image_size: int | None,
    class_names: Sequence[str] | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """
    Yield `(indices in data, float32 images, int64 labels)`, checked.

    A `datasets.Dataset` must have the `class_names` that are given, as [`check_class_names`] says.
    """
    for indices, images, labels in _raw_batches(data, num_samples, seed, batch_size, image_size, class_names):
        check_pixels(images)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(
                f"labels are {getattr(labels, 'dtype', type(labels))} of shape {list(getattr(labels, 'shape', []))}; "
                f"int64 class indices [{len(images)}], one per image, are needed."
            )
        yield indices, images.float(), labels


def _raw_batches(
    data: Any,
    num_samples: int | None,
    seed: int,
    batch_size: int,
    image_size: int | None,
    class_names: Sequence[str] | None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    from datasets import Dataset, IterableDataset

    if _is_batch(data):
        data = data["pixel_values"], data["labels"]
    if isinstance(data, IterableDataset):
        raise ValueError(
            "data is an IterableDataset, whose images are not known beforehand; load the split without streaming, or "
            "take some of it: Dataset.from_list(list(data.take(1000)), features=data.features)."
        )
    if isinstance(data, Mapping) and any(isinstance(value, Tensor) for value in data.values()):
        raise ValueError(f"data is a mapping of {', '.join(map(str, data))}; pixel_values and labels are needed.")
    if isinstance(data, Mapping):
        raise ValueError(f"data holds several splits ({', '.join(map(str, data))}); hand over one of them.")
    if isinstance(data, Dataset):
        pixels = as_pixel_dataset(data, image_size)
        check_class_names(class_names, own_class_names(pixels), _ALIGN)
        order = stratified_indices(pixels["labels"][:], num_samples, seed)
        starts = range(0, len(order), batch_size)
        for start, (images, labels) in zip(starts, batches(pixels, batch_size, order), strict=True):
            yield order[start : start + batch_size], images, labels
    elif _is_pair(data):
        images, labels = data
        if not isinstance(labels, Tensor):
            raise ValueError(f"data is a tensor and a {type(labels).__name__}; give labels as torch.as_tensor(labels).")
        if len(images) != len(labels):
            raise ValueError(f"There are {len(images)} images and {len(labels)} labels; one label per image is needed.")
        order = stratified_indices(labels.tolist(), num_samples, seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield chosen, images[chosen], labels[chosen]
    else:
        seen = 0
        if not isinstance(data, Iterable):
            raise ValueError(f"data is a {type(data).__name__}; {_KINDS}.")
        for batch in data:
            if not isinstance(batch, Mapping) and not _is_pair(batch):
                raise ValueError(
                    f"data yields {type(batch).__name__} that are no (images, labels) of tensors; {_KINDS}."
                )
            if isinstance(batch, Mapping) and not {"pixel_values", "labels"} <= set(batch):
                raise ValueError(
                    f"data yields mappings of {', '.join(map(str, batch))}; pixel_values and labels are needed."
                )
            images, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, Mapping) else batch
            if isinstance(images, Tensor) and images.ndim == 3:
                raise ValueError(
                    f"data yields single images {list(images.shape)}, each with its label; batches of them are needed, "
                    "such as torch.utils.data.DataLoader(data, batch_size=128) makes."
                )
            if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
                raise ValueError(
                    f"data yields images that are a {type(images).__name__} with labels that are a "
                    f"{type(labels).__name__}; {_KINDS}."
                )
            take = len(images) if num_samples is None else min(len(images), num_samples - seen)
            if take == 0:
                break
            yield list(range(seen, seen + take)), images[:take], labels[:take]
            seen += take


def count_images(data: Any, num_samples: int | None) -> int | None:
    """Number of images to come, where it can be known."""
    from datasets import Dataset

    if _is_batch(data):
        data = data["pixel_values"]
    elif _is_pair(data):
        data = data[0]
    elif not isinstance(data, Dataset):
        return num_samples
    return len(data) if num_samples is None else min(num_samples, len(data))


def _is_batch(data: Any) -> bool:
    return isinstance(data, Mapping) and all(isinstance(data.get(key), Tensor) for key in ("pixel_values", "labels"))


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor)


def stratified_indices(labels: Sequence[int], num_samples: int | None, seed: int) -> list[int]:
    """A stratified random subset drawn with `seed`; all, in their order, if there are no more."""
    if num_samples is None or num_samples >= len(labels):
        return list(range(len(labels)))
    return [int(index) for index in stratified_order(labels, seed)[:num_samples]]

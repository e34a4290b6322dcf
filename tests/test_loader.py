"""Batches out of the memory-mapped file: the same as row by row, in bytes, and fast."""

import pickle
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from test_data import animals, image_dataset, random_images, save
from torch import nn
from torch.utils.data import DataLoader

from hf_mrpf import MRPFConfig, MRPFTrainer, ObjectiveOutput
from hf_mrpf.data import load_image_data
from hf_mrpf.loader import PixelRows, as_float, batches, collate_pixels, with_index
from hf_mrpf.pixels import as_pixel_dataset

FLOATS = Features({"pixel_values": Array3D((3, 4, 4), "float32"), "labels": ClassLabel(num_classes=3)})


def floats() -> Dataset:
    values = np.random.default_rng(0).random((9, 3, 4, 4), np.float32)
    return as_pixel_dataset(Dataset.from_dict({"pixel_values": values, "labels": [0, 1, 2] * 3}, features=FLOATS))


def mapped(folder: Path, count: int, size: int = 8) -> Dataset:
    place = save(folder / "set", train=animals(count, size), test=animals(3, size))
    return as_pixel_dataset(load_dataset(place, cache_dir=str(folder / "cache"))["train"])


WAYS = {
    "whole": lambda dataset: dataset,
    "selection": lambda dataset: dataset.select([5, 3, 7, 7, 0, 8]),
    "stretch": lambda dataset: dataset.select(range(2, 9)),
    "selection of a stretch": lambda dataset: dataset.select(range(2, 9)).select([6, 0, 3, 1, 2]),
    "with an index": lambda dataset: with_index(dataset.select([5, 3, 7, 0, 1])),
    "joined": lambda dataset: concatenate_datasets([dataset, dataset.select([4, 2])]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["in a file", "oblong", "floats"])
def test_a_batch_is_its_rows(tmp_path, kind, way):
    dataset = {
        "in a file": lambda: mapped(tmp_path, 11),
        "oblong": lambda: as_pixel_dataset(animals(11, (6, 10))),
        "floats": floats,
    }[kind]()
    dataset = WAYS[way](dataset)
    rows = PixelRows(dataset)
    chosen = [4, 0, 3, 3]
    batch, expected = rows.__getitems__(chosen), collate_pixels(dataset.__getitems__(chosen))
    assert batch.keys() == expected.keys()
    assert batch["pixel_values"].dtype == (torch.float32 if kind == "floats" else torch.uint8)
    for name, tensor in expected.items():
        found = as_float(batch[name]) if name == "pixel_values" else batch[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
    assert len(rows) == len(dataset)


def test_rows_are_read_where_the_file_lies(tmp_path):
    dataset = mapped(tmp_path, 300, 32).select(list(range(0, 300, 2)))
    rows = PixelRows(dataset)
    content = pickle.dumps(rows)
    assert len(content) < 100_000 < 150 * 3 * 32 * 32, "a worker would be sent all pixels"
    again = pickle.loads(content).__getitems__([7, 5])
    assert torch.equal(again["pixel_values"], rows.__getitems__([7, 5])["pixel_values"])
    assert all(chunk.base is not None and not chunk.flags.writeable for chunk in rows._chunks)


def test_what_holds_no_packed_pixels_of_one_size_is_refused():
    with pytest.raises(ValueError, match="columns image, label hold no packed pixels.*as_pixel_dataset"):
        PixelRows(animals(3))
    small, large, oblong = (as_pixel_dataset(animals(3, size)) for size in (8, (8, 16), (16, 8)))
    with pytest.raises(ValueError, match="images of several sizes"):
        PixelRows(concatenate_datasets([small, large]))
    turned = PixelRows(concatenate_datasets([large, oblong]))
    with pytest.raises(ValueError, match="images of several sizes"):
        turned.__getitems__([1, 4])


def test_each_image_is_decoded_once_and_then_never_again(tmp_path, monkeypatch):
    seen: Counter = Counter()
    decode = Image.decode_example

    def counting(self, value, *args, **kwargs):
        seen[value["bytes"]] += 1
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(Image, "decode_example", counting)
    folder = save(tmp_path / "set", train=animals(90), test=animals(30, seed=1))

    def decoded(cache: str, **limits) -> tuple[int, int]:
        seen.clear()
        load_image_data(folder, cache_dir=str(tmp_path / cache), **limits)
        return sum(seen.values()), max(seen.values(), default=0)

    # The first image of each of the two splits is looked at before, for its size.
    assert decoded("all") == (90 + 30 + 2, 2)
    assert decoded("all")[0] == 2
    assert decoded("all", seed=1, max_train_samples=50)[0] == 2, "another choice comes from the same file"
    assert decoded("some", max_train_samples=20, max_eval_samples=6)[0] <= 20 + 6 + 6 + 2
    assert decoded("some", max_train_samples=60, max_eval_samples=6)[0] == 90 + 2


class Seen(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 10)
        self.images: list[torch.Tensor] = []

    def forward(self, images):
        self.images.append(images.detach().clone())
        return self.head(images.flatten(1))


def objective(model, images, labels, attack, **options):
    logits = model(images)
    return ObjectiveOutput(nn.functional.cross_entropy(logits, labels), logits)


def trainer_of(folder: Path, dataset: Dataset, collator=None, **options) -> MRPFTrainer:
    args = MRPFConfig(
        str(folder), objective=objective, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=4, max_steps=2, crop_padding=0, **options,
    )  # fmt: skip
    more = {} if collator is None else {"data_collator": collator}
    return MRPFTrainer(Seen(), args, train_dataset=dataset, **more)


def test_rows_of_other_data_sets_are_collated_or_refused_with_what_is_needed(tmp_path):
    pixels, labels = torch.rand(8, 3, 8, 8), [index % 3 for index in range(8)]
    pairs = list(zip(pixels, labels, strict=True))
    expected = collate_pixels([{"pixel_values": image, "labels": label} for image, label in pairs])
    assert torch.equal(expected["pixel_values"], pixels) and expected["labels"].tolist() == labels
    for rows in (
        [{"pixel_values": image.numpy(), "label": label} for image, label in pairs],
        [{"pixel_values": image.double().numpy(), "labels": np.int64(label)} for image, label in pairs],
        [{"pixel_values": image.tolist(), "labels": torch.tensor(label)} for image, label in pairs],
    ):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in collate_pixels(rows).items())
    for given, message in (
        (torch.utils.data.TensorDataset(pixels, torch.tensor(labels)), "no columns: it is a tuple"),
        ([{"pixel_values": image} for image in pixels], "the columns pixel_values; pixel_values and labels are needed"),
        (animals(8).to_iterable_dataset(), "the columns image, label; .*not of one that streams"),
    ):
        with pytest.raises(ValueError, match=f"A sample has {message}"):
            trainer_of(tmp_path, given).train()
        with pytest.raises(ValueError, match=f"A sample has {message}"):
            trainer_of(tmp_path, given).evaluate(given)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_sees_the_images_in_the_order_of_the_loader_of_rows(tmp_path, workers):
    dataset = mapped(tmp_path, 30)
    seen = []
    for collator in (None, lambda rows: collate_pixels(rows)):  # the second is the user's own, for rows
        trainer = trainer_of(tmp_path, dataset, collator, horizontal_flip=False, dataloader_num_workers=workers)
        trainer.model.images.clear()  # the first was shown when the classes were checked
        trainer.train()
        seen.append(torch.stack(trainer.model.images))
    assert torch.equal(*seen)
    assert seen[0].dtype == torch.float32 and 0 < seen[0].max() <= 1
    everything = {image.numpy().tobytes() for image in torch.cat([images for images, _ in batches(dataset, 30)])}
    assert {image.numpy().tobytes() for image in seen[0].flatten(0, 1)} <= everything
    assert next(iter(trainer_of(tmp_path, dataset).get_train_dataloader()))["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize(("given", "mirrors"), [(None, True), (False, False)])
def test_training_mirrors_what_the_classes_allow(tmp_path, given, mirrors):
    animal, digit = mapped(tmp_path, 30), animals(30).cast_column("label", ClassLabel(names=list("0123456789")))
    assert not trainer_of(tmp_path, digit).horizontal_flip, "a mirrored digit is another sign"
    assert trainer_of(tmp_path, digit, horizontal_flip=True).horizontal_flip, "unless the user says so"
    trainer = trainer_of(tmp_path, animal, horizontal_flip=given)
    trainer.model.images.clear()
    trainer.train()
    seen = {image.numpy().tobytes() for image in torch.cat(trainer.model.images)}
    known = {image.numpy().tobytes() for images, _ in batches(animal, 30) for image in images}
    assert (trainer.horizontal_flip, not seen <= known) == (mirrors, mirrors)


def test_classes_without_names_are_mirrored_and_that_is_said_where_there_are_ten(tmp_path, caplog):
    numbers = image_dataset(random_images(30), [row % 10 for row in range(30)], names="0123456789")
    plain = numbers.cast_column("label", Value("int64"))
    assert trainer_of(tmp_path, plain).horizontal_flip
    assert "digits need horizontal_flip=False" in caplog.text
    data = load_image_data(save(tmp_path / "set", train=plain, test=plain), cache_dir=str(tmp_path / "cache"))
    assert data.class_names == list("0123456789")
    assert trainer_of(tmp_path, data.train.select(range(20))).horizontal_flip, "decoded and cut before"
    caplog.clear()
    assert not trainer_of(tmp_path, numbers).horizontal_flip
    assert "digits" not in caplog.text


def test_loading_is_fast():
    values = np.random.default_rng(0).integers(0, 256, (4096, 3, 32, 32), dtype=np.uint8)
    header = struct.pack("<4H", 1, 3, 32, 32)
    features = Features({"pixel_values": Value("binary"), "labels": ClassLabel(num_classes=3)})
    columns = {"pixel_values": [header + image.tobytes() for image in values], "labels": [0] * len(values)}
    pixels = as_pixel_dataset(Dataset.from_dict(columns, features=features))
    loader = DataLoader(PixelRows(pixels), batch_size=128, shuffle=True, collate_fn=collate_pixels)

    def in_batches() -> int:
        return sum(len(as_float(batch["pixel_values"])) for batch in loader)

    def row_by_row() -> int:
        return sum(len(pixels[index]["pixel_values"]) > 0 for index in range(4096))

    ratios = []
    for _ in range(3):
        seconds = []
        for way in (row_by_row, in_batches):
            start = time.process_time()
            assert way() == 4096
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    assert max(ratios) > 2, f"{max(ratios):.1f} times faster than row by row; 7 times were measured"

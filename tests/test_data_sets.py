"""CIFAR-10, CIFAR-100, SVHN, Tiny ImageNet and image folders: in the schema of the Hub, made here, and real samples."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from test_data import DIGIT_NAMES, image_keys, pixels_of, random_images, save

from hf_mrpf import MRPFConfig
from hf_mrpf.augmentation import mirror_keeps_class
from hf_mrpf.data import load_image_data, stratified_order
from hf_mrpf.stages import settle_augmentation

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclass
class Schema:
    """A data set as the Hub has it: columns, class names and splits; and what must be made of it."""

    config: str
    image: str
    labels: dict[str, list[str]]
    splits: dict[str, int]
    size: int
    test: str = "test"
    flip: bool = True
    label: str = "label"
    padding: int = field(init=False)

    def __post_init__(self):
        self.padding = self.size // 8


HUB = {
    "cifar10": Schema("plain_text", "img", {"label": CIFAR10}, {"train": 60, "test": 20}, 32),
    "cifar100": Schema(
        "cifar100",
        "img",
        {"fine_label": [f"fine {number}" for number in range(100)], "coarse_label": [f"coarse {n}" for n in range(20)]},
        {"train": 60, "test": 20},
        32,
        label="fine_label",
    ),
    "svhn": Schema(
        "cropped_digits", "image", {"label": DIGIT_NAMES}, {"train": 60, "test": 20, "extra": 40}, 32, flip=False
    ),
    "tiny-imagenet": Schema(
        "default", "image", {"label": [f"n{row:08d}" for row in range(200)]}, {"train": 60, "valid": 20}, 64, "valid"
    ),
}  # fmt: skip


def made(schema: Schema, split: str) -> Dataset:
    """Images and labels of a split, all of its own."""
    seed, count = list(schema.splits).index(split), schema.splits[split]
    features = Features(
        {schema.image: Image(), **{column: ClassLabel(names=names) for column, names in schema.labels.items()}}
    )
    generator = np.random.default_rng(seed)
    labels = {column: generator.integers(0, len(names), count).tolist() for column, names in schema.labels.items()}
    return Dataset.from_dict({schema.image: random_images(count, schema.size, seed), **labels}, features=features)


def as_on_the_hub(folder: Path, schema: Schema) -> str:
    files = "\n".join(f"  - {{split: {split}, path: data/{split}-*}}" for split in schema.splits)
    readme = f"---\nconfigs:\n- config_name: {schema.config}\n  data_files:\n{files}\n"
    # SVHN has a second configuration, so that one must be named.
    if schema.config == "cropped_digits":
        readme += "- config_name: full_numbers\n  data_files:\n  - {split: train, path: data/train-*}\n"
    return save(folder, readme + "---\n", **{split: made(schema, split) for split in schema.splits})


@pytest.fixture
def load(tmp_path):
    """`load_image_data` with a cache of its own."""
    return lambda *args, **options: load_image_data(*args, cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize("name", HUB)
def test_the_schema_of_the_hub_is_read(tmp_path, load, name):
    schema = HUB[name]
    data = load(as_on_the_hub(tmp_path / name, schema), schema.config if name == "svhn" else None)
    assert data.class_names == schema.labels[schema.label]
    assert (data.image_size, data.flip, data.name) == (schema.size, schema.flip, name)
    assert data.description["image_column"] == schema.image
    assert data.description["label_column"] == schema.label
    assert data.description["splits"] == {
        "train": {"from": "train", "num_images": 54},
        "validation": {"from": "train", "num_images": 6},
        "test": {"from": schema.test, "num_images": 20},
    }
    source = made(schema, schema.test)
    assert data.test["labels"][:] == source[schema.label]
    assert torch.equal(data.test[3]["pixel_values"], torch.tensor(np.array(source[3][schema.image])).permute(2, 0, 1))
    # Normalisation is that of the images that train: neither validation nor test is in it.
    pixels = pixels_of(data.train).double()
    assert np.allclose(data.image_mean, pixels.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(data.image_std, pixels.std((0, 2, 3), correction=0), atol=1e-6)
    args = MRPFConfig(str(tmp_path / "run"), use_cpu=True)
    settle_augmentation(data, args)
    assert (args.crop_padding, args.horizontal_flip) == (schema.padding, schema.flip)


def test_labels_of_cifar100_can_be_chosen(tmp_path, load, caplog):
    folder = as_on_the_hub(tmp_path / "cifar100", HUB["cifar100"])
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert caplog.messages == ["Labels: fine_label (100 classes), not coarse_label (20); name the column to change it."]
    coarse = load(folder, label_column_name="coarse_label")
    assert coarse.class_names == HUB["cifar100"].labels["coarse_label"]
    assert coarse.test["labels"][:] == made(HUB["cifar100"], "test")["coarse_label"]


def test_svhn_needs_its_configuration_and_trains_on_extra_where_asked(tmp_path, load):
    folder = as_on_the_hub(tmp_path / "svhn", HUB["svhn"])
    with pytest.raises(ValueError, match=r"cannot be loaded: Config name is missing.*cropped_digits"):
        load(folder)
    with pytest.raises(ValueError, match=r"svhn has no test split .*; it has train\."):
        load(folder, "full_numbers")
    plain = load(folder, "cropped_digits")
    both = load(folder, "cropped_digits", train_split="train+extra")
    assert both.description["splits"] == {
        "train": {"from": "train+extra", "num_images": 90},
        "validation": {"from": "train+extra", "num_images": 10},
        "test": {"from": "test", "num_images": 20},
    }
    train, extra = (set(image_keys_of(HUB["svhn"], split)) for split in ("train", "extra"))
    assert set(image_keys(both.train)) | set(image_keys(both.validation)) == train | extra
    assert set(image_keys(plain.train)) | set(image_keys(plain.validation)) == train
    assert image_keys(both.test) == image_keys(plain.test)
    assert len(load(folder, "cropped_digits", train_split="extra").train) == 36
    with pytest.raises(ValueError, match=r"svhn has no split more; it has train, test, extra\."):
        load(folder, "cropped_digits", train_split="train+more")
    with pytest.raises(ValueError, match="names a split twice"):
        load(folder, "cropped_digits", train_split="train+train")
    with pytest.raises(ValueError, match="has no test split"):
        load(folder, "cropped_digits", train_split="train+test")


def image_keys_of(schema: Schema, split: str) -> list[bytes]:
    pixels = [np.asarray(image).transpose(2, 0, 1) for image in made(schema, split)[schema.image]]
    return [(torch.tensor(image).float() / 255).numpy().tobytes() for image in pixels]


@pytest.mark.parametrize("names", [["cat", "dog", "eel"], DIGIT_NAMES], ids=["animals", "digits"])
def test_a_folder_of_image_folders(tmp_path, load, names):
    for split, count in (("train", 30), ("test", 10)):
        for row, image in enumerate(random_images(count, 16, seed=count)):
            (place := tmp_path / "mine" / split / names[row % len(names)]).mkdir(parents=True, exist_ok=True)
            image.save(place / f"{row}.png")
    data = load(str(tmp_path / "mine"))
    assert data.class_names == names
    assert [len(part) for part in (data.train, data.validation, data.test)] == [27, 3, 10]
    assert data.flip == (names != DIGIT_NAMES)
    sources = random_images(10, 16, seed=10)
    keys = {np.asarray(image).transpose(2, 0, 1).tobytes(): row % len(names) for row, image in enumerate(sources)}
    assert [keys[row["pixel_values"].numpy().tobytes()] for row in data.test] == data.test["labels"][:]


# ---- Mirroring ------------------------------------------------------------------------------------------------------


def test_only_the_ten_digits_are_not_mirrored():
    assert not mirror_keeps_class(DIGIT_NAMES) and not mirror_keeps_class(DIGIT_NAMES[::-1])
    assert mirror_keeps_class(CIFAR10) and mirror_keeps_class(DIGIT_NAMES[:9]) and mirror_keeps_class(None)


@pytest.mark.parametrize("given", [True, False])
def test_what_the_user_says_of_augmentation_holds(tmp_path, caplog, given):
    args = MRPFConfig(str(tmp_path), use_cpu=True, horizontal_flip=given, crop_padding=3)
    with caplog.at_level(logging.INFO, logger="hf_mrpf"):
        settle_augmentation(load_image_data("digits", max_train_samples=20, max_eval_samples=10), args)
    assert (args.crop_padding, args.horizontal_flip) == (3, given)
    (said,) = caplog.messages
    assert "[data] name=digits classes=10 image_size=16 train=20 validation=10 test=10 crop_padding=3" in said
    assert said.lower().endswith(f"horizontal_flip={given}".lower())


# ---- Real data sets -------------------------------------------------------------------------------------------------
def test_cifar10_folder(test_data, load, tmp_path):
    data = load(str(test_data / "cifar10"), max_train_samples=500, max_eval_samples=100)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [500, 100, 100]
    assert all(set(np.bincount(part["labels"][:])) == {len(part) // 10} for part in (data.train, data.test))
    assert (data.image_size, data.name, data.flip) == (32, "cifar10", True)
    assert data.class_names[:2] == ["airplane", "automobile"]
    assert str(test_data) not in str(data.description)
    source = load_dataset(str(test_data / "cifar10"), cache_dir=str(tmp_path / "cache"))["test"]
    row = stratified_order(source["label"][:], 42)[7]
    expected = torch.from_numpy(np.array(source[int(row)]["img"])).permute(2, 0, 1)
    assert torch.equal(data.test[7]["pixel_values"], expected)
    assert data.test[7]["labels"] == source[int(row)]["label"]


def test_cifar100_sample_takes_the_finest_labels(test_data, load, caplog):
    with caplog.at_level(logging.WARNING):
        data = load(str(test_data / "cifar100-sample"), max_train_samples=100, max_eval_samples=50)
    assert len(data.class_names) == 100
    assert data.description["label_column"] == "fine_label"
    assert caplog.messages == ["Labels: fine_label (100 classes), not coarse_label (20); name the column to change it."]
    coarse = load(str(test_data / "cifar100-sample"), label_column_name="coarse_label", max_train_samples=100)
    assert (len(coarse.class_names), len(coarse.validation), len(coarse.test)) == (20, 111, 916)


def test_tiny_imagenet_sample_tests_on_its_validation_split(test_data, load):
    data = load(str(test_data / "tiny-imagenet-sample"), image_size=32, max_train_samples=404, max_eval_samples=202)
    assert data.description["splits"] == {
        "train": {"from": "train", "num_images": 404},
        "validation": {"from": "train", "num_images": 202},
        "test": {"from": "validation", "num_images": 202},
    }
    assert data.image_size == 32
    assert data.train[0]["pixel_values"].shape == (3, 32, 32)
    assert np.bincount(data.test["labels"][:]).tolist() == [1] * 202

"""Loading, decoding, choosing and augmenting images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PillowImage
from torch.utils.data import DataLoader

from hf_mrpf.data import (
    as_pixel_dataset,
    augment,
    batches,
    calibration_batches,
    collate_pixels,
    digits_dataset,
    load_image_data,
    stratified_order,
    stratified_split,
    stratified_subset,
    with_index,
)

DIGIT_NAMES = [str(digit) for digit in range(10)]
ANIMALS = ["cat", "dog", "eel"]


def random_images(count: int, size: int | tuple[int, int] = 8, seed: int = 0) -> list[PillowImage.Image]:
    height, width = (size, size) if isinstance(size, int) else size
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [PillowImage.fromarray(image) for image in pixels]


def image_dataset(images, labels, names=ANIMALS, image="image", label="label") -> Dataset:
    features = Features({image: Image(), label: ClassLabel(names=list(names))})
    return Dataset.from_dict({image: images, label: labels}, features=features)


def animals(count: int, size: int | tuple[int, int] = 8, seed: int = 0) -> Dataset:
    return image_dataset(random_images(count, size, seed), [row % 3 for row in range(count)])


def save(folder: Path, readme: str | None = None, **splits: Dataset) -> str:
    for split, dataset in splits.items():
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return str(folder)


@pytest.fixture
def load(tmp_path):
    """`load_image_data` with a cache of its own."""
    return lambda *args, **options: load_image_data(*args, cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture(scope="module")
def digits():
    return load_image_data()


def pixels_of(dataset: Dataset) -> torch.Tensor:
    return torch.cat([images for images, _ in batches(dataset, 256)])


def image_keys(dataset: Dataset) -> list[bytes]:
    return [image.numpy().tobytes() for image in pixels_of(dataset)]


# ---- The embedded digits --------------------------------------------------------------------------------------------


def test_digits_are_split_stratified_and_disjoint(digits):
    parts = {"train": digits.train, "validation": digits.validation, "test": digits.test}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1197, "validation": 100, "test": 500}
    whole = np.concatenate([part["labels"][:] for part in parts.values()])
    for part in parts.values():
        share = np.bincount(part["labels"][:], minlength=10)
        assert np.all(np.abs(share - np.bincount(whole) * len(part) / len(whole)) <= 1)
    from sklearn.datasets import load_digits

    duplicates = 1797 - len({image.tobytes() for image in load_digits().images})
    assert len({key for part in parts.values() for key in image_keys(part)}) == 1797 - duplicates
    assert (digits.class_names, digits.image_size, digits.name, digits.flip) == (DIGIT_NAMES, 16, "digits", False)


def test_digits_look_like_any_other_data_set():
    splits = digits_dataset()
    assert isinstance(splits, DatasetDict)
    assert splits["test"].features == Features({"image": Image(), "label": ClassLabel(names=DIGIT_NAMES)})
    image = splits["train"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (16, 16))


def test_digits_are_the_same_whatever_the_seed(digits):
    other = load_image_data("digits", seed=5)
    assert other.description["splits"]["validation"] == {"from": "validation", "num_images": 100}
    assert image_keys(other.test) == image_keys(digits.test)


def test_statistics_are_those_of_the_training_pixels(digits):
    pixels = pixels_of(digits.train).double()
    assert np.allclose(digits.image_mean, pixels.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(digits.image_std, pixels.std((0, 2, 3), correction=0), atol=1e-6)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_channel_is_only_shifted(tmp_path, load, value):
    pixels = [np.asarray(image).copy() for image in random_images(30)]
    for image in pixels:
        image[..., 2] = value
    images = image_dataset([PillowImage.fromarray(image) for image in pixels], [0, 1, 2] * 10)
    data = load(save(tmp_path / "set", train=images, test=images))
    assert data.image_std[2] == 1 and max(data.image_std[:2]) < 0.5
    assert data.image_mean[2] == pytest.approx(value / 255, abs=1e-6)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="install scikit-learn or name a data set"):
        load_image_data()


# ---- Splits and limits ----------------------------------------------------------------------------------------------


def test_validation_is_cut_from_train_disjoint_and_before_the_limit(tmp_path, load):
    folder = save(tmp_path / "set", train=animals(90), test=animals(30, seed=1))
    data = load(folder)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [81, 9, 30]
    assert np.bincount(data.validation["labels"][:]).tolist() == [3, 3, 3]
    train, validation = image_keys(data.train), image_keys(data.validation)
    assert set(train) | set(validation) == set(image_keys(as_pixel_dataset(animals(90))))
    limited = load(folder, max_train_samples=30, max_eval_samples=6)
    assert np.bincount(limited.train["labels"][:]).tolist() == [10, 10, 10]
    assert image_keys(limited.train) == train[:30]
    assert image_keys(limited.validation) == validation[:6]
    assert np.bincount(limited.test["labels"][:]).tolist() == [2, 2, 2]
    assert image_keys(load(folder, max_train_samples=30).validation) == validation
    assert image_keys(load(folder, seed=1).validation) != validation


def test_own_validation_is_used_where_there_is_a_test_split_too(tmp_path, load):
    folder = save(tmp_path / "set", train=animals(9), test=animals(6, seed=1), validation=animals(12, seed=2))
    data = load(folder, max_eval_samples=9)
    assert {part: split["from"] for part, split in data.description["splits"].items()} == {
        "train": "train",
        "validation": "validation",
        "test": "test",
    }
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 9, 6]


def test_integer_labels_are_taken_from_a_column_called_label(tmp_path, load):
    def plain(count, seed):
        return animals(count, seed=seed).cast_column("label", Value("int64"))

    folder = save(tmp_path / "set", train=plain(30, 0), test=plain(6, 1))
    data = load(folder)
    assert data.class_names == ["0", "1", "2"]
    assert data.train.features["labels"].names == ["0", "1", "2"]
    folder = save(
        tmp_path / "renamed",
        train=plain(30, 0).rename_column("label", "kind"),
        test=plain(6, 1).rename_column("label", "kind"),
    )
    assert load(folder, label_column_name="kind").class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no column of class labels was found: the columns are image, kind"):
        load(folder)


# ---- Bad data sets --------------------------------------------------------------------------------------------------


def test_unknown_names_say_what_to_do(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no data set folder \.\./shared/nothing"):
        load("../shared/nothing")
    with pytest.raises(OSError, match=r"uoft-cs/cifar10 cannot be loaded: Couldn't reach.*without a network only what"):
        load("uoft-cs/cifar10")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="doesn't contain any data files"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no configurations, got dataset_config_name='plain'"):
        load("digits", "plain")


def test_damaged_file_is_named(tmp_path, load):
    folder = save(tmp_path / "set", train=animals(30), test=animals(6))
    path = tmp_path / "set/data/train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"set cannot be loaded: .*Parquet"):
        load(folder)


@pytest.mark.parametrize("value", [0, -1, True, 2.0])
@pytest.mark.parametrize("argument", ["image_size", "max_train_samples", "max_eval_samples"])
def test_counts_must_be_positive_whole_numbers(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} is {value!r}; a whole number of 1 or more"):
        load_image_data(**{argument: value})


def test_bad_splits(tmp_path, load):
    train, test = animals(30), animals(6)
    with pytest.raises(ValueError, match=r"has no split train; it has test\."):
        load(save(tmp_path / "a", test=test))
    with pytest.raises(ValueError, match=r"b cannot be loaded: .*test.* corresponds to no data\."):
        load(save(tmp_path / "b", train=train, test=test.select([])))
    with pytest.raises(ValueError, match="9 training images are too few"):
        load(save(tmp_path / "c", train=animals(9), test=test))
    with pytest.raises(ValueError, match=r"8x8 in train, 12x12 in test; give image_size"):
        load(save(tmp_path / "e", train=train, test=animals(6, 12)))
    wide = save(tmp_path / "f", train=animals(30, (8, 12)), test=animals(6, (8, 12)))
    with pytest.raises(ValueError, match=r"must be square and of one size, found 8x12 in train, 8x12 in test"):
        load(wide)
    assert load(wide, image_size=10).train[0]["pixel_values"].shape == (3, 10, 10)


def test_bad_columns():
    dataset = animals(6)
    with pytest.raises(ValueError, match="there is no column img; the columns are image, label"):
        as_pixel_dataset(dataset, image_column_name="img")
    with pytest.raises(ValueError, match="0 image columns were found and one is needed: the columns are label"):
        as_pixel_dataset(dataset.remove_columns("image"))
    with pytest.raises(ValueError, match="2 image columns were found"):
        as_pixel_dataset(
            dataset.add_column("mask", dataset.with_format("arrow")[:]["image"].to_pylist(), feature=Image())
        )
    words = Dataset.from_dict({"image": random_images(2), "kind": ["cat", "dog"]})
    with pytest.raises(ValueError, match=r"column kind is Value\('string'\).*class_encode_column"):
        as_pixel_dataset(words, label_column_name="kind")
    with pytest.raises(ValueError, match="the data set is empty"):
        as_pixel_dataset(dataset.select([]))
    with pytest.raises(ValueError, match="has a transform set"):
        as_pixel_dataset(dataset.with_transform(lambda batch: batch))


def test_bad_labels_name_row_value_and_classes(tmp_path, load):
    # ClassLabel checks names when it encodes, not what a file holds.
    test = image_dataset(random_images(6), [0, 1, 2, -1, 1, -1])
    with pytest.raises(
        ValueError,
        match=r"split test: label -1 in row 3 of column label is out of range: 3 classes .* 0 to 2 \(2 such rows\)\. "
        "Name another split to measure on as test_split",
    ):
        load(save(tmp_path / "set", train=animals(30), test=test))
    with pytest.raises(ValueError, match="row 2 has no label in column label"):
        as_pixel_dataset(image_dataset(random_images(3), [0, 1, None]))
    huge = Dataset.from_dict({"image": random_images(2), "label": [0, 10**12]})
    with pytest.raises(ValueError, match=r"label 1000000000000 in row 1 .* out of range"):
        as_pixel_dataset(huge)


def test_a_labelled_split_stands_in_for_a_test_split_without_labels(tmp_path, load):
    hidden = image_dataset(random_images(6), [-1] * 6)
    folder = save(tmp_path / "set", train=animals(30), validation=animals(9), test=hidden)
    data = load(folder, test_split="validation")
    assert data.description["splits"] == {
        "train": {"from": "train", "num_images": 27},
        "validation": {"from": "train", "num_images": 3},
        "test": {"from": "validation", "num_images": 9},
    }
    for split, message in (("dev", "has no split dev; it has train"), ("train", "train_split is .train")):
        with pytest.raises(ValueError, match=message):
            load(folder, test_split=split)


def test_an_image_that_pillow_refuses_for_its_size_is_named_by_its_row(monkeypatch):
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match="the image in row 0 cannot be decoded: Image size"):
        as_pixel_dataset(animals(3))


def test_broken_images_are_named_by_their_row_of_the_split(tmp_path, load):
    encoded = animals(60).cast_column("image", Image(decode=False))["image"][:]
    for row in (0, 41, 50):
        broken = list(encoded)
        broken[row] = {"bytes": encoded[row]["bytes"][:60], "path": None}
        train = image_dataset(broken, [index % 3 for index in range(60)])
        with pytest.raises(ValueError, match=rf"the image in row {row} cannot be decoded"):
            as_pixel_dataset(train)
    # Row 50 in the file, wherever the stratified choice has put it.
    folder = save(tmp_path / "set", train=animals(30), test=train)
    seed = next(seed for seed in range(20) if 50 in stratified_order(train["label"][:], seed)[:15])
    with pytest.raises(ValueError, match="Data set set, split test: the image in row 50 cannot be decoded"):
        load(folder, seed=seed, max_eval_samples=15)
    with pytest.raises(ValueError, match="row 1 has no image"):
        as_pixel_dataset(image_dataset([random_images(1)[0], None], [0, 1]))


# ---- Pixel data sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, (6, 10)])
def test_pixels_are_the_images(size):
    dataset = animals(7, size)
    pixels = as_pixel_dataset(dataset)
    assert pixels.column_names == ["pixel_values", "labels"]
    assert pixels.features["labels"] == dataset.features["label"]
    for row in (0, 6):
        assert pixels[row]["pixel_values"].dtype == torch.uint8
        expected = torch.from_numpy(np.array(dataset[row]["image"])).permute(2, 0, 1)
        assert torch.equal(pixels[row]["pixel_values"], expected)
        assert pixels[row]["labels"] == dataset[row]["label"]
    assert pixels["labels"][:] == dataset["label"][:]
    assert image_keys(as_pixel_dataset(dataset.with_format("torch"))) == image_keys(pixels)


def test_decoded_once_and_found_again_in_the_cache(tmp_path):
    folder, cache = save(tmp_path / "set", train=animals(20)), str(tmp_path / "cache")
    source = load_dataset(folder, cache_dir=cache)["train"]
    first = as_pixel_dataset(source)
    (cached,) = first.cache_files
    written = Path(cached["filename"]).stat().st_mtime_ns
    again = as_pixel_dataset(load_dataset(folder, cache_dir=cache)["train"])
    assert again.cache_files == first.cache_files
    assert Path(cached["filename"]).stat().st_mtime_ns == written
    assert as_pixel_dataset(source, 4).cache_files != first.cache_files
    assert image_keys(as_pixel_dataset(first)) == image_keys(first)


def test_every_kind_of_image_becomes_rgb():
    colour = random_images(1)[0]
    grey, palette, clear = colour.convert("L"), colour.convert("P"), colour.convert("RGBA")
    clear.putalpha(3)
    pixels = as_pixel_dataset(image_dataset([grey, palette, clear, colour], [0, 1, 2, 0]))
    shown = [np.array(image.convert("RGB")) for image in (grey, palette, colour, colour)]
    for row, image in enumerate(shown):
        assert torch.equal(pixels[row]["pixel_values"], torch.from_numpy(image).permute(2, 0, 1))
    deep = PillowImage.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"row 1 has mode I;16; 8 bits a channel are needed"):
        as_pixel_dataset(image_dataset([colour, deep], [0, 1]))


def test_images_are_resized_only_where_the_size_differs():
    small, large = random_images(1, 8)[0], random_images(1, (16, 24))[0]
    with pytest.raises(ValueError, match=r"several sizes \(8x8 in the first row, 16x24 in row 1\); give image_size"):
        as_pixel_dataset(image_dataset([small, large], [0, 1]))
    pixels = as_pixel_dataset(image_dataset([small, large], [0, 1]), image_size=8)
    assert torch.equal(pixels[0]["pixel_values"], torch.from_numpy(np.array(small)).permute(2, 0, 1))
    source = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(source, (8, 8), mode="bilinear", antialias=True)
    assert (pixels[1]["pixel_values"] - expected[0]).abs().max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_pixel_values_are_taken_as_they_are(dtype):
    values = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4))
    values = values / 255 if "float" in dtype else values
    features = Features({"pixel_values": Array3D((3, 4, 4), dtype), "labels": ClassLabel(names=ANIMALS)})
    dataset = Dataset.from_dict({"pixel_values": values, "labels": [0, 1, 2, 0, 1]}, features=features)
    pixels = as_pixel_dataset(dataset)
    assert pixels[0]["pixel_values"].dtype == (torch.float32 if "float" in dtype else torch.uint8)
    images, labels = next(batches(pixels, 5))
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert np.allclose(images, values if "float" in dtype else values / 255, atol=1e-7)


def test_bad_pixel_values():
    def dataset(values):
        return Dataset.from_dict({"pixel_values": values, "label": [0] * len(values)})

    with pytest.raises(ValueError, match=r"shape \[1, 4, 4\]; \[3, H, W\] is needed; repeat the grey channel"):
        as_pixel_dataset(dataset(np.zeros((2, 1, 4, 4)).tolist()))
    with pytest.raises(ValueError, match=r"integers run from 0 to 300; 0 to 255 are needed"):
        as_pixel_dataset(dataset([np.zeros((3, 4, 4), int).tolist(), np.full((3, 4, 4), 300).tolist()]))
    with pytest.raises(ValueError, match=r"floats run from -2 to 0; \[0, 1\] is needed.*model normalises"):
        as_pixel_dataset(dataset([np.zeros((3, 4, 4)).tolist(), np.full((3, 4, 4), -2.0).tolist()]))
    with pytest.raises(ValueError, match="floats run from nan"):
        as_pixel_dataset(dataset(np.full((2, 3, 4, 4), np.nan).tolist()))
    with pytest.raises(ValueError, match="arrays of several shapes"):
        as_pixel_dataset(dataset([np.zeros((3, 4, 4)).tolist(), np.zeros((3, 5, 4)).tolist()]))
    with pytest.raises(ValueError, match=r"shape \[3, 4, 4\], image_size is 8: resize the images first"):
        as_pixel_dataset(dataset(np.zeros((2, 3, 4, 4)).tolist()), 8)
    with pytest.raises(ValueError, match=r"pixels were decoded to \[3, 8, 8\]; for 4 pixels give the images"):
        as_pixel_dataset(as_pixel_dataset(animals(3)), 4)


def test_pixels_survive_what_is_done_to_a_data_set(tmp_path):
    from datasets import concatenate_datasets, load_from_disk

    pixels = as_pixel_dataset(animals(12))
    expected = pixels_of(pixels)
    chosen = pixels.select([5, 3, 7])
    assert torch.equal(pixels_of(as_pixel_dataset(chosen)), expected[[5, 3, 7]])
    pixels.with_format(None).save_to_disk(str(tmp_path / "saved"))
    assert torch.equal(pixels_of(as_pixel_dataset(load_from_disk(str(tmp_path / "saved")))), expected)
    joined = concatenate_datasets([pixels, chosen]).with_format(None)
    assert torch.equal(collate_pixels(joined.__getitems__([0, 12]))["pixel_values"], expected[[0, 5]])
    # datasets rewrites a selection as nested lists here.
    flat = chosen.flatten_indices()
    assert torch.equal(collate_pixels(flat.__getitems__([0, 2]))["pixel_values"], expected[[5, 7]])
    assert torch.equal(pixels_of(as_pixel_dataset(flat)), expected[[5, 3, 7]])


def test_collate_and_loader():
    pixels = as_pixel_dataset(animals(10))
    indexed = with_index(pixels.select([4, 2, 9, 0]))
    assert indexed.features["pixel_values"] == Value("binary"), "copied as bytes, not as nested lists"
    loader = DataLoader(indexed, batch_size=3, collate_fn=collate_pixels, num_workers=0)
    first, last = list(loader)
    assert first["index"].tolist() + last["index"].tolist() == [0, 1, 2, 3]
    assert first["labels"].dtype == torch.int64
    assert first["labels"].tolist() == [1, 2, 0]
    assert torch.equal(first["pixel_values"], pixels_of(pixels)[[4, 2, 9]])
    assert first["pixel_values"].dtype == torch.float32
    assert "index" not in collate_pixels(pixels.__getitems__([0]))


def test_batches_follow_the_indices():
    pixels = as_pixel_dataset(animals(10))
    everything = pixels_of(pixels)
    found = list(batches(pixels, 4, [9, 1, 3, 0, 2]))
    assert [len(labels) for _, labels in found] == [4, 1]
    assert torch.equal(torch.cat([images for images, _ in found]), everything[[9, 1, 3, 0, 2]])
    assert torch.cat([labels for _, labels in found]).tolist() == [0, 1, 0, 0, 2]
    assert [len(labels) for _, labels in batches(pixels, 4)] == [4, 4, 2]
    assert 0 <= everything.min() < 0.1 < 0.9 < everything.max() <= 1


def test_trainer_reads_pixel_data_sets(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3 * 16 * 16, 10)
            self.shapes = set()

        def forward(self, pixel_values, labels=None):
            self.shapes.add(tuple(pixel_values.shape))
            logits = self.head(pixel_values.flatten(1))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = load_image_data(max_train_samples=64, max_eval_samples=32)
    model = Linear()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        max_steps=4,
        learning_rate=0.01,
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, collate_pixels, data.train, data.validation)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert (32, 3, 16, 16) in model.shapes


# ---- Choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50, 50, 50], [80, 15, 5], [1, 2, 97], [40]])
def test_every_prefix_and_stretch_of_the_order_is_stratified(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = stratified_order(labels, 3)
    assert sorted(order) == list(range(len(labels)))
    shares = np.array(sizes) / len(labels)
    for start in (0, 10, 23):
        for stop in range(start + 1, len(labels) + 1):
            counts = np.bincount(labels[order[start:stop]], minlength=len(sizes))
            allowed = 1 if start == 0 else 2
            assert np.all(np.abs(counts - shares * (stop - start)) <= allowed)


def test_order_depends_on_the_seed_alone():
    labels = np.arange(100) % 4
    assert np.array_equal(stratified_order(labels, 1), stratified_order(labels.tolist(), 1))
    assert not np.array_equal(stratified_order(labels, 1), stratified_order(labels, 2))


def test_subset_and_split():
    pixels = as_pixel_dataset(animals(30))
    part, rest = stratified_split(pixels, 12, seed=1)
    assert np.bincount(part["labels"][:]).tolist() == [4, 4, 4]
    assert sorted(image_keys(part) + image_keys(rest)) == sorted(image_keys(pixels))
    assert image_keys(stratified_subset(pixels, 12, seed=1)) == image_keys(part)
    assert len(stratified_subset(pixels, 2)) == 2, "fewer images than classes"
    for n in (0, 31):
        with pytest.raises(ValueError, match=rf"{n} images were asked for; the data set has 30"):
            stratified_subset(pixels, n)


def test_calibration_sets_are_stratified_and_disjoint(digits):
    sets = calibration_batches(digits.train, sets=4, size=50, seed=3)
    assert [images.shape for images, _ in sets] == [(50, 3, 16, 16)] * 4
    for _, labels in sets:
        assert (torch.bincount(labels, minlength=10) - 5).abs().max() <= 1
    keys = [image.numpy().tobytes() for images, _ in sets for image in images]
    assert len(set(keys)) == 200
    assert torch.equal(calibration_batches(digits.train, 4, 50, seed=3)[2][0], sets[2][0])
    assert not torch.equal(calibration_batches(digits.train, 4, 50, seed=4)[2][0], sets[2][0])
    with pytest.raises(ValueError, match="3 calibration sets of 128 need 384 images, the data set has 100"):
        calibration_batches(digits.validation)


# ---- Augmentation ---------------------------------------------------------------------------------------------------


def reference_augment(images, padding, flip):
    """One image at a time."""
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count)) if padding else torch.zeros(2, count, dtype=torch.int64)
    coins = torch.rand(count) if flip else torch.ones(count)
    augmented = []
    for image, down, right, coin in zip(images, *offsets.tolist(), coins.tolist(), strict=True):
        canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
        canvas[:, padding : padding + height, padding : padding + width] = image
        crop = canvas[:, down : down + height, right : right + width]
        augmented.append(crop.flip(2) if coin < 0.5 else crop)
    return torch.stack(augmented)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [None, 0, 3])
def test_augmentation_equals_a_loop_over_the_images(padding, flip):
    images = torch.rand(40, 3, 16, 24)
    before = images.clone()
    torch.manual_seed(1)
    found = augment(images, padding=padding, flip=flip)
    torch.manual_seed(1)
    expected = reference_augment(images, 2 if padding is None else padding, flip)
    assert torch.equal(found, expected)
    assert torch.equal(images, before)


def test_augmentation_reaches_every_offset_and_both_sides():
    images = torch.rand(1, 3, 8, 8).expand(400, 3, 8, 8)
    assert len({image.numpy().tobytes() for image in augment(images)}) == 3 * 3 * 2
    assert torch.equal(augment(images, padding=0, flip=False), images)

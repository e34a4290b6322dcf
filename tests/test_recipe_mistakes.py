"""What a user may get wrong with the recipes: told before it costs anything, and nothing is lost by it."""

import json
import runpy
import shutil
from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from test_train_recipe import NETWORK, PRUNING, REPOSITORY, TINY, recipe

from hf_mrpf import PrunedForImageClassification
from hf_mrpf.cli import DataArguments, ModelArguments
from hf_mrpf.data import load_image_data
from hf_mrpf.starting_point import build_model, check_default_data, check_outlives_overwriting

SMALL = ("--backbone_kwargs", json.dumps(NETWORK))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes") / "base"
    recipe("train", "--output_dir", str(folder), *TINY, *SMALL)
    return folder


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=64, max_eval_samples=20)


def functions(name: str) -> dict:
    return runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"), run_name="recipe")


def test_beginning_anew_does_not_remove_the_model_that_is_started_from(base, tmp_path):
    for place in (base, base / "stages" / "dense" / "model"):
        for name, options in (("prune", PRUNING), ("train", ("--fresh_weights",))):
            start = ("--model_name_or_path", str(place), "--overwrite_output_dir")
            with pytest.raises(ValueError, match="--overwrite_output_dir would remove .*, which this run starts from"):
                recipe(name, "--output_dir", str(base), *TINY, *options, *start)
    PrunedForImageClassification.from_pretrained(base)
    # What is not removed may be started from, and so may what lies elsewhere.
    own = shutil.copytree(base, tmp_path / "out" / "own")
    check_outlives_overwriting(str(own), str(tmp_path / "out"), True)
    check_outlives_overwriting(str(base), str(base), False)
    check_outlives_overwriting("timm/resnet18", str(base), True)


def test_a_result_that_lost_a_file_is_written_again_from_its_stages(tmp_path):
    folder = tmp_path / "base"
    options = ("--output_dir", str(folder), *TINY, *SMALL)
    recipe("train", *options)
    files = ("README.md", "robustness_report.json", "model.safetensors")
    before = {file: (folder / file).read_bytes() for file in files}
    for file in files:
        (folder / file).unlink()
        output = recipe("train", *options)
        assert "is not whole" in output and file in output and "kept from before" in output
        assert file != "model.safetensors" or (folder / file).read_bytes() == before[file]
    assert all((folder / file).is_file() for file in files)
    for file in ("robustness_report.json", "model.safetensors"):
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
        assert f"{file} is not as it was written (100 bytes)" in recipe("train", *options)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "A word of mine.")
    assert "is finished with these settings" in recipe("train", *options)
    assert "--card_note is not on its card" in recipe("train", *options, "--card_note", "Said too late.")
    shutil.rmtree(folder / "stages")
    assert "is finished with these settings" in recipe("train", *options)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing, and the stages .* are gone"):
        recipe("train", *options)


def test_figures_of_a_round_are_those_that_there_are():
    round_figures = functions("prune")["round_figures"]
    args = SimpleNamespace(load_best_model_at_end=True)
    assert round_figures({"steps": {}}, {"best": {"eval_train_robust_accuracy": 0.5}}, args) == {"trained": {}}


def test_the_card_names_the_split_that_was_measured_on(tmp_path, data):
    features = Features({"image": Image(), "label": ClassLabel(names=list("abcdefghij"))})
    (tmp_path / "own").mkdir()
    for part in ("train", "validation", "test"):
        split = getattr(data, part)
        images = [image.permute(1, 2, 0).numpy() for image in split["pixel_values"][:]]
        rows = Dataset.from_dict({"image": images, "label": split["labels"][:]}, features=features)
        rows.to_parquet(tmp_path / "own" / f"{part}-00000-of-00001.parquet")
    folder = tmp_path / "out"
    network = ("--model_name_or_path", "timm/resnet18", "--small_images", *SMALL)
    short = ("--base_epochs", "1", "--max_steps", "1", "--allocation", "uniform")
    measured = ("--dataset_name", str(tmp_path / "own"), "--test_split", "validation")
    recipe("prune", "--output_dir", str(folder), *TINY, *PRUNING, *network, *short, *measured)
    card = ModelCard.load(folder / "README.md")
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "own, split `validation`" in card.content and "on the validation images" in card.content
    shown = functions("evaluate")["shown_split"]
    assert shown("test", "validation") == "split validation"
    assert shown("validation", "train") == "validation images of the split train"


def test_a_run_of_prune_alone_has_a_dense_parent_beside_it(base, tmp_path):
    dense_stage = functions("export")["dense_stage"]
    assert dense_stage(str(base), None) is None  # that of a training is the model itself
    assert dense_stage(str(tmp_path), None) is None
    record = {"shapes": {"backbone.conv1.weight": [4, 3, 3, 3]}, "attrs": {}}
    assert dense_stage(str(base), record) == str(base / "stages" / "dense" / "model")


def test_a_model_of_other_things_is_not_taken_to_the_embedded_digits(base, tmp_path):
    sizes = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "small_images": True}
    names = ["airplane", "bird", "cat"]
    model = PrunedForImageClassification.from_backbone("timm/resnet18", id2label=names, image_size=16, **sizes)
    model.save_pretrained(tmp_path / "planes")
    named = ("--model_name_or_path", str(tmp_path / "planes"), "--output_dir", str(tmp_path / "out"), *TINY)
    told = "tells airplane, bird, cat and so on apart, and without --dataset_name"
    for name, options in (("prune", named), ("train", named), ("evaluate", (named[1], "--device", "cpu"))):
        with pytest.raises(ValueError, match=told):
            recipe(name, *options)
    check_default_data(str(base), PrunedForImageClassification.from_pretrained(base).config, DataArguments())
    check_default_data("planes", model.config, DataArguments(dataset_name="digits"))


def test_arguments_of_the_backbone_do_not_fight_with_options(data):
    for key in ("image_size", "small_images", "pretrained", "id2label"):
        with pytest.raises(ValueError, match=f"--backbone_kwargs holds {key}: classes are those of the data set"):
            build_model(ModelArguments("timm/resnet18", backbone_kwargs=json.dumps(NETWORK | {key: 1})), data)
    own = NETWORK | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    model = build_model(ModelArguments("timm/resnet18", backbone_kwargs=json.dumps(own)), data)
    assert (model.config.image_mean, model.config.image_std) == ([0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metric_for_best_model", "pgd20"), "metric_for_best_model='pgd20' is not measured; choose one of robust_"),
        (("--prediction_loss_only", "true"), "prediction_loss_only measures the loss alone"),
        (
            ("--dataloader_drop_last", "true", "--per_device_train_batch_size", "128"),
            "dataloader_drop_last leaves out a batch that is not full, and 64 training images are fewer than one of",
        ),
    ],
)
def test_what_would_fail_at_the_first_validation_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        recipe("train", "--output_dir", str(tmp_path / "out"), *TINY, *SMALL, *options)


def test_an_evaluation_counts_every_image_whatever_training_drops(tmp_path):
    few = ("--dataloader_drop_last", "true", "--per_device_eval_batch_size", "16", "--num_train_epochs", "1")
    output = recipe("train", "--output_dir", str(tmp_path / "out"), *TINY, *SMALL, *few)
    stage = json.loads((tmp_path / "out" / "stages" / "dense" / "stage.json").read_text())
    right = stage["last"]["eval_accuracy"] * 20
    assert right == pytest.approx(round(right)) and "[dense]" in output
    assert json.loads((tmp_path / "out" / "robustness_report.json").read_text())["clean_accuracy"] * 20 == right


@pytest.mark.parametrize("place", ["run", "journal"])
def test_a_report_replaces_neither_that_of_a_run_nor_the_verdicts(base, tmp_path, place):
    same = str(tmp_path / "verdicts.jsonl")
    options, message = ("--output", same, "--journal", same), "the report would replace the verdicts"
    if place == "run":
        options, message = ("--output", str(base / "robustness_report.json")), "lies in the folder of a run"
    with pytest.raises(ValueError, match=message):
        recipe("evaluate", str(base), "--device", "cpu", *options)


@pytest.mark.parametrize("best", ["true", "false"])
def test_the_card_of_a_training_tells_what_it_started_from_and_whether_an_epoch_was_picked(tmp_path, best):
    options = ("--num_train_epochs", "1", "--load_best_model_at_end", best)
    recipe("train", "--output_dir", str(tmp_path / "out"), *TINY, *SMALL, *options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("on which the best epoch was picked" in card) == (best == "true")
    assert "this run has not read the test split" in card and "Started from: fresh weights." in card

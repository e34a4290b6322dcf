"""Command-line options: groups in the help, fractions, one message for an error, the model that is named."""

import argparse
import json
import re

import pytest
from transformers import TrainingArguments

from hf_mrpf import MRPFConfig, load_image_data
from hf_mrpf.cli import (
    DataArguments,
    GroupedParser,
    ModelArguments,
    RoundArguments,
    RunArguments,
    number,
    run_settings,
)
from hf_mrpf.console import StageProgress, report_errors
from hf_mrpf.starting_point import base_model, build_model, load_data, own_config, starting_config

GROUPS = ("data:", "model:", "pruning:", "attack:", "training:", "Hub:", "transformers:")
NARROW = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_type": "deep", "stem_width": 4}'


@pytest.fixture(scope="module")
def parser():
    return GroupedParser([DataArguments, ModelArguments, RoundArguments, RunArguments, MRPFConfig])


@pytest.fixture(scope="module")
def data():
    return load_data(DataArguments(max_train_samples=40, max_eval_samples=20), None)


def test_help_shows_every_option_once_in_its_group(parser):
    text = parser.format_help()
    places = [text.index(f"\n{group}") for group in GROUPS]
    assert places == sorted(places)
    sections = dict(zip(GROUPS, (text[a:b] for a, b in zip(places, [*places[1:], None], strict=True)), strict=True))
    for group, options in {
        "data:": ("--dataset_name", "--max_train_samples", "--max_eval_samples"),
        "model:": ("--model_name_or_path", "--small_images", "--base_epochs"),
        "pruning:": ("--target", "--allocation", "--gamma", "--no_repair", "--pruning_rounds", "--recovery_epochs"),
        "attack:": ("--eps", "--objective", "--eval_num_steps"),
        "training:": ("--output_dir", "--seed", "--use_cpu", "--optim", "--learning_rate", "--expected_world_size"),
        "Hub:": ("--push_to_hub", "--hub_model_id", "--hub_private_repo"),
        "transformers:": ("--adam_beta1", "--fsdp"),
    }.items():
        for option in options:
            assert f" {option}" in sections[group], (group, option)


def test_eps_and_steps_read_fractions_and_adam_is_an_optimizer(parser, tmp_path):
    *_, args = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--eps", "8/255", "--step_size", "2/255", "--optim", "adam", "--use_cpu"]
    )
    assert (args.eps, args.step_size, args.optim) == (8 / 255, 2 / 255, "adam")
    assert number("0.031") == 0.031
    with pytest.raises(argparse.ArgumentTypeError, match="'a/b' is no number; write 0.031 or 8/255"):
        number("a/b")


def test_options_of_several_values_are_checked_as_json(parser, tmp_path, capsys):
    def parse(*options):
        *_, args = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *options])
        return args

    assert parse("--lr_scheduler_kwargs", ' {"num_cycles": 2}').lr_scheduler_kwargs == {"num_cycles": 2}
    assert parse("--accelerator_config", ' {"split_batches": true}').accelerator_config.split_batches
    file = tmp_path / "accelerator.json"
    file.write_text('{"split_batches": true}')
    assert parse("--accelerator_config", str(file)).accelerator_config.split_batches
    for option, text in (("lr_scheduler_kwargs", "{"), ("lr_scheduler_kwargs", "5"), ("accelerator_config", "{a: 1}")):
        with pytest.raises(SystemExit):
            parse(f"--{option}", text)
        error = capsys.readouterr().err
        assert f"--{option}/" in error and f": '{text}' is no JSON object; write for instance" in error


@pytest.mark.parametrize("name", ["base_epochs", "control_epochs"])
@pytest.mark.parametrize("epochs", [-1.0, float("nan")])
def test_a_number_of_epochs_that_is_none_is_refused(name, epochs):
    with pytest.raises(ValueError, match=f"--{name} {epochs} must be a number of epochs, at least 0"):
        ModelArguments(**{name: epochs})


def test_run_settings_leave_out_what_changes_no_result(tmp_path):
    def settings(**changes):
        args = MRPFConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
        return run_settings(DataArguments(), ModelArguments(), args)

    plain = settings()
    json.dumps(plain)
    assert settings(hub_model_id="me/model", disable_tqdm=True, logging_steps=7) == plain
    assert settings(eps=0.1) != plain
    assert "output_dir" not in plain


def test_the_named_model_is_built_with_the_classes_and_statistics_of_the_data(data, tmp_path):
    arguments = ModelArguments("timm/resnet18", small_images=True, backbone_kwargs=NARROW)
    model = build_model(arguments, data)
    assert (model.config.num_labels, model.config.image_size) == (10, 16)
    assert model.config.image_mean == pytest.approx(data.image_mean)
    model.save_pretrained(tmp_path / "model")
    assert own_config(str(tmp_path / "model")).image_size == 16
    assert own_config("timm/resnet18") is None
    assert own_config("resnet18") is None
    again = build_model(ModelArguments(str(tmp_path / "model")), data)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.fixture
def saved(data, tmp_path):
    """Folder of a model of this library for 16 pixels, not in the form for small images."""
    build_model(ModelArguments("timm/resnet18", backbone_kwargs=NARROW), data).save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"backbone_kwargs": '{"drop_rate": 0.5}'}, "--backbone_kwargs '{\"drop_rate\": 0.5}': "),
        ({"pretrained": True}, "--pretrained: "),
        ({"small_images": True}, "--small_images: "),
        ({"image_size": 24}, "--image_size 24: "),
        ({"image_size": 24, "small_images": True}, "--small_images, --image_size 24: "),
    ],
)
def test_an_option_that_a_saved_model_cannot_follow_is_refused_and_not_passed_over(saved, changes, option):
    with pytest.raises(ValueError, match=re.escape(option) + ".* is a model of this library.*images of 16 pixels"):
        starting_config(ModelArguments(saved, **changes))


def test_an_option_that_says_what_a_saved_model_is_changes_nothing(saved, data):
    assert starting_config(ModelArguments(saved, image_size=16)).image_size == 16
    assert starting_config(ModelArguments("timm/resnet18", image_size=24, pretrained=True)) is None
    with pytest.raises(ValueError, match="--small_images: "):
        build_model(ModelArguments(saved, small_images=True), data)


@pytest.mark.parametrize("size", [0, -3])
def test_an_image_size_that_is_none_is_refused_and_not_taken_for_one_not_given(size):
    with pytest.raises(ValueError, match=f"--image_size {size} must be a number of pixels, at least 1"):
        ModelArguments(image_size=size)


def test_the_data_are_cut_as_by_default_whatever_the_seed_of_a_run(data):
    plain = load_image_data(max_train_samples=40, max_eval_samples=20)
    assert data.description == plain.description and data.description["seed"] == 42
    assert data.test["labels"][:] == plain.test["labels"][:]
    assert data.test["labels"][:] != load_image_data(max_eval_samples=20, seed=1).test["labels"][:]


def test_a_model_that_does_not_fit_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="--backbone_kwargs 'oops' is not a JSON object"):
        build_model(ModelArguments("timm/resnet18", backbone_kwargs="oops"), data)
    with pytest.raises(ValueError, match="--backbone_kwargs .* is not a JSON object"):
        build_model(ModelArguments("timm/resnet18", backbone_kwargs="[1]"), data)
    with pytest.raises(ValueError, match=r"without config.json"):
        own_config(str(tmp_path))
    with pytest.raises(ValueError, match="nosuch: there is no such folder"):
        own_config("./nosuch")
    with pytest.raises(ValueError, match="resnet"):
        build_model(ModelArguments("timm/resnet18x"), data)


def test_what_a_user_can_put_right_is_one_message_and_the_rest_a_traceback(capsys):
    def refuse():
        raise ValueError("eps is 8")

    with pytest.raises(SystemExit) as stop:
        report_errors(refuse)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: eps is 8\n"

    def fail():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        report_errors(fail)


def test_the_progress_bar_carries_the_newest_figures_and_prints_no_line(capsys):
    from transformers import TrainerControl, TrainerState

    state, control = TrainerState(max_steps=4, is_world_process_zero=True), TrainerControl()
    progress = StageProgress()
    progress.on_train_begin(None, state, control)
    progress.on_log(None, state, control, logs={"loss": "1.25", "epoch": "1"})
    progress.on_log(None, state, control, logs={"eval_accuracy": 0.5, "eval_robust_accuracy": 0.25})
    assert progress.training_bar.postfix == "loss=1.25, clean=0.5, robust=0.25"
    progress.on_train_end(None, state, control)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not hasattr(TrainingArguments, "_validate_args"), reason="this transformers has them in one piece")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "save and eval strategy to match"),
        ({"fp16": True, "bf16": True, "use_cpu": True}, "fp16 and bf16"),
        ({"dataloader_prefetch_factor": 2}, "num_workers > 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_the_imports_of_transformers(
    options, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: pytest.fail("five seconds of imports"))
    with pytest.raises(ValueError, match=words):
        MRPFConfig(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"model_name_or_path": "timm/resnet18"}, None),
        ({"model_name_or_path": "timm/resnet18", "pretrained": True}, "timm/resnet18.a1_in1k"),
        ({"model_name_or_path": "resnet18.tv_in1k"}, "timm/resnet18.tv_in1k"),
        ({"model_name_or_path": "me/digits-dense"}, "me/digits-dense"),
        ({}, None),
    ],
)
def test_the_card_names_the_weights_of_the_hub_that_a_run_started_from(options, found):
    assert base_model(ModelArguments(**options)) == found


def test_a_folder_is_no_base_model_of_a_card(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert base_model(ModelArguments(str(tmp_path))) is None

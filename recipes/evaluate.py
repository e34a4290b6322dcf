"""
Measures a model under attack: a folder or Hub id of a model of this library.

    python recipes/evaluate.py outputs/digits
    python recipes/evaluate.py me/resnet18-cifar10-mrpf --dataset_name uoft-cs/cifar10 --num_samples 1000
    accelerate launch --config_file recipes/accelerate/cpu_2proc.yaml recipes/evaluate.py outputs/digits --device cpu

Attacks, from cheap to dear: fgsm (one step), pgd20, cw (20 steps on the margin of the logits), apgd_ce (100 steps, no
step size to choose), pgd50x5 (50 steps, five starts), apgd_t and fab_t (100 steps at each of 9 targets), square (5000
queries, no gradients), and autoattack, the standard set: apgd_ce, apgd_t, fab_t and square on what withstood the ones
before. By default clean, fgsm, pgd20 and cw. A few checks of the figures are made on 64 images; those that fail are
printed.

Without `--eps` it is the eps that the model's own `robustness_report.json` was measured at, 8/255 in linf where it has
none; in another norm than the model's own `--eps` has to be given.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import cached_file

from hf_mrpf import AttackConfig, PrunedForImageClassification
from hf_mrpf.class_names import check_class_names, model_class_names
from hf_mrpf.cli import DataArguments, check_place, number
from hf_mrpf.console import quieten, report_errors
from hf_mrpf.data import ImageData
from hf_mrpf.evaluation import evaluate_robustness
from hf_mrpf.launch import check_world_size
from hf_mrpf.named_attacks import ATTACKS, QUICK
from hf_mrpf.report import RobustnessReport
from hf_mrpf.run_folder import STATE_FILE, read_json
from hf_mrpf.sanity import failures_of_report, failures_under_attack
from hf_mrpf.starting_point import check_comparable, check_default_data, load_data


def parse_arguments() -> tuple[DataArguments, argparse.Namespace]:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = HfArgumentParser([DataArguments], description=__doc__, formatter_class=as_written)
    parser.add_argument("model", help="folder or Hub id of a model of this library")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="split to measure on")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(QUICK), help="attacks to run")
    parser.add_argument("--parent", help="dense model that this one was pruned from: does what fools it transfer?")
    parser.add_argument("--journal", help="file to keep verdicts in: an interrupted evaluation goes on from there")
    parser.add_argument("--norm", choices=("linf", "l2"), help="norm of the attacks; the model's own if not given")
    parser.add_argument("--eps", type=number, help="radius in pixels in [0, 1]; 8/255 is read. The model's own")
    parser.add_argument("--num_samples", type=int, help="stratified subset of the split; all if not given")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a batch")
    parser.add_argument("--device", help="cpu, cuda, mps; that of the launcher if not given, a GPU where there is one")
    parser.add_argument("--expected_world_size", type=int, help="stop where there are other than so many processes")
    parser.add_argument("--seed", type=int, default=42, help="seed of the random starts, and of the --num_samples")
    parser.add_argument("--output", help="file to write the report to, as JSON")
    data_args, arguments = parser.parse_args_into_dataclasses()
    return data_args, arguments


def main() -> None:
    data_args, arguments = parse_arguments()
    state = processes(arguments.device)
    check_world_size(state.num_processes, arguments.expected_world_size)
    device = own_device(state, arguments.device)
    if state.is_main_process:
        print(f"world size {state.num_processes}, device {device}, seed {arguments.seed}", flush=True)
    quieten()
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"--output {arguments.output}: there is no such folder to write to.")
    if arguments.output and Path(arguments.output).is_dir():
        raise ValueError(f"--output {arguments.output} is a folder; name a file in it, such as report.json.")
    if arguments.output and (Path(arguments.output).absolute().parent / STATE_FILE).is_file():
        raise ValueError(f"--output {arguments.output} lies in the folder of a run, whose own report it could replace.")
    if arguments.output and arguments.journal and Path(arguments.output).resolve() == Path(arguments.journal).resolve():
        raise ValueError(f"--output and --journal are both {arguments.output}: the report would replace the verdicts.")
    check_place(arguments.model, "model")
    if arguments.parent:
        check_place(arguments.parent, "--parent")
    model = PrunedForImageClassification.from_pretrained(arguments.model, revision=arguments.revision)
    parent = PrunedForImageClassification.from_pretrained(arguments.parent) if arguments.parent else None
    if parent is not None:
        check_comparable(model, parent, arguments.parent)
    attack = own_attack(arguments)
    check_default_data(arguments.model, model.config, data_args)
    with state.local_main_process_first():  # decodes the images, which the others find in the cache
        data = load_data(data_args, model.config.image_size)
    check_classes(model, data, arguments)
    report = evaluate_robustness(
        model.to(device),
        getattr(data, arguments.split),
        arguments.attacks,
        attack,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        data_name=data.name,
        progress=state.is_main_process,
        distributed=state.num_processes > 1,
        journal=arguments.journal,
    )
    if not state.is_main_process:
        return
    split = data.description["splits"][arguments.split]["from"]
    print(f"{arguments.model} on {data.name}, {shown_split(arguments.split, split)}: {report}")
    if arguments.output:
        report.save(arguments.output)
        print(f"report in {arguments.output}")
    failures = failures_of_report(report, len(data.class_names))
    if report.attacks:
        failures += failures_under_attack(
            model, getattr(data, arguments.split), attack, parent=parent and parent.to(device), seed=arguments.seed
        )
    for line in failures:
        print(f"warning: {line}")
    for line in notes(report):
        print(line)


def processes(device: str | None) -> PartialState:
    """The processes that the launcher started, on GPUs or, where that is asked for, on the CPU."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on", "y", "t")
    return PartialState(cpu=device == "cpu" or (device is None and asked))


def own_device(state: PartialState, wanted: str | None) -> torch.device:
    """The device that was asked for; of several of its kind, the one that the launcher gave this process."""
    given = torch.device(state.device.type if state.device.type == "cpu" else state.device)
    if wanted is None:
        return given
    try:
        asked = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"--device {wanted!r} is no device; give cpu, cuda or mps.") from error
    if asked.type not in ("cpu", given.type):
        raise ValueError(f"--device {wanted}: there is none here; give {given.type}, or leave the option out.")
    return given if asked.type == given.type and asked.index is None else asked


def own_attack(arguments: argparse.Namespace) -> AttackConfig:
    """The attack of the options; what is not given is that of the model's own report."""
    revision = arguments.revision or "main"
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(arguments.model, "robustness_report.json", revision=revision, **quiet)
    own = read_json(Path(file)) if file else {}
    norm = arguments.norm or own.get("norm", "linf")
    if arguments.eps is not None:
        return AttackConfig(norm, arguments.eps)
    if own.get("norm") == norm and "eps" in own:
        return AttackConfig(norm, own["eps"])
    if own.get("norm", norm) != norm or norm == "l2":
        raise ValueError(
            f"--norm {norm}: {arguments.model} was not measured in this norm; give --eps, such as "
            f"{'0.5 at 32 pixels' if norm == 'l2' else '8/255'}."
        )
    return AttackConfig(norm)


def check_classes(model: PrunedForImageClassification, data: ImageData, arguments: argparse.Namespace) -> None:
    """Refuses a data set with other classes: its figures would mean nothing."""
    advice = f"give {arguments.model} the data set that it was trained on."
    if model.config.num_labels != len(data.class_names):
        raise ValueError(
            f"{arguments.model} has {model.config.num_labels} classes and {data.name} {len(data.class_names)}: {advice}"
        )
    check_class_names(model_class_names(model), data.class_names, advice)


def shown_split(part: str, source: str) -> str:
    """The part of the data that was measured on, by the name of the split that it is of."""
    return f"split {source}" if part == "test" else f"{part} images of the split {source}"


def notes(report: RobustnessReport) -> list[str]:
    """What a reader of the figures must know beside them."""
    lines = []
    for name, settings in report.settings.items():
        if not settings.get("standard", True):
            lines.append(f"{name} is not the standard set here: {settings['differs']}.")
    if report.attacks:
        lines.append(
            "Robust accuracy holds for these attacks only, and is an upper bound: stronger ones may fool more."
        )
    return lines


if __name__ == "__main__":
    report_errors(main)

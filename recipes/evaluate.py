"""
Measures a model under attack: a folder or Hub id of a model of this library.

    python recipes/evaluate.py outputs/digits
    python recipes/evaluate.py me/resnet18-cifar10-mrpf --dataset_name uoft-cs/cifar10 --num_samples 1000
    accelerate launch --config_file recipes/accelerate/cpu_2proc.yaml recipes/evaluate.py outputs/digits --device cpu

Without `--eps` it is the eps that the model's own `robustness_report.json` was measured at, 8/255 where it has none.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import cached_file

from hf_mrpf import AttackConfig, PrunedForImageClassification
from hf_mrpf.cli import DataArguments, load_data, number
from hf_mrpf.console import quieten, report_errors
from hf_mrpf.data import ImageData
from hf_mrpf.evaluation import ATTACKS, evaluate_robustness
from hf_mrpf.launch import check_world_size
from hf_mrpf.report import RobustnessReport
from hf_mrpf.run_folder import read_json


def parse_arguments() -> tuple[DataArguments, argparse.Namespace]:
    parser = HfArgumentParser([DataArguments], description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub id of a model of this library")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="split to measure on")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="attacks to run")
    parser.add_argument("--norm", choices=("linf", "l2"), help="norm of the attacks; the model's own if not given")
    parser.add_argument("--eps", type=number, help="radius in pixels in [0, 1]; 8/255 is read. The model's own")
    parser.add_argument("--num_samples", type=int, help="stratified subset of the split; all if not given")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a batch")
    parser.add_argument("--device", help="cpu, cuda, mps; that of the launcher if not given, a GPU where there is one")
    parser.add_argument("--expected_world_size", type=int, help="stop where there are other than so many processes")
    parser.add_argument("--seed", type=int, default=42, help="seed of the random starts and of the subset")
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
    model = PrunedForImageClassification.from_pretrained(arguments.model, revision=arguments.revision)
    attack = own_attack(arguments)
    with state.local_main_process_first():  # decodes the images, which the others find in the cache
        data = load_data(data_args, model.config.image_size, arguments.seed)
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
    )
    if not state.is_main_process:
        return
    print(f"{arguments.model} on {data.name}, split {arguments.split}: {report}")
    for line in sanity(report, len(data.class_names)):
        print(line)
    if arguments.output:
        report.save(arguments.output)
        print(f"report in {arguments.output}")


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
    return AttackConfig(norm, own["eps"]) if own.get("norm") == norm and "eps" in own else AttackConfig(norm)


def check_classes(model: PrunedForImageClassification, data: ImageData, arguments: argparse.Namespace) -> None:
    """Refuses a data set with other classes: its figures would mean nothing."""
    known = [str(label) for _, label in sorted((model.config.id2label or {}).items())]
    unnamed = known == [f"LABEL_{index}" for index in range(len(known))]
    if len(known) != len(data.class_names) or not (unnamed or known == list(data.class_names)):
        raise ValueError(
            f"{arguments.model} has the {len(known)} classes {', '.join(known[:5])}, ..., and {data.name} the "
            f"{len(data.class_names)} classes {', '.join(data.class_names[:5])}, ...: give the data set of the model."
        )


def sanity(report: RobustnessReport, classes: int) -> list[str]:
    """What a reader of the figures must know before they believe them."""
    lines = []
    if report.clean_accuracy < 2 / classes:
        lines.append(f"warning: clean accuracy is near the {1 / classes:.1%} of guessing; is this the right data set?")
    if report.zero_gradient_share is not None:
        share = report.zero_gradient_share
        lines.append(f"images without any gradient, which these attacks cannot move: {share:.1%}")
        if share > 0.05:
            lines.append("warning: gradients are masked; the robust accuracies above are not to be trusted.")
    if {"fgsm", "pgd20"} <= report.attacks.keys() and report.attacks["pgd20"] > report.attacks["fgsm"] + 0.02:
        lines.append("warning: PGD-20 is weaker than the single step of FGSM, as under masked gradients.")
    if report.attacks:
        lines.append(
            "Robust accuracy holds for these attacks only, and is an upper bound: stronger ones may fool more."
        )
    return lines


if __name__ == "__main__":
    report_errors(main)

"""
Writes a model for deployment, as .pt2 and .onnx, and measures how fast they run beside the dense parent.

    python recipes/export.py outputs/digits
    python recipes/export.py me/resnet18-cifar10-mrpf --dense me/resnet18-cifar10-dense --threads 4

The dense parent of a run of recipes/prune.py is found in its folder; of any other model, name it with `--dense`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_mrpf import PrunedForImageClassification
from hf_mrpf.cli import check_place
from hf_mrpf.console import quieten, report_errors
from hf_mrpf.efficiency import measure_latency, processor_name
from hf_mrpf.export import FORMATS, ExportedFile, export_model, load_exported
from hf_mrpf.report import package_versions
from hf_mrpf.run_folder import EXPORTS, STAGES, write_json
from hf_mrpf.starting_point import check_comparable, own_config

RUNTIMES = {"pt2": "exported", "onnx": "onnxruntime"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub id of a model of this library")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--dense", help="folder or Hub id to compare with; that of the run folder if not given")
    parser.add_argument("--output_dir", help="folder for the files; 'export' in the model's folder if not given")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="files to write")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 64], help="images in a timed pass")
    parser.add_argument("--rounds", type=int, default=20, help="timed passes of each, of which the median is given")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and onnxruntime alike; PyTorch's own number")
    arguments = parser.parse_args()
    for name in ("batch_sizes", "rounds", "threads"):
        given = getattr(arguments, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            raise ValueError(f"--{name} must be at least 1, got {given}.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    quieten()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    check_place(arguments.model, "model")
    if arguments.dense:
        check_place(arguments.dense, "--dense")
    model = PrunedForImageClassification.from_pretrained(arguments.model, revision=arguments.revision)
    if model.dtype != torch.float32:
        print(f"The weights are {str(model.dtype).removeprefix('torch.')}; they are exported and measured in float32.")
    model, models = model.float(), {}
    parent = arguments.dense or dense_stage(arguments.model, model.config.pruning)
    if parent:
        models["dense"] = PrunedForImageClassification.from_pretrained(parent).float()
        check_comparable(model, models["dense"], parent)
    models["pruned" if model.config.pruning else "model"] = model

    output_dir = Path(arguments.output_dir or default_folder(arguments.model))
    files = export_model(model, output_dir, arguments.formats)
    for file in files:
        print(f"{file.path}: {file.size:,} bytes, logits within {file.difference:.2g} of the model's")
    if not parent:
        print(f"{arguments.model} has no dense parent beside it, so it is measured alone; --dense names one.")
    times = measure(models, files, arguments)
    table = latency_table(times)
    description = {
        "model": arguments.model,
        "dense": parent,
        "image_size": model.config.image_size,
        "files": {
            file.format: {"name": file.path.name, "bytes": file.size, "largest_difference": file.difference}
            for file in files
        },
        "milliseconds": times,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "versions": package_versions("onnx", "onnxscript", "onnxruntime"),
    }
    write_json(output_dir / "latency.json", description)
    print(table)
    print(measured(description))
    print(f"figures in {output_dir / 'latency.json'}")


def default_folder(model: str) -> Path:
    """Beside the model where it is a folder; a model of the Hub has none here."""
    return (Path(model) if Path(model).is_dir() else Path("outputs") / Path(model).name) / EXPORTS


def dense_stage(model: str, pruning: dict | None) -> str | None:
    """The dense model that the run of recipes/prune.py in this folder started from."""
    folder = Path(model) / STAGES / "dense" / "model"
    if not folder.is_dir():
        return None
    # In a folder of recipes/train.py that stage is the model itself, of a pruned shape perhaps.
    config = own_config(str(folder))
    return str(folder) if config is not None and config.pruning != pruning else None


def measure(
    models: dict[str, PrunedForImageClassification], files: list[ExportedFile], arguments: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds by batch size, model and runtime; at a batch size all of them take turns."""
    with TemporaryDirectory() as folder:
        runners: dict[str, dict[str, Callable[[torch.Tensor], Any]]] = {}
        for name, model in models.items():
            exported = export_model(model, folder, arguments.formats) if name == "dense" else files
            runners[name] = {"eager": model} | {RUNTIMES[file.format]: load_exported(file.path) for file in exported}
    flat = {f"{name} {runtime}": runner for name, row in runners.items() for runtime, runner in row.items()}
    size = model.config.image_size
    times = {}
    for batch in dict.fromkeys(arguments.batch_sizes):
        medians = measure_latency(flat, size, batch, rounds=arguments.rounds)
        times[str(batch)] = {
            name: {runtime: medians[f"{name} {runtime}"] for runtime in row} for name, row in runners.items()
        }
    return times


def latency_table(times: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row for each model in milliseconds, and one with how many times faster the pruned one is."""
    batches, names = list(times), list(next(iter(times.values())))
    columns = [(batch, runtime) for batch in batches for runtime in times[batch][names[0]]]
    lines = [["model", *(f"{runtime}, batch {batch}" for batch, runtime in columns)]]
    lines.append(["---", *("---:" for _ in columns)])
    for name in names:
        lines.append([name, *(f"{times[batch][name][runtime]:.3g} ms" for batch, runtime in columns)])
    if len(names) == 2:
        ratios = (times[batch][names[0]][runtime] / times[batch][names[1]][runtime] for batch, runtime in columns)
        lines.append([" / ".join(names), *(f"{ratio:.2f}x" for ratio in ratios)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(description: dict[str, Any]) -> str:
    """How the times were measured, in one sentence."""
    threads, versions = description["threads"], description["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime") if name in versions)
    return (
        f"Medians of {description['rounds']} passes that took turns, {threads} thread{'s' if threads > 1 else ''} "
        f"each, images of {description['image_size']} pixels, {description['processor']}, {packages}."
    )


if __name__ == "__main__":
    report_errors(main)

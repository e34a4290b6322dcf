"""The floors of the architecture: a file imports only from floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_mrpf

PACKAGE = Path(__file__).resolve().parent.parent / "hf_mrpf"
FLOORS = {
    "tokens": -1,
    "winograd": -2,
    "folding": -1,
    "prefix": 0,
    "attacks": 0,
    "modes": -1,
    "class_names": 0,
    "rules": -1,
    "controls": -0.5,
    "isomorphic": -0.5,
    "allocation": 0,
    "modeling": 0,
    "architectures": 0,
    "efficiency": 0.1,
    "run_folder": 0,
    "report": 0,
    "checkpoints": 1,
    "rounds": 0,
    "launch": 0,
    "fingerprint": 0.05,
    "faults": 0,
    "processes": 0.1,
    "journal": 0.2,
    "progress": 0,
    "calibration": 0.2,
    "batchnorm": 0.2,
    "weight_ascent": 1,
    "pixels": 0,
    "loader": 0.1,
    "augmentation": 0,
    "layers": 0.1,
    "attention": 0.2,
    "surgery": 0.2,
    "groups": 0.2,
    "wrappers": 0.1,
    "exactness": 0.2,
    "coupling": 0.3,
    "results": 1,
    "export": 1,
    "plan_fields": 1.5,
    "plan": 2,
    "plan_inputs": 2.5,
    "latency": 2,
    "selection": 2,
    "compression": 4,
    "objectives": 1,
    "weight_scores": 0,
    "importance": 1,
    "units": 1,
    "data": 1,
    "sensitivity": 2,
    "apgd": 1,
    "fab": 1,
    "square": 1,
    "named_attacks": 1.5,
    "indexed_images": 1.5,
    "verdicts": 1.6,
    "evaluation": 2,
    "sanity": 2.5,
    "pruning": 3,
    "rollback": 1,
    "repair": 2.4,
    "pruned_copies": 2.5,
    "netadapt": 2.6,
    "damage": 2.6,
    "measured_allocation": 2.7,
    "model_card": 3,
    "figures": 3,
    "config": 3,
    "optimizer_arguments": 0,
    "hub": 4,
    "publishing": 5,
    "logs": 3,
    "callbacks": 4,
    "pixel_trainer": 5.2,
    "measuring": 5.5,
    "averaging": 5.7,
    "resumable": 5.8,
    "optimizing": 5.9,
    "weight_perturbation": 0.2,
    "trainer": 6,
    "interruption": 0,
    "cli": 4,
    "starting_point": 4.5,
    "console": 4,
    "stage_lines": 3,
    "recipe_options": 5,
    "sweep_config": 5.1,
    "sweep": 5.2,
    "sweep_table": 5.3,
    "sweep_runs": 5.4,
    "slurm": 5.4,
    "sweep_summary": 5.4,
    "sweep_figures": 5.5,
    "sweep_show": 5.6,
    "fresh": 1,
    "delivery": 5,
    "stages": 7,
    "__init__": 8,
}
HEAVY = (
    "timm",
    "torch_pruning",
    "torchattacks",
    "datasets",
    "matplotlib",
    "sklearn",
    "transformers.trainer",
    "onnx",
    "onnxruntime",
)


def own_imports(source: str) -> set[str]:
    """Modules of this package that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_mrpf"):
            found |= {node.module.partition(".")[2]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("hf_mrpf.")}
    return {name.split(".")[0] for name in found}


def upward(module: str, source: str) -> set[str]:
    return {name for name in own_imports(source) if FLOORS.get(name, 0) >= FLOORS[module] and name != "__version__"}


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.stem)
def test_a_file_imports_only_lower_floors(file):
    assert file.stem in FLOORS, f"{file.name} has no floor: add it to the table in design and here"
    assert not upward(file.stem, file.read_text())


def test_an_upward_import_would_be_found():
    assert upward("attacks", "def f():\n    from .trainer import MRPFTrainer") == {"trainer"}
    assert upward("units", "import hf_mrpf.data") == {"data"}
    assert upward("units", "from hf_mrpf import attacks") == set()


def test_the_model_file_travels_alone():
    assert own_imports((PACKAGE / "modeling.py").read_text()) == set()


def test_every_public_name_exists():
    assert not [name for name in hf_mrpf.__all__ if getattr(hf_mrpf, name, None) is None]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_mrpf.nothing


def test_importing_the_package_loads_nothing_heavy():
    script = (
        "import sys; from transformers import AutoModelForImageClassification, PreTrainedModel\n"
        "before = set(sys.modules)\n"  # transformers 5.17 loads scikit-learn by itself
        "import hf_mrpf\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules and name not in before]\n"
        "assert not heavy, heavy\n"
    )
    run(script)


# What `PreTrainedModel` and `Dataset` come with takes longer than everything else that a start imports.
SLOW = (*HEAVY, "transformers.modeling_utils", "transformers.image_utils", "torchvision", "torch._dynamo")


def test_registration_waits_for_a_config_with_what_a_model_class_needs():
    run(
        "import sys, torch; from transformers import AutoConfig, AutoModelForImageClassification\n"
        "before = set(sys.modules)\n"
        "import hf_mrpf\n"
        f"slow = [name for name in {SLOW!r} if name in sys.modules and name not in before]\n"
        "assert not slow, slow\n"
        "config = AutoConfig.for_model('mrpf', image_size=32)\n"
        "assert type(config) is hf_mrpf.PrunedConfig and config.image_size == 32\n"
        "found = AutoModelForImageClassification._model_mapping[type(config)]\n"
        "assert found is hf_mrpf.PrunedForImageClassification\n"
    )


def test_what_is_wrong_with_an_argument_is_said_before_slow_imports():
    of_both = ["--help", "--nosuch 1", "--eps 9", "--backbone_kwargs oops", "--model_name_or_path ./nosuch"]
    commands = [f"recipes/{name}.py {options}" for name in ("prune", "train") for options in of_both]
    commands += [f"recipes/prune.py {options}" for options in ("--target 1.5", "--pruning_rounds 0")]
    commands += ["recipes/train.py --dense_epochs 3", "recipes/train.py --report_split all"]
    commands += [f"recipes/sweep.py {options}" for options in ("--help", "x.yaml --nosuch", "nosuch.yaml")]
    run(
        "import runpy, sys; from transformers import AutoModelForImageClassification, TrainingArguments\n"
        "before = set(sys.modules)\n"
        f"for command in {commands!r}:\n"
        "    sys.argv, status = command.split(), None\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as stop: status = stop.code\n"
        "    assert status == (2, 0)[sys.argv[-1] == '--help'], (command, status)\n"
        f"    slow = [name for name in {SLOW!r} if name in sys.modules and name not in before]\n"
        "    assert not slow, (command, slow)\n"
    )


def run(script: str) -> None:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr

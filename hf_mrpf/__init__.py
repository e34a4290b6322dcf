"""
hf_mrpf: small vision models that still withstand adversarial attack.

Module Robust Pruning and Fine-Tuning (arXiv 2410.15176) for timm and transformers backbones. Importing the package
registers the model class with the Auto classes; everything heavier is loaded when it is first asked for.
"""

from importlib import import_module
from typing import Any

from .modeling import PrunedConfig, PrunedForImageClassification

# Not on first use: loading the submodule later would put it in the place of the function of the same name.
from .repair import repair

__version__ = "0.1.0"

_LAZY = {
    "batchnorm": ("recalibrate_batchnorm",),
    "attacks": ("AttackConfig", "pgd_attack"),
    "compression": ("compress",),
    "config": ("MRPFConfig",),
    "data": ("ImageData", "load_image_data"),
    "efficiency": ("count_macs", "count_parameters", "measure_latency"),
    "evaluation": ("evaluate_robustness",),
    "export": ("export_model",),
    "report": ("RobustnessReport", "paired_difference"),
    "figures": ("plot_sensitivity",),
    "hub": ("push_folder",),
    "allocation": ("ALLOCATIONS",),
    "importance": ("IMPORTANCES",),
    "objectives": ("OBJECTIVES", "ObjectiveOutput"),
    "plan": ("PruningPlan",),
    "pruning": ("plan_pruning", "prune"),
    "sensitivity": ("SensitivityResult", "module_robustness_sensitivity", "unit_sensitivity"),
    "trainer": ("MRPFTrainer",),
    "units": ("PruningUnit", "pruning_units"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = ["PrunedConfig", "PrunedForImageClassification", "repair"]
__all__ += _HOME


def _push_to_hub(self: PrunedForImageClassification, repo_id: str, **options: Any) -> Any:
    """Send the model to the Hub with a short card, see [`hf_mrpf.hub.push_model`]."""
    from .hub import push_model

    return push_model(self, repo_id, **options)


# The modeling file travels with checkpoints and so cannot ask for the card itself; a copy pushes as transformers does.
PrunedForImageClassification.push_to_hub = _push_to_hub  # type: ignore[method-assign,assignment]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

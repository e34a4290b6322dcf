"""
hf_mrpf: small vision models that still withstand adversarial attack.

Module Robust Pruning and Fine-Tuning (arXiv 2410.15176) for timm and transformers backbones. Importing the package
registers the model with the Auto classes; its class and everything heavier is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig

# Not on first use: loading the submodule later would put it in the place of the function of the same name.
from .repair import repair

if TYPE_CHECKING:
    from .modeling import PrunedConfig, PrunedForImageClassification

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
    "measured_allocation": ("MEASURED",),
    "modeling": ("PrunedConfig", "PrunedForImageClassification", "with_new_head"),
    "objectives": ("OBJECTIVES", "ObjectiveOutput"),
    "plan": ("PruningPlan",),
    "pruning": ("plan_pruning", "prune"),
    "sensitivity": ("SensitivityResult", "module_robustness_sensitivity", "unit_sensitivity"),
    "trainer": ("MRPFTrainer",),
    "units": ("PruningUnit", "pruning_units"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = ["PrunedConfig", "PrunedForImageClassification", "repair"]
__all__ += [name for name in _HOME if name not in __all__]


class _Registered(PreTrainedConfig):
    """
    Stands for `PrunedConfig` with the Auto classes until one is made.

    What `PreTrainedModel` imports takes seconds; whoever makes a config loads `modeling.py`, which registers both.
    """

    model_type = "mrpf"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("PrunedConfig")(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PrunedConfig.from_dict`."""
        return __getattr__("PrunedConfig").from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PrunedConfig.from_pretrained`."""
        return __getattr__("PrunedConfig").from_pretrained(*args, **kwargs)


AutoConfig.register(_Registered.model_type, _Registered, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

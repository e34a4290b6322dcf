"""The attacks that have a name: what each consists of, how strong it is, and how it is run on a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .apgd import DLR_CLASSES, apgd_attack
from .attacks import AttackConfig, keyed_start, logits_of, pgd_attack
from .fab import fab_attack
from .square import square_attack

AUTOATTACK_TARGETS = 9


@dataclass(frozen=True)
class NamedAttack:
    """
    Strength of an attack that has a name; norm, radius and random start come from the `AttackConfig`.

    Args:
        loss (`str`):
            What is maximised: for PGD a key of `LOSSES` in `attacks.py`.
        steps (`int`):
            Steps of a restart, or queries. A single step of PGD has the full length `eps` and starts at the image
            itself (FGSM).
        restarts (`int`, *optional*, defaults to `1`):
            Independent random starts; an image is robust if it withstands them all.
        method (`str`, *optional*, defaults to `"pgd"`):
            A key of `METHODS`.
        targets (`int`, *optional*):
            For a targeted attack, how many of the classes with the largest other logits are aimed at, one after
            another; all of them where there are fewer.
    """

    loss: str
    steps: int
    restarts: int = 1
    method: str = "pgd"
    targets: int = 0

    def configure(self, attack: AttackConfig) -> AttackConfig:
        """The attack in full. A `step_size` of the `AttackConfig` is kept; without one it is `2.5 * eps / steps`."""
        attack = replace(attack, dtype="float32")
        if self.steps == 1:
            return replace(attack, num_steps=1, step_size=attack.eps or None, random_start=False)
        return replace(attack, num_steps=self.steps)

    def runs(self, classes: int) -> list["Run"]:
        """Its restarts, or its targets of a model with so many classes."""
        count = min(self.targets, classes - 1) if self.targets else self.restarts
        return [Run(self, number) for number in range(count)]

    def settings(self, attack: AttackConfig, classes: int) -> dict[str, Any]:
        """What a report says of it, JSON-ready."""
        used = self.configure(attack)
        if self.method == "pgd":
            return {
                "loss": self.loss,
                "steps": self.steps,
                "step_size": used.step,
                "restarts": self.restarts,
                "random_start": used.random_start,
                "fooled_by": "any iterate",
            }
        if self.method == "square":
            return {"method": self.method, "loss": self.loss, "queries": self.steps, "restarts": self.restarts}
        content: dict[str, Any] = {"method": self.method, "loss": self.loss, "steps": self.steps}
        if self.loss == "dlr" and classes < DLR_CLASSES:
            content["loss"] = "margin"
        content |= {"targets": min(self.targets, classes - 1)} if self.targets else {"restarts": self.restarts}
        content |= {"random_start": used.random_start} if self.method == "apgd" else {}
        return content | {"fooled_by": "any iterate"}


@dataclass(frozen=True)
class Run:
    """One restart of an attack, or its run at one target: the unit in which verdicts are found and kept."""

    attack: NamedAttack
    number: int

    @property
    def name(self) -> str:
        """Unique among all runs: `"apgd dlr 100 #3"`."""
        return f"{self.attack.method} {self.attack.loss} {self.attack.steps} #{self.number}"

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int], attack: AttackConfig, seed: int
    ) -> Tensor:
        """What the run makes of images that the model classifies correctly; random numbers by seed and index."""
        used = self.attack.configure(attack)
        return METHODS[self.attack.method](self, model, images, labels, indices, used, seed)


def settings_of(name: str, attack: AttackConfig, classes: int) -> dict[str, Any]:
    """
    What a report says of a named attack on a model with so many classes.

    Of one that consists of several: `parts`, the settings of each by its name; `standard`, whether that is the
    published set; and where not, `differs`, why.
    """
    parts = ATTACKS[name]
    if len(parts) == 1:
        return parts[0].settings(attack, classes)
    names = {spec: other for other, specs in ATTACKS.items() if len(specs) == 1 for spec in specs}
    content = {"parts": {names[part]: part.settings(attack, classes) for part in parts}}
    differs = [f"{classes - 1} of {AUTOATTACK_TARGETS} targets"] if classes <= AUTOATTACK_TARGETS else []
    differs += ["margin in the place of targeted DLR, which needs 4 classes"] if classes < DLR_CLASSES else []
    differs += ["no random start"] if not attack.random_start else []
    return content | {"standard": not differs} | ({"differs": "; ".join(differs)} if differs else {})


def runs_of(name: str, classes: int) -> list[Run]:
    """All runs that an image must withstand to be robust under the named attack, in the order they are made in."""
    return [run for part in ATTACKS[name] for run in part.runs(classes)]


def _pgd(
    run: Run, model: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int], attack: AttackConfig, seed: int
) -> Tensor:
    start = keyed_start(images, indices, attack, seed, run.number)
    return pgd_attack(model, images, labels, attack, loss=run.attack.loss, start=start, until_fooled=True)


def _apgd(
    run: Run, model: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int], attack: AttackConfig, seed: int
) -> Tensor:
    targets = _targets(model, images, labels, run.number) if run.attack.targets else None
    start = keyed_start(images, indices, attack, seed, run.number)
    return apgd_attack(model, images, labels, attack, targets=targets, start=start)


def _fab(
    run: Run, model: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int], attack: AttackConfig, seed: int
) -> Tensor:
    return fab_attack(model, images, labels, attack, targets=_targets(model, images, labels, run.number))


def _square(
    run: Run, model: nn.Module, images: Tensor, labels: Tensor, indices: Sequence[int], attack: AttackConfig, seed: int
) -> Tensor:
    return square_attack(model, images, labels, attack, indices=indices, seed=seed + run.number)


def _targets(model: nn.Module, images: Tensor, labels: Tensor, number: int) -> Tensor:
    """The class with the largest logit but the true one, or with `number` the one so many places after it."""
    with torch.no_grad():
        logits = logits_of(model(images))
    return logits.scatter(1, labels[:, None], -torch.inf).argsort(stable=True, dim=1, descending=True)[:, number]


METHODS: Mapping[str, Callable[..., Tensor]] = {"pgd": _pgd, "apgd": _apgd, "fab": _fab, "square": _square}

_APGD_CE = NamedAttack("ce", 100, method="apgd")
_APGD_T = NamedAttack("dlr", 100, method="apgd", targets=AUTOATTACK_TARGETS)
_FAB_T = NamedAttack("boundary", 100, method="fab", targets=AUTOATTACK_TARGETS)
_SQUARE = NamedAttack("margin", 5000, method="square")

# An image is robust under a name if it withstands everything listed for it.
ATTACKS: dict[str, tuple[NamedAttack, ...]] = {
    "clean": (),
    "fgsm": (NamedAttack("ce", 1),),
    "pgd20": (NamedAttack("ce", 20),),
    "pgd50x5": (NamedAttack("ce", 50, restarts=5),),
    "cw": (NamedAttack("margin", 20),),
    "apgd_ce": (_APGD_CE,),
    "apgd_t": (_APGD_T,),
    "fab_t": (_FAB_T,),
    "square": (_SQUARE,),
    "autoattack": (_APGD_CE, _APGD_T, _FAB_T, _SQUARE),
}
# What a first look costs little for: the others take minutes to hours.
QUICK = ("clean", "fgsm", "pgd20", "cw")

"""
Training objectives: what a step of (adversarial) fine-tuning minimises.

All share one signature, so that they can be exchanged by name, and a user's own function with the same signature stands
beside them. An argument that an objective has no use for is ignored by it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import AttackConfig, check_pixels, eval_mode, kl_divergence, logits_of, pgd_attack


@dataclass(frozen=True)
class ObjectiveOutput:
    """
    What an objective returns.

    Args:
        loss (`Tensor` of shape `[]`):
            Mean over the batch in nats, with its graph.
        logits (`Tensor` of shape `[N, C]`, *optional*):
            Logits of the clean images from the training forward; None where the objective runs none.
        adversarial_logits (`Tensor` of shape `[N, C]`, *optional*):
            Logits of the adversarial images from the training forward.
        adversarial_images (`Tensor` of shape `[N, 3, H, W]`, *optional*):
            The images attacked, detached, in [0, 1].
    """

    loss: Tensor
    logits: Tensor | None = None
    adversarial_logits: Tensor | None = None
    adversarial_images: Tensor | None = None


Objective = Callable[..., ObjectiveOutput]


def trades(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    beta: float = 6.0,
    attacked: nn.Module | None = None,
    adversarial_images: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> ObjectiveOutput:
    """
    `CE(f(x), y) + beta * KL(f(x) || f(x_adv))`: TRADES, Alg. 1 of [Zhang et al.](https://huggingface.co/papers/1901.08573).

    The attack maximises the KL against the clean prediction of the eval mode, held constant. It starts at
    `x + 0.001 * torch.randn_like(x)` (one draw from the global generator, whatever `attack.random_start`), not clamped
    before the first step. The loss lets the gradient through both arguments of the KL. Clean and adversarial images are
    two forwards, since one concatenated forward would mix their BatchNorm statistics.

    Args:
        model (`nn.Module`):
            Runs the training forwards in its own mode; may be wrapped by `DistributedDataParallel`.
        images (`Tensor` of shape `[N, 3, H, W]`):
            Float pixels in [0, 1].
        labels (`Tensor` of shape `[N]`):
            Class indices, int64.
        attack ([`AttackConfig`]):
            Threat model and strength of the inner attack.
        beta (`float`, *optional*, defaults to `6.0`):
            Weight of the KL term.
        attacked (`nn.Module`, *optional*):
            Module that the attack runs on, in eval mode. Defaults to `model`, or what a parallel wrapper wraps.
        adversarial_images (`Tensor` of shape `[N, 3, H, W]`, *optional*):
            Taken instead of running an attack.
        teacher (`nn.Module`, *optional*):
            Not used by this objective.

    Returns:
        [`ObjectiveOutput`] with every field.

    Raises:
        ValueError: If the images to attack are no float pixels in [0, 1].
    """
    if adversarial_images is None:
        check_pixels(images)
        attacked = _attacked(model, attacked)
        with torch.no_grad(), eval_mode(attacked):
            constant = logits_of(attacked(images))
        start = images + 0.001 * torch.randn_like(images)
        adversarial_images = pgd_attack(attacked, images, constant, attack, loss="kl", start=start)
    logits = logits_of(model(images))
    adversarial_logits = logits_of(model(adversarial_images))
    divergence = kl_divergence(adversarial_logits, logits) / len(images)
    loss = F.cross_entropy(logits, labels) + beta * divergence
    return ObjectiveOutput(loss, logits, adversarial_logits, adversarial_images)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    beta: float = 6.0,
    attacked: nn.Module | None = None,
    adversarial_images: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> ObjectiveOutput:
    """
    Adversarial training, [Madry et al.](https://huggingface.co/papers/1706.06083), eq. 2.1: `CE(f(x_adv), y)`.

    The attack maximises the cross-entropy, from a random start where `attack.random_start`. Arguments as in [`trades`];
    `beta` is not used.

    Returns:
        [`ObjectiveOutput`] without `logits`: the clean images are never run.
    """
    if adversarial_images is None:
        adversarial_images = pgd_attack(_attacked(model, attacked), images, labels, attack)
    adversarial_logits = logits_of(model(adversarial_images))
    loss = F.cross_entropy(adversarial_logits, labels)
    return ObjectiveOutput(loss, None, adversarial_logits, adversarial_images)


def standard(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    beta: float = 6.0,
    attacked: nn.Module | None = None,
    adversarial_images: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> ObjectiveOutput:
    """
    Ordinary training, the control: `CE(f(x), y)`. No attack is run; arguments as in [`trades`].

    Returns:
        [`ObjectiveOutput`] with `loss` and `logits` alone.
    """
    logits = logits_of(model(images))
    return ObjectiveOutput(F.cross_entropy(logits, labels), logits)


def get_objective(objective: str | Objective) -> Objective:
    """
    The objective of a name in `OBJECTIVES`; a callable is returned as it is.

    Raises:
        ValueError: If the name is unknown; the known ones are listed.
    """
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective is {objective!r}; known objectives: {', '.join(OBJECTIVES)}, or any callable with the "
            "signature of hf_mrpf.objectives.trades."
        )
    return OBJECTIVES[objective]


def _attacked(model: nn.Module, attacked: nn.Module | None) -> nn.Module:
    if attacked is not None:
        return attacked
    # A wrapper's forward would synchronise ranks and buffers at every step of the attack.
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


OBJECTIVES: dict[str, Objective] = {"trades": trades, "pgd": pgd, "standard": standard}

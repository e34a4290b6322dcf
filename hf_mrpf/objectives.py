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

from .attacks import AttackConfig, check_pixels, kl_divergence, logits_of, pgd_attack
from .modes import eval_mode


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
            Read by [`rslad`] alone.

    Returns:
        [`ObjectiveOutput`] with every field.

    Raises:
        ValueError: If the images to attack are no float pixels in [0, 1].
    """
    if adversarial_images is None:
        check_pixels(images)
        attacked = _attacked(model, attacked)
        with torch.no_grad(), eval_mode(attacked):
            # A copy: a network compiled into CUDA graphs writes its next output over this one.
            constant = logits_of(attacked(images)).clone()
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


def mart(
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
    Misclassification-aware adversarial training, Alg. 1 of [Wang et al., ICLR
    2020](https://openreview.net/forum?id=rklOg6EFwS): `BCE(p(x_adv), y) + beta * (1 - p_y(x)) * KL(p(x) || p(x_adv))`.

    The boosted cross-entropy `BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k)` also keeps the strongest other class
    down; images that are misclassified without any attack weigh most in the KL. The attack is that of [`pgd`], on the
    cross-entropy. Gradients pass through the weight and both arguments of the KL. Arguments as in [`trades`]; the paper
    calls `beta` lambda and takes 5, its published code 6.

    Returns:
        [`ObjectiveOutput`] with every field.
    """
    if adversarial_images is None:
        adversarial_images = pgd_attack(_attacked(model, attacked), images, labels, attack)
    logits, adversarial_logits = logits_of(model(images)), logits_of(model(adversarial_images))
    clean, adversarial = F.log_softmax(logits, 1), F.log_softmax(adversarial_logits, 1)
    own = labels[:, None]
    other = adversarial.scatter(1, own, -torch.inf).argmax(1, keepdim=True)
    # As a sum over the other classes, since 1 - p would round to 0 where the network is sure.
    boosted = F.nll_loss(adversarial, labels) - adversarial.scatter(1, other, -torch.inf).logsumexp(1).mean()
    divergences = F.kl_div(adversarial, clean, reduction="none", log_target=True).sum(1)
    weights = -torch.expm1(clean.gather(1, own)).squeeze(1)
    loss = boosted + beta * (weights * divergences).mean()
    return ObjectiveOutput(loss, logits, adversarial_logits, adversarial_images)


def rslad(
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
    Robust soft-label adversarial distillation, [Zi et al.](https://huggingface.co/papers/2108.07969):
    `1/6 * KL(t(x) || f(x)) + 5/6 * KL(t(x) || f(x_adv))`, for recovery of a pruned network from its dense parent.

    The teacher `t` sees clean images alone, in eval mode and without gradient; its prediction also is what the attack
    drives `f(x_adv)` away from, by the KL, from the start of [`trades`]. No label is used. Arguments as in [`trades`];
    `beta` is not used, and the weights are the paper's.

    Args:
        teacher (`nn.Module`):
            A robust network with the same classes, on the device of the images: in a pruning run the dense parent.

    Returns:
        [`ObjectiveOutput`] with every field.

    Raises:
        ValueError: If there is no teacher, it has other classes, or the images to attack are no float pixels in [0, 1].
    """
    if teacher is None:
        raise ValueError(
            "objective 'rslad' distils from a teacher and none was given; give the dense, robust parent: "
            "MRPFTrainer(..., teacher=dense)."
        )
    with torch.no_grad(), eval_mode(teacher):
        soft = logits_of(teacher(images))
    if adversarial_images is None:
        check_pixels(images)
        start = images + 0.001 * torch.randn_like(images)
        adversarial_images = pgd_attack(_attacked(model, attacked), images, soft, attack, loss="kl", start=start)
    logits, adversarial_logits = logits_of(model(images)), logits_of(model(adversarial_images))
    if logits.shape != soft.shape:
        raise ValueError(
            f"The teacher has {soft.shape[1]} classes and the model {logits.shape[1]}; give one with the same."
        )
    divergences = kl_divergence(logits, soft) / 6 + kl_divergence(adversarial_logits, soft) * 5 / 6
    return ObjectiveOutput(divergences / len(images), logits, adversarial_logits, adversarial_images)


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


def dense_objective(objective: str) -> str:
    """What the dense model is trained by: the teacher of the others has none of its own."""
    return "trades" if objective == "rslad" else objective


def _attacked(model: nn.Module, attacked: nn.Module | None) -> nn.Module:
    if attacked is not None:
        return attacked
    # A wrapper's forward would synchronise ranks and buffers at every step of the attack.
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


OBJECTIVES: dict[str, Objective] = {"trades": trades, "pgd": pgd, "mart": mart, "rslad": rslad, "standard": standard}

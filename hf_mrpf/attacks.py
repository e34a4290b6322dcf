"""Projected gradient descent on pixels in [0, 1], and the guards every attack needs."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folding import fast_layout, folded_batchnorm
from .modes import eval_mode, frozen, telling_dtypes

# A pixel moves by at most 1; published l2 threat models use 0.5 (at 32x32) to 3 (at 224x224).
MAX_EPS = {"linf": 1.0, "l2": 16.0}
# Of the largest logit; float32 sums in two orders differ by a hundredth of it.
ROUNDING = 1e-4
# float16 is not among them: its gradients underflow without a scaler.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class AttackConfig:
    """
    Threat model and strength of a projected gradient attack (PGD, [Madry et al.](https://huggingface.co/papers/1706.06083)).

    Args:
        norm (`str`, *optional*, defaults to `"linf"`):
            Norm that bounds the perturbation of one image: `"linf"` (any pixel) or `"l2"` (the whole image).
        eps (`float`, *optional*, defaults to `8/255`):
            Radius of the ball, in pixels that run from 0 to 1; at most 1 for `"linf"` and 16 for `"l2"`. 0 leaves the
            images as they are.
        step_size (`float`, *optional*):
            Length of one step, in the units of `eps`. Defaults to `2.5 * eps / num_steps`: 2/255 here.
        num_steps (`int`, *optional*, defaults to `10`):
            Number of steps, at least 1.
        random_start (`bool`, *optional*, defaults to `True`):
            Whether to start at a random point of the ball instead of at the image.
        dtype (`str`, *optional*, defaults to `"float32"`):
            What the model computes in while it is attacked, and while sensitivities are measured; one of `DTYPES`.
            `"bfloat16"` is faster on processors and GPUs that have it, and finds slightly other images, whose pixels
            stay float32. Robust accuracy is always measured in float32.

    Raises:
        ValueError: If a value is unknown, of the wrong type or out of range, as when 8 is given for 8/255.
    """

    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float | None = None
    num_steps: int = 10
    random_start: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.norm not in MAX_EPS:
            raise ValueError(f"norm is {self.norm!r}; known norms: {', '.join(MAX_EPS)}.")
        largest = MAX_EPS[self.norm]
        if not _is_number(self.eps) or not 0 <= self.eps <= largest:
            too_large = _is_number(self.eps) and self.eps > largest
            hint = f" Is it {self.eps:g} given where {self.eps:g}/255 was meant?" if too_large else ""
            raise ValueError(
                f"eps is {self.eps!r}; it must be a number in [0, {largest:g}] for {self.norm}, "
                f"as pixels run from 0 to 1.{hint}"
            )
        if self.step_size is not None and (not _is_number(self.step_size) or not 0 < self.step_size <= 2 * largest):
            raise ValueError(
                f"step_size is {self.step_size!r}; it must be a number in (0, {2 * largest:g}] in pixels from 0 to 1 "
                f"for {self.norm}, or None for 2.5 * eps / num_steps."
            )
        for name in ("eps", "step_size"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))  # JSON knows no numbers of numpy's
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps!r}; it must be an integer of at least 1.")
        if not isinstance(self.random_start, bool):
            raise ValueError(f"random_start is {self.random_start!r}; it must be True or False.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; an attack computes in one of {', '.join(DTYPES)}.")

    @property
    def step(self) -> float:
        """Length of one step: `step_size`, or `2.5 * eps / num_steps` where that is None."""
        return 2.5 * self.eps / self.num_steps if self.step_size is None else self.step_size

    def describe(self) -> str:
        """Short text for tables and logs: `"linf eps=0.0314 10x0.0078"`, with the dtype where it is not float32."""
        kind = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.norm} eps={self.eps:.4f} {self.num_steps}x{self.step:.4f}{kind}"


def logits_of(output: Any) -> Tensor:
    """
    The logits `[N, C]` of a model's output: the tensor itself, or its `.logits`.

    Those of one image may have lost their first dimension, as by a `squeeze()`.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__}; it must return a tensor of logits or an output with .logits."
        )
    if logits.ndim == 1:
        return logits[None]
    if logits.ndim != 2:
        raise ValueError(f"the model's logits have shape {list(logits.shape)}; [N, classes] is needed.")
    return logits


def check_attack(attack: AttackConfig) -> None:
    """Refuse, by a ValueError, what is no [`AttackConfig`], such as a bare eps, and a place where no gradient is."""
    if not isinstance(attack, AttackConfig):
        raise ValueError(f"attack is {attack!r}; give an AttackConfig, such as AttackConfig(eps=8 / 255).")
    if torch.is_inference_mode_enabled():
        raise ValueError("an attack needs gradients: leave torch.inference_mode(), or use torch.no_grad().")


def check_pixels(images: Tensor) -> None:
    """
    Refuse images that are not float pixels of shape `[N, 3, H, W]` in [0, 1].

    Raises:
        ValueError: If the images are integers, of half precision, of another shape, not finite, or outside [0, 1] as
            normalised pixels are.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images are {type(images).__name__}; a float tensor [N, 3, H, W] with pixels in [0, 1] is needed."
        )
    if images.dtype not in (torch.float32, torch.float64):
        advice = (
            "divide them by 255"
            if not images.is_floating_point()
            else "it is coarser than an attack's steps; the model may compute in another dtype"
        )
        raise ValueError(f"images are {images.dtype}; float32 pixels in [0, 1] are needed: {advice}.")
    if images.ndim != 4 or images.shape[1] != 3:
        advice = "; repeat the grey channel three times" if images.ndim == 4 and images.shape[1] == 1 else ""
        raise ValueError(f"images have shape {list(images.shape)}; [N, 3, H, W] is needed{advice}.")
    if images.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images hold pixels that are not finite (NaN or infinity).")
    if low < 0 or high > 1:
        raise ValueError(
            f"pixels run from {low:.4g} to {high:.4g}; they must stay in [0, 1]: hand over plain pixels, the model "
            "normalises them itself."
        )


def computing_in(attack: AttackConfig, images: Tensor) -> AbstractContextManager[Any]:
    """
    Let models compute in the dtype of the attack, or in that of an autocast that is on where it says float32.

    Weights may change meanwhile: no cast of them is kept.
    """
    kind = images.device.type
    if attack.dtype == "float32" and not torch.is_autocast_enabled(kind):
        return nullcontext()
    dtype = torch.get_autocast_dtype(kind) if attack.dtype == "float32" else torch.bfloat16
    return torch.autocast(kind, dtype, cache_enabled=False)


@contextmanager
def under_attack(model: nn.Module, images: Tensor) -> Iterator[None]:
    """
    Put `model` in the form that it has while it is attacked; afterwards it is as it was, also after an exception.

    In eval mode, its parameters without gradients, in the form that `folding.py` gives it.
    """
    with eval_mode(model), frozen(model), folded_batchnorm(model, images):
        yield


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of class indices `[N]`, summed over the batch (nats)."""
    return F.cross_entropy(logits, labels, reduction="sum")


def kl_divergence(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(clean || logits), summed over the batch (nats); the inner loss of TRADES, arXiv 1901.08573."""
    # log_softmax on both sides: raw probabilities underflow to 0 and give NaN.
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(clean_logits, 1), reduction="sum", log_target=True)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, summed over the batch (after Carlini and Wagner, arXiv 1608.04644)."""
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf)
    return (others.max(1, keepdim=True).values - true).sum()


def pgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    loss: str = "ce",
    start: Tensor | None = None,
    until_fooled: bool = False,
) -> Tensor:
    """
    Search the ball around each image for the point that maximises the loss, by projected gradient steps.

    The model is attacked in eval mode with its parameters frozen; its modes, flags and `.grad` are left as they were.
    BatchNorm is folded into convolutions meanwhile, and those of small maps are filtered (`folding.py`): logits change
    by rounding alone. The loss is summed over the batch, so an image's result does not depend on the others. It works
    under `torch.no_grad()` too.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        images (`Tensor` of shape `[N, 3, H, W]`):
            Float pixels in [0, 1].
        labels (`Tensor`):
            Class indices `[N]`; for `loss="kl"` the clean logits `[N, C]`, held constant.
        attack ([`AttackConfig`]):
            Norm, radius, steps and start.
        loss (`str`, *optional*, defaults to `"ce"`):
            What is maximised, a key of `LOSSES`: `"ce"`, `"kl"` or `"margin"`.
        start (`Tensor` of the shape of `images`, *optional*):
            First iterate, taken as it is: it is projected after the first step, not before. Defaults to a random point
            of the ball (global generator) where `attack.random_start`, else to the images.
        until_fooled (`bool`, *optional*, defaults to `False`):
            Whether an image leaves the batch as soon as an iterate is classified wrongly, by more than rounding: that
            iterate is then what is returned for it. Needs class indices.

    Returns:
        `Tensor` of the shape of `images`: detached, within `attack.eps` of the images and within [0, 1].

    Raises:
        ValueError: If the images are no pixels in [0, 1], labels or start do not fit them, clean logits are not of the
            model's classes, the loss is unknown, or is `"kl"` with `until_fooled`.
    """
    check_attack(attack)
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; known losses: {', '.join(LOSSES)}.")
    if until_fooled and loss == "kl":
        raise ValueError("until_fooled needs the class of each image, and loss='kl' has none: choose 'ce' or 'margin'.")
    check_pixels(images)
    check_labels(labels, len(images), logits=loss == "kl")
    check_start(start, images)
    images, labels = images.detach(), labels.detach()
    if attack.eps == 0:
        return images.clone(memory_format=torch.contiguous_format)
    if start is None:
        start = _random_start(images, attack, None) if attack.random_start else images

    with telling_dtypes(model, images), computing_in(attack, images), under_attack(model, images):
        layout = fast_layout(model, images)
        images = images.contiguous(memory_format=layout)
        adversarial = start.detach().clone(memory_format=layout)
        # What images that have left the batch were left at, and the places of those that are in it still.
        found, places = None, torch.arange(len(images), device=images.device)
        for _ in range(attack.num_steps):
            with torch.enable_grad():
                logits = logits_of(model(adversarial.requires_grad_()))
                if loss == "kl" and logits.shape != labels.shape:
                    raise ValueError(
                        f"the clean logits have {labels.shape[1]} classes and the model {logits.shape[1]}; give "
                        "logits, or a teacher that makes them, of the same classes."
                    )
                gradient = gradient_of(LOSSES[loss](logits, labels), adversarial)
            with torch.no_grad():
                adversarial.requires_grad_(False)
                if until_fooled and (fooled := surely_wrong(logits, labels)).any():
                    left = ~fooled
                    found = adversarial.clone() if found is None else found.index_copy_(0, places, adversarial)
                    adversarial, gradient, images, labels, places = (
                        tensor[left] for tensor in (adversarial, gradient, images, labels, places)
                    )
                    if not len(places):
                        break
                STEPS[attack.norm](adversarial, gradient, images, attack)
    found = adversarial if found is None else found.index_copy_(0, places, adversarial)
    return found.contiguous()


def gradient_of(loss: Tensor, images: Tensor) -> Tensor:
    """
    Gradient of a loss with respect to the images that it was computed from.

    Raises:
        ValueError: If there is none, as of a model that is quantised or runs without gradients.
    """
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the model lets no gradient through to its images (its forward turns gradients off, or it is quantised), "
            "and an attack follows one: only evaluate_robustness(..., attacks=['square']) needs none."
        )
    return gradient


def keyed_generator(seed: int, index: int, restart: int = 0) -> torch.Generator:
    """A generator on the CPU whose numbers depend on these alone: a seed, the index of an image, and a restart."""
    # torch's CPU generator takes 32 bits of its seed; and in a sum a restart of one seed would be one of the next.
    sequence = np.random.SeedSequence([seed, index], spawn_key=(restart,) if restart else ())
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def keyed_start(
    images: Tensor, indices: Sequence[int] | Tensor, attack: AttackConfig, seed: int, restart: int = 0
) -> Tensor:
    """
    Random start of an attack in which the noise of an image depends on its index, the seed and the restart alone.

    Batch size, order, sharding, device and the global generator change nothing.

    Args:
        images (`Tensor` of shape `[N, 3, H, W]`):
            Pixels in [0, 1].
        indices (`Sequence[int]` or `Tensor` of shape `[N]`):
            Index of each image in its data set, at least 0.
        attack ([`AttackConfig`]):
            Norm and radius; the images come back unchanged where `random_start` is off.
        seed (`int`):
            At least 0.
        restart (`int`, *optional*, defaults to 0):
            Which of several starts with this seed, at least 0.

    Returns:
        `Tensor` of the shape of `images`, within the ball and within [0, 1].

    Raises:
        ValueError: If there is not one index per image, or an index or the seed is negative.
    """
    keys = [int(index) for index in indices]
    if len(keys) != len(images):
        raise ValueError(f"{len(keys)} indices are given for {len(images)} images; one per image is needed.")
    if seed < 0 or any(key < 0 for key in keys):
        raise ValueError(
            f"seed and indices must be at least 0; the seed is {seed}, the smallest index {min(keys, default=0)}."
        )
    if not attack.random_start or attack.eps == 0 or not keys:
        return images
    starts = [
        _random_start(image, attack, keyed_generator(seed, key, restart))
        for image, key in zip(images.detach().cpu().split(1), keys, strict=True)
    ]
    return torch.cat(starts).to(images.device)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def surely_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether another logit exceeds the true one, `[N]`, by more than the rounding of another order of sums."""
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)
    return (others - true > ROUNDING * logits.abs().amax(1, keepdim=True)).flatten()


def check_labels(labels: Tensor, count: int, *, logits: bool = False) -> None:
    """Refuse, by a ValueError, what is not one class index, or with `logits` one row of logits, for each of `count`."""
    if logits:
        fits, needed = labels.is_floating_point() and labels.ndim == 2, f"clean logits [{count}, C]"
    else:
        fits, needed = labels.dtype == torch.int64 and labels.ndim == 1, f"int64 class indices [{count}]"
    if not fits or len(labels) != count:
        raise ValueError(f"labels are {labels.dtype} of shape {list(labels.shape)}; {needed} are needed.")


def check_start(start: Tensor | None, images: Tensor) -> None:
    """Refuse, by a ValueError, a start of another shape than the images."""
    if start is not None and start.shape != images.shape:
        raise ValueError(
            f"start has shape {list(start.shape)}, the images {list(images.shape)}; they must be the same."
        )


def _random_start(images: Tensor, attack: AttackConfig, generator: torch.Generator | None) -> Tensor:
    """Uniform in the cube for linf; for l2 a uniform direction at a uniform distance. Clamped to [0, 1]."""
    # Numbers are drawn in the order of memory: that of the images must not matter.
    noise = torch.empty_like(images, memory_format=torch.contiguous_format)
    if attack.norm == "linf":
        noise.uniform_(-attack.eps, attack.eps, generator=generator)
    else:
        noise.normal_(generator=generator)
        length = lengths(noise)
        noise *= attack.eps * torch.empty_like(length).uniform_(0, 1, generator=generator) / length
    return noise.add_(images).clamp_(0, 1)


def lengths(images: Tensor) -> Tensor:
    """l2 norm of each image, `[N, 1, 1, 1]`, never 0."""
    return images.flatten(1).norm(dim=1).clamp_min(torch.finfo(images.dtype).tiny).view(-1, 1, 1, 1)


def _step_linf(adversarial: Tensor, gradient: Tensor, images: Tensor, attack: AttackConfig) -> None:
    adversarial.add_(gradient.sign(), alpha=attack.step)
    adversarial.clamp_(images - attack.eps, images + attack.eps).clamp_(0, 1)


def _step_l2(adversarial: Tensor, gradient: Tensor, images: Tensor, attack: AttackConfig) -> None:
    adversarial.add_(gradient / lengths(gradient), alpha=attack.step).sub_(images)
    adversarial.mul_((attack.eps / lengths(adversarial)).clamp_max(1)).add_(images).clamp_(0, 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "kl": kl_divergence, "margin": margin}
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor, AttackConfig], None]] = {"linf": _step_linf, "l2": _step_l2}

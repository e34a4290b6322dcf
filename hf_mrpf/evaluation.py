"""How robust a model is: named attacks on every image, and the report of what withstood them."""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import AttackConfig, check_pixels, eval_mode, frozen, keyed_start, logits_of, pgd_attack
from .data import as_pixel_dataset, batches, stratified_order
from .fingerprint import images_sha256, weights_sha256
from .journal import Journal
from .processes import Processes
from .progress import Bar, progress_bar
from .report import PairedDifference, RobustnessReport, package_versions, paired_difference, wilson_interval

__all__ = [
    "ATTACKS",
    "NamedAttack",
    "PairedDifference",
    "RobustnessReport",
    "evaluate_robustness",
    "package_versions",
    "paired_difference",
    "wilson_interval",
]


_KINDS = "give (images, labels) tensors, one split of a data set (such as ImageData.test), or batches of such tensors"


@dataclass(frozen=True)
class NamedAttack:
    """
    Strength of an attack that has a name; norm, radius and random start come from the `AttackConfig`.

    Args:
        loss (`str`):
            What is maximised: a key of `LOSSES` in `attacks.py`.
        steps (`int`):
            Steps of a restart. A single step has the full length `eps` and starts at the image itself (FGSM).
        restarts (`int`, *optional*, defaults to `1`):
            Independent random starts; an image is robust if it withstands them all.
    """

    loss: str
    steps: int
    restarts: int = 1

    def configure(self, attack: AttackConfig) -> AttackConfig:
        """The attack in full. A `step_size` of the `AttackConfig` is kept; without one it is `2.5 * eps / steps`."""
        attack = replace(attack, dtype="float32")
        if self.steps == 1:
            return replace(attack, num_steps=1, step_size=attack.eps or None, random_start=False)
        return replace(attack, num_steps=self.steps)


def evaluate_robustness(
    model: nn.Module,
    data: Any,
    attacks: Sequence[str] = ("clean", "pgd20"),
    attack: AttackConfig | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    *,
    batch_size: int = 128,
    data_name: str = "",
    progress: bool = False,
    distributed: bool = False,
    journal: Path | str | None = None,
) -> RobustnessReport:
    """
    Measure clean accuracy and robust accuracy under named attacks.

    Images that are misclassified as they are count as fooled and are not attacked, and an image leaves the batch once
    an iterate fools the model: robust accuracy is that of the worst iterate, no higher than that of the last one, and
    what fooled is classified again by the network as it is. Everything is computed in float32: a model with other
    weights is evaluated as a float32 copy. The random start of an image is keyed by the seed and its index in `data`,
    so that neither batch size nor subset changes it. The model's modes, gradients and flags are left as they were.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        data (`tuple[Tensor, Tensor]`, `datasets.Dataset` or iterable of `(images, labels)` batches):
            Float images `[N, 3, H, W]` in [0, 1] with class indices `[N]`; or one split of a data set with an image (or
            `pixel_values`) and a label column.
        attacks (`Sequence[str]`, *optional*, defaults to `("clean", "pgd20")`):
            Keys of `ATTACKS`: `clean` (always measured), `fgsm` (one step of length eps), `pgd20` (20 steps on the
            cross-entropy), `cw` (20 steps on the margin between the true and the best other logit).
        attack ([`AttackConfig`], *optional*):
            Norm, eps, random start and, if set, step size; steps and restarts are the name's. Defaults to
            `AttackConfig()`: linf, 8/255.
        num_samples (`int`, *optional*):
            Evaluate a stratified random subset of that many images drawn with `seed` (all, if there are fewer); of an
            iterable of batches, whose labels are not known beforehand, the first ones.
        seed (`int`, *optional*, defaults to `0`):
            Seed of subset and random starts.
        batch_size (`int`, *optional*, defaults to `128`):
            Images a batch; an iterable of batches keeps its own.
        data_name (`str`, *optional*):
            What to call the images in the report.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether every process of the group makes this same call: each then attacks a share of every `batch_size`
            times their number of images, no image twice, and all get the same report.
        journal (`Path` or `str`, *optional*):
            File to keep the verdicts in, batch by batch. The same call on the same weights goes on from there; an image
            that is another one now is measured again.

    Returns:
        [`RobustnessReport`]

    Raises:
        `ValueError`: unknown attack (the known are listed), no images, images that are not pixels in [0, 1], labels
            that the logits have no place for, logits that are not finite (the first such image is named).
    """
    attack = attack or AttackConfig()
    names = _known_attacks([attacks] if isinstance(attacks, str) else attacks)
    if num_samples is not None and (
        isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1
    ):
        raise ValueError(
            f"num_samples is {num_samples!r}; it must be an integer of at least 1, or None for all images."
        )
    weight = next(model.parameters(), torch.zeros(()))
    processes = Processes.of(distributed)
    settings = {name: _settings(spec, attack) for name, spec in names.items()}
    subject = {"norm": attack.norm, "eps": attack.eps, "seed": seed, "attacks": settings, "zero_gradients": bool(names)}
    subject |= {"weights": weights_sha256(model)} if journal else {}
    fingerprint, outcomes = hashlib.sha256(), []
    network = _in_float32(model)
    image_size = getattr(getattr(model, "config", None), "image_size", None)
    image_size = image_size if isinstance(image_size, int) else None
    expected, questions = _count(data, num_samples), 1 + len(names)
    total = None if expected is None else expected * questions
    bar = progress_bar(total, "evaluation", "attacked image", shown=progress and processes.is_main)
    with eval_mode(network), frozen(network), Journal(journal, subject, processes) as kept, bar:
        known = {image: outcome for entry in kept.entries for image, outcome in entry.items()}
        together = batch_size * processes.count
        for indices, images, labels in _indexed_batches(data, num_samples, seed, together, image_size):
            _add_to(fingerprint, indices, images, labels)
            keys = [f"{index} {digest}" for index, digest in zip(indices, images_sha256(images, labels), strict=True)]
            shown = bar.n
            missing = [position for position, key in enumerate(keys) if key not in known]
            if missing:
                mine = missing[processes.share(len(missing))]
                batch = [indices[i] for i in mine], images[mine].to(weight.device), labels[mine].to(weight.device)
                found = _outcomes(network, *batch, names, attack, seed, bar) if mine else []
                entry = dict(zip([keys[i] for i in missing], chain.from_iterable(processes.gather(found)), strict=True))
                kept.add(entry)
                known |= entry
            outcomes += [known[key] for key in keys]
            # Images of the journal, and those that other processes attacked.
            bar.update(len(images) * questions - (bar.n - shown))
        bar.set_description("evaluation")
    columns = list(zip(*outcomes, strict=True)) or [()] * (2 + len(names))
    verdicts = {
        name: [bit == "1" for bit in column] for name, column in zip(("clean", *names), columns[1:], strict=True)
    }
    count = len(verdicts["clean"])
    if count == 0:
        raise ValueError("There are no images to evaluate: data is empty.")
    right = {name: sum(bits) for name, bits in verdicts.items()}
    return RobustnessReport(
        clean_accuracy=right["clean"] / count,
        attacks={name: right[name] / count for name in names},
        intervals={name: wilson_interval(right[name], count) for name in verdicts},
        settings=settings,
        num_samples=count,
        norm=attack.norm,
        eps=attack.eps,
        seed=seed,
        zero_gradient_share=columns[0].count("1") / count if names else None,
        data_name=data_name,
        images=fingerprint.hexdigest(),
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        versions=package_versions(),
        verdicts=verdicts,
    )


def _known_attacks(attacks: Iterable[str]) -> dict[str, NamedAttack]:
    requested = list(attacks)
    if unknown := [name for name in requested if name not in ATTACKS]:
        raise ValueError(f"Unknown attacks {', '.join(map(repr, unknown))}; known: {', '.join(ATTACKS)}.")
    return {name: spec for name in requested if (spec := ATTACKS[name]) is not None}


def _settings(spec: NamedAttack, attack: AttackConfig) -> dict[str, Any]:
    used = spec.configure(attack)
    return {
        "loss": spec.loss,
        "steps": spec.steps,
        "step_size": used.step,
        "restarts": spec.restarts,
        "random_start": used.random_start,
        "fooled_by": "any iterate",
    }


def _indexed_batches(
    data: Any, num_samples: int | None, seed: int, batch_size: int, image_size: int | None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield `(indices in data, float32 images, int64 labels)`, checked."""
    for indices, images, labels in _raw_batches(data, num_samples, seed, batch_size, image_size):
        check_pixels(images)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(
                f"labels are {getattr(labels, 'dtype', type(labels))} of shape {list(getattr(labels, 'shape', []))}; "
                f"int64 class indices [{len(images)}], one per image, are needed."
            )
        yield indices, images.float(), labels


def _raw_batches(
    data: Any, num_samples: int | None, seed: int, batch_size: int, image_size: int | None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    from datasets import Dataset

    if isinstance(data, Mapping):
        raise ValueError(f"data holds several splits ({', '.join(map(str, data))}); hand over one of them.")
    if isinstance(data, Dataset):
        pixels = as_pixel_dataset(data, image_size)
        order = _order(pixels["labels"][:], num_samples, seed)
        starts = range(0, len(order), batch_size)
        for start, (images, labels) in zip(starts, batches(pixels, batch_size, order), strict=True):
            yield order[start : start + batch_size], images, labels
    elif _is_pair(data):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"There are {len(images)} images and {len(labels)} labels; one label per image is needed.")
        order = _order(labels.tolist(), num_samples, seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield chosen, images[chosen], labels[chosen]
    else:
        seen = 0
        if not isinstance(data, Iterable):
            raise ValueError(f"data is a {type(data).__name__}; {_KINDS}.")
        for batch in data:
            if not isinstance(batch, Mapping) and not _is_pair(batch):
                raise ValueError(
                    f"data yields {type(batch).__name__} that are no (images, labels) of tensors; {_KINDS}."
                )
            images, labels = (batch["pixel_values"], batch["labels"]) if isinstance(batch, Mapping) else batch
            take = len(images) if num_samples is None else min(len(images), num_samples - seen)
            if take == 0:
                break
            yield list(range(seen, seen + take)), images[:take], labels[:take]
            seen += take


def _count(data: Any, num_samples: int | None) -> int | None:
    """Number of images to come, where it can be known."""
    if _is_pair(data):
        data = data[0]
    elif not hasattr(data, "features"):
        return num_samples
    return len(data) if num_samples is None else min(num_samples, len(data))


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor)


def _order(labels: Sequence[int], num_samples: int | None, seed: int) -> list[int]:
    if num_samples is None or num_samples >= len(labels):
        return list(range(len(labels)))
    return [int(index) for index in stratified_order(labels, seed)[:num_samples]]


def _in_float32(model: nn.Module) -> nn.Module:
    kinds = {tensor.dtype for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()}
    return model if kinds <= {torch.float32} else copy.deepcopy(model).float()


def _add_to(fingerprint: Any, indices: list[int], images: Tensor, labels: Tensor) -> None:
    # Image by image, so that the batch size leaves no mark.
    for index, image, label in zip(indices, images.cpu(), labels.tolist(), strict=True):
        fingerprint.update(f"{index} {label} {tuple(image.shape)}".encode())
        fingerprint.update(image.contiguous().numpy().tobytes())


def _outcomes(
    model: nn.Module,
    indices: list[int],
    images: Tensor,
    labels: Tensor,
    names: Mapping[str, NamedAttack],
    attack: AttackConfig,
    seed: int,
    bar: Bar,
) -> list[str]:
    """For each image one digit a question: has it no gradient, is it right as it is, does it withstand each attack."""
    logits, blind = _clean_logits(model, images, labels, indices, gradient=bool(names))
    correct = logits.argmax(1) == labels
    answers = [blind, correct]
    bar.update(len(images))
    for name, spec in names.items():
        bar.set_description(f"evaluation, {name}")
        answers.append(_robust(model, images, labels, indices, correct, spec, attack, seed))
        bar.update(len(images))
    return ["".join("01"[bit] for bit in bits) for bits in torch.stack(answers, 1).tolist()]


def _clean_logits(
    model: nn.Module, images: Tensor, labels: Tensor, indices: list[int], *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Logits of the images, and which of them have no gradient anywhere (none, if it is not asked for)."""
    with torch.set_grad_enabled(gradient):
        leaf = images.clone().requires_grad_(gradient)
        logits = _finite_logits(model, leaf, indices)
        classes = logits.shape[1]
        outside = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
        if outside:
            raise ValueError(
                f"The label of image {indices[outside[0]]} is {int(labels[outside[0]])}, but the model has {classes} "
                f"classes (0 to {classes - 1})."
            )
        if not gradient:
            return logits, torch.zeros_like(labels, dtype=torch.bool)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)
    return logits.detach(), slope.flatten(1).abs().amax(1) == 0


def _robust(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: list[int],
    correct: Tensor,
    spec: NamedAttack,
    attack: AttackConfig,
    seed: int,
) -> Tensor:
    """Whether each image is classified correctly before the attack and after each of its restarts."""
    robust, used = correct.clone(), spec.configure(attack)
    for restart in range(spec.restarts):
        alive = robust.nonzero().flatten()
        if not len(alive):
            break
        keys = [indices[position] for position in alive.tolist()]
        start = keyed_start(images[alive], keys, used, seed + restart)
        adversarial = pgd_attack(
            model, images[alive], labels[alive], used, loss=spec.loss, start=start, until_fooled=True
        )
        with torch.no_grad():
            robust[alive] = _finite_logits(model, adversarial, keys).argmax(1) == labels[alive]
    return robust


def _finite_logits(model: nn.Module, images: Tensor, indices: list[int]) -> Tensor:
    logits = logits_of(model(images))
    finite = logits.isfinite().all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"The logits of image {indices[first]} are not finite: {logits[first].tolist()}. Look for NaN in the "
            "model's weights and BatchNorm statistics."
        )
    return logits


ATTACKS: dict[str, NamedAttack | None] = {
    "clean": None,
    "fgsm": NamedAttack("ce", steps=1),
    "pgd20": NamedAttack("ce", steps=20),
    "cw": NamedAttack("margin", steps=20),
}

"""How robust a model is: named attacks on every image, and the report of what withstood them."""

import copy
import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import AttackConfig, check_attack, gradient_of, logits_of
from .class_names import model_class_names
from .fingerprint import answers_of, weights_sha256
from .folding import fast_layout
from .indexed_images import count_images, indexed_batches, pools
from .journal import Journal
from .modes import eval_mode, frozen, in_own_dtype
from .named_attacks import ATTACKS, AUTOATTACK_TARGETS, NamedAttack, Run, runs_of, settings_of
from .processes import Processes
from .progress import progress_bar
from .report import PairedDifference, RobustnessReport, package_versions, paired_difference, wilson_interval
from .verdicts import Answer, Verdicts

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
    weights is evaluated as a float32 copy. All random numbers of an image are keyed by the seed and its index in
    `data`, so that neither batch size nor subset changes them. The model's modes, gradients and flags are left as they
    were.

    An attack of several runs (restarts, targets, the parts of `autoattack`) makes the next one on the images alone that
    withstood those before, in full batches drawn from all images that are held at a time (256 MiB of pixels). A run
    that several of the named attacks share is made once.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        data (`tuple[Tensor, Tensor]`, `datasets.Dataset` or iterable of `(images, labels)` batches):
            Float images `[N, 3, H, W]` in [0, 1] with class indices `[N]`, also as a mapping of `pixel_values` and
            `labels`; or one split of a data set with an image (or `pixel_values`) and a label column.
        attacks (`Sequence[str]`, *optional*, defaults to `("clean", "pgd20")`):
            Keys of `ATTACKS`: `clean` (always measured), `fgsm` (one step of length eps), `pgd20` (20 steps on the
            cross-entropy), `pgd50x5` (50 steps from each of five starts), `cw` (20 steps on the margin between the true
            and the best other logit), `apgd_ce`, `apgd_t` (100 steps; the latter on the targeted DLR loss at 9
            targets), `fab_t` (100 steps at 9 targets), `square` (5000 queries, no gradients), and `autoattack`, the
            standard set of [Croce and Hein](https://huggingface.co/papers/2003.01690): those four one after another.
            With fewer than 10 classes there are fewer targets, and with 2 or 3 the margin stands for targeted DLR,
            which is not defined there: `settings` in the report names what was run.
        attack ([`AttackConfig`], *optional*):
            Norm, eps, random start and, if set, step size; steps and restarts are the name's. Defaults to
            `AttackConfig()`: linf, 8/255.
        num_samples (`int`, *optional*):
            Evaluate a stratified random subset of that many images drawn with `seed` (all, if there are fewer); of an
            iterable of batches, whose labels are not known beforehand, the first ones.
        seed (`int`, *optional*, defaults to `0`):
            Seed of subset and random starts.
        batch_size (`int`, *optional*, defaults to `128`):
            Images a batch.
        data_name (`str`, *optional*):
            What to call the images in the report.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether every process of the group makes this same call: each then attacks a share of every `batch_size`
            times their number of images, no image twice, and all get the same report.
        journal (`Path` or `str`, *optional*):
            File to keep the verdicts in, after each batch of each run. The same call on the same network goes on from
            there; an image that is another one now is measured again. Verdicts on another network, or of another seed
            or threat model, are moved aside, to `<name>.1`; a file that holds no verdicts is refused.

    Returns:
        [`RobustnessReport`]

    Raises:
        `ValueError`: unknown attack (the known are listed), no images, images that are not pixels in [0, 1], labels
            that the logits have no place for, a data set whose named classes are not the first ones of the model's
            config in the same order, logits that are not finite (the first such image is named), a model that lets no
            gradient through, of which `square` alone can tell.
    """
    attack = attack or AttackConfig()
    names = _known_attacks([attacks] if isinstance(attacks, str) else attacks)
    if names:
        check_attack(attack)
    for option, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        all_images = option == "num_samples" and value is None
        if not all_images and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            advice = ", or None for all images" if option == "num_samples" else ""
            raise ValueError(f"{option} is {value!r}; it must be an integer of at least 1{advice}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an integer of at least 0.")
    weight = next(model.parameters(), torch.zeros(()))
    processes = Processes.of(distributed)
    subject = {"norm": attack.norm, "eps": attack.eps, "step_size": attack.step_size, "seed": seed}
    subject |= {"random_start": attack.random_start}
    gradient = any(part.method != "square" for name in names for part in ATTACKS[name])
    # Without a gradient nothing is known of those that are zero.
    question = "clean" if gradient else "clean, without its gradient"
    fingerprint = hashlib.sha256()
    network = _in_float32(model)
    image_size = getattr(getattr(model, "config", None), "image_size", None)
    image_size = image_size if isinstance(image_size, int) else None
    numbered = indexed_batches(data, num_samples, seed, batch_size, image_size, model_class_names(model))
    if journal and (first := next(numbered, None)) is not None:
        numbered = chain([first], numbered)
        subject |= {"weights": weights_sha256(model), "answers": answers_of(network, first[1].to(weight.device))}
    expected = count_images(data, num_samples)
    rounds = 1 + sum(len(runs_of(name, AUTOATTACK_TARGETS + 1)) for name in names)
    bar = progress_bar(
        None if expected is None else expected * rounds, "evaluation", "attacked image",
        shown=progress and processes.is_main,
    )  # fmt: skip
    blind, classes = 0, 0
    verdicts: dict[str, list[bool]] = {name: [] for name in ("clean", *names)}
    verdicts_file = Journal(journal, subject, processes, keep=True)
    with in_own_dtype(network), eval_mode(network), frozen(network), verdicts_file as kept, bar:
        known = Verdicts(kept, processes, batch_size, bar)

        def clean(indices: list[int], images: Tensor, labels: Tensor) -> list[str]:
            where = images.to(weight.device), labels.to(weight.device)
            return _clean_answers(network, *where, indices, gradient=gradient)

        for pool in pools(numbered):
            _add_to(fingerprint, pool.indices, pool.images, pool.labels)
            everything = range(len(pool.keys))
            answers = known.settle(question, pool, everything, clean)
            blind += sum(answer[0] == "1" for answer in answers)
            classes = int(answers[0][2:])
            correct = [answer[1] == "1" for answer in answers]
            verdicts["clean"] += correct
            for name in names:
                bar.set_description(f"evaluation, {name}")
                robust = list(correct)
                for run in runs_of(name, classes):
                    withstands = _answers_under(run, network, attack, seed, weight.device)
                    standing = [position for position in everything if robust[position]]
                    answers = known.settle(run.name, pool, standing, withstands)
                    for position, answer in zip(standing, answers, strict=True):
                        robust[position] = answer == "1"
                verdicts[name] += robust
        bar.set_description("evaluation")
    count = len(verdicts["clean"])
    if count == 0:
        raise ValueError("There are no images to evaluate: data is empty.")
    right = {name: sum(bits) for name, bits in verdicts.items()}
    return RobustnessReport(
        clean_accuracy=right["clean"] / count,
        attacks={name: right[name] / count for name in names},
        intervals={name: wilson_interval(right[name], count) for name in verdicts},
        settings={name: settings_of(name, attack, classes) for name in names},
        num_samples=count,
        norm=attack.norm,
        eps=attack.eps,
        seed=seed,
        zero_gradient_share=blind / count if gradient else None,
        data_name=data_name,
        images=fingerprint.hexdigest(),
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        versions=package_versions(),
        verdicts=verdicts,
    )


def _known_attacks(attacks: Sequence[str]) -> list[str]:
    """The names but for `clean`, each once."""
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise ValueError(f"Unknown attacks {', '.join(map(repr, unknown))}; known: {', '.join(ATTACKS)}.")
    return [name for name in dict.fromkeys(attacks) if ATTACKS[name]]


def _in_float32(model: nn.Module) -> nn.Module:
    kinds = {tensor.dtype for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()}
    return model if kinds <= {torch.float32} else copy.deepcopy(model).float()


def _add_to(fingerprint: Any, indices: list[int], images: Tensor, labels: Tensor) -> None:
    # Image by image, so that the batch size leaves no mark.
    for index, image, label in zip(indices, images.cpu(), labels.tolist(), strict=True):
        fingerprint.update(f"{index} {label} {tuple(image.shape)}".encode())
        fingerprint.update(image.contiguous().numpy().tobytes())


def _clean_answers(
    model: nn.Module, images: Tensor, labels: Tensor, indices: list[int], *, gradient: bool
) -> list[str]:
    """For each image a digit whether it has no gradient, one whether it is right, and the number of classes."""
    logits, blind = _clean_logits(model, images, labels, indices, gradient=gradient)
    bits = torch.stack([blind, logits.argmax(1) == labels], 1).tolist()
    return [f"{first:d}{second:d}{logits.shape[1]}" for first, second in bits]


def _clean_logits(
    model: nn.Module, images: Tensor, labels: Tensor, indices: list[int], *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Logits of the images, and which of them have no gradient anywhere (none, if it is not asked for)."""
    with torch.set_grad_enabled(gradient):
        leaf = images.clone(memory_format=fast_layout(model, images)).requires_grad_(gradient)
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
        slope = gradient_of(F.cross_entropy(logits, labels, reduction="sum"), leaf)
    return logits.detach(), slope.flatten(1).abs().amax(1) == 0


def _answers_under(run: Run, model: nn.Module, attack: AttackConfig, seed: int, device: torch.device) -> Answer:
    """What tells for a batch of images, by one digit each, whether they are classified correctly after the run."""

    def withstands(indices: list[int], images: Tensor, labels: Tensor) -> list[str]:
        images, labels = images.to(device), labels.to(device)
        adversarial = run(model, images, labels, indices, attack, seed)
        with torch.no_grad():
            right = _finite_logits(model, adversarial, indices).argmax(1) == labels
        return ["01"[bit] for bit in right.tolist()]

    return withstands


def _finite_logits(model: nn.Module, images: Tensor, indices: list[int]) -> Tensor:
    logits = logits_of(model(images.contiguous(memory_format=fast_layout(model, images))))
    finite = logits.isfinite().all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"The logits of image {indices[first]} are not finite: {logits[first].tolist()}. Look for NaN in the "
            "model's weights and BatchNorm statistics."
        )
    return logits

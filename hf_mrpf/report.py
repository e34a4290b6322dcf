"""What an evaluation found: accuracies with their uncertainty, the verdict on every image, and paired comparisons."""

import json
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Self

PACKAGES = ("hf-mrpf", "torch", "torchvision", "timm", "transformers", "torch-pruning")
Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class RobustnessReport:
    """
    Accuracies of one model on one set of images, and the verdict on every image behind them.

    `str(report)` is one line for a log.

    Args:
        clean_accuracy (`float`):
            Fraction of images classified correctly as they are.
        attacks (`dict[str, float]`):
            Robust accuracy by attack: fraction of images that are classified correctly as they are and under that
            attack. It is an upper bound of the true robustness: a stronger attack may fool more.
        intervals (`dict[str, tuple[float, float]]`):
            Wilson 95 % interval of each accuracy, `"clean"` among them. For one model alone; to compare two models on
            the same images use [`paired_difference`].
        settings (`dict[str, dict]`):
            For each attack `loss`, `steps`, `step_size` (pixels in [0, 1]), `restarts`, `random_start`.
        num_samples (`int`):
            Number of images.
        norm (`str`), eps (`float`):
            Ball of the attacks, pixels in [0, 1].
        seed (`int`):
            Seed of the subset and of the random starts.
        zero_gradient_share (`float`, *optional*):
            Share of images whose cross-entropy has a gradient of exactly zero at every pixel. Gradient attacks cannot
            move these, so a robust accuracy beside a large share is not to be trusted. None if nothing was attacked,
            or only without gradients.
        data_name (`str`):
            What the images are.
        images (`str`):
            SHA-256 over indices, pixels and labels: two reports on the same images have the same.
        device (`str`), dtype (`str`):
            Device, and dtype of the weights as they were given. The arithmetic is float32 whatever they are.
        versions (`dict[str, str]`):
            Python and packages.
        verdicts (`dict[str, list[bool]]`):
            For `"clean"` and each attack, whether each image, in order of evaluation, is still classified correctly.
    """

    clean_accuracy: float
    attacks: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    settings: dict[str, dict[str, Any]]
    num_samples: int
    norm: str
    eps: float
    seed: int
    zero_gradient_share: float | None
    data_name: str
    images: str
    device: str
    dtype: str
    versions: dict[str, str]
    verdicts: dict[str, list[bool]] = field(repr=False)

    def __post_init__(self) -> None:
        for name, accuracy in self.attacks.items():
            if not 0 <= accuracy <= self.clean_accuracy <= 1:
                raise ValueError(
                    f"Robust accuracy {accuracy} under {name} and clean accuracy {self.clean_accuracy} contradict each "
                    "other: 0 <= robust <= clean <= 1 holds for every attack."
                )

    def __str__(self) -> str:
        parts = [f"{name} {100 * self.accuracy(name):.1f} % {_interval_text(self.intervals[name])}" for name in self]
        return f"{', '.join(parts)} (n={self.num_samples}, {self.norm} eps={self.eps:.4g}, seed {self.seed})"

    def __iter__(self) -> Iterator[str]:
        """Names of all accuracies, `"clean"` first."""
        return iter(("clean", *self.attacks))

    def accuracy(self, name: str) -> float:
        """Accuracy under the named attack, or `"clean"`."""
        return self.clean_accuracy if name == "clean" else self.attacks[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content; the verdicts of an attack are a string of 0 and 1, one digit an image."""
        content = asdict(self)
        content["verdicts"] = {name: "".join("01"[bit] for bit in bits) for name, bits in self.verdicts.items()}
        content["intervals"] = {name: list(interval) for name, interval in self.intervals.items()}
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; further keys, such as a run adds, are left out. A ValueError names missing ones."""
        known = {item.name for item in fields(cls)}
        if missing := sorted(known - content.keys()):
            raise ValueError(f"This is no robustness report: missing keys {', '.join(missing)}.")
        verdicts = {name: [bit == "1" for bit in bits] for name, bits in content["verdicts"].items()}
        intervals = {name: (low, high) for name, (low, high) in content["intervals"].items()}
        values = {name: content[name] for name in known} | {"verdicts": verdicts, "intervals": intervals}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON (`robustness_report.json`)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises a ValueError that names the file where it holds no report."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one model minus that of another over the same images, with its standard error and 95 % interval."""

    difference: float
    standard_error: float
    interval: tuple[float, float]


def wilson_interval(successes: int, total: int, z: float = Z95) -> tuple[float, float]:
    """
    Wilson score interval of a proportion, `(low, high)` in [0, 1]; 95 % unless another normal quantile is given.

    Unlike the usual `p +- z * sqrt(p (1 - p) / n)` it keeps its level near 0 and 1 (Wilson, JASA 22, 1927).
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} are no proportion; 0 <= successes <= total, total >= 1.")
    share, weight = successes / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(a: RobustnessReport, b: RobustnessReport, attack: str = "clean") -> PairedDifference:
    """
    Compare two models image by image: accuracy of `a` minus accuracy of `b` under one attack.

    Only images on which the verdicts differ contribute, so the error is far below that of two separate intervals. The
    standard error is that of the mean of the differences; the 95 % interval is the one of Bonett and Price (British J.
    of Math. and Stat. Psychology 65, 2012), which stays honest where few verdicts differ or none.

    Args:
        a, b ([`RobustnessReport`]):
            Reports over the same images.
        attack (`str`, *optional*, defaults to `"clean"`):
            Attack that both reports hold, at the same strength.

    Returns:
        [`PairedDifference`]: fractions, positive where `a` is better.

    Raises:
        `ValueError`: the reports are of different images or attacks.
    """
    for report in (a, b):
        if attack not in report.verdicts:
            raise ValueError(f"A report holds no verdicts under {attack!r}; it has {', '.join(report.verdicts)}.")
    if a.images != b.images:
        raise ValueError("The two reports are of different images, so they cannot be compared image by image.")
    if attack != "clean" and _strength(a, attack) != _strength(b, attack):
        raise ValueError(
            f"{attack} differs: {_strength(a, attack)} in the first report, {_strength(b, attack)} in the second."
        )
    count = a.num_samples
    pairs = list(zip(a.verdicts[attack], b.verdicts[attack], strict=True))
    better, worse = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    difference = (better - worse) / count
    variance = ((better + worse) / count - difference**2) / max(count - 1, 1)
    up, down = (better + 1) / (count + 2), (worse + 1) / (count + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    interval = (max(-1.0, up - down - half), min(1.0, up - down + half))
    return PairedDifference(difference, math.sqrt(variance), interval)


def package_versions(*further: str) -> dict[str, str]:
    """Versions of Python and of the installed packages that a result depends on, and of `further` ones."""
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *further):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _strength(report: RobustnessReport, attack: str) -> dict[str, Any]:
    return {"norm": report.norm, "eps": report.eps, **report.settings[attack]}


def _interval_text(interval: tuple[float, float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

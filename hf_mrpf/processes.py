"""The processes of a distributed run: the share of the work of each, and sums that come out the same on all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fingerprint import weights_sha256


@dataclass(frozen=True)
class Processes:
    """
    A group of processes that compute one result together; by itself a single process.

    Every process makes the same calls in the same order. With one process nothing is sent, and none of this needs
    `torch.distributed`.

    Args:
        rank (`int`, *optional*, defaults to `0`):
            Number of this process, from 0.
        count (`int`, *optional*, defaults to `1`):
            How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, distributed: bool) -> Self:
        """
        All processes of the default group where `distributed`, else this one alone.

        Raises:
            ValueError: where `distributed` and no process group is running.
        """
        if not distributed:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed=True needs a running process group: start the program with accelerate launch or torchrun "
                "on several processes, or leave distributed out."
            )
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """
        Positions of `count` items that fall to this process.

        The slices of all processes follow one another and cover each item once; their lengths differ by one at most,
        so that one may be empty.
        """
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which is the same bit for bit on each."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def total(self, value: float, device: torch.device) -> float:
        """The sum of a number over all processes, in float64, by way of `device`."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=device)
        self.sum_([box])
        return box.item()

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """
        What `work` returns on the main process, on every process.

        Raises:
            On the main process what `work` raises; on the others, which would wait forever, a ValueError with the same
            text, or a RuntimeError where it is no ValueError.
        """
        found, error = _attempt(work) if self.is_main else (None, None)
        found, failure = self.from_main((found, self._failure(error)))
        if error or failure:
            raise error or failure
        return found

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """
        What `work` returns on each process, by rank, on every process.

        Raises:
            On a process whose `work` raises the same; on the others that of the first such process, as for `on_main`.
        """
        found, error = _attempt(work)
        values = self.gather((found, self._failure(error)))
        failures = [failure for _, failure in values if failure]
        if failures:
            raise error or failures[0]
        return [value for value, _ in values]

    def _failure(self, error: Exception | None) -> Exception | None:
        """What to send of an error: any text can be sent, not any object."""
        if error is None:
            return None
        if isinstance(error, ValueError):
            return ValueError(str(error))
        return RuntimeError(f"process {self.rank} failed with {type(error).__name__}: {error}")


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the other processes wait to hear of it
        return None, error


def check_same_model(model: nn.Module, processes: Processes, when: str) -> None:
    """
    Make sure that every process holds the same parameters and buffers, bit for bit.

    Args:
        model (`nn.Module`), processes ([`Processes`]): what to compare, between whom.
        when (`str`): what has just ended, for the message: `"after pruning"`.

    Raises:
        ValueError: on every process, where one differs.
    """
    digests = processes.gather(weights_sha256(model))
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ValueError(
            f"{when} processes {', '.join(map(str, different))} hold other weights than process 0, so the result would "
            "depend on which one is saved. Were all started with the same command, versions and data?"
        )

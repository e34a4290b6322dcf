"""Verdicts on images: each found once, by all processes together, and kept on disk."""

from collections.abc import Callable, Sequence
from itertools import chain

from torch import Tensor

from .indexed_images import Pool
from .journal import Journal
from .processes import Processes
from .progress import Bar

Answer = Callable[[list[int], Tensor, Tensor], list[str]]


class Verdicts:
    """
    Answers to questions on images, by question and key of the image.

    Args:
        journal ([`Journal`]):
            Entered; what it holds is known from the start, and each batch of answers is added to it.
        processes ([`Processes`]):
            Who takes part. Each answers for its share of every batch, and all get to know every answer.
        batch_size (`int`):
            Images a batch and process.
        bar ([`Bar`]):
            Told of every image that is settled.
    """

    def __init__(self, journal: Journal, processes: Processes, batch_size: int, bar: Bar):
        self.journal, self.processes, self.bar = journal, processes, bar
        self.together = batch_size * processes.count
        self.known: dict[str, dict[str, str]] = {}
        for entry in journal.entries:
            self.known.setdefault(entry["question"], {}).update(entry["answers"])

    def settle(self, question: str, pool: Pool, positions: Sequence[int], answer: Answer) -> list[str]:
        """
        The answers for the images at these positions of the pool.

        Those that are not known yet are asked for in full batches: `answer(indices, images, labels)` gives one string
        an image.
        """
        known = self.known.setdefault(question, {})
        missing = [position for position in positions if pool.keys[position] not in known]
        for start in range(0, len(missing), self.together):
            asked = missing[start : start + self.together]
            mine = asked[self.processes.share(len(asked))]

            def found(mine: list[int] = mine) -> list[str]:
                return answer([pool.indices[i] for i in mine], pool.images[mine], pool.labels[mine]) if mine else []

            # An image that is refused on one process would leave the others waiting.
            answers = chain.from_iterable(self.processes.together(found))
            entry = dict(zip([pool.keys[position] for position in asked], answers, strict=True))
            self.journal.add({"question": question, "answers": entry})
            known |= entry
            self.bar.update(len(asked))
        self.bar.update(len(pool.keys) - len(missing))
        return [known[pool.keys[position]] for position in positions]

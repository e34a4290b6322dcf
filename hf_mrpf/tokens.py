"""What is secret and must not be shown."""

import re
from collections.abc import Iterable

# Options may be abbreviated, and written with dashes.
_OPTION = r"--(?:hub[-_]t\w*|[\w-]*token)"


def without_tokens(text: str) -> str:
    """The text with `***` in the place of tokens: what looks like one, and the value of an option that takes one."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}\b", "hf_***", text)
    return re.sub(rf"({_OPTION}[= ])\S+", r"\1***", text)


def words_without_tokens(words: Iterable[str]) -> list[str]:
    """The words of a command, with `***` in the place of tokens."""
    shown: list[str] = []
    for word in words:
        secret = shown and re.fullmatch(_OPTION, shown[-1])
        assigned = re.match(rf"{_OPTION}=", word)
        shown.append("***" if secret else f"{assigned[0]}***" if assigned else without_tokens(word))
    return shown

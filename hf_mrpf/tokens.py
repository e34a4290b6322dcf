"""What is secret and must not be shown."""

import re


def without_tokens(text: str) -> str:
    """The text with `***` in the place of tokens: what looks like one, and the value of an option that takes one."""
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}\b", "hf_***", text)
    # Options may be abbreviated, and written with dashes.
    return re.sub(r"(--(?:hub[-_]t\w*|[\w-]*tok\w*)[= ])\S+", r"\1***", text)

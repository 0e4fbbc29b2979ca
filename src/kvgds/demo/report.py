"""What a demo process hands to its parent, and whether two runs gave the same.

Pure but for reading and writing its own files.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Reply:
    """What a prompt got.

    Attributes:
        tokens: the tokens generated.
        logits: the logits that each was chosen from, (tokens, vocabulary).
        first_token_s: seconds from the prompt's arrival to its first token.
        loaded: blocks of the prompt that came from the engine.
        wanted: keys of the prompt's blocks that could have.
    """

    tokens: list[int]
    logits: npt.NDArray[np.float32]
    first_token_s: float
    loaded: int
    wanted: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an engine moved.

    Attributes:
        blocks: how many blocks.
        seconds: how long at least one of them was under way.
    """

    blocks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What one process did.

    Attributes:
        model: the model in words.
        plan: the engine's path and why, as it prints itself.
        stored_keys: keys whose stores were acknowledged.
        stored: traffic to storage.
        loaded: traffic from storage.
        failures: why blocks that should have loaded did not.
        replies: to the prompts served with kvgds.
        plain: to the first process's prompts and then its own, without kvgds.
        whole_s: seconds to the first token of its own, without kvgds, prefilled in one step.
    """

    model: str
    plan: str
    stored_keys: frozenset[bytes]
    stored: Traffic
    loaded: Traffic
    failures: list[str]
    replies: list[Reply]
    plain: list[Reply] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it for the parent."""
        path.write_bytes(pickle.dumps(self))

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what a child wrote."""
        report = pickle.loads(path.read_bytes())  # noqa: S301 - from our child, in a folder of ours
        if not isinstance(report, cls):
            raise TypeError(f"{path} holds no report")
        return report


def differences(served: Sequence[Reply], plain: Sequence[Reply]) -> Iterator[str]:
    """One line for each prompt whose tokens or logits are not those of the plain run."""
    for number, (ours, theirs) in enumerate(zip(served, plain, strict=True), 1):
        for place, (token, expected) in enumerate(zip(ours.tokens, theirs.tokens, strict=True), 1):
            if token != expected:
                yield f"prompt {number}: token {place} is {token}, without kvgds {expected}"
                break
        # NaN equals nothing, so logits that are no numbers count as different too.
        wrong = (ours.logits != theirs.logits).any(axis=1)
        if wrong.any():
            yield f"prompt {number}: the logits of token {int(wrong.argmax()) + 1} differ"

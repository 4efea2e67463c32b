"""The exception tree. Errors that users can cause or fix are `LorasmithError`s, whose text is one sentence.

    LorasmithError
    ├── OptionError      an option has an unknown name, a wrong type or a value out of its range
    ├── ModelError       a base model cannot be found, read or recognised
    ├── LoraError        a LoRA file cannot be read, does not fit the model, or must not be written
    ├── DataError        images, captions or latents cannot be used
    ├── GraphError       a workflow is malformed (carries every finding)
    ├── NodeError        a node of a workflow failed (names the node, keeps the cause)
    ├── CancelledError   the work was cancelled
    ├── TrainingError    a run cannot start or continue
    └── OutputError      something cannot be written

The sentence states the rule, the value that breaks it and the remedy. It is one line without control characters, of at
most 300 characters, whatever the value is: values come from files and names of others. Doors (command line, nodes,
server) print the sentence; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from lorasmith.core.printable import sentence

__all__ = [
    "CancelledError",
    "DataError",
    "GraphError",
    "LoraError",
    "LorasmithError",
    "ModelError",
    "NodeError",
    "OptionError",
    "OutputError",
    "TrainingError",
]


class LorasmithError(Exception):
    """Base of all errors that users can cause or fix.

    Args:
        message: made fit to print by `sentence`.

    Attributes:
        is_printed_elsewhere: whether another process of the run prints it, see `core.processes.joined`.
    """

    is_printed_elsewhere = False

    def __init__(self, message: object = "") -> None:
        super().__init__(sentence(message))


class OptionError(LorasmithError):
    """An option has an unknown name, a wrong type or a value out of its range."""


class ModelError(LorasmithError):
    """A base model cannot be found, read or recognised."""


class LoraError(LorasmithError):
    """A LoRA file cannot be read, does not fit the model, or must not be written."""


class DataError(LorasmithError):
    """Images, captions or latents cannot be used for training."""


class GraphError(LorasmithError):
    """A workflow is malformed; `findings` holds one sentence per fault, each naming node id and title.

    The message lists the first findings, one per line.
    """

    def __init__(self, message: object, findings: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings

    def __str__(self) -> str:
        shown = [f"  - {sentence(finding)}" for finding in self.findings[:_SHOWN_FINDINGS]]
        more = len(self.findings) - len(shown)
        return "\n".join((super().__str__(), *shown, *([f"  and {more:,} more"] if more else ())))


class NodeError(LorasmithError):
    """A node of a workflow failed; the sentence names the node, `__cause__` is the error that it raised."""


class CancelledError(LorasmithError):
    """The work was cancelled, and stopped at the next opportunity."""


class TrainingError(LorasmithError):
    """A training run cannot start or continue."""


class OutputError(LorasmithError):
    """A file or folder cannot be written."""


_SHOWN_FINDINGS = 50

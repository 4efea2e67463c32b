"""Endpoints about drafts: what is chosen for a training that is not queued yet, which all pages share.

A page sends the draft that it has with the one that it has seen, so that what two pages change apart is merged, and
what both change is refused to the second one, which keeps its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.typed_json import typed
from lorasmith.server.datasets.dataset_folders import dataset_folder, is_builtin
from lorasmith.server.endpoint import Call, Endpoint
from lorasmith.server.jobs.job_shapes import Draft, DraftAnswer, DraftBody
from lorasmith.server.request_handling import ServerContext

_MOST_BYTES = 64_000
_EXAMPLES = {  # what is known of built-in datasets
    "fox": Draft(what="pet", teaches="subject", trigger="a fox"),
    "high-contrast": Draft(what="style", teaches="style", trigger="high contrast style"),
}


class StaleDraftError(LorasmithError):
    """Parts of a draft were changed by another client; `details` is the stored one as a DraftAnswer."""

    def __init__(self, names: list[str], details: dict[str, Any]) -> None:
        super().__init__(
            f"{', '.join(names)} of this training was changed elsewhere, and nothing was stored; look at what is there "
            "now, and store yours again"
        )
        self.details = details


def merged(
    seen: Mapping[str, Any], mine: Mapping[str, Any], there: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """`there` with what `mine` changes of `seen`, and the names that both have changed otherwise. Mappings in them are
    merged by name, a missing name is None.
    """
    found, conflicts = dict(there), []
    for name in {**seen, **mine}:
        was, new, now = seen.get(name), mine.get(name), there.get(name)
        if isinstance(new, Mapping) and all(value is None or isinstance(value, Mapping) for value in (was, now)):
            found[name], inner = merged(was or {}, new, now or {})
            conflicts += inner
        elif new != was:
            if now not in (was, new):
                conflicts.append(name)
            elif name in mine:
                found[name] = new
            else:
                found.pop(name, None)
    return found, conflicts


async def _draft(context: ServerContext, call: Call) -> DraftAnswer:
    stored, version = _stored(context, call.path("name"))
    return DraftAnswer(draft=stored, version=version)


async def _set_draft(context: ServerContext, call: Call) -> DraftAnswer:
    name, body = call.path("name"), call.body
    mine = asdict(body.draft)
    if (size := len(json.dumps(mine))) > _MOST_BYTES:
        raise OptionError(f"a draft must have at most {_MOST_BYTES:,} bytes, got {size:,}; shorten its texts")
    stored, version = _stored(context, name)
    there = asdict(stored)
    found, conflicts = (mine, []) if body.seen is None else merged(asdict(body.seen), mine, there)
    if conflicts:
        raise StaleDraftError(conflicts, {"draft": there, "version": version})
    if found != there:
        version = context.dispatcher.set_draft(name, found)
    return DraftAnswer(draft=Draft(**found), version=version)


def _stored(context: ServerContext, name: str) -> tuple[Draft, int]:
    """The draft of a dataset (at first an example's has its trigger) and its version. Raises UnknownFileError."""
    folder = dataset_folder(context.config.folders(), name)
    stored, version = context.store.draft(name)
    first = _EXAMPLES.get(name, Draft()) if is_builtin(folder) else Draft()
    return (typed(stored, Draft) if version else first), version


DRAFT_ROUTES = (
    Endpoint(
        "GET",
        "/datasets/{name}/draft",
        "What is chosen for a training on a dataset.",
        handler=_draft,
        answer=DraftAnswer,
    ),
    Endpoint(
        "PUT",
        "/datasets/{name}/draft",
        "Store what is chosen for a training on a dataset, merged with what others changed since it was seen.",
        handler=_set_draft,
        body=DraftBody,
        answer=DraftAnswer,
    ),
)

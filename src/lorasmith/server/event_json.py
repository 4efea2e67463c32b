"""Events of training and of its preparation as JSON; those of preparation are summarised."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from lorasmith.app.run_plan import (
    ClassImageDrawn,
    EncodersHashed,
    ImageEncoded,
    ImagesChecked,
    ImagesFound,
    ModelLoading,
    RunPlan,
    RunPlanned,
    captions_used,
)
from lorasmith.training.events import CaptionEncoded, Drawing, Event, StepDone, encoded

_PREPARING = (ImageEncoded, ClassImageDrawn, EncodersHashed)
PROGRESS = frozenset(kind.__name__ for kind in (StepDone, *_PREPARING, CaptionEncoded, Drawing))
"""Events that newer ones replace for a slow reader."""

_MOST_LISTED = 100


def event_json(event: Event) -> dict[str, Any]:
    """An event: `{"event": its class, "at": seconds, ...}`. NaN and infinity become null."""
    head = {"event": type(event).__name__, "at": event.at}
    match event:
        case ImagesFound():
            scan = event.scan
            body = {
                "folder": str(event.folder),
                "images": len(scan.images),
                "captions": captions_used(scan.images, event.trigger),
                "skipped": [{"file": path.name, "reason": why} for path, why in scan.skipped[:_MOST_LISTED]],
                "skipped_count": len(scan.skipped),
                "notes": list(scan.notes),
            }
        case ImagesChecked():
            found = event.check.preflight.findings
            body = {"findings": [{"kind": one.kind, "message": one.sentence} for one in found[:_MOST_LISTED]]}
        case ModelLoading():
            body = {"model": event.model}
        case RunPlanned():
            body = _plan(event.plan)
        case ImageEncoded():
            body = {"done": event.done, "total": event.total, "cached": event.cached}
        case ClassImageDrawn() | EncodersHashed():
            body = {"done": event.done, "total": event.total}
        case _:
            found_json: dict[str, Any] = finite(json.loads(encoded(event)))
            return found_json
    result: dict[str, Any] = finite({**head, **body})
    return result


def finite(value: Any) -> Any:
    """JSON values with NaN and infinity replaced by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def _plan(plan: RunPlan) -> dict[str, Any]:
    config = plan.config
    return {
        "model": plan.model,
        "family": plan.family,
        "found": [{"part": one.title, "file": one.path.name, "place": one.place} for one in plan.found],
        "images": len(plan.scan.images),
        "held_out": list(plan.held_out),
        "trigger": plan.trigger,
        "resolutions": list(plan.resolutions),
        "trained": plan.trained,
        "parameters": plan.parameters,
        "steps": config.steps,
        "epochs": plan.epochs,
        "samples": plan.samples,
        "settings": asdict(config),
        "data": dict(plan.data),
        "notes": list(plan.notes),
    }

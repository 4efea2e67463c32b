"""Jobs in the worker process: graphs, trainings on folders, measurements; and what is cached between them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from lorasmith.core.errors import CancelledError
from lorasmith.core.placement import best_device
from lorasmith.server.child_process import BlockingChannel
from lorasmith.server.folder_jobs import measure, train
from lorasmith.server.graph_jobs import GraphJob
from lorasmith.server.job_reporter import JobReporter
from lorasmith.server.server_config import folders_of_child
from lorasmith.server.warm_models import WarmModel


class Jobs:
    """Runs jobs one after another. `start` is the server's first message; `cancel` is set to stop a job."""

    def __init__(self, channel: BlockingChannel, start: Mapping[str, Any], *, cancel: threading.Event) -> None:
        self._base = Path(start["base"]).resolve()
        self._start = {**start, "base": str(self._base)}
        self._device = torch.device("cuda") if str(start["device"]).startswith("cuda") else best_device()
        self._cancel = cancel
        self._channel = channel
        self._graphs: GraphJob | None = None
        self._model = WarmModel()
        self._finished: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing

    def run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job; returns `outputs`, `messages` and others. Raises CancelledError, with its run saved."""
        self._finished = _nothing
        request, folders = message["request"], folders_of_child(self._start)
        reporter = JobReporter(self._channel, self._base)
        if self._cancel.is_set():
            raise CancelledError("the job was cancelled before it began")
        if message["kind"] == "graph":
            self._model.release()
            if self._graphs is None or self._graphs.folders != folders:
                self._graphs = GraphJob(folders)
            self._finished = self._graphs.rest
            return self._graphs.run(message["id"], request, reporter=reporter, cancel=self._cancel)
        self._release_graphs()
        if message["kind"] == "train":
            before = None if message["run"] is None else self._base / message["run"]
            return train(
                request,
                folders,
                before=before,
                reporter=reporter,
                cancelled=self._cancel.is_set,
                load=self._model.load,
            )
        return measure(
            request,
            folders,
            device=self._device,
            reporter=reporter,
            cancelled=self._cancel.is_set,
            load=self._model.load,
        )

    def rest(self, end: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs and messages of a job that did not complete."""
        return self._finished(end)

    def free(self, *, models: bool, memory: bool) -> None:
        """Release cached models and results of nodes."""
        if models or memory:
            self._model.release()
            self._release_graphs()

    def device(self) -> dict[str, Any]:
        if self._device.type != "cuda":
            memory = psutil.virtual_memory()
            return {"memory_bytes": memory.total, "free_bytes": memory.available}
        free, total = torch.cuda.mem_get_info()
        return {
            "memory_bytes": total,
            "free_bytes": free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        }

    def is_broken(self) -> bool:
        """Whether the device is unusable in this process, as after an illegal memory access."""
        try:
            return float(torch.ones(2, device=self._device).sum()) != 2.0
        except (RuntimeError, MemoryError):
            return True

    def _release_graphs(self) -> None:
        self._graphs = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _nothing(end: Mapping[str, Any]) -> dict[str, Any]:
    return {}

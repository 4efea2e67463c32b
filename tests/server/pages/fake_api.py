"""The server's own API with made-up answers: what the page is tested and looked at with, without torch or a GPU.

python tests/server/pages/fake_api.py [port]
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image, ImageDraw

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.runs.view import RunView
from lorasmith.server.api.draft_endpoints import merged
from lorasmith.server.api_shapes import Draft
from lorasmith.server.page_routes import routes
from lorasmith.training.events import (
    Event,
    LoraSaved,
    Outcome,
    Previewed,
    PromptDrawn,
    RunFinished,
    RunStarted,
    StepDone,
    Validated,
    Warned,
)

PICTURES = BUILT_IN_BASE / "input" / "fox"
NOW = 1_795_760_000.0
STEPS = 60

SETTINGS: dict[str, Any] = {
    "groups": [
        {
            "title": "Training",
            "settings": [
                {"name": "steps", "label": "Steps", "type": "integer", "default": 500, "min": 1, "max": 100000,
                 "step": None, "choices": [], "help": "Number of optimizer updates.", "main": True},
                {"name": "learning_rate", "label": "Learning rate", "type": "number", "default": None, "min": 1e-7,
                 "max": 1.0, "step": None, "choices": [], "help": "Default: chosen by model.", "main": True},
                {"name": "rank", "label": "Rank", "type": "integer", "default": 16, "min": 1, "max": 128,
                 "step": None, "choices": [], "help": "Sets the capacity and the size of the file.", "main": True},
            ],
        },
        {
            "title": "LoRA and targets",
            "settings": [
                {"name": "algorithm", "label": "Algorithm", "type": "text", "default": "LoRA", "min": None, "max": None,
                 "step": None, "choices": ["LoRA", "LoHa", "LoKr"], "help": "Kind of adapter.", "main": False},
                {"name": "pairs", "label": "Pairs", "type": "text", "default": "none", "min": None, "max": None,
                 "step": None, "choices": ["none", "slider", "dpo"], "help": "Train on pairs.", "main": False},
                {"name": "training_adapter", "label": "Training adapter", "type": "text", "default": None, "min": None,
                 "max": None, "step": None, "choices": [], "help": "LoRA beneath.", "main": False},
                {"name": "flip", "label": "Flip", "type": "boolean", "default": False, "min": None, "max": None,
                 "step": None, "choices": [], "help": "Also train on mirrored pictures.", "main": False},
                {"name": "image_repeats", "label": "Image repeats", "type": "text", "default": "", "min": None,
                 "max": None, "step": None, "choices": [], "help": "How often single images are drawn.", "main": False},
                {"name": "trigger", "label": "Trigger", "type": "text", "default": "", "min": None, "max": None,
                 "step": None, "choices": [], "help": "Phrase of the subject.", "main": True},
            ],
        },
    ],
    "presets": [
        {"name": "quick", "title": "Quick", "summary": "A first look in a third of the time.",
         "settings": {"steps": 40, "rank": 8}},
        {"name": "balanced", "title": "Balanced", "summary": "The usual choice: good likeness in a moderate time.",
         "settings": {"steps": STEPS, "rank": 16}},
        {"name": "thorough", "title": "Thorough", "summary": "The finest details for twice the time.",
         "settings": {"steps": 120, "rank": 32}},
    ],
}  # fmt: skip

MODELS = {
    "models": [
        {"name": "checkpoints/sd15.safetensors", "title": "sd15.safetensors", "family": "Stable Diffusion 1.5",
         "place": "models/checkpoints", "size_bytes": 4_265_146_304, "precision": "fp16", "builtin": False,
         "ready": True, "missing": []},
        {"name": "checkpoints/sdxl.safetensors", "title": "sdxl.safetensors", "family": "Stable Diffusion XL",
         "place": "models/checkpoints", "size_bytes": 6_938_040_682, "precision": "fp16", "builtin": False,
         "ready": True, "missing": []},
        {"name": "diffusion_models/flux1-kontext.safetensors", "title": "flux1-kontext.safetensors", "family": "Flux.1",
         "place": "models/diffusion_models", "size_bytes": 11_902_932_552, "precision": "fp8", "builtin": False,
         "ready": True, "missing": [], "edits": ["kontext"], "edit": "kontext", "recognised_by": "name",
         "takes_controls": True},
        {"name": "diffusion_models/flux1-dev.safetensors", "title": "flux1-dev.safetensors", "family": "Flux.1",
         "place": "models/diffusion_models", "size_bytes": 23_802_932_552, "precision": "bf16", "builtin": False,
         "ready": False, "missing": [{"part": "text_encoder_2", "usual_file": "t5xxl_fp16.safetensors",
                                      "on_hub": True},
                                     {"part": "vae", "usual_file": "ae.safetensors"}]},
        {"name": "lorasmith-tiny", "title": "lorasmith-tiny", "family": "Lorasmith Tiny", "place": "",
         "precision": "bf16", "size_bytes": 31_000_000, "builtin": True, "ready": True, "missing": []},
    ],
    "other": [{"name": "notes.safetensors", "place": "models/checkpoints", "what": "it holds no known model",
               "size_bytes": 4096}],
    "notes": [],
}  # fmt: skip


EVALUATED: dict[str, Any] = {
    "title": "fox-001",
    "model": "SD 1.5",
    "trigger": "foxy",
    "seed": 0,
    "sampling_steps": 20,
    "prompts": ["foxy", "foxy, <b>on</b> a beach"],
    "base": ["base-1.png", "base-2.png"],
    "loras": [
        {
            "file": f"fox-{step}.safetensors",
            "label": f"step {step}",
            "step": step,
            "measures": {
                "likeness": 0.6, "adherence": 0.9, "diversity": 0.1, "memorisation": 0.0, "drift": 0.1, "bleed": None,
                "change": 0.2,
            },
            "pictures": [f"lora-{step}-1.png", f"lora-{step}-2.png"],
        }
        for step in (50, 100)
    ],
    "training": {"count": 4, "self_likeness": 0.6, "base_likeness": 0.4},
    "verdict": {"outcome": "use", "best": 0, "ignored_from": 1, "copied": False},
    "sentence": "Use step 50: it looks like your pictures; from step 100 on prompts are ignored.",
    "strengths": [],
    "notes": ["A note."],
}  # fmt: skip


GALLERY: dict[str, Any] = {
    "kinds": {"Place": ["on a beach", "in a city street at night"], "Style": ["as a pencil drawing"]},
    "steps": [20, 40, 60],
    "strengths": [0.4, 0.8, 1.2],
    "grids": [],
}


FORMATS = {
    "pictures": [".jpg", ".png"],
    "captions": [".txt"],
    "refused": {".jxl": "is a JXL file, which is not read here; convert it", ".mp4": "is a video; run lorasmith train"},
}


SHELF = [
    {"name": "sdxl", "title": "Stable Diffusion XL 1.0", "family": "Stable Diffusion XL", "gated": False,
     "about": "Everything by short prompts; the most LoRAs and fine-tunes.", "licence": "CreativeML Open RAIL++-M",
     "card": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
     "files": [{"part": "denoiser", "file": "sd_xl_base_1.0.safetensors", "size_bytes": 6_940_000_000,
                "kept_bytes": 0, "found": False}]},
    {"name": "z-image", "title": "Z-Image", "family": "Z-Image", "about": "Photographs and lettering.", "gated": False,
     "licence": "Apache 2.0", "card": "https://huggingface.co/Tongyi-MAI/Z-Image",
     "files": [{"part": "denoiser", "file": "z_image_bf16.safetensors", "size_bytes": 12_310_000_000,
                "kept_bytes": 4_200_000_000, "found": False},
               {"part": "vae", "file": "ae.safetensors", "size_bytes": 340_000_000, "kept_bytes": 0, "found": True}]},
    {"name": "flux.1-dev", "title": "Flux.1 dev", "family": "Flux.1", "about": "Photographs, long prompts.",
     "gated": True, "licence": "FLUX.1 [dev] Non-Commercial License",
     "card": "https://huggingface.co/black-forest-labs/FLUX.1-dev",
     "files": [{"part": "denoiser", "file": "flux1-dev.safetensors", "size_bytes": 23_800_000_000, "kept_bytes": 0,
                "found": False}]},
]  # fmt: skip


CAPTIONERS = [
    {"name": "florence-2-base", "title": "Florence-2 base", "found": False, "licence": "MIT", "kept_bytes": 0,
     "about": "A sentence or two on what a picture shows; small enough for a processor.", "size_bytes": 500_000_000,
     "card": "https://huggingface.co/florence-community/Florence-2-base"},
    {"name": "blip-large", "title": "BLIP large", "found": False, "licence": "BSD 3-Clause", "kept_bytes": 0,
     "about": "One short and plain sentence.", "size_bytes": 1_900_000_000,
     "card": "https://huggingface.co/Salesforce/blip-image-captioning-large"},
]  # fmt: skip


SWEEP = {
    "id": "fox-sweep-001",
    "comparable": True,
    "runs": [
        {"name": "rank-8", "run": "runs/fox-sweep-001/rank-8", "settings": {"rank": 8}, "state": "complete", "place": 1,
         "loss": 0.21, "best_step": 60, "change": -0.05, "steps": 80, "error": ""},
        {"name": "rank-16", "run": "runs/fox-sweep-001/rank-16", "settings": {"rank": 16}, "state": "failed",
         "place": None, "loss": None, "best_step": None, "change": None, "steps": 0, "error": "Memory ran out."},
    ],
}  # fmt: skip


@dataclass
class FakeServer:
    """Everything that the answers are made from; tests change it.

    Attributes:
        step_seconds: pause between the steps of a made-up training.
        refusals: by "METHOD path", the status and message to answer with.
        is_closing: whether streams of events end.
        calls: requests that change something, as (method, path, body); not of drafts.
        streams: number of streams that are open.
    """

    step_seconds: float = 0.05
    ready: bool = True
    datasets: dict[str, dict[str, tuple[bytes, str]]] = field(default_factory=dict)
    controls: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of datasets
    removed: dict[str, Any] = field(default_factory=dict)  # by where it was moved to
    crops: dict[str, dict[str, float]] = field(default_factory=dict)  # of pictures
    captioners: list[dict[str, Any]] = field(default_factory=lambda: json.loads(json.dumps(CAPTIONERS)))
    findings: list[dict[str, Any]] = field(default_factory=list)  # of checks, besides copies
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(MODELS)))
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    events: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    views: dict[str, RunView] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    drafts: dict[str, tuple[dict[str, Any], int]] = field(default_factory=dict)  # with their versions
    streams: int = 0
    removed_runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # runs
    measured: bool = False
    control: str = "none"  # whether drawings take a picture
    least_strength: float = 0.0  # of drawings
    evaluation: dict[str, Any] = field(default_factory=lambda: {"evaluation": None, "folder": "evaluation"})
    gallery: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(GALLERY)))
    distilled: dict[str, str] = field(default_factory=dict)  # what plans say of the model and its usual adapter
    downloads: list[dict[str, Any]] = field(default_factory=list)
    has_token: bool = False  # whether the hub gives the gated model
    disk_free_bytes: int = 10**11
    fails: bool = False  # whether a captioner fails on one photo
    is_held: bool = False  # whether a captioner waits after its first caption
    is_closing: bool = False
    builtin: frozenset[str] = frozenset()
    _all_events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26, middlewares=[self._middleware])
        app.add_routes(routes(None))  # type: ignore[arg-type]
        at = "/lorasmith/v1"
        app.add_routes(
            [
                web.get(f"{at}/status", self._status),
                web.get(f"{at}/settings", _says(lambda: SETTINGS)),
                web.get(f"{at}/models", _says(lambda: self.models)),
                web.get(f"{at}/datasets", self._datasets),
                web.get(f"{at}/formats", self._formats),
                web.post(f"{at}/datasets", self._new_dataset),
                web.get(f"{at}/datasets/{{name}}", self._dataset),
                web.delete(f"{at}/datasets/{{name}}", self._remove_dataset),
                web.post(f"{at}/datasets/{{name}}/images", self._upload),
                web.get(f"{at}/datasets/{{name}}/images/{{file}}", self._picture),
                web.delete(f"{at}/datasets/{{name}}/images/{{file}}", self._remove_picture),
                web.put(f"{at}/datasets/{{name}}/images/{{file}}/crop", self._crop),
                web.post(f"{at}/datasets/{{name}}/remove", self._remove_pictures),
                web.post(f"{at}/datasets/{{name}}/restore", self._restore),
                web.post(f"{at}/datasets/{{name}}/captioning", self._write_captions),
                web.get(f"{at}/captioners", _says(lambda: {"captioners": self.captioners, "notes": []})),
                web.get(f"{at}/datasets/{{name}}/controls/{{file}}", self._control),
                web.put(f"{at}/datasets/{{name}}/controls", self._pair),
                web.delete(f"{at}/datasets/{{name}}/controls/{{file}}", self._remove_control),
                web.put(f"{at}/datasets/{{name}}/captions", self._captions),
                web.get(f"{at}/datasets/{{name}}/draft", self._draft),
                web.put(f"{at}/datasets/{{name}}/draft", self._set_draft),
                web.get(f"{at}/datasets/{{name}}/check", self._check),
                web.get(f"{at}/shelf", _says(lambda: {"models": SHELF})),
                web.get(f"{at}/shelf/{{name}}/memory", self._shelf_memory),
                web.get(f"{at}/downloads", _says(lambda: {"downloads": self.downloads})),
                web.post(f"{at}/downloads", self._download),
                web.post(f"{at}/downloads/check", self._check_download),
                web.post(f"{at}/downloads/{{id}}/cancel", self._end_download),
                web.delete(f"{at}/downloads/{{id}}", self._end_download),
                web.put(f"{at}/hub-token", self._store_token),
                web.post(f"{at}/models", self._add_model),
                web.post(f"{at}/plans", self._plan),
                web.post(f"{at}/measurements", self._measure),
                web.get(f"{at}/jobs", self._list_jobs),
                web.post(f"{at}/jobs", self._new_job),
                web.get(f"{at}/jobs/{{id}}", self._job),
                web.delete(f"{at}/jobs/{{id}}", self._remove_job),
                web.post(f"{at}/jobs/{{id}}/{{action}}", self._act),
                web.get(f"{at}/events", self._events),
                web.get(f"{at}/runs", self._list_runs),
                web.get(f"{at}/sweeps", _says(lambda: {"sweeps": self.sweeps, "damaged": []})),
                web.post(f"{at}/sweeps", self._new_sweep),
                web.get(f"{at}/sweeps/{{id}}", _says(lambda: SWEEP)),
                web.get(f"{at}/runs/{{id}}", self._run),
                web.put(f"{at}/runs/{{id}}/marks", self._mark),
                web.delete(f"{at}/runs/{{id}}", self._remove_run),
                web.post(f"{at}/runs/{{id}}/restore", self._restore_run),
                web.get(f"{at}/runs/{{id}}/files/{{file:.+}}", self._run_file),
                web.get(f"{at}/runs/{{id}}/graph", _says(lambda: {"1": {"class_type": "TrainLoraNode"}})),
                web.get(f"{at}/runs/{{id}}/report", _says(dict)),
                web.post(f"{at}/runs/{{id}}/install", self._install),
                web.post(f"{at}/runs/{{id}}/train-on", self._train_on),
                web.get(
                    f"{at}/runs/{{id}}/drawing",
                    _says(self._drawing_facts),
                ),
                web.post(f"{at}/runs/{{id}}/controls", self._add_control),
                web.post(f"{at}/runs/{{id}}/drawing", self._draw),
                web.post(f"{at}/runs/{{id}}/requests", self._request),
                web.get(f"{at}/runs/{{id}}/gallery", _says(lambda: self.gallery)),
                web.post(f"{at}/runs/{{id}}/gallery", self._draw_grid),
                web.get(f"{at}/runs/{{id}}/card", self._card),
                web.get(f"{at}/runs/{{id}}/evaluation", _says(lambda: self.evaluation)),
                web.post(f"{at}/runs/{{id}}/evaluation", self._evaluate),
            ]
        )
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if refusal := self.refusals.get(f"{request.method} {request.path}"):
            return _error(*refusal)
        is_change = request.method in ("POST", "PUT", "DELETE") and not request.path.endswith("/draft")
        if is_change and request.content_type == "application/json":
            self.calls.append((request.method, request.path, await request.json()))
        answer = await handler(request)
        if is_change and answer.status < 400 and (name := request.match_info.get("name")):
            self._all_events.append(("dataset", {"name": name}))
        return answer

    def add_dataset(self, name: str, number: int = 4, captions: bool = True) -> None:
        files = sorted(PICTURES.glob("*.png"))[:number]
        self.datasets[name] = {
            one.name: (one.read_bytes(), f"a red fox, picture {index}" if captions and index != 1 else "")
            for index, one in enumerate(files)
        }

    def add_run(self, id: str, **changes: Any) -> None:
        self.runs[id] = {**_run_facts(id), **changes}

    def add_advised_run(self, id: str) -> None:
        """A run on four pictures, two of which stand out."""
        images = [{"file": f"fox_{n}.png", "caption": "a red fox", "use": "trained", "thumbnail": f"pictures/{n}.png",
                   "standing": "", "controls": 0} for n in range(1, 5)]  # fmt: skip
        advice = [
            {"file": "fox_2.png", "finding": "never learnt", "drawn_less": "",
             "reason": "Its loss stays 2.6 times that of the others at the same noise levels.",
             "remedy": "Look at its caption, or leave it out if it does not belong here."},
            {"file": "fox_3.png", "finding": "learnt by heart", "drawn_less": "fox_3.png=0.1",
             "reason": "Its loss fell to 31 % of that of the others at the same noise levels, and it was drawn "
             "10 times as often.", "remedy": "Draw it less often, or leave it out."},
        ]  # fmt: skip
        self.add_run(id, images=images, advice=advice, advice_summary="fox_2.png is never learnt.")

    def add_job(self, state: str, **changes: Any) -> dict[str, Any]:
        id = str(uuid.uuid4())
        job = {
            "id": id, "kind": "train", "state": state, "number": float(len(self.jobs)), "title": "", "name": "fox",
            "created": NOW, "started": None, "ended": None, "outputs": {}, "error": None, "run": None, "attempts": 0,
            "request": {"dataset": "fox", "model": "sdxl.safetensors", "trigger": "foxy", "name": "fox"}, **changes,
        }  # fmt: skip
        self.jobs[id] = job
        self.events[id] = []
        return job

    async def _shelf_memory(self, request: web.Request) -> web.Response:
        fits = request.match_info["name"] != "flux.1-dev"
        return web.json_response({"memory_bytes": (10 if fits else 90) * 2**30, "fits": fits, "encoders_fit": True})

    async def _check_download(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        if name == "flux.1-dev" and not self.has_token:
            page = "https://huggingface.co/black-forest-labs/FLUX.1-dev"
            error = {"kind": "GatedError", "message": "accept it", "details": {"accept": page, "has_token": False}}
            return web.json_response({"error": error}, status=403)
        file = {"file": "model.safetensors", "repository": "maker/model", "folder": "models/checkpoints",
                "size_bytes": 6_938_040_682, "kept_bytes": 0}  # fmt: skip
        return web.json_response({"title": name, "files": [file], "free_bytes": self.disk_free_bytes})

    async def _download(self, request: web.Request) -> web.Response:
        body = await request.json()
        added = {"id": str(len(self.downloads) + 1), "subject": f"{body['kind']}:{body['name']}", "title": body["name"],
                 "state": "running", "file": "model.safetensors", "done_bytes": 2 * 2**30, "total_bytes": 6 * 2**30,
                 "bytes_per_s": 50.0 * 2**20, "is_checking": False, "error": "", "accept": ""}  # fmt: skip
        self.downloads.insert(0, added)
        return web.json_response(added, status=201)

    async def _end_download(self, request: web.Request) -> web.Response:
        one = next(one for one in self.downloads if one["id"] == request.match_info["id"])
        if request.method == "DELETE":
            self.downloads.remove(one)
        else:
            one["state"] = "cancelled"
        return web.json_response(one)

    async def _store_token(self, request: web.Request) -> web.Response:
        self.has_token = True
        return web.json_response({"stored": True})

    async def _add_model(self, request: web.Request) -> web.Response:
        async for part in await request.multipart():
            await part.read()
            if part.filename == "odd.safetensors":
                return _error(400, "odd.safetensors cannot be used; send a checkpoint")
            row = {**MODELS["models"][1], "name": part.filename, "title": part.filename, "family": "Sent"}
            self.models["models"].append(row)
            return web.json_response({"file": part.filename, "place": "models/checkpoints", "model": part.filename},
                                     status=201)  # fmt: skip
        return _error(400, "no file")

    async def _status(self, request: web.Request) -> web.Response:
        free = 40 * 2**30
        device = {"name": "cuda:0", "title": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "free_bytes": free}
        return web.json_response(
            {"version": "0.1.0", "ready": self.ready, "base_dir": "/home/me/lorasmith", "devices": [device],
             "queue": self._counts(), "disk_free_bytes": 10**11}
        )  # fmt: skip

    async def _datasets(self, request: web.Request) -> web.Response:
        return web.json_response({"datasets": [
            {"name": name, "images": len(files), "captions": sum(bool(caption) for _, caption in files.values()),
             "modified": NOW, "cover": next(iter(files), None), "builtin": name in self.builtin}
            for name, files in self.datasets.items()
        ]})  # fmt: skip

    async def _new_dataset(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        if name in self.datasets:
            return _error(409, f"there is a dataset {name!r} already")
        self.datasets[name] = {}
        return web.json_response({"name": name}, status=201)

    async def _dataset(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.datasets:
            return _error(404, f"there is no dataset {name!r}; choose another one")
        images = []
        stems = {Path(file).stem for file in self.datasets[name]}
        controls: dict[str, list[dict[str, Any]]] = {}
        for file, content in self.controls.get(name, {}).items():
            width, height = Image.open(io.BytesIO(content)).size
            row = {"file": file, "width": width, "height": height, "fixed": False, "problem": ""}
            controls.setdefault(Path(file).stem if Path(file).stem in stems else "", []).append(row)
        for file, (content, caption) in self.datasets[name].items():
            try:
                width, height = Image.open(io.BytesIO(content)).size
            except OSError:
                width = height = None  # type: ignore[assignment]
            if width and (part := self.crops.get(file)):
                width, height = round(part["width"] * width), round(part["height"] * height)
            mask = next((one for one in self.datasets[name] if one.startswith(f"{Path(file).stem}.mask.")), "")
            if Path(file).stem.removesuffix(".mask") in stems - {Path(file).stem}:
                continue
            images.append({"file": file, "width": width, "height": height, "bytes": len(content), "caption": caption,
                           "has_caption": bool(caption), "problem": "" if width else "cannot be read",
                           "crop": self.crops.get(file), "mask": mask,
                           "controls": controls.get(Path(file).stem, [])})  # fmt: skip
        return web.json_response(
            {
                "name": name,
                "folder": f"/home/me/input/{name}",
                "images": images,
                "builtin": name in self.builtin,
                "notes": [],
                "skipped": [],
                "controls": controls.get("", []),
            }
        )

    async def _formats(self, _: web.Request) -> web.Response:
        return web.json_response(FORMATS)

    async def _draft(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.datasets:
            return _error(404, f"there is no dataset {name!r}; choose another one")
        draft, version = self.drafts.get(name, ({}, 0))
        return web.json_response({"draft": {**asdict(Draft()), **draft}, "version": version})

    async def _set_draft(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.json()
        draft, version = self.drafts.get(name, ({}, 0))
        there = {**asdict(Draft()), **draft}
        found, conflicts = merged(body["seen"], body["draft"], there)
        if conflicts:
            details = {"draft": there, "version": version}
            message = f"{', '.join(conflicts)} was changed elsewhere"
            return web.json_response(
                {"error": {"kind": "StaleDraftError", "message": message, "details": details}}, status=409
            )
        return web.json_response(self.change_draft(name, **found))

    def change_draft(self, name: str, /, **changes: Any) -> dict[str, Any]:
        """Store and send the draft of a dataset."""
        draft, version = self.drafts.get(name, ({}, 0))
        self.drafts[name] = {**asdict(Draft()), **draft, **changes}, version + 1
        answer = {"draft": self.drafts[name][0], "version": version + 1}
        self._all_events.append(("draft", {"dataset": name, **answer}))
        return answer

    async def _control(self, request: web.Request) -> web.Response:
        content = self.controls[request.match_info["name"]][request.match_info["file"]]
        return web.Response(body=content, content_type="image/png")

    async def _pair(self, request: web.Request) -> web.Response:
        controls, body = self.controls[request.match_info["name"]], await request.json()
        moved, stem = controls.pop(body["control"]), Path(body.get("image") or body["former"]).stem
        there = {file: controls.pop(file) for file in list(controls) if Path(file).stem == stem}
        controls[f"{stem}.png"] = moved
        for content in there.values():
            controls[body["control"]] = content
        return web.json_response({"changed": 1 + len(there)})

    async def _remove_control(self, request: web.Request) -> web.Response:
        place, file = f"user/lorasmith/removed/{len(self.removed)}", request.match_info["file"]
        self.removed[place] = {file: self.controls[request.match_info["name"]].pop(file)}
        return web.json_response({"removed": place})

    async def _upload(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.step_seconds)
        files = self.datasets[request.match_info["name"]]
        added, captions, skipped = [], {}, []
        async for part in await request.multipart():
            content, file = bytes(await part.read()), part.filename or "x"
            if file.endswith(".txt"):
                captions[Path(file).stem] = content.decode()
                continue
            try:
                Image.open(io.BytesIO(content)).verify()
            except Exception:
                skipped.append({"file": file, "reason": "is not a picture that can be read"})
                continue
            if file.startswith("control/"):
                self.controls.setdefault(request.match_info["name"], {})[file.removeprefix("control/")] = content
                added.append(file)
                continue
            while file in files:
                file = f"{Path(file).stem}-2{Path(file).suffix}"
            files[file] = (content, "")
            added.append(file)
        for stem, text in captions.items():
            if (of := next((file for file in files if Path(file).stem == stem), None)) is None:
                skipped.append({"file": f"{stem}.txt", "reason": "has no picture of the same name; add that too"})
            else:
                files[of] = (files[of][0], text)
        return web.json_response({"added": added, "skipped": skipped, "renamed": {}})

    async def _picture(self, request: web.Request) -> web.Response:
        content, _ = self.datasets[request.match_info["name"]][request.match_info["file"]]
        if (part := self.crops.get(request.match_info["file"])) and request.query.get("original") != "true":
            whole, buffer = Image.open(io.BytesIO(content)), io.BytesIO()
            left, top = part["x"] * whole.width, part["y"] * whole.height
            box = (left, top, left + part["width"] * whole.width, top + part["height"] * whole.height)
            whole.crop(tuple(map(round, box))).save(buffer, "PNG")
            content = buffer.getvalue()
        return web.Response(body=content, content_type="image/png")

    async def _remove_picture(self, request: web.Request) -> web.Response:
        return self._set_aside(request.match_info["name"], [request.match_info["file"]])

    async def _remove_pictures(self, request: web.Request) -> web.Response:
        return self._set_aside(request.match_info["name"], (await request.json())["files"])

    def _set_aside(self, name: str, files: list[str]) -> web.Response:
        place = f"user/lorasmith/removed/{len(self.removed)}"
        self.removed[place] = {file: self.datasets[name].pop(file) for file in files}
        return web.json_response({"removed": place})

    async def _restore(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.json()
        files = self.removed.pop(body["removed"])
        found = self.controls if body.get("control") else self.datasets
        found[name] = dict(sorted({**found.get(name, {}), **files}.items()))
        return web.json_response({"changed": len(files)})

    async def _remove_dataset(self, request: web.Request) -> web.Response:
        place = f"user/lorasmith/removed/{len(self.removed)}"
        self.removed[place] = self.datasets.pop(request.match_info["name"])
        return web.json_response({"removed": place})

    async def _crop(self, request: web.Request) -> web.Response:
        file, part = request.match_info["file"], await request.json()
        self.crops.pop(file, None)
        if part["width"] < 1 or part["height"] < 1:
            self.crops[file] = part
        return web.json_response({"file": file})

    async def _write_captions(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.json()
        job = self.add_job("pending", kind="caption", name=name, title="Captions", dataset=name, request={})
        self.publish(job)
        files = {file: one for file, one in self.datasets[name].items() if body["overwrite"] or not one[1]}

        async def write() -> None:
            self.publish(job, state="running")
            written = {}
            for done, (file, (content, before)) in enumerate(files.items()):
                self._tell(job["id"], "progress", {"value": done, "maximum": len(files)})
                while self.is_held and done:
                    await asyncio.sleep(0.02)
                caption = f"{body['trigger']}, written" if body["trigger"] else "written"
                self.datasets[name][file] = (content, caption)
                written[file] = {"before": before, "caption": caption}
                self._all_events.append(("dataset", {"name": name}))
            failed = {"odd.png": "makes the captioner fail"} if self.fails else {}
            outputs = {"written": written, "changed": [], "empty": [], "failed": failed}
            self.publish(job, state="completed", outputs=outputs)

        self._tasks[job["id"]] = asyncio.create_task(write())
        return web.json_response(job, status=201)

    async def _captions(self, request: web.Request) -> web.Response:
        files = self.datasets[request.match_info["name"]]
        edits = await request.json()
        if stale := {file: files[file][1] for file, one in edits.items() if one["seen"] != files[file][1]}:
            message = f"the caption of {next(iter(stale))} was changed elsewhere, and nothing was stored"
            error = {"kind": "StaleCaptionError", "message": message, "details": stale}
            return web.json_response({"error": error}, status=409)
        for file, one in edits.items():
            files[file] = (files[file][0], one["caption"])
        return web.json_response({"changed": 1})

    async def _check(self, request: web.Request) -> web.Response:
        if not self.ready:
            return _error(503, "the server is still starting")
        files = self.datasets[request.match_info["name"]]
        images = {}
        for index, (file, (_, caption)) in enumerate(files.items()):
            problems = ["no caption"] if not caption and not request.query.get("trigger") else []
            problems += ["copy of another picture"] if index == 2 else []
            images[file] = {"problems": problems, "crop": {"x": 0.1, "y": 0, "width": 0.8, "height": 1},
                            "trained": [512, 512], "tokens": None}  # fmt: skip
        findings = [
            {
                "kind": "copies",
                "title": "Copies",
                "message": "2 pictures are copies of each other; keep one.",
                "files": list(files)[2:3],
                "removes": list(files)[2:3],
                "severity": "warning",
            }
        ]
        there = [one for one in self.findings if set(one["files"]) & files.keys()]
        found = [*there, *(findings if len(files) > 2 else [])]
        return web.json_response({"findings": found, "images": images, "skipped": []})

    async def _plan(self, request: web.Request) -> web.Response:
        body = await request.json()
        settings = body["settings"]
        steps, rank = settings.get("steps", 500), settings.get("rank", 16)
        if rank > 64:
            return _error(400, f"rank must be between 1 and 64, got {rank}")
        seconds = 0.42 if self.measured else None
        return web.json_response(
            {"steps": steps, "epochs": steps / 4, "rank": rank, "resolution": 1024, "images": 4, "held_out": 1,
             "parameters": rank * 1_450_000, "memory_bytes": int(9.5 * 2**30) + rank * 2**24, "fits": True,
             "memory_settings": {}, "seconds_per_step": seconds,
             "seconds": None if seconds is None else seconds * steps,
             "measured_at": None, "notes": [], **({} if "training_adapter" in settings else self.distilled)}
        )  # fmt: skip

    async def _measure(self, request: web.Request) -> web.Response:
        job = self.add_job("pending", kind="measure", name=None)
        self.publish(job)

        async def measure() -> None:
            self.publish(job, state="running")
            await asyncio.sleep(4 * self.step_seconds)
            self.measured = True
            self.publish(job, state="completed")

        self._tasks[job["id"]] = asyncio.create_task(measure())
        return web.json_response(job, status=201)

    async def _list_jobs(self, request: web.Request) -> web.Response:
        return web.json_response({"jobs": list(self.jobs.values()), "total": len(self.jobs)})

    async def _new_job(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not body.get("model"):
            return _error(400, "a run needs a model; choose one")
        return web.json_response(self._train(body), status=201)

    async def _new_sweep(self, request: web.Request) -> web.Response:
        await request.json()  # the middleware notes it
        return web.json_response(SWEEP, status=201)

    def _train(self, body: dict[str, Any]) -> dict[str, Any]:
        job = self.add_job("pending", name=body["name"], request=body)
        self.publish(job)
        self._tasks[job["id"]] = asyncio.create_task(self._training(job))
        return job

    async def _training(self, job: dict[str, Any]) -> None:
        id, steps = job["id"], job["request"]["settings"].get("steps", STEPS)
        run = job["run"] or f"runs/{job['name']}-{1 + len(self.runs):03d}"
        self.publish(job, state="running", started=time.time())
        view = self.views.setdefault(id, RunView())
        for count in range(1, len(PREPARATION) + 1):
            self._tell(id, "view", {"view": {**view.to_json(), "preparation": PREPARATION[:count]}})
            await asyncio.sleep(4 * self.step_seconds)
        self.publish(job, run=run)
        self.add_run(
            run,
            state="running",
            status="Running",
            mood="fair",
            step=0,
            steps=steps,
            job=id,
            lora=None,
            name=job["name"],
        )
        self.show(id, started(steps))
        self.show(id, Warned(message="rank 16 exceeds the size of 1 of 133 layers"))
        base = tuple(f"base-{index}.png" for index in range(2))
        self.show(id, Previewed(step=0, prompts=PROMPTS, paths=base, strength=0.0))
        for step in range(view.step + 1, steps + 1):
            await asyncio.sleep(self.step_seconds)
            for event in made_up_events(step):
                self.show(id, event)
        self.show(id, RunFinished(step=steps, reason=Outcome.FINISHED))
        self.runs[run] = {**_run_facts(run), "job": id, "name": job["name"]}
        self.publish(job, state="completed", ended=time.time())

    async def _job(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        return web.json_response(job) if job else _error(404, "there is no such job; it may have been removed")

    async def _remove_job(self, request: web.Request) -> web.Response:
        del self.jobs[request.match_info["id"]]
        return web.json_response({"done": True})

    async def _act(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["id"]]
        id, action = job["id"], request.match_info["action"]
        if action == "cancel":
            if task := self._tasks.pop(id, None):
                task.cancel()
            if job["run"]:
                self.runs[job["run"]] = {
                    **_run_facts(job["run"]),
                    "job": id,
                    "status": "Stopped early",
                    "state": "stopped",
                }
            self.publish(job, state="paused" if (await request.json()).get("pause") else "cancelled")
        elif action == "continue":
            self.publish(job, state="pending")
            self._tasks[id] = asyncio.create_task(self._training(job))
        elif action == "retry":
            return web.json_response(self._train(job["request"]), status=201)
        return web.json_response(job)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        await response.write(b"retry: 300\n\n")
        self.streams += 1
        sources = [("", self._all_events)]
        for topic in request.query.getall("topic", []):
            id = topic.partition("/")[2]
            job = self.runs[id]["job"] if id in self.runs else None
            sources.append((topic, self.events.setdefault(job or id, [])))
        at = {"": len(self._all_events)}
        try:
            while not self.is_closing:
                for topic, events in sources:
                    for kind, data in events[at.get(topic, 0) :]:
                        sent = {**data, "topic": topic} if topic else data
                        await response.write(f"event: {kind}\ndata: {json.dumps(sent)}\n\n".encode())
                    at[topic] = len(events)
                await asyncio.sleep(0.02)
        except ConnectionResetError:
            pass
        finally:
            self.streams -= 1
        return response

    async def _list_runs(self, request: web.Request) -> web.Response:
        runs = list(reversed(self.runs.values()))
        limit = int(request.query.get("limit", len(runs)))
        return web.json_response({"runs": runs[:limit], "damaged": [], "total": len(runs)})

    async def _run(self, request: web.Request) -> web.Response:
        run = self.runs.get(request.match_info["id"])
        return web.json_response(run) if run else _error(404, "there is no such run; it may have been removed")

    async def _mark(self, request: web.Request) -> web.Response:
        run, marks = self.runs[request.match_info["id"]], await request.json()
        run.update({{"title": "label"}.get(name, name): value for name, value in marks.items()})
        return web.json_response({})

    async def _remove_run(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        self.removed_runs[id] = self.runs.pop(id)
        return web.json_response({"removed": f"user/lorasmith/removed/{id}"})

    async def _restore_run(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        self.runs[id] = self.removed_runs.pop(id)
        return web.json_response({})

    async def _run_file(self, request: web.Request) -> web.Response:
        file = request.match_info["file"]
        if file.endswith(".png"):
            return web.Response(body=_drawn(file), content_type="image/png")
        return web.Response(body=b"safetensors", headers={"Content-Disposition": "attachment"})

    async def _install(self, request: web.Request) -> web.Response:
        run = self.runs[request.match_info["id"]]
        run["lora"]["installed"] = "fox.safetensors"
        return web.json_response({"installed": "fox.safetensors", "was_there": False})

    async def _train_on(self, request: web.Request) -> web.Response:
        steps = (await request.json())["steps"]
        return web.json_response(self._train({"name": "fox", "settings": {"steps": steps}, "model": "m"}), status=201)

    def _drawing_facts(self) -> dict[str, Any]:
        return {"control": self.control, "least_strength": self.least_strength}

    async def _add_control(self, request: web.Request) -> web.Response:
        await request.post()
        return web.json_response({"control": "control-1.png"}, status=201)

    async def _request(self, request: web.Request) -> web.Response:
        """What a run that trains is asked for, which it does at once."""
        id, asked = request.match_info["id"], await request.json()
        job = self.runs[id]["job"] or id
        step = self.views[job].step
        if asked["what"] == "save":
            self.show(job, LoraSaved(step=step, path=f"fox-step{step:08}.safetensors"))
        elif asked["what"] == "preview":
            paths = tuple(f"{step}-1.0-{index}.png" for index in range(2))
            self.show(job, Previewed(step=step, prompts=PROMPTS, paths=paths, strength=1.0))
        else:
            number, drawing = uuid.uuid4().hex, asked["drawing"]
            given = {name: drawing[name] for name in ("prompt", "strength", "seed", "lora")}
            paths = (f"{number}-1.png", f"{number}-2.png")
            self.show(job, PromptDrawn(id=number, step=step, paths=paths, **given))
            return web.json_response({"id": number}, status=202)
        return web.json_response({"id": asked["what"]}, status=202)

    async def _draw_grid(self, request: web.Request) -> web.Response:
        wish = (await request.json())["wish"]
        run = request.match_info["id"]
        job = self.add_job("pending", kind="draw", name=None, title="Drawing", request={}, about=run, wish=wish)
        self.publish(job)

        async def draw() -> None:
            self.publish(job, state="running")
            for value in range(9):
                self._tell(job["id"], "progress", {"value": value, "maximum": 8})
                await asyncio.sleep(self.step_seconds)
            cells = [{"step": step, "strength": strength, "file": f"gallery/{wish}-{step}-{strength}.png"}
                     for step in self.gallery["steps"] for strength in self.gallery["strengths"]]  # fmt: skip
            grid = {"wish": wish, "prompt": f"foxy, {wish}", "seed": 0, "base": f"gallery/{wish}.png", "cells": cells}
            self.gallery["grids"].append(grid)
            self.publish(job, state="completed", outputs={"prompt": grid["prompt"]})

        self._tasks[job["id"]] = asyncio.create_task(draw())
        return web.json_response(job, status=201)

    async def _card(self, request: web.Request) -> web.Response:
        return web.Response(body=_drawn("card"), content_type="image/png")

    async def _evaluate(self, request: web.Request) -> web.Response:
        run = request.match_info["id"]
        job = self.add_job("pending", kind="evaluate", name=None, title="Evaluation", request={}, about=run)
        self.publish(job)

        async def evaluate() -> None:
            self.publish(job, state="running")
            for value in range(9):
                self._tell(job["id"], "progress", {"value": value, "maximum": 8})
                await asyncio.sleep(self.step_seconds)
            self.evaluation = {"evaluation": EVALUATED, "folder": "evaluation"}
            self.publish(job, state="completed", outputs={"sentence": EVALUATED["sentence"]})

        self._tasks[job["id"]] = asyncio.create_task(evaluate())
        return web.json_response(job, status=201)

    async def _draw(self, request: web.Request) -> web.Response:
        job = self.add_job("pending", kind="draw", name=None, title="Drawing", request=await request.json())
        self.publish(job)

        async def draw() -> None:
            while any(one["state"] == "running" for one in self.jobs.values()):
                await asyncio.sleep(self.step_seconds)
            self.publish(job, state="running")
            for value in range(9):
                self._tell(job["id"], "progress", {"value": value, "maximum": 8})
                await asyncio.sleep(4 * self.step_seconds)
            pictures = [f"tried/{job['id']}-{number}.png" for number in range(2)]
            self.publish(job, state="completed", outputs={"pictures": pictures, "notes": []})

        self._tasks[job["id"]] = asyncio.create_task(draw())
        return web.json_response(job, status=201)

    def _counts(self) -> dict[str, int]:
        return {state: sum(job["state"] == state for job in self.jobs.values()) for state in ("pending", "running")}

    def publish(self, job: dict[str, Any], **changes: Any) -> None:
        job.update(changes)
        summary = {key: value for key, value in job.items() if key not in ("request", "outputs")}
        self._all_events += [("job", summary), ("queue", self._counts())]
        self._tell(job["id"], "job", summary)

    def show(self, id: str, event: Event) -> None:
        """Send the view of a run after an event to who watches it."""
        view = self.views.setdefault(id, RunView())
        view.take(event)
        self._tell(id, "view", {"view": view.to_json()})

    def _tell(self, id: str, kind: str, data: dict[str, Any]) -> None:
        self.events.setdefault(id, []).append((kind, dict(data)))


def started(steps: int) -> RunStarted:
    return RunStarted(steps=steps, steps_before=0, samples=4, adapters=133, parameters=9, device="cuda:0", dtype="bf16")


def made_up_events(step: int) -> list[Event]:
    """The events of one step of a training that goes well."""
    loss = 0.12 + 0.3 * math.exp(-step / 20) + 0.05 * math.sin(7.3 * step)
    events: list[Event] = [StepDone(step=step, loss=loss, grad_norm=0.1, learning_rate=1e-4)]
    if step % 10 == 0:
        events.append(Validated(**_validation(step), verdict="it still improves on held-out images"))
    if step % 20 == 0 or step == 2:
        paths = tuple(f"{step}-1.0-{index}.png" for index in range(2))
        events.append(Previewed(step=step, prompts=PROMPTS, paths=paths, strength=1.0))
    return events


PREPARATION = (
    "4 photos found; captions: a caption of its own for 3 of 4 images",
    "Loading sdxl.safetensors…",
    "Photos prepared: 4 of 4",
)
PROMPTS = ("a photo of foxy in the snow", "foxy <b>as</b> a knight, oil painting")


def _validation(step: int, factor: float = 1.0) -> dict[str, Any]:
    loss = factor * 0.2 + 0.25 * math.exp(-step / 20) + (0.002 * (step - 50) if step > 50 else 0)
    return {"step": step, "loss": loss, "base_loss": 0.45, "low": -0.2, "high": -0.05,
            "best": step <= 50, "best_step": min(step, 50)}  # fmt: skip


def _run_facts(id: str) -> dict[str, Any]:
    factor = 1 + 0.1 * (int(id[-1]) if id[-1].isdigit() else 0)
    losses = [
        [step, factor * (0.12 + 0.3 * math.exp(-step / 20) + 0.05 * math.sin(7.3 * step))]
        for step in range(1, STEPS + 1)
    ]
    smooth = [[step, factor * (0.12 + 0.3 * math.exp(-step / 20))] for step in range(1, STEPS + 1)]
    previews = [{"step": step, "strength": strength, "prompt": prompt, "number": index + 1,
                 "file": f"previews/{step}-{strength}-{index}.png"}
                for step in (20, 40, 60) for strength in ((0.0, 1.0) if step < 60 else (0.0, 0.5, 1.0, 1.5))
                for index, prompt in enumerate(PROMPTS)]  # fmt: skip
    settings = [
        {"name": "steps", "value": STEPS, "default": 500, "help": "", "group": "Training"},
        {"name": "rank", "value": 8 * round(10 * (factor - 1)), "default": 16, "help": "", "group": "LoRA and targets"},
        {"name": "learning_rate", "value": 1e-4, "default": None, "help": "", "group": "Training"},
    ]
    return {
        "id": id, "name": "fox", "state": "finished", "started": NOW, "seconds": 95.0, "step": STEPS, "steps": STEPS,
        "model": "sdxl.safetensors", "family": "Stable Diffusion XL", "loss": 0.151, "loss_label": "mean of 50 steps",
        "held_out": 0.2205, "cover": "previews/60-1.0-0.png", "job": None, "status": "Finished", "mood": "good",
        "settings": settings, "changed": {"steps": STEPS}, "trigger": "foxy", "losses": losses, "smooth": smooth,
        "rates": [], "validations": [_validation(step, factor) for step in range(10, STEPS + 1, 10)],
        "base_loss": 0.45,
        "likenesses": [{"step": step, "likeness": 0.6 - 0.3 * math.exp(-step / 20), "own": 0.64,
                        "adherence": 0.9 - step / 120} for step in (20, 40, 60)],
        "previews": previews, "pairs": [], "left_out": [], "advice": [], "advice_summary": "",
        "images": [{"file": f"{n}.png", "caption": "a red fox", "use": "trained" if n else "held out",
                    "thumbnail": f"pictures/{n}.png", "standing": "never fit" if n == 1 else "", "controls": 0}
                   for n in range(4)],
        "lora": {"file": "fox.safetensors", "bytes": 45_000_000, "installed": None},
        "saves": [{"step": step, "file": f"fox-{step}.safetensors", "bytes": 45_000_000, "best": step == 50}
                  for step in (40, 50, 60)],
        "recommended": {"sentence": "Finished after 60 steps; use the last one.", "is_judged": False, "step": 60,
                        "file": "fox.safetensors", "bytes": 45_000_000},
        "best_step": 50,
        "verdict": "the LoRA improves on held-out images, most at step 50; a little overfitting after that",
        "facts": {"Steps": "60 of 60", "Time": "1 min 35 s", "Held-out loss": "0.2205 (base 0.45)", "LoRA": "43 MiB"},
        "sentences": ["LoRA on sdxl.safetensors", "cuda:0, bf16"], "notes": [],
        "use": {"ComfyUI": ["Copy the file to models/loras and load it with Load LoRA at strength 1.", ""],
                "A1111 and Forge": ["Write into the prompt:", "<lora:fox:1> foxy"]},
        "command": "lorasmith train input/fox --model sdxl.safetensors --trigger foxy --steps 60",
        "commands": {"Train the same again":
                     "lorasmith train input/fox --model sdxl.safetensors --trigger foxy --steps 60"},
        "files": ["fox.safetensors", "run.json", "events.jsonl"], "folder": f"/home/me/lorasmith/{id}",
        "is_trainable_on": True, "dataset": "fox",
    }  # fmt: skip


def _drawn(name: str) -> bytes:
    """A picture whose look depends on its name."""
    hue = sum(map(ord, name)) * 37 % 360
    picture = Image.new("RGB", (256, 256), f"hsl({hue}, 30%, 82%)")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((60, 70, 200, 220), fill=f"hsl({(hue + 25) % 360}, 65%, 45%)")
    pen.polygon([(75, 100), (90, 30), (125, 80)], fill=f"hsl({(hue + 25) % 360}, 65%, 40%)")
    pen.polygon([(185, 100), (170, 30), (135, 80)], fill=f"hsl({(hue + 25) % 360}, 65%, 40%)")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _says(answer: Callable[[], Any]) -> Callable[[web.Request], Any]:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(answer())

    return handler


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"kind": "OptionError", "message": message}}, status=status)


def example() -> FakeServer:
    """A server with some of everything."""
    server = FakeServer(step_seconds=0.1)
    server.add_dataset("fox", 8)
    server.add_dataset("high-contrast", 6)
    server.builtin = frozenset({"high-contrast"})
    server.add_dataset("my-dog", 5, captions=False)
    for number in (1, 2, 3):
        server.add_run(f"runs/fox-{number:03d}")
    server.add_run("runs/broken-004", state="failed", status="Failed", mood="bad", name="broken", cover=None, lora=None)
    return server


if __name__ == "__main__":
    web.run_app(example().app(), host="127.0.0.1", port=int(sys.argv[1]) if len(sys.argv) > 1 else 8199)

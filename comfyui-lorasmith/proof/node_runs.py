"""The nodes as ComfyUI calls them, by themselves and by its executor."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

import checkout
import families
from parity import pictures


def node(family: str) -> dict[str, Any]:
    """The nodes as ComfyUI calls them: trained, interrupted, resumed, saved; without the packages that it lacks."""
    for lacking in ("diffusers", "accelerate", "matplotlib"):
        sys.modules[lacking] = None  # type: ignore[assignment]
    pack = checkout.pack()
    import comfy.model_management as management
    import comfy_extras.nodes_train as theirs
    import folder_paths

    outputs = Path(folder_paths.get_output_directory())
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    before = pictures(model, positive, size=families.FAMILIES[family].size)
    train = pack.NODE_CLASS_MAPPINGS["LorasmithTrainLora"]()
    declared = {**train.INPUT_TYPES()["required"], **train.INPUT_TYPES()["optional"]}
    own = theirs.TrainLoraNode.INPUT_TYPES()["required"]
    widgets = {
        name: kind[1]["default"] for name, kind in train.INPUT_TYPES()["required"].items() if "default" in kind[1]
    }
    given = {**widgets, "steps": 6, "training_dtype": "fp32", "lora_dtype": "fp32"}

    def run(**others: Any) -> Any:
        with torch.inference_mode():
            lists = {name: [value] for name, value in {**given, **others}.items()}
            return train.train([model], [{"samples": torch.cat(latents).clone()}], [positive], **lists)

    whole, losses, steps = run(seed=1)
    interrupted = False
    try:
        with _stopping(3):
            run(seed=2)
    except management.InterruptProcessingException:
        interrupted = True
    resumed, resumed_losses, _ = run(seed=2)
    for run_folder in (outputs / "runs").iterdir():
        run_folder.rename(outputs / run_folder.name)
    straight, straight_losses, _ = run(seed=2)
    theirs.SaveLoRA.execute(whole, "loras/proof")
    theirs.LossGraphNode.execute(losses, "proof")
    return {
        "inputs": [*own] == [name for name in declared if name in own],
        "losses": len(losses["loss"]),
        "steps": steps,
        "interrupted": interrupted,
        "resumed": resumed_losses == straight_losses
        and all(torch.equal(resumed[key], straight[key]) for key in straight),
        "saved": len(list(outputs.rglob("proof*.safetensors"))),
        "same bits": torch.equal(before, pictures(model, positive, size=families.FAMILIES[family].size)),
    }


class _Vae:
    """Latents' first channels as colours."""

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        return samples_in[:, :3].movedim(1, -1).sigmoid()


def others(family: str) -> dict[str, Any]:
    """Previews, resuming by name, validating and comparing, as ComfyUI calls the nodes."""
    pack = checkout.pack()
    import comfy.model_management as management
    import folder_paths

    outputs = Path(folder_paths.get_output_directory())
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    before = pictures(model, positive, size=families.FAMILIES[family].size)
    images = [{"samples": torch.cat(latents)}]

    def run(kind: str, **given: Any) -> Any:
        node = pack.NODE_CLASS_MAPPINGS[kind]()
        widgets = {name: kind[1] for name, kind in node.INPUT_TYPES()["required"].items() if len(kind) > 1}
        defaults = {name: options["default"] for name, options in widgets.items() if "default" in options}
        lists = {name: [value] for name, value in {**defaults, **given}.items()}
        with torch.inference_mode():
            return getattr(node, node.FUNCTION)(**lists)

    def train(kind: str, **given: Any) -> Any:
        return run(kind, model=model, latents=images[0], positive=positive, **given)

    small = {"steps": 6, "training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 1e-3}
    plain, losses, _ = train("LorasmithTrainLora", **small)
    (drawn,) = run(
        "LorasmithPreviews",
        vae=_Vae(),
        positive=positive[:1],
        negative=positive[:1],
        latent={"samples": torch.zeros_like(latents[0])},
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        every=3,
    )
    (outputs / "runs").rename(outputs / "plain")
    found = train("LorasmithTrainLora", previews=drawn, **small)
    lora, drawn_losses, _ = found["result"]
    rows = {path.stem: path.read_bytes() for path in outputs.glob("runs/*/samples/*-1.*")}
    (outputs / "runs").rename(outputs / "drawn")
    with contextlib.suppress(management.InterruptProcessingException), _stopping(3):
        train("LorasmithTrainLora", **small)
    resumed, resumed_losses, _ = train("LorasmithResumeLora", run="lora_00001")
    valid, bare, _ = train("LorasmithValidateLora", lora=lora, draws=2)["result"]
    again, same, _ = train("LorasmithValidateLora", lora=lora, draws=2, strength=0.0)["result"]
    table, picture = train("LorasmithCompareTrainers", steps=5, training_dtype="fp32")["result"]
    return {
        "ran with previews": drawn_losses == losses and all(torch.equal(lora[key], plain[key]) for key in plain),
        "drawn": len({row: rows[row] for row in rows}) == 5 and len(set(rows.values())) == 4,
        "resumed by name": resumed_losses == losses and all(torch.equal(resumed[key], plain[key]) for key in plain),
        "validated": valid != bare and again == same == bare,
        "compared": len(table.splitlines()) == 6 and picture.ndim == 4,
        "same bits": torch.equal(before, pictures(model, positive, size=families.FAMILIES[family].size)),
    }


class _Clip:
    """Encodes each text as one of a family's conditionings."""

    def __init__(self, family: str) -> None:
        self._family, self._known = family, dict[str, Any]()

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        if tokens not in self._known:
            entries = families.data_of(self._family, count=5 + len(self._known))[1]
            self._known[tokens] = [entries[-1][0], dict(entries[-1][1])]
        return [self._known[tokens]]


def methods(family: str) -> dict[str, Any]:
    """Methods that encode texts: the first loss is the plain one, and what is learnt another."""
    pack = checkout.pack()
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    before = pictures(model, positive, size=families.FAMILIES[family].size)
    further, train = (pack.NODE_CLASS_MAPPINGS[f"Lorasmith{name}"]() for name in ("LoraSettings", "TrainLora"))
    defaults = {name: kind[1]["default"] for name, kind in further.INPUT_TYPES()["required"].items()}
    required = train.INPUT_TYPES()["required"]
    given = {name: kind[1]["default"] for name, kind in required.items() if "default" in kind[1]}
    given |= {"steps": 3, "training_dtype": "fp32", "lora_dtype": "fp32", "learning_rate": 1e-2, "batch_size": 2}

    def run(**changed: Any) -> Any:
        lists = {"settings": [further.settings(**{**defaults, **changed})[0]], "clip": [_Clip(family)]}
        with torch.inference_mode():
            return train.train(
                [model],
                [{"samples": torch.cat(latents).clone()}],
                [positive],
                captions=["a sks dog"],
                trigger=["sks dog"],
                **{name: [value] for name, value in given.items()},
                **lists,
            )

    plain, losses, _ = run()
    kept, kept_losses, _ = run(preserve="class", preserve_class="dog")
    slid, slid_losses, _ = run(slider_positive="a red dog", slider_negative="a blue dog")

    def differs(one: Any) -> bool:
        return not all(torch.equal(one[key], plain[key]) for key in plain)

    return {
        "ran preserved": kept_losses["loss"][0] == losses["loss"][0] and differs(kept),
        "ran slider": slid_losses["loss"][0] > 0 and differs(slid),
        "same bits": torch.equal(before, pictures(model, positive, size=families.FAMILIES[family].size)),
    }


def graph(family: str) -> dict[str, Any]:
    """A workflow by ComfyUI's own executor, in inference mode: stopped, queued again, and a bad one."""
    import execution

    import nodes

    asyncio.run(nodes.load_custom_node(str(checkout.PACK)))
    nodes.NODE_CLASS_MAPPINGS |= {"Given": type("Given", (_Given,), {"family": family}), "Kept": _Kept}
    if not hasattr(nodes.NODE_CLASS_MAPPINGS["Given"], "RELATIVE_PYTHON_MODULE"):
        for name in ("Given", "Kept"):
            nodes.NODE_CLASS_MAPPINGS[name].RELATIVE_PYTHON_MODULE = "nodes"
    declared = nodes.NODE_CLASS_MAPPINGS["LorasmithTrainLora"].INPUT_TYPES()["required"]
    widgets = {name: kind[1]["default"] for name, kind in declared.items() if "default" in kind[1]}

    def run(seed: int, at: int = 0, **others: Any) -> tuple[list[tuple[str, dict[str, Any]]], list[float]]:
        given = {**widgets, "steps": 5, "training_dtype": "fp32", "seed": seed, **others}
        prompt = {
            "1": {"class_type": "Given", "inputs": {}},
            "2": {
                "class_type": "LorasmithTrainLora",
                "inputs": {"model": ["1", 0], "latents": ["1", 1], "positive": ["1", 2], **given},
            },
            "3": {"class_type": "Kept", "inputs": {"lora": ["2", 0], "loss": ["2", 1], "stop": at}},
        }
        _Kept.losses = []
        server = _Server(at)
        executor = execution.PromptExecutor(server, **_cache(execution))
        with _stopping(at):
            executor.execute(prompt, f"prompt {seed}", {}, ["3"])
        return executor.status_messages, _Kept.losses

    def ended(messages: Any, name: str) -> dict[str, Any] | None:
        return next((data for event, data in messages if event == name), None)

    done, losses = run(1)
    stopped, _ = run(2, at=3)
    _, resumed = run(2)
    refused, _ = run(3, rank=3, learning_rate=2.0)
    error = ended(refused, "execution_error") or {}
    return {
        "ran": ended(done, "execution_error") is None and len(losses) == 5,
        "interrupted": ended(stopped, "execution_interrupted") is not None,
        "went on": len(resumed) == 5,
        "refused": str(error.get("exception_message", "")).strip(),
    }


def _cache(execution: Any) -> dict[str, Any]:
    """Arguments of an executor, which need none in some versions."""
    kinds = getattr(execution, "CacheType", None)
    return (
        {} if kinds is None else {"cache_type": kinds.NONE, "cache_args": {"ram": 0.0, "lru": 0, "ram_inactive": 0.0}}
    )


class _Server:
    client_id = last_node_id = None

    def __init__(self, at: int) -> None:
        self.sent: list[Any] = []

    def send_sync(self, event: Any, data: Any, sid: Any = None) -> None:
        self.sent.append((event, data))


class _Given:
    """A node that gives a small model and its data."""

    family = ""
    RETURN_TYPES = ("MODEL", "LATENT", "CONDITIONING")
    FUNCTION = "given"
    CATEGORY = "proof"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def given(self) -> tuple[Any, Any, Any]:
        latents, positive = families.data_of(self.family)
        return families.model_of(self.family), {"samples": torch.cat(latents)}, positive


class _Kept:
    """A node that keeps the losses."""

    losses: ClassVar[list[float]] = []
    RETURN_TYPES = ()
    FUNCTION = "kept"
    OUTPUT_NODE = True
    CATEGORY = "proof"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"lora": ("LORA_MODEL",), "loss": ("LOSS_MAP",), "stop": ("INT", {})}}

    def kept(self, lora: Any, loss: Any, stop: int) -> dict[str, Any]:
        type(self).losses = loss["loss"]
        return {"ui": {}}


@contextlib.contextmanager
def _stopping(at: int) -> Iterator[None]:
    """Inside the context, ComfyUI is asked to stop after a step."""
    import comfy.model_management as management

    loaded = ("comfyui-lorasmith.nodes", "lorasmith_pack.nodes")  # by ComfyUI, and by `checkout.pack`
    module = next(one for name, one in sys.modules.items() if name.endswith(loaded))
    on_event = module.NodeHost.on_event

    def stopping(self: Any, event: Any) -> None:
        on_event(self, event)
        if type(event).__name__ == "StepDone" and event.step == at:
            management.interrupt_current_processing()

    module.NodeHost.on_event = stopping
    try:
        yield
    finally:
        module.NodeHost.on_event = on_event

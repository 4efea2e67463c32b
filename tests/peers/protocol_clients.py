"""Independent clients of ComfyUI's protocol against a running server: each draws a picture with the built-in model.

    python tests/peers/protocol_clients.py CLIENT ADDRESS

runs in an environment that has the clients: comfy-api-simplified, comfy-toolkit[ws], comfyui-workflow-client,
comfyui-async-api-tool, comfy-script[client] with tqdm, comfyui-autograph, comfyui-cli with pytest, comfy-lint. It
prints what the client got. `tests/server/comfyui/test_protocol_clients.py` starts the server.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "lorasmith-tiny.safetensors"


def prompt(seed: int) -> dict[str, Any]:
    """A picture in two steps, in API format."""
    nodes = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": MODEL}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red dog", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": 2,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {
            "class_type": "SaveImage",
            "inputs": {"images": ["6", 0], "filename_prefix": "client"},
        },
    }
    titles = {"7": "Save Image"}
    return {key: {**node, "_meta": {"title": titles.get(key, node["class_type"])}} for key, node in nodes.items()}


def workflow(seed: int) -> dict[str, Any]:
    """The same as the editor saves it, as far as nodes and links go."""
    kinds = {
        "1": "MODEL CLIP VAE",
        "2": "CONDITIONING",
        "3": "CONDITIONING",
        "4": "LATENT",
        "5": "LATENT",
        "6": "IMAGE",
    }
    values = {
        "1": [MODEL],
        "2": ["a red dog"],
        "3": [""],
        "4": [64, 64, 1],
        "6": [],
        "7": ["client"],
        "5": [seed, "fixed", 2, 1.0, "euler", "normal", 1.0],
    }
    links: list[list[Any]] = []
    nodes = []
    for key, member in prompt(seed).items():
        inputs = []
        for name, value in member["inputs"].items():
            if isinstance(value, list):
                kind = kinds[value[0]].split()[value[1]]
                links.append([len(links) + 1, int(value[0]), value[1], int(key), len(inputs), kind])
                inputs.append({"name": name, "type": kind, "link": len(links)})
        outputs = [{"name": kind, "type": kind, "links": []} for kind in kinds.get(key, "").split()]
        place = {"pos": [0, 0], "size": [1, 1], "flags": {}, "order": int(key), "mode": 0, "properties": {}}
        sockets = {"inputs": inputs, "outputs": outputs, "widgets_values": values[key]}
        nodes.append({"id": int(key), "type": member["class_type"], **place, **sockets})
    return {"last_node_id": 7, "last_link_id": len(links), "nodes": nodes, "links": links, "version": 0.4}


def is_picture(content: bytes) -> str:
    """The size of a PNG in words."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return f"{image.width}×{image.height} PNG of {len(content)} bytes"


def comfy_api_simplified(address: str) -> str:
    from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.json"
        file.write_text(json.dumps(prompt(1)))
        graph = ComfyWorkflowWrapper(str(file))
    api = ComfyApiWrapper(address)
    (content,) = api.queue_and_wait_images(graph, "Save Image").values()
    return is_picture(content)


def comfy_toolkit(address: str) -> str:
    from comfy_toolkit import ComfyClient

    client = ComfyClient(address)
    assert client.is_online()
    steps: list[tuple[int, int]] = []
    nodes: list[str | None] = []
    result = client.submit_and_track(
        prompt(2), on_progress=lambda *step: steps.append(step), on_node=nodes.append, overall_timeout=60
    )
    assert steps[-1] == (2, 2), steps
    assert "7" in nodes, nodes
    (picture,) = client.wait_for_images(client.submit(prompt(22)))
    assert result
    return (
        f"{is_picture(client.download(picture))}; {len(steps)} steps, {len(nodes)} nodes; {client.vram_stats()['name']}"
    )


def comfyui_workflow_client(address: str) -> str:
    from comfyuiclient import ComfyUIClient, ComfyUIClientAsync

    host = address.removeprefix("http://")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.json"
        file.write_text(json.dumps(prompt(3)))
        client = ComfyUIClient(host, str(file))
        client.connect()
        found = client.generate(["Save Image"])
        client.close()

        async def drawn() -> Any:
            again = ComfyUIClientAsync(host, str(file))
            await again.connect()
            await again.set_data(key="Save Image", input_key="filename_prefix", input_value="again")
            pictures = await again.generate(["Save Image"])
            await again.close()
            return pictures

        second = asyncio.run(drawn())
    return f"{found['Save Image'].size}, asynchronously {second['Save Image'].size}"


def comfyui_async_api_tool(address: str) -> str:
    import aiohttp
    from comfyui_async_api_tool import ComfyClient

    async def main() -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            client = ComfyClient(session, address)
            return [event async for event in client.run(prompt(4))]

    events = asyncio.run(main())
    assert not [one for one in events if one["type"] == "error"], events
    pictures = [one["data"] for one in events if one["type"] == "image"]
    progress = [one["data"] for one in events if one["type"] == "progress"]
    return f"{is_picture(pictures[-1])}; progress to {max(progress):.0f} %, {events[-1].get('generation_ms')} ms"


def comfy_script(address: str) -> str:
    from comfy_script.runtime import load

    load(address)
    from comfy_script.runtime import Workflow
    from comfy_script.runtime.nodes import (
        CheckpointLoaderSimple,
        CLIPTextEncode,
        EmptyLatentImage,
        KSampler,
        SaveImage,
        VAEDecode,
    )

    with Workflow(wait=True):
        model, clip, vae = CheckpointLoaderSimple(MODEL)
        good, bad = CLIPTextEncode("a red dog", clip), CLIPTextEncode("", clip)
        latent = EmptyLatentImage(64, 64, 1)
        drawn = KSampler(model, 5, 2, 1.0, "euler", "normal", good, bad, latent, 1.0)
        saved = SaveImage(VAEDecode(drawn, vae), "script")
    picture = saved.wait()[0]
    return f"picture of {picture.size}"


def comfyui_autograph(address: str) -> str:
    """Also an oracle: both convert the same file of the editor to the same prompt."""
    from autograph import ApiFlow

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "workflow.json"
        file.write_text(json.dumps(workflow(6)))
        flow = ApiFlow(str(file), server_url=address)
        flow.save(Path(folder) / "prompt.json")
        theirs = json.loads((Path(folder) / "prompt.json").read_text())
        result = flow.submit(server_url=address, wait=True)
        pictures = result.fetch_images()
        saved = pictures.save(Path(folder) / "out.png")
        size = [Path(path).stat().st_size for path in (saved if isinstance(saved, list) else [saved])]
    body = json.dumps(workflow(6)).encode()
    with urllib.request.urlopen(f"{address}/workflow/convert", body) as answer:
        ours = json.load(answer)
    same = {key: (theirs[key]["class_type"], theirs[key]["inputs"]) for key in theirs}
    assert same == {key: (ours[key]["class_type"], ours[key]["inputs"]) for key in ours}, (theirs, ours)
    return f"pictures of {size} bytes; {len(ours)} nodes converted alike"


def comfyui_cli(address: str) -> str:
    """Its own tests."""
    import comfyui.tests

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    variables = {"PATH": path, "COMFYUI_TEST_SERVER": address.removeprefix("http://"), "COMFYUI_TEST_CHECKPOINT": MODEL}
    tests = Path(comfyui.tests.__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(tests)]
    ran = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]
    return "; ".join(line for line in ran.stdout.splitlines() if line.startswith("SKIPPED") or " passed" in line)


def comfy_lint(address: str) -> str:
    """Its linter knows the nodes from `/object_info`."""
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good.json", Path(folder) / "bad.json"
        good.write_text(json.dumps(prompt(7)))
        graph = prompt(7)
        graph["5"]["inputs"]["sampler_name"] = "none such"
        bad.write_text(json.dumps(graph))
        found = []
        for file in (good, bad):
            command = [sys.executable, "-m", "comfy_lint.cli", "--server", address, str(file)]
            found.append(subprocess.run(command, capture_output=True, text=True, check=False))
    assert found[0].returncode == 0, found[0].stdout + found[0].stderr
    assert found[1].returncode == 1, found[1].stdout + found[1].stderr
    return " ".join(next(line for line in found[1].stdout.splitlines() if "error" in line).split())


CLIENTS: dict[str, Callable[[str], str]] = {
    one.__name__: one
    for one in (
        comfy_api_simplified,
        comfy_toolkit,
        comfyui_workflow_client,
        comfyui_async_api_tool,
        comfy_script,
        comfyui_autograph,
        comfyui_cli,
        comfy_lint,
    )
}


if __name__ == "__main__":
    print(CLIENTS[sys.argv[1]](sys.argv[2]))

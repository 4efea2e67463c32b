"""ComfyUI's own editor in a browser, against the server: templates, runs, errors, restarts, our extension.

It needs playwright, Chromium and releases of the editor: the installed one, and those in the folders of
`LORASMITH_EDITORS`, each made by `pip install --target FOLDER comfyui-frontend-package==X` and separated as in PATH.
With `LORASMITH_PICTURES=FOLDER` pictures of the page are kept, to be looked at.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lorasmith.core.folders import ASSETS
from tools.browsing import chromium, opened_browser

pytestmark = pytest.mark.slow

APP = "window.comfyAPI.app.app"
TRAIN = f"{APP}.graph.nodes.find(node => node.type === 'TrainLoraNode')"
PATIENCE_MS = 900_000
"""For a few steps of a tiny model on a busy machine."""


def editors() -> list[Path | None]:
    """Folders with the editor's package; None stands for the installed one."""
    given = [Path(one) for one in os.environ.get("LORASMITH_EDITORS", "").split(os.pathsep) if one]
    installed = [None] if importlib.util.find_spec("comfyui_frontend_package") else []
    return [*given, *installed]


def version(folder: Path | None) -> str:
    if folder is None:
        return "installed"
    return next(folder.glob("comfyui_frontend_package-*.dist-info")).name.split("-")[1].removesuffix(".dist")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass
class Server:
    """`lorasmith serve` as a process, with one release of the editor."""

    base: Path
    editor: Path | None
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        paths = [*([str(self.editor)] if self.editor else []), *filter(None, sys.path)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorasmith", "serve", "--base-dir", str(self.base), "--port", str(self.port)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            cwd=self.base,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ends = time.monotonic() + 400
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/editor/api/object_info"):
                return
            assert time.monotonic() < ends, "the server does not answer"
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.3)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


@dataclass
class Editor:
    """The editor in a browser."""

    page: Any
    server: Server
    errors: list[str] = field(default_factory=list)

    def do(self, script: str, *arguments: Any) -> Any:
        return self.page.evaluate(script, *arguments)

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition, timeout=PATIENCE_MS, polling=200)

    def open(self) -> None:
        self.page.goto(f"{self.server.address}/editor/")
        self.wait(f"window.comfyAPI?.app && {APP}.graph && {APP}.canvas && {APP}.vueAppReady")
        self.wait("!!window.LiteGraph?.registered_node_types?.TrainLoraNode")

    def choose(self, title: str) -> None:
        """Choose a template in the dialog that is open."""
        self.page.get_by_text(title, exact=True).first.click()
        self.wait(f"!!({TRAIN})")
        self.page.wait_for_timeout(500)

    def set(self, **values: Any) -> None:
        """Set inputs of Train LoRA."""
        self.do(
            f"values => {{ for (const widget of {TRAIN}.widgets) "
            "if (widget.name in values) widget.value = values[widget.name] }",
            values,
        )

    def run(self) -> None:
        self.do(f"() => {{ {APP}.queuePrompt(0) }}")

    def state(self, text: str) -> None:
        """Wait until the panel says `text`."""
        self.wait(f"document.querySelector('.lorasmith-state')?.textContent.includes({json.dumps(text)})")

    def figures(self) -> str:
        return str(self.page.locator(".lorasmith-figures").first.text_content())

    def picture(self, name: str) -> None:
        """Keep a picture of the page in the folder of `LORASMITH_PICTURES`, to be looked at."""
        if folder := os.environ.get("LORASMITH_PICTURES"):
            centred = (
                "() => { const app = " + APP + "; const node = " + TRAIN + "; if (!node) return;"
                "app.canvas.ds.scale = 0.85; app.canvas.ds.offset = [300 - node.pos[0], 130 - node.pos[1]];"
                "app.canvas.setDirty(true, true) }"
            )
            self.do(centred)
            self.page.wait_for_timeout(700)
            self.page.screenshot(path=Path(folder) / f"{version(self.server.editor)}-{name}.png")


NONE = pytest.param(
    None,
    marks=pytest.mark.skip("comfyui-frontend-package is not installed, and LORASMITH_EDITORS names no folder with it"),
)


@pytest.fixture(scope="module", params=editors() or [NONE], ids=version)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("base"), request.param)
    broken = one.base / "models" / "checkpoints" / "broken.safetensors"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no tensors")
    try:
        one.start()
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if chromium() is None:
        pytest.skip("no Chromium is installed")
    with opened_browser() as one:
        yield one


@pytest.fixture
def editor(server: Server, browser: Any) -> Iterator[Editor]:
    """The editor in a fresh browser profile, which must log no error of ours."""
    page = browser.new_page(viewport={"width": 1500, "height": 950})
    one = Editor(page, server)

    def heard(message: Any) -> None:
        where = (message.location or {}).get("url", "")
        said = f"{where} {message.text}"
        if message.type == "error" and not any(known in said for known in EXPECTED):
            one.errors.append(f"{message.text} {where}")

    page.on("console", heard)
    page.on("pageerror", lambda error: one.errors.append(str(error)))
    yield one
    page.close()
    assert one.errors == []


EXPECTED = ("/api/userdata", "Content Security Policy")
"""The original server answers 404, too, for files and folders that the user has not saved yet; and the editor's calls
of other hosts are stopped on purpose."""


def test_the_first_run_shows_our_templates(editor: Editor) -> None:
    editor.server.stop()  # a fresh base folder: no setting says that the tutorial was seen
    (editor.server.base / "user" / "default" / "comfy.settings.json").unlink(missing_ok=True)
    editor.server.start()
    editor.open()
    for title in ("Single subject", "Style", "Continue a LoRA"):
        editor.page.get_by_text(title, exact=True).first.wait_for(timeout=30_000)
    editor.page.wait_for_timeout(1000)
    loaded = editor.do(
        "() => [...document.images].filter(one => one.naturalWidth === 320 && one.naturalHeight > 100).length"
    )
    assert loaded >= 4, "the cards' pictures are shown"
    editor.picture("templates")
    editor.choose("Compare strengths")
    editor.page.wait_for_timeout(1000)
    editor.picture("graph")


def test_without_a_first_run_the_editor_opens_our_graph(editor: Editor) -> None:
    editor.open()
    editor.do(f"async () => {{ await {APP}.extensionManager.setting.set('Comfy.TutorialCompleted', true) }}")
    editor.page.wait_for_timeout(500)
    editor.do("() => { localStorage.clear(); sessionStorage.clear() }")
    editor.page.goto("about:blank")
    editor.open()
    editor.wait(f"!!({TRAIN})")


def test_nothing_of_the_extension_is_in_prompt_or_workflow(editor: Editor) -> None:
    load(editor, "style")
    assert editor.page.locator(".lorasmith-training").count() == 1
    prompt, workflow = editor.do(
        f"async () => {{ const made = await {APP}.graphToPrompt(); return [made.output, made.workflow] }}"
    )
    original = json.loads(fetch(editor, "/templates/style.json"))
    node = next(one for one in workflow["nodes"] if one["type"] == "TrainLoraNode")
    before = next(one for one in original["nodes"] if one["type"] == "TrainLoraNode")
    declared = json.loads(fetch(editor, "/api/object_info/TrainLoraNode"))["TrainLoraNode"]["input_order"]
    inputs = prompt[str(node["id"])]["inputs"]
    assert set(inputs) <= {*declared["required"], *declared["optional"]}
    assert node["widgets_values"][: len(before["widgets_values"])] == before["widgets_values"]
    # One value for each input but the four sockets, and one for what happens to the seed after a run.
    assert len(node["widgets_values"]) == len(declared["required"]) + len(declared["optional"]) - 4 + 1
    assert "lorasmith_" not in json.dumps([prompt, workflow])
    assert {one["name"] for one in node["inputs"]} <= {*inputs, "clip"}  # which is not linked


def test_settings_of_ours_are_out_of_sight_until_they_are_asked_for(editor: Editor) -> None:
    load(editor, "style")
    shown = f"() => {TRAIN}.widgets.filter(one => !one.hidden).map(one => one.name)"
    height = f"() => {TRAIN}.size[1]"
    few, low = editor.do(shown), editor.do(height)
    names = editor.do(f"() => {TRAIN}.outputs.map(one => one.localized_name ?? one.name)")
    assert names == ["lora", "loss_map", "steps"], "older releases have other names"
    assert "steps" in few
    assert "previews" in few
    assert "ema_decay" not in few
    editor.page.locator(".lorasmith-more").first.dispatch_event("click")
    assert "ema_decay" in editor.do(shown)
    assert editor.do(height) > low + 300
    editor.picture("more_settings")
    editor.page.locator(".lorasmith-more").first.dispatch_event("click")
    assert (editor.do(shown), editor.do(height)) == (few, low)
    editor.do(  # one that was tuned is never out of sight
        "async () => { const made = await " + APP + ".graphToPrompt();"
        "const node = made.workflow.nodes.find(one => one.type === 'TrainLoraNode');"
        "node.showAdvanced = false; node.widgets_values[20] = 'attention';"
        f"await {APP}.loadGraphData(made.workflow) }}"
    )
    assert "targets" in editor.do(shown)


def test_a_training_is_shown_live_and_its_lora_reopens_the_graph(editor: Editor) -> None:
    load(editor, "folder")
    editor.set(steps=8, validation_share=0.25, previews="a fox", preview_every=4)
    editor.run()
    editor.state("Training.")
    editor.wait("/step [2-7] of 8/.test(document.querySelector('.lorasmith-figures')?.textContent)")
    early = curve(editor)
    assert early > 50, "the curve is drawn"
    editor.state("Finished.")
    assert curve(editor) > early, "the curve has moved"
    figures = editor.figures()
    assert "step 8 of 8 · loss " in figures
    assert "held out " in figures
    pictures = editor.do(
        "() => [...document.querySelectorAll('.lorasmith-preview img')].map(one => [one.alt, one.naturalWidth])"
    )
    assert [one[0] for one in pictures] == ["without LoRA: a fox", "step 8: a fox"]
    assert all(width > 0 for _, width in pictures), "the pictures are there"
    editor.picture("trained")
    (lora,) = wait_for(editor.server.base / "output" / "loras", "*.safetensors")
    editor.do(f"async () => {{ {APP}.graph.clear() }}")
    drop(editor, lora)
    editor.wait(f"!!({TRAIN})")
    values = editor.do(f"() => Object.fromEntries({TRAIN}.widgets.map(one => [one.name, one.value]))")
    assert (values["steps"], values["previews"]) == (8, "a fox")


def test_a_bad_value_is_shown_on_its_node(editor: Editor) -> None:
    load(editor, "folder")
    editor.set(steps=-3)
    editor.run()
    editor.wait(f"Object.keys({APP}.lastNodeErrors ?? {{}}).length > 0")
    errors = editor.do(f"() => {APP}.lastNodeErrors")
    assert [*errors] == ["20"]
    assert errors["20"]["errors"][0]["type"] == "value_smaller_than_min"
    editor.picture("bad_value")
    editor.errors[:] = [one for one in editor.errors if not is_refusal(one)]


def test_an_unknown_node_that_feeds_a_caption_stops_the_run(editor: Editor) -> None:
    editor.open()
    prompt = json.loads((ASSETS / "examples" / "single_subject.json").read_text())
    prompt["40"]["inputs"]["text"] = ["999", 1]
    prompt["999"] = {"class_type": "SuperCaption", "inputs": {"text": "a fox"}}
    editor.do(f"async prompt => {{ await {APP}.loadApiJson(prompt, 'mine') }}", prompt)
    sent = editor.do(f"async () => (await {APP}.graphToPrompt())")
    assert sent["output"]["40"]["inputs"]["text"] == ["999", 1]
    assert any(str(one["id"]) == "999" and len(one["outputs"]) == 2 for one in sent["workflow"]["nodes"])
    with editor.page.expect_response("**/prompt") as answer:
        editor.run()
    assert answer.value.status == 400 and "unknown node 'SuperCaption'" in answer.value.text()
    editor.errors[:] = [one for one in editor.errors if not is_refusal(one)]


def test_nodes_that_are_not_here_are_named_and_no_manager_is(editor: Editor) -> None:
    if editor.server.editor is not None:
        pytest.skip("the panel is that of the installed release")
    load(editor, "folder")
    prompt = json.loads((ASSETS / "examples" / "single_subject.json").read_text())
    prompt["999"] = {"class_type": "SuperCaption", "inputs": {"text": "a fox"}}
    editor.do(f"async prompt => {{ await {APP}.loadApiJson(prompt, 'mine') }}", prompt)
    editor.page.get_by_text("Lorasmith has no such node. Replace or remove it to run this workflow here.").wait_for(
        timeout=PATIENCE_MS
    )
    toast = str(editor.page.inner_text("body"))
    editor.page.get_by_text("View details").first.click()
    editor.page.get_by_text("Nodes that are not here").wait_for(timeout=PATIENCE_MS)
    panel = str(editor.page.inner_text("body"))
    assert "Put one of its own in their place (double-click the canvas for a list)" in panel
    assert "SuperCaption" in panel and "Not a node of Lorasmith" in panel
    assert re.findall(r"(?i)\b(manager|registry|install\w*|missing node packs)\b", toast + panel) == []
    editor.picture("missing_nodes")


def test_open_in_editor_opens_the_graph_of_a_run(editor: Editor) -> None:
    settings = {"steps": 2, "rank": 2, "learning_rate": 0.00123, "targets": "attention", "previews": ""}
    body = {"dataset": "fox", "model": "lorasmith-tiny", "name": "fox", "trigger": "sks fox", "settings": settings}
    job = asked(editor, "jobs", body)
    ends = time.monotonic() + PATIENCE_MS / 1000
    while (state := asked(editor, f"jobs/{job['id']}"))["state"] != "completed":
        assert state["state"] in ("pending", "running") and time.monotonic() < ends, state
        time.sleep(0.5)
    run = quote(state["run"], safe="")
    graph = asked(editor, f"runs/{run}/graph")
    editor.page.goto(f"{editor.server.address}/editor/?run={run}")
    editor.wait(
        f"window.comfyAPI?.app && {APP}.graph?.nodes.some(node => node.type === 'LoadImageTextDataSetFromFolder')"
    )
    shown = editor.do(f"async () => (await {APP}.graphToPrompt()).output")
    assert {key: node["class_type"] for key, node in shown.items()} == {
        key: node["class_type"] for key, node in graph.items()
    }
    for key, node in graph.items():
        assert {name: shown[key]["inputs"][name] for name in node["inputs"]} == node["inputs"], key
    assert graph["20"]["inputs"]["learning_rate"] == 0.00123
    red = "!LiteGraph.registered_node_types[node.type] || node.has_errors"
    assert editor.do(f"() => {APP}.graph.nodes.filter(node => {red}).map(node => node.type)") == []
    assert "run=" not in editor.page.url  # loaded again, the page keeps what was changed since
    editor.wait(f"{APP}.canvas.ds.scale >= 0.6")  # its text can be read
    open_tabs = f"{APP}.extensionManager.workflow.openWorkflows.map(one => one.filename)"
    editor.wait(f"{open_tabs}.join() === {json.dumps(state['run'].split('/')[-1])}")
    editor.picture("run")
    editor.do(f"() => {APP}.extensionManager.command.execute('Lorasmith.Back')")
    editor.page.wait_for_url(f"**/#/runs/{run}")


def test_pictures_in_subfolders_stay_chosen(editor: Editor) -> None:
    editor.open()
    editor.do(f"async () => {{ await {APP}.loadGraphData() }}")
    chosen = editor.do(
        f"() => {APP}.graph.nodes.filter(one => one.type === 'LoadImage').map(one => one.widgets[0].value)"
    )
    assert chosen == [f"fox/fox_{number}.png" for number in range(1, 7)]


def test_a_failure_is_shown_on_its_node(editor: Editor) -> None:
    load(editor, "folder")
    editor.do(
        f"() => {{ {APP}.graph.nodes.find(node => node.type === 'CheckpointLoaderSimple')"
        ".widgets[0].value = 'broken.safetensors' }"
    )
    editor.run()
    editor.wait(f"!!{APP}.lastExecutionError")
    error = editor.do(f"() => {APP}.lastExecutionError")
    assert (error["node_id"], error["node_type"]) == ("1", "CheckpointLoaderSimple")
    assert "broken.safetensors" in error["exception_message"]
    editor.picture("failure")


def test_a_cancelled_training_continues_after_a_restart_of_the_server(editor: Editor) -> None:
    load(editor, "folder")
    editor.set(steps=60, rank=8)
    editor.run()
    editor.wait("/step [3-9] of 60/.test(document.querySelector('.lorasmith-figures')?.textContent)")
    editor.do(f"async () => {{ await {APP}.extensionManager.command.execute('Comfy.Interrupt') }}")
    editor.state("Cancelled")
    editor.picture("cancelled")
    editor.server.stop()
    editor.page.wait_for_timeout(2000)
    editor.server.start()
    editor.wait("window.comfyAPI.api.api.socket?.readyState === WebSocket.OPEN")
    editor.page.wait_for_timeout(1000)
    editor.run()
    editor.wait("/step \\d+ of 60/.test(document.querySelector('.lorasmith-figures')?.textContent)")
    editor.state("Training.")
    first = int(editor.figures().split()[1])
    assert first > 3, "it resumed"
    editor.do(f"async () => {{ await {APP}.extensionManager.command.execute('Comfy.Interrupt') }}")
    editor.state("Cancelled")
    editor.errors[:] = [one for one in editor.errors if not is_outage(one)]


def test_node_help_is_shown(editor: Editor) -> None:
    load(editor, "folder")
    editor.do(
        f"() => {{ const app = {APP}; const node = {TRAIN}; app.canvas.ds.scale = 0.6;"
        "app.canvas.ds.offset = [500 - node.pos[0], 300 - node.pos[1]]; app.canvas.selectNode(node);"
        "app.canvas.setDirty(true, true) }"
    )
    editor.page.get_by_test_id("info-button").first.click()
    help_text = editor.page.locator(".node-help-content").first
    help_text.get_by_text("Seed of initial weights").first.wait_for(timeout=30_000)
    assert "Train a LoRA on images and their captions" in str(help_text.text_content())
    editor.picture("help")


def test_a_reloaded_page_shows_the_whole_curve_of_a_running_training(editor: Editor) -> None:
    load(editor, "folder")
    editor.set(steps=900, rank=4)  # so many that it still trains after the page was loaded again
    editor.run()
    editor.wait("/step ([5-9]|\\d\\d+) of 900/.test(document.querySelector('.lorasmith-figures')?.textContent)")
    editor.page.wait_for_timeout(2000)  # the editor keeps the open graph after a moment
    editor.open()
    editor.wait("/step \\d+ of 900/.test(document.querySelector('.lorasmith-figures')?.textContent)")
    editor.page.wait_for_timeout(3000)
    assert curve(editor) > 50
    editor.picture("reloaded")
    editor.do(f"async () => {{ await {APP}.extensionManager.command.execute('Comfy.Interrupt') }}")
    editor.state("Cancelled")


def load(editor: Editor, name: str) -> None:
    """Open the editor with a template, past its dialogs."""
    editor.open()
    editor.page.wait_for_timeout(1500)
    editor.page.keyboard.press("Escape")
    editor.do(
        "async name => { const address = window.comfyAPI.api.api.fileURL(`/templates/${name}.json`);"
        f"await {APP}.loadGraphData(await (await fetch(address)).json()) }}",
        name,
    )
    editor.wait(f"!!({TRAIN})")
    editor.page.wait_for_timeout(500)


def asked(editor: Editor, path: str, body: dict[str, Any] | None = None) -> Any:
    """An answer of the server's own API; a POST with a body."""
    data, headers = (None, {}) if body is None else (json.dumps(body).encode(), {"Content-Type": "application/json"})
    request = urllib.request.Request(f"{editor.server.address}/lorasmith/v1/{path}", data, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def fetch(editor: Editor, path: str) -> str:
    with urllib.request.urlopen(f"{editor.server.address}/editor{path}") as answer:
        return str(answer.read().decode())


def curve(editor: Editor) -> int:
    """Pixels of the curve that are not transparent."""
    return int(
        editor.do(
            "() => { const canvas = document.querySelector('.lorasmith-curve');"
            "const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
            "let blue = 0; for (let i = 0; i < pixels.length; i += 4)"
            "if (pixels[i + 3] > 100 && pixels[i + 2] > pixels[i] + 40) blue += 1; return blue }"
        )
    )


def drop(editor: Editor, path: Path) -> None:
    """Drop a file on the page."""
    editor.do(
        "([name, data]) => { const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));"
        "const transfer = new DataTransfer(); transfer.items.add(new File([bytes], name));"
        "const target = document.querySelector('canvas.lgraphcanvas, #graph-canvas') ?? document.body;"
        "const where = { bubbles: true, cancelable: true, clientX: 700, clientY: 500 };"
        "for (const kind of ['dragenter', 'dragover', 'drop'])"
        "target.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, ...where })) }",
        [path.name, base64.b64encode(path.read_bytes()).decode()],
    )


def wait_for(folder: Path, pattern: str) -> list[Path]:
    ends = time.monotonic() + PATIENCE_MS / 1000
    while not (found := sorted(folder.glob(pattern))):
        assert time.monotonic() < ends
        time.sleep(0.2)
    return found


def is_refusal(error: str) -> bool:
    """Whether an error is the browser's note of the 400 that the test asked for."""
    return "400" in error or "rompt" in error


def is_outage(error: str) -> bool:
    """Whether an error is the browser's note of a server that was away."""
    return "ERR_CONNECTION" in error or "WebSocket" in error or "Failed to fetch" in error

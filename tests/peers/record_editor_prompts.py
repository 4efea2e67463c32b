"""Record what ComfyUI's editor makes of files in its format: the prompts that it would queue.

    python tests/peers/record_editor_prompts.py --server http://127.0.0.1:8188 --chromium /usr/bin/chromium \\
        --out tests/golden/editor_prompts.json
    python tests/peers/record_editor_prompts.py --server ... --out FOLDER FILE.json ...

Needs a running ComfyUI server with its page, Chromium, and the package `playwright`. Without files, the cases of
`tests/workflow/editor_cases.py` are recorded in one file, with the version of the page; of files, the prompt of each
is written into a folder under the file's name, and the server's node definitions beside them as `object_info.json`.
`compare_editor_prompts.py` compares such a folder with ours.

The editor of the server decides: widgets whose values it makes itself (3D views, comparisons of pictures) have those
of an empty page, and nodes that the server does not know have no widgets.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

CONVERT = """async (file) => {
    const convert = async () => {
        const quiet = {silentAssetErrors: true, showMissingNodesDialog: false, showMissingModelsDialog: false}
        await app.loadGraphData(file, true, true, null, quiet)
        await new Promise((done) => setTimeout(done, 60))
        return (await app.graphToPrompt()).output
    }
    const late = new Promise((_, refuse) => setTimeout(() => refuse(new Error('took 40 seconds')), 40000))
    return await Promise.race([convert(), late])
}"""


def main() -> None:
    arguments = _arguments()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(arguments.server, wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=180_000)
        page.wait_for_timeout(8_000)  # extensions register their nodes after that
        if arguments.files:
            _record_files(page, arguments)
        else:
            _record_cases(page, arguments)
        browser.close()


def _record_cases(page: Any, arguments: argparse.Namespace) -> None:
    from tests.workflow.editor_cases import CASES

    version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__ ?? ''")
    found = {name: page.evaluate(CONVERT, case) for name, case in CASES.items()}
    arguments.out.write_text(json.dumps({"version": version, "prompts": found}, indent=1) + "\n", encoding="utf-8")
    print(len(found), "cases with version", version)


def _record_files(page: Any, arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(f"{arguments.server}/object_info") as answer:
        (arguments.out / "object_info.json").write_bytes(answer.read())
    for file in arguments.files:
        try:
            prompt = page.evaluate(CONVERT, json.loads(file.read_text(encoding="utf-8")))
        except Exception as error:  # the page refuses some files, and the others are still wanted
            print(file.name, error)
            continue
        (arguments.out / file.name).write_text(json.dumps(prompt, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="address of a ComfyUI server")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="path of the browser")
    parser.add_argument("--out", type=Path, required=True, help="file for the cases, or folder for files")
    parser.add_argument("files", type=Path, nargs="*", help="workflows in the editor's format")
    return parser.parse_args()


if __name__ == "__main__":
    main()

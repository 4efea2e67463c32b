"""Frames of the page while it is scrolled, with 500 photos and 300 runs.

    python -m benchmarks.page_frames

It needs Playwright and Chromium, and prints the median, the 95 % and the longest time between frames, in ms.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from tests.server.pages.run_folders import write_finished_run
from tools.browsing import opened_browser, served

PHOTOS = 500
RUNS = 300
VIEWS = {"#/new/many/photos": ".tile:nth-child(400)", "#/": ".covers > li:nth-child(250)", "#/runs": ".run-rows li"}
"""Views, and what is there when they are complete."""

SCROLLED = """async () => {
  const times = [];
  let last = performance.now();
  const end = last + 6000;
  await new Promise((done) => {
    const frame = (now) => {
      times.push(now - last);
      last = now;
      scrollBy(0, 40);
      if (scrollY + innerHeight >= document.documentElement.scrollHeight - 2) scrollTo(0, 0);
      now < end ? requestAnimationFrame(frame) : done();
    };
    requestAnimationFrame(frame);
  });
  times.sort((one, other) => one - other);
  return [0.5, 0.95, 1].map((share) => times[Math.min(times.length - 1, Math.floor(times.length * share))].toFixed(1));
}"""


def main() -> None:
    """Fill a base folder, and scroll its views."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "ComfyUI"
        _fill(base)
        with served(base) as server, opened_browser() as browser:
            for width in (1280, 390):
                page = browser.new_page(viewport={"width": width, "height": 860})
                for view, complete in VIEWS.items():
                    page.goto("about:blank")
                    page.goto(server.address + view)
                    page.wait_for_selector(complete, state="attached")
                    page.wait_for_timeout(2500)
                    print(width, view, *page.evaluate(SCROLLED), flush=True)


def _fill(base: Path) -> None:
    draw = random.Random(1)
    photos = base / "input" / "many"
    photos.mkdir(parents=True)
    for index in range(PHOTOS):
        width, height = draw.choice([(640, 480), (480, 640), (800, 600)])
        picture = Image.effect_noise((width // 8, height // 8), 60).convert("RGB").resize((width, height))
        picture.save(photos / f"photo {index:03}.jpg")
        (photos / f"photo {index:03}.txt").write_text(f"a photo, number {index}")
    first = write_finished_run(base, "runs/fox-001")
    for number in range(2, RUNS + 1):
        shutil.copytree(first, first.with_name(f"fox-{number:03}"))


if __name__ == "__main__":
    main()

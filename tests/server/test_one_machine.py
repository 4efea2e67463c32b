"""What `lorasmith serve` imports where nobody asked for more than one machine: by the names of modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ONLY_WHERE_ASKED = (
    "ray",
    "prometheus_client",
    "fsspec",
    "s3fs",
    "boto3",
    "lorasmith.server.draining",
    "lorasmith.server.notices",
    "lorasmith.runs.ray_cluster",
    "lorasmith.runs.ray_bridge",
)

SERVED = f"""
import asyncio, sys, urllib.request
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import lorasmith.cli.serve
from tests.server.fakes import ended, fake_config
from lorasmith.server.http_server import running

async def main(base):
    async with running(fake_config(Path(base))) as (context, address):
        for path in ("/", "/healthz", "/metrics", "/lorasmith/v1/status"):
            assert await asyncio.to_thread(lambda: urllib.request.urlopen(address + path).read())
        assert (await ended(context, context.dispatcher.submit("train", {{}}))).state == "completed"

asyncio.run(main(sys.argv[1]))
print([name for name in {ONLY_WHERE_ASKED!r} if name in sys.modules])
"""


def test_one_machine_imports_nothing_of_a_farm(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SERVED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

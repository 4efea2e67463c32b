"""A run over the workers of a Ray cluster, on Ray Train's TorchTrainer.

    python ray_train.py --workers 4 -- train photos --model lorasmith-tiny --output /shared/run --batch-size 4

Ray starts the processes and brings them together; what follows `--` is a command line of Lorasmith. All workers
see the folder in which this is started, with photographs, model and output.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer


def train(config: dict[str, Any]) -> None:
    """One worker: the command line of Lorasmith, in the process group that Ray has made."""
    from lorasmith.cli.main import main

    os.chdir(config["folder"])  # Ray starts workers in folders of their own
    sys.argv = ["lorasmith", *config["arguments"]]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"lorasmith ended with exit code {end.code}") from end


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    trainer = TorchTrainer(
        train,
        train_loop_config={"arguments": [one for one in given.arguments if one != "--"], "folder": str(Path.cwd())},
        # Sums of gradients are on the GPUs; what the processes tell each other besides stays on the hosts.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if given.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
    )
    trainer.fit()

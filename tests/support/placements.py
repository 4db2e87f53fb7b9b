"""Prepares or trains on a cluster of several nodes, and prints the node of each process.

    python -m tests.support.placements SETTINGS.yaml ADDRESS prepare train

A program of its own, because a test's process is on another cluster already. It prints one JSON
object: the driver's node, and the nodes of the run's actors by the class of the actor.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import yaml
from ray._private.state import actors

from tests.support.faults import TRAIN_WORKER
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.on_ray.prepare import prepare
from udp_ray.on_ray.train import train

ACCOUNTANT = "RunAccountant"
PAUSE_S = 0.2


def main(arguments: Sequence[str]) -> None:
    """Does the steps that are named, and prints where they ran."""
    settings, address, *steps = arguments
    config = ExperimentConfig.model_validate(yaml.safe_load(Path(settings).read_text()))
    ray.init(address=address, log_to_driver=False)
    with _watched() as seen:
        if "prepare" in steps:
            prepare(config.data, tokenizer=config.model.name)
        if "train" in steps:
            train(config, announce=lambda text: None)
    nodes = {
        kind: [node for name, node in seen.values() if kind in name]
        for kind in (ACCOUNTANT, TRAIN_WORKER)
    }
    found = {"driver": ray.get_runtime_context().get_node_id(), "actors": nodes}
    sys.stdout.write(json.dumps(found) + "\n")


@contextmanager
def _watched() -> Iterator[dict[str, tuple[str, str]]]:
    """Yields what fills with the class and node of every actor, by its id, while the block runs.

    Looked at all the time, because an actor that has ended may not be said to be anywhere.
    """
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    seen: dict[str, tuple[str, str]] = {}
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(PAUSE_S):
            for name, actor in actors().items():
                if actor["Address"]["NodeID"] in alive:
                    seen[name] = actor["ActorClassName"], actor["Address"]["NodeID"]

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])

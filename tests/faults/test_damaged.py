"""A shard of the store damaged on disk.

pytest tests/faults/test_damaged.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.recovery import no_output, require_one_sentence
from tests.support.runs import DATASET, tiny_experiment
from udp_ray.errors import DataError
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.train import train

Damage = Callable[[Path], None]


def cut_short(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@contextmanager
def damaged(file: Path, damage: Damage) -> Iterator[None]:
    kept = file.read_bytes()
    damage(file)
    try:
        yield
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize("damage", [cut_short, altered])
def test_a_damaged_shard_is_named_before_anything_is_spent(tmp_path: Path, damage: Damage) -> None:
    config = tiny_experiment(tmp_path)
    shard = sorted(Path(config.data.store).glob("shard-*.bin"))[0]
    with damaged(shard, damage), pytest.raises(DataError) as caught:
        train(config, announce=no_output)
    require_one_sentence(caught.value, str(shard), "is damaged", "prepare the store again")
    with Ledger.open(config.data.ledger_url) as ledger:
        assert not ledger.spent(DATASET).runs
    assert not Path(config.output).exists()

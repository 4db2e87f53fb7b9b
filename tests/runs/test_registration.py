"""pytest tests/runs/test_registration.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from udp_ray.errors import LedgerError
from udp_ray.ledger.ledger import Ledger
from udp_ray.runs.registration import registered

DIGEST = "d" * 64


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/ledger.sqlite"


def test_a_new_ledger_appears_only_when_it_is_confirmed(tmp_path):
    with registered("chats", url(tmp_path)) as registration:
        assert not (tmp_path / "ledger.sqlite").exists()
        registration.confirm(DIGEST)
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.sqlite"]
    with Ledger.open(url(tmp_path), expected_id=registration.ledger_id) as ledger:
        record = ledger.dataset("chats")
    assert record.user_hash_key == registration.user_hash_key
    assert record.fingerprints == (DIGEST,)


def test_a_refused_input_leaves_no_ledger_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), registered("chats", url(tmp_path)):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_dataset_keeps_its_key_by_name_and_other_names_have_another(tmp_path):
    def key(name: str) -> bytes:
        with registered(name, url(tmp_path)) as registration:
            registration.confirm(DIGEST)
        return registration.user_hash_key

    first, again, other = key("chats"), key("chats"), key("mails")
    assert first == again
    assert first != other


def test_of_two_that_make_the_same_ledger_one_is_refused(tmp_path):
    with (
        registered("chats", url(tmp_path)) as first,
        registered("chats", url(tmp_path)) as second,
    ):
        first.confirm(DIGEST)
        with pytest.raises(LedgerError, match="already"):
            second.confirm(DIGEST)
    Ledger.open(url(tmp_path), expected_id=first.ledger_id).close()


def test_the_key_is_not_in_the_representation(tmp_path):
    with registered("chats", url(tmp_path)) as registration:
        assert registration.user_hash_key.hex() not in repr(registration)
        assert repr(registration.user_hash_key) not in repr(registration)

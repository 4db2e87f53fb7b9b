"""Prompts and texts to compare with are read whole, and a mistake in a file is one sentence.

pytest tests/data/test_texts.py
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.stores import write_store
from udp_ray.data.store import TokenStore
from udp_ray.data.texts import heldout_texts, read_texts
from udp_ray.errors import DataError

EOS = 0


def written(folder: Path, name: str) -> str:
    """Writes "one" and "two, too", and a text without letters, in the format of the name."""
    file = folder / name
    if name.endswith(".txt"):
        file.write_text("one\n\ntwo, too\n")
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"prompt": ["one", None, "two, too"]}), file)
    else:
        rows = ['{"prompt": "one"}', '{"prompt": " "}', "", '{"prompt": "two, too"}']
        file.write_text("\n".join(rows))
    return str(file)


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.jsonl"])
def test_the_texts_of_a_file_are_read_in_order_without_empty_ones(
    tmp_path: Path, name: str
) -> None:
    assert read_texts(written(tmp_path, name), "prompt", field="prompts") == ["one", "two, too"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.docx", b"x", ["prompts is", "a.docx", "no known format", ".jsonl"]),
        ("a.txt", b" \n", ["prompts is", "holds no text", "give a file"]),
        ("a.txt", b"caf\xe9", ["prompts is", "cannot be read", "give another"]),
        ("a.jsonl", b'{"prompt": 7}', ["prompt_column is 'prompt'", "int in line 1", "name a"]),
        ("a.jsonl", b'{"text": "x"}', ["prompt_column is 'prompt'", "lacks", "'text'"]),
        ("a.jsonl", b'{"prompt": "sec', ["prompts is", "cannot be read as jsonl", "give another"]),
        ("a.jsonl", b"[1]", ["line 1 of", "not a JSON object", "correct it"]),
        ("a.parquet", b"sec", ["prompts is", "cannot be read as parquet", "give another"]),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_texts(str(tmp_path / name), "prompt", field="prompts")
    message = str(caught.value)
    assert "\n" not in message
    assert "sec" not in message.replace(str(tmp_path), "")
    for word in words:
        assert word in message


def test_a_missing_file_and_a_column_of_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"heldout is .*none\.txt, which cannot be read"):
        read_texts(str(tmp_path / "none.txt"), "text", field="heldout")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="heldout_column is 'text', which holds int64"):
        read_texts(str(tmp_path / "n.parquet"), "text", field="heldout")


# ---- held-out texts of a store


def store_of(folder: Path, heldout: list, loss_starts: list | None = None) -> TokenStore:
    path = write_store(folder / "held", heldout, loss_starts=loss_starts)
    return TokenStore.open(path, verify=False)


def test_each_text_of_an_example_is_a_text(tmp_path: Path) -> None:
    users = [[[3, 4, EOS, 5, EOS], [6, 7, 8]], [[9, EOS]]]
    found = heldout_texts(store_of(tmp_path, users), num_texts=9, prefix=[], seed=0)
    assert sorted(found) == [[3, 4, EOS], [5, EOS], [6, 7, 8], [9, EOS]]
    some = heldout_texts(store_of(tmp_path / "b", users), num_texts=2, prefix=[], seed=0)
    assert some == found[:2]


def test_neither_prompts_nor_the_first_token_of_the_tokenizer_are_text(tmp_path: Path) -> None:
    users, starts = [[[1, 2, 3, 4, EOS]], [[1, 5, EOS]]], [[3], [1]]
    found = heldout_texts(store_of(tmp_path, users, starts), num_texts=9, prefix=[1], seed=0)
    assert sorted(found) == [[4, EOS], [5, EOS]]


def test_another_seed_draws_other_texts(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[[n, EOS]] for n in range(1, 60)])
    drawn = [heldout_texts(store, num_texts=5, prefix=[], seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]

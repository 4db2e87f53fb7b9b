"""pytest tests/data/test_read.py

CSV, which Ray Data reads, is read in tests/on_ray/test_prepare_read.py; here only what is said of
such files before and after.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from udp_ray.data.read import (
    Columns,
    Piece,
    column_names,
    find_pieces,
    join_adjacent,
    read_rows,
    refuse_unreadable,
)
from udp_ray.errors import DataError

ROWS = [
    {"who": f"user {n % 7}", "text": f'line {n}\nwith "quotes", commas and ü', "n": n}
    for n in range(5000)
]
COLUMNS = Columns("who", "text")


def write(path: Path, rows: list[dict]) -> str:
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows))
    if path.name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=700)
    elif path.name.endswith(".csv"):
        pacsv.write_csv(table, path)
    elif path.name.endswith(".csv.gz"):
        with gzip.open(path, "wb") as file:
            pacsv.write_csv(table, file)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


def read(inputs: list[str], piece_bytes: int = 1 << 30) -> list[tuple[str, str]]:
    pieces = find_pieces(inputs, "train", piece_bytes)
    refuse_unreadable(pieces, COLUMNS)
    return [
        (row["who"], row["text"])
        for piece in pieces
        for table in read_rows(piece, COLUMNS)
        for row in table.to_pylist()
    ]


EXPECTED = [(row["who"], row["text"]) for row in ROWS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("piece_bytes", [10_000, 1 << 30])
def test_every_format_gives_the_rows_that_were_written(tmp_path, name, piece_bytes):
    assert read([write(tmp_path / name, ROWS)], piece_bytes) == EXPECTED


def test_large_files_are_cut_into_pieces(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert len(find_pieces([path], "train", 10_000)) > 3
    assert len(find_pieces([path], "train", 1 << 30)) == 1


@pytest.mark.parametrize("piece_bytes", range(1, 40))
def test_each_line_belongs_to_one_piece_wherever_the_cut_falls(tmp_path, piece_bytes):
    rows = [{"who": "a" * (n % 5), "text": "x" * (n % 3)} for n in range(9)]
    path = write(tmp_path / "a.jsonl", rows)
    Path(path).write_text(Path(path).read_text().replace("\n", "\n\n", 3).rstrip("\n"))
    assert read([path], piece_bytes) == [(row["who"], row["text"]) for row in rows]


def test_datasets_saved_to_disk_are_read_with_and_without_splits(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=dataset, other=dataset.select([0])).save_to_disk(tmp_path / "dict")
    assert read([str(tmp_path / "plain")], 10_000) == EXPECTED
    assert read([str(tmp_path / "dict")]) == EXPECTED
    with pytest.raises(DataError, match="cannot be read"):
        find_pieces([str(tmp_path / "dict")], "absent", 1 << 30)


def test_globs_folders_and_urls_find_files_in_a_fixed_order(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl", "b/c/3.jsonl", "b/_x.jsonl", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [{"who": name, "text": "t"}])

    def found(pattern: str) -> list[str]:
        return [who for who, _ in read([pattern])]

    assert found(f"{tmp_path}/b") == ["b/1.jsonl", "b/2.jsonl", "b/c/3.jsonl"]
    assert found(f"{tmp_path}/b/*.jsonl") == ["b/1.jsonl", "b/2.jsonl", "b/_x.jsonl"]
    assert found(f"{tmp_path}/**/[1-3].jsonl") == ["b/1.jsonl", "b/2.jsonl", "b/c/3.jsonl"]
    assert found(f"file://{tmp_path}/*/?.jsonl") == ["b/1.jsonl", "b/2.jsonl"]
    assert found(f"file://{tmp_path}/b/2.jsonl") == ["b/2.jsonl"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("absent.parquet", "matches no file"),
        ("*.parquet", "matches no file"),
        ("notes.txt", "of no known format"),
        ("nowhere://host/file.parquet", "cannot be read"),
        ("hf://no such/name", "cannot be read"),
    ],
)
def test_an_input_that_is_not_there_is_refused(tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        find_pieces([inputs], "train", 1 << 30)


SECRET = "what Ann said"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", SECRET),
        ("a.csv", f"who,text\nzoe,x\nzoe,y,{SECRET}\n"),
        ("a.jsonl", '{"who": "zoe", "text": "x"}\n{"who": "' + SECRET + '"'),
        ("a.jsonl", f'{{"who": "zoe", "text": "x"}}\n["{SECRET}"]'),
        ("a.jsonl", f'{{"who": "zoe", "text": ["{SECRET}"]}}'),
        ("a.jsonl", f'{{"who": {{"name": "{SECRET}"}}, "text": "x"}}'),
        ("a.jsonl.gz", SECRET),
    ],
)
def test_a_damaged_file_is_named_and_never_quoted(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as refusal:
        read([str(tmp_path / name)])
    assert SECRET not in str(refusal.value)
    assert "zoe" not in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_file_of_another_encoding_is_refused(tmp_path):
    for name, content in (("a.csv", "who,text\na,ü\n"), ("a.jsonl", '{"who": "a", "text": "ü"}')):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match="cannot be read"):
            read([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_a_missing_column_is_refused_with_those_that_exist(tmp_path, name):
    (piece,) = find_pieces([write(tmp_path / name, ROWS[:3])], "train", 1 << 30)
    columns = Columns("author", "text")
    assert column_names(piece) == ["who", "text", "n"]
    with pytest.raises(DataError, match=r"no column 'author': it has 'who', 'text', 'n'"):
        refuse_unreadable([piece], columns) if name == "a.csv" else list(read_rows(piece, columns))


@pytest.mark.parametrize("piece_bytes", [10, 1 << 30])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"who": "a"', "line 4 is not JSON: Expecting"),
        ("[1]", "line 4 is not a JSON object"),
        ('{"who": "a", "text": 1}', r"line 4 of .*a\.jsonl: column 'text' holds a JSON int"),
        ('{"who": "\xff"}', "line 4 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, content, message, piece_bytes):
    path = tmp_path / "a.jsonl"
    sound = '{"who": "zoe", "text": "x"}\n'
    path.write_bytes(f"{sound}\n{sound}{content}\n{sound}".encode("latin-1"))
    with pytest.raises(DataError, match=message) as refusal:
        read([str(path)], piece_bytes)
    assert "zoe" not in str(refusal.value)
    assert "a.jsonl" in str(refusal.value)


def test_a_malformed_row_of_a_csv_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"who,text\nzoe,x\nzoe,y,{SECRET}\n")
    with pytest.raises(DataError, match=r"a\.csv cannot be read \(row 3 has 3 columns, not 2\)"):
        read([str(path)])


def test_text_files_are_not_guessed_at(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"who": "2020-01-01", "text": "2020-01-01"}\n')
    assert read([str(lines)]) == [("2020-01-01", "2020-01-01")]


def test_ids_of_json_lines_may_be_numbers_in_one_row_and_text_in_the_next(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"who": 1, "text": "a"}\n{"who": "1", "text": null}\n{"who": 1.0, "text": "\\ud800"}\n'
        '{"who": 123456789012345678901234567890, "text": "b"}\n{"text": "c"}\n'
    )
    ids = ["1", "1", "1", "123456789012345678901234567890", None]
    assert read([str(lines)]) == list(zip(ids, ["a", None, "?", "b", "c"], strict=True))


def test_a_column_may_be_absent_from_the_first_row_of_json_lines(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"who": "a"}\n{"who": "b", "text": "x"}\n')
    (piece,) = find_pieces([str(lines)], "train", 1 << 30)
    assert column_names(piece) == ["who", "text"]
    assert read([str(lines)]) == [("a", None), ("b", "x")]


def test_a_file_without_rows_has_none(tmp_path):
    schema = pa.schema([("who", pa.string()), ("text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").touch()
    assert read([str(tmp_path)]) == []


@pytest.mark.parametrize("group_rows", [40, 700, 1500])
@pytest.mark.parametrize("piece_bytes", [300, 5000, 1 << 30])
def test_pieces_of_parquet_hold_every_row_once_and_in_order(tmp_path, group_rows, piece_bytes):
    numbers = pa.table({"n": range(1500), "who": ["u"] * 1500, "text": ["t"] * 1500})
    pq.write_table(numbers, tmp_path / "a.parquet", row_group_size=group_rows)
    pieces = find_pieces([str(tmp_path / "a.parquet")], "train", piece_bytes)
    columns = Columns("n", "text")
    read = [pa.concat_tables([*read_rows(piece, columns)])["n"].to_pylist() for piece in pieces]
    assert [n for numbers in read for n in numbers] == list(range(1500))
    assert all(read)


def test_a_large_row_group_is_read_by_a_few_tasks(tmp_path):
    write(tmp_path / "a.parquet", ROWS)
    assert len(find_pieces([str(tmp_path / "a.parquet")], "train", 10)) > 1
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    assert len(find_pieces([str(tmp_path / "b.parquet")], "train", 10)) == 4


def test_parquet_with_an_empty_row_group_is_read(tmp_path):
    table = pa.table({"who": ["a", "b"], "text": ["x", "y"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for some in (table[:0], table[:1], table[:0], table[1:], table[:0]):
            writer.write_table(some)
    assert read([str(tmp_path / "a.parquet")], 1) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_pieces_that_follow_one_another_are_read_as_one(tmp_path, ending):
    places = [write(tmp_path / f"{name}.{ending}", ROWS) for name in "ab"]
    pieces = find_pieces(places, "train", 30_000)
    of_a = [piece for piece in pieces if piece.location == pieces[0].location]
    assert len(of_a) > 4
    some = [*of_a[:2], *of_a[3:], *pieces[len(of_a) :]]  # the third is another task's
    joined = join_adjacent(some)
    assert len(joined) == 3

    def texts_of(pieces: list[Piece]) -> list[str]:
        tables = (rows for each in pieces for rows in read_rows(each, COLUMNS))
        return [text for rows in tables for text in rows["text"].to_pylist()]

    assert texts_of(joined) == texts_of(some)
    assert sum(each.num_bytes for each in joined) == sum(each.num_bytes for each in some)

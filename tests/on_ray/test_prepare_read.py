"""What Ray Data's own readers give, and what is said where they fail.

pytest tests/on_ray/test_prepare_read.py
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray

from udp_ray.config.experiment import DataConfig
from udp_ray.data.read import Columns, Piece, find_pieces
from udp_ray.errors import DataError
from udp_ray.on_ray.prepare import Input, _own_error, divide_pieces, find_input, read_datasets

ROWS = [
    {"who": f"user {n % 7}", "text": f'line {n}\nwith "quotes", commas and \u00fc', "n": n}
    for n in range(3000)
]
EXPECTED = sorted((row["who"], row["text"]) for row in ROWS)
COLUMNS = Columns("who", "text")
SECRET = "what Ann said"

pytestmark = pytest.mark.usefixtures("ray_2_cpus")


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix in (".parquet", ".pq"):
        pq.write_table(table, path, row_group_size=700)
    elif path.suffix == ".gz":
        with gzip.open(path, "wb") as file:
            pacsv.write_csv(table, file)
    else:
        pacsv.write_csv(table, path)
    return str(path)


def rows_of(inputs: Sequence[str], columns: Columns = COLUMNS) -> list[tuple[str, str]]:
    pieces = find_pieces(inputs, "train", 10_000)
    try:
        return sorted(
            (str(row[columns.user]), row[columns.text])
            for dataset in read_datasets(pieces, columns)
            for row in dataset.iter_rows()
        )
    except Exception as error:
        raise _own_error(error, Input(pieces, [], columns)) from None


@pytest.mark.parametrize("name", ["a.parquet", "b.pq", "a.csv", "a.csv.gz"])
def test_every_format_gives_the_rows_that_were_written(tmp_path, name):
    assert rows_of([write(tmp_path / name, ROWS)]) == EXPECTED


def test_no_file_is_passed_over_whatever_its_name(tmp_path):
    """Ray's listing of folders skips hidden files, and its paths may be URLs."""
    names = ["_x.parquet", ".y.parquet", "a b%41#c.parquet", "k=v/z.parquet", "_x.csv", "q [1].csv"]
    for name in names:
        write(tmp_path / name, [{"who": name, "text": "t"}])
    pieces = [f"{tmp_path}/[_.aq]*", f"{tmp_path}/k=v"]
    assert rows_of(pieces) == [(name, "t") for name in sorted(names)]


def test_text_files_are_not_guessed_at(tmp_path):
    csv = tmp_path / "a.csv"
    csv.write_text("who,text\n007,2020-01-01\n1e3,null\nNA,true\n")
    assert rows_of([str(csv)]) == [("007", "2020-01-01"), ("1e3", "null"), ("NA", "true")]


def test_files_whose_ids_have_other_types_are_read_together(tmp_path):
    write(tmp_path / "1.parquet", [{"who": 1, "text": "a"}])
    write(tmp_path / "2.parquet", [{"who": "2", "text": "b"}])
    assert rows_of([str(tmp_path)]) == [("1", "a"), ("2", "b")]


def test_a_column_may_have_the_name_of_rays_own(tmp_path):
    rows = [{"path": "user 1", "text": "a"}]
    for name in ("a.parquet", "a.csv"):
        inputs = [write(tmp_path / name, rows)]
        assert rows_of(inputs, Columns("path", "text")) == [("user 1", "a")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("2.csv", f"who,text\nzoe,x\nzoe,y,{SECRET}\n", r"2\.csv .*row 3 has 3 columns, not 2"),
        ("2.csv", f"who,said\nzoe,{SECRET}\n", r"2\.csv has no column 'text'"),
        ("2.csv", "", r"2\.csv cannot be read"),
        ("2.csv", f"who,text\nzoe,\xff{SECRET}\n", r"2\.csv cannot be read"),
    ],
    ids=["malformed", "missing column", "empty", "encoding"],
)
def test_a_file_that_ray_cannot_read_is_named_and_never_quoted(
    tmp_path, capfd, name, content, message
):
    write(tmp_path / "1.csv", ROWS[:3])
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message) as refusal:
        rows_of([str(tmp_path)])
    captured = capfd.readouterr()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logged = "".join(
        file.read_text(errors="replace") for file in session.rglob("*.log*") if file.is_file()
    )
    for told in (str(refusal.value), captured.out, captured.err, logged):
        assert SECRET not in told
    assert "\n" not in str(refusal.value)


def test_a_parquet_file_without_the_column_is_refused_and_not_read_as_nulls(tmp_path):
    files = [
        write(tmp_path / "1.parquet", [{"who": "a", "text": "x"}]),
        write(tmp_path / "2.parquet", [{"who": "zoe", "said": "y"}]),
    ]
    data = DataConfig.model_validate(
        {"name": "chats", "user_column": "who", "store": "s", "input": [str(tmp_path)]}
    )
    with pytest.raises(DataError, match=r"2\.parquet has no column 'text': it has 'who', 'said'"):
        find_input(data)
    rows = ray.data.read_parquet(files, columns=COLUMNS.names).take_all()  # the failing arm
    assert {"who": "zoe", "text": None} in rows


@pytest.mark.parametrize("num_cores", [1, 2, 64])
def test_tasks_are_long_at_first_and_short_at_the_end(num_cores):
    pieces = [Piece("parquet", "a", n, n + 1, num_bytes=4 << 20) for n in range(200)]
    runs = divide_pieces(pieces, num_cores)
    lengths = [len(run) for run in runs]
    assert [piece for run in runs for piece in run] == pieces
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == min(16, max(1, 100 // num_cores))  # 64 MiB, or what two rounds would take
    assert lengths[-num_cores:] == [1] * num_cores
    assert len(runs) < 30 or num_cores == 64


def test_pieces_of_unknown_or_large_size_are_tasks_too():
    unknown = [Piece("hub", "a", n, n + 1) for n in range(8)]
    assert [piece for run in divide_pieces(unknown, 1) for piece in run] == unknown
    large = [Piece("jsonl", f"{n}.gz", num_bytes=1 << 40) for n in range(3)]
    assert divide_pieces(large, 2) == [[piece] for piece in large]
    many = [Piece("parquet", "a", n, n + 1, num_bytes=64 << 20) for n in range(9000)]
    assert len(divide_pieces(many, 2)) < 5000
    assert divide_pieces([], 2) == []

"""Jobs are thin, explain themselves, dry-run without a trace, refuse a mistake in one sentence."""

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import udp_ray
from udp_ray.config.cli import run_job
from udp_ray.ledger.ledger import Ledger

REPOSITORY = Path(udp_ray.__file__).parent.parent
JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))
CONFIGS = REPOSITORY / "jobs" / "configs"
MOST_LINES = 60

by_name = pytest.mark.parametrize("job", JOBS, ids=lambda file: file.stem)


class Done(NamedTuple):
    """What a job left behind."""

    status: int | str | None
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs a job in this process, from the repository, as its last line would."""
    monkeypatch.chdir(REPOSITORY)

    def call(job: Path, *arguments: str) -> Done:
        spec = importlib.util.spec_from_file_location(f"job_{job.stem}", job)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as end:
            run_job(lambda: module.main(arguments))
        return Done(end.value.code, *capsys.readouterr())

    return call


def imported_roots(job: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(job.read_text())))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in whole | parts}


@by_name
def test_a_job_is_thin(job: Path) -> None:
    assert len(job.read_text().splitlines()) <= MOST_LINES
    assert not [n for n in ast.walk(ast.parse(job.read_text())) if isinstance(n, ast.While)]
    assert not imported_roots(job) & {"torch", "ray", "deepspeed", "numpy", "transformers"}


@by_name
def test_a_job_opens_with_the_command_that_runs_it(job: Path) -> None:
    docstring = ast.get_docstring(ast.parse(job.read_text())) or ""
    assert f"python jobs/{job.name}" in docstring


@by_name
def test_help_explains_every_setting(job: Path, run: Callable[..., Done]) -> None:
    done = run(job, "--help")
    assert done.status == 0
    # An option with no text is followed at once by its default.
    bare = re.findall(r"^  (--[\w.]+) [^\n]*\n +\(default", done.out, flags=re.MULTILINE)
    assert not bare, f"no explanation: {bare}"


@by_name
def test_an_unknown_option_is_one_sentence(job: Path, run: Callable[..., Done]) -> None:
    done = run(job, *(["show"] if job.stem == "ledger" else []), "--no-such-option", "1")
    assert_one_sentence(done, "--no-such-option")


def assert_one_sentence(done: Done, *words: str) -> None:
    assert done.status == 2, done
    assert done.err.startswith("error: ")
    assert len(done.err.strip().splitlines()) == 1
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


def unanchored(ignored: str, names: set[str]) -> set[str]:
    """Returns the folders of the package that a line without a leading slash leaves out."""
    return {line.rstrip("/") for line in ignored.splitlines() if not line.startswith("/")} & names


def test_a_submitted_job_gets_every_folder_of_the_package() -> None:
    folders = [path for path in (REPOSITORY / "udp_ray").rglob("*") if path.is_dir()]
    names = {folder.name for folder in folders} - {"__pycache__"}
    assert not unanchored((REPOSITORY / ".rayignore").read_text(), names)
    assert unanchored("build/\nruns/\n/data/", names) == {"runs"}  # the failing arm


# ---- dry runs

DEMO = ["--config", str(CONFIGS / "demo.yaml")]
DRY_RUNS = {
    "audit": [*DEMO, "--data.store", "TMP/store", "--output", "TMP/out"],
    "benchmark": ["--output", "TMP/out"],
    "demo": ["--data.store", "TMP/d/store", "--output", "TMP/d/private"],
    "generate": ["--run", "demo/model", "--output", "TMP/out"],
    "mean_estimation": ["--output", "TMP/out"],
    "plan": ["--output", "TMP/out"],
    "prepare": [*DEMO, "--data.store", "TMP/store"],
    "pretrain": [
        "--config", str(CONFIGS / "pretrain.yaml"),
        "--input", "demo/data/ubuntu_irc_heldout.parquet", "--output", "TMP/out",
    ],
    "price": [*DEMO, "--data.store", "TMP/store"],
    "scale": ["--output", "TMP/out"],
    "study": ["--output", "TMP/out"],
    "train": [*DEMO, "--data.store", "TMP/store", "--output", "TMP/out"],
}  # fmt: skip


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_says_what_would_be_done_and_leaves_no_trace(
    name: str, run: Callable[..., Done], tmp_path: Path
) -> None:
    arguments = [text.replace("TMP", str(tmp_path)) for text in DRY_RUNS[name]]
    done = run(REPOSITORY / "jobs" / f"{name}.py", *arguments, "--dry-run")
    assert done.status == 0, done.err
    assert len(done.out) > 100
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_new_total_leaves_the_ledger_as_it_is(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with Ledger.create(url) as ledger:
        ledger.register_dataset("chats")
    asked = ["--ledger", url, "--dataset", "chats", "--epsilon", "3", "--delta", "1e-6"]
    assert run(REPOSITORY / "jobs" / "ledger.py", "set-budget", *asked, "--dry-run").status == 0
    with Ledger.open(url) as ledger:
        assert ledger.dataset("chats").total is None
    assert run(REPOSITORY / "jobs" / "ledger.py", "set-budget", *asked).status == 0
    with Ledger.open(url) as ledger:
        total = ledger.dataset("chats").total
        assert total is not None
        assert total.epsilon == 3


# ---- mistakes

MISTAKES = {
    "price with two targets": ("price", [*DEMO, "--privacy.noise_multiplier", "1"], ["privacy."]),
    "price of replace-one": (
        "price", [*DEMO, "--privacy.adjacency", "replace_one"], ["replace_one"],
    ),
    "price with a delta of 1/N": ("price", [*DEMO, "--privacy.delta", "1e-4"], ["privacy.delta"]),
    "prepare without a file": (
        "prepare", [*DEMO, "--data.store", "TMP/s", "--data.input", "TMP/none.parquet"],
        ["data.input", "none.parquet"],
    ),
    "prepare with a missing column": (
        "prepare", [*DEMO, "--data.store", "TMP/s", "--data.user_column", "who"],
        ["data.user_column", "who"],
    ),
    "prepare with a missing tokenizer": (
        "prepare", [*DEMO, "--data.store", "TMP/s", "--data.tokenizer", "TMP/none"], ["none"],
    ),
    "train without a store": (
        "train", [*DEMO, "--data.store", "TMP/s", "--output", "TMP/out"], ["TMP/s"],
    ),
    "train on a resumed nothing": (
        "train", [*DEMO, "--data.store", "TMP/s", "--output", "TMP/out", "--resume"], ["TMP/out"],
    ),
    "train with a negative clip norm": (
        "train", [*DEMO, "--privacy.clip_norm", "-1"], ["privacy.clip_norm", "-1"],
    ),
    "ledger that is not there": (
        "ledger", ["show", "--ledger", "sqlite:///TMP/no.sqlite", "--dataset", "x"], ["no.sqlite"],
    ),
    "generate without a model": ("generate", ["--run", "TMP/none"], ["run", "TMP/none"]),
    "generate with a top_p above one": (
        "generate", ["--run", "demo/model", "--top_p", "1.5"], ["top_p", "1.5"],
    ),
    "verify without a run": ("verify", ["--output", "TMP/none"], ["TMP/none"]),
    "plan without a workload": ("plan", DEMO, ["plan"]),
    "pretrain without text": ("pretrain", ["--output", "TMP/out"], ["input"]),
    "demo outside its folder": (
        "demo", ["--data.store", "TMP/a/store", "--output", "TMP/b/out"], ["data.store"],
    ),
    "benchmark without a study": ("benchmark", [*DEMO, "--output", "TMP/out"], ["study"]),
    "benchmark without rounds": (
        "benchmark", ["--config", str(CONFIGS / "benchmark.yaml"), "--study.rounds", "0"],
        ["study.rounds", "0"],
    ),
    "benchmark of an unknown contestant": (
        "benchmark",
        ["--config", str(CONFIGS / "benchmark.yaml"), "--study.contestants", "faster"],
        ["study.contestants", "faster"],
    ),
    "audit of a run that is not there": (
        "audit", ["--of", "TMP/none", "--output", "TMP/out"], ["--of", "TMP/none"],
    ),
    "study of an unknown variant": (
        "study", ["--only", "bandit", "--output", "TMP/out"], ["only", "bandit"],
    ),
    "mean estimation without users": (
        "mean_estimation",
        ["--config", str(CONFIGS / "mean_estimation.yaml"), "--study.num_users", "0"],
        ["num_users"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    case: str, run: Callable[..., Done], tmp_path: Path
) -> None:
    name, arguments, words = MISTAKES[case]
    placed = [text.replace("TMP", str(tmp_path)) for text in arguments]
    done = run(REPOSITORY / "jobs" / f"{name}.py", *placed)
    assert_one_sentence(done, *(word.replace("TMP", str(tmp_path)) for word in words))
    assert not list(tmp_path.iterdir())

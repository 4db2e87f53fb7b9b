"""The documentation agrees with the code: links, commands, Python code, paths and settings exist.

    pytest tests/contracts/test_docs.py

Each check is a function of text that returns what is wrong; a test applies it to all pages, and
another one, its failing arm, to a page that is wrong. Commands are parsed by their job and not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import udp_ray
from tests.mutants.planted import MUTANTS
from udp_ray.config import cli
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.errors import UdpRayError

ROOT = Path(udp_ray.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.glob("**/*.md"), *ROOT.glob("demo/*/README.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
COMMANDS = {"sh", "bash", "console", "text", ""}
"""Languages of code blocks that may hold commands; indented blocks have none."""
PLACEHOLDERS = {"FILE": "jobs/configs/demo.yaml"}
"""Words that stand for a file in a command."""
FILE_ENDINGS = (
    "json",
    "yaml",
    "yml",
    "safetensors",
    "png",
    "md",
    "txt",
    "py",
    "toml",
    "sqlite",
    "sql",
)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ---- reading markdown

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S
)
INDENTED = re.compile(r"(?:\A|\n\n)((?: {4}[^\n]*(?:\n|\Z)|\n(?= {4}))+)")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"(?<![\w./])udp_ray(?:\.\w+)+")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields the language and the code of each block, fenced or indented."""
    for found in BLOCK.finditer(text):
        yield found["language"], textwrap.dedent(found["code"])
    for found in INDENTED.finditer(BLOCK.sub("", text)):
        yield "", textwrap.dedent(found[1])


def prose(text: str) -> str:
    """Returns a page without its fenced blocks."""
    return BLOCK.sub("", text)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(text), flags=re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


# ---- links


def has_anchor(page: Path, text: str, file: Path, anchor: str) -> bool:
    """Returns whether a page, or another file that it links to, has an anchor of that name."""
    return not anchor or anchor in anchors(text if file == page else file.read_text())


def dead_links(text: str, page: Path, *, site: Path = DOCS) -> list[str]:
    """Returns the relative links of a page that lead nowhere, or out of the site."""
    wrong = []
    for target in LINK.findall(re.sub(CODE, "", prose(text))):
        if re.match(r"[a-z]+:", target):
            continue  # other sites are not asked
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_outside = page.is_relative_to(site) and not file.is_relative_to(site)
        if is_outside or not file.exists() or not has_anchor(page, text, file, anchor):
            wrong.append(target)
    return wrong


@by_page
def test_no_link_is_dead(page: Path) -> None:
    assert not dead_links(page.read_text(), page)


def test_a_dead_link_is_found() -> None:
    page = DOCS / "index.md"
    text = (
        "[a](none.md) [b](guarantee.md#none) ![c](none.png) [d](../README.md) [e](#terms)\n# Terms"
    )
    assert dead_links(text, page) == [
        "none.md",
        "guarantee.md#none",
        "none.png",
        "../README.md",
    ]
    assert not dead_links("[a](guarantee.md#what-is-not-covered)", page)


# ---- the site


def pages_of(nav: Any) -> Iterator[str]:
    """Yields the files that a navigation names."""
    if isinstance(nav, str):
        yield nav
        return
    for part in nav.values() if isinstance(nav, dict) else nav:
        yield from pages_of(part)


def wrong_in_nav(nav: Any, pages: set[str]) -> set[str]:
    """Returns the pages that a navigation lacks, names twice, or that are not there."""
    named = list(pages_of(nav))
    return pages.symmetric_difference(named) | {page for page in named if named.count(page) > 1}


def test_the_navigation_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert not wrong_in_nav(nav, {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")})


def test_a_page_without_navigation_is_found() -> None:
    nav = [{"Home": "index.md"}, {"More": [{"A": "a.md"}, {"Again": "a.md"}, {"B": "gone.md"}]}]
    assert wrong_in_nav(nav, {"index.md", "a.md", "b.md"}) == {"a.md", "b.md", "gone.md"}


# ---- commands


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command in a page's blocks."""
    for language, code in blocks(text):
        if language in COMMANDS:
            for line in code.replace("\\\n", " ").splitlines():
                try:
                    yield shlex.split(line, comments=True)
                except ValueError:
                    continue  # a quotation mark in a program's output


class _ParsedError(Exception):
    """Ends a job once its settings were read."""


def parses(job: Path, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Returns why a job refuses its arguments; it is stopped after it has read them."""
    real = cli.parse

    def parse(*given: Any, **options: Any) -> Any:
        real(*given, **options)
        raise _ParsedError

    spec = importlib.util.spec_from_file_location(f"documented_{job.stem}", job)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "parse", parse)
        spec.loader.exec_module(module)
        try:
            module.main(list(arguments))
        except _ParsedError:
            return None
        except SystemExit as end:
            return None if end.code == 0 else "it exits"  # --help
        except UdpRayError as error:
            return str(error)
    return "it never reads its settings"


def wrong_commands(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns what is wrong with the commands of a page that run a job or a make target."""
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    wrong = []
    for words in commands(text):
        if words[:1] == ["make"]:
            asked = [word for word in words[1:] if "=" not in word]
            wrong += [f"make {target}" for target in asked if target not in targets]
        place = next((i for i, word in enumerate(words) if re.fullmatch(r"jobs/\w+\.py", word)), 0)
        if not place or not words[place - 1].startswith("python"):
            continue
        job = ROOT / words[place]
        if not job.is_file():
            wrong.append(f"{words[place]}: there is no such job")
            continue
        arguments = [PLACEHOLDERS.get(word, word) for word in words[place + 1 :]]
        if (reason := parses(job, arguments, monkeypatch)) is not None:
            wrong.append(f"{shlex.join(words)}: {reason}")
    return wrong


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A working directory as a reader has it: the repository's files and the README's settings."""
    for name in ("jobs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    settings = next(
        code for kind, code in blocks((ROOT / "README.md").read_text()) if kind == "yaml"
    )
    (tmp_path / "chats.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    settings = (ROOT / "jobs" / "configs" / "demo.yaml").read_text()
    (tmp_path / "runs" / "first" / "config.yaml").write_text(settings)
    return monkeypatch


@by_page
def test_every_command_parses(page: Path, desk: pytest.MonkeyPatch) -> None:
    assert not wrong_commands(page.read_text(), desk)


def test_commands_are_found_at_all(desk: pytest.MonkeyPatch) -> None:
    found = [words for words in commands((ROOT / "README.md").read_text()) if "python" in words]
    assert len(found) >= 7, found


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/none.py --dry-run",
        "python jobs/train.py --config chats.yaml --no-such-option 1",
        "python jobs/train.py --config chats.yaml --privacy.epsilon many",
        "python jobs/train.py --config absent.yaml",
        "ray job submit \\\n    -- python jobs/train.py --config chats.yaml --resum",
        "python jobs/ledger.py forget --config chats.yaml",
        "make everything",
    ],
)
def test_a_wrong_command_is_found(line: str, desk: pytest.MonkeyPatch) -> None:
    assert wrong_commands(f"```sh\n{line}\n```", desk)
    assert wrong_commands("Text.\n\n" + textwrap.indent(line, "    ") + "\n", desk)


# ---- Python


def resolve(name: str) -> bool:
    """Returns whether a dotted name is a module, or leads to an attribute of one."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            module = ".".join(parts[:depth])
            if not hasattr(value, "__path__") or importlib.util.find_spec(module) is None:
                return False
            if depth == len(parts):
                return True  # found, and not imported: that may take seconds
            importlib.import_module(module)
        value = getattr(value, part)
    return True


def dotted(node: ast.AST) -> str | None:
    """Returns the dotted name that an expression is, if it is one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def wrong_python(code: str) -> list[str]:
    """Returns why Python code does not compile, or which of our names in it do not exist."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and (name := dotted(node)) is not None:
            names.add(name)
    ours = sorted(name for name in names if name.split(".")[0] == "udp_ray")
    return [name for name in ours if not resolve(name)]


def wrong_names(text: str) -> list[str]:
    """Returns the names of our modules and their contents in a text that do not exist."""
    found = [name for code in CODE.findall(prose(text)) for name in NAME.findall(code)]
    return [name for name in found if not resolve(name)]


@by_page
def test_python_compiles_and_our_names_exist(page: Path) -> None:
    wrong = [wrong_python(code) for kind, code in blocks(page.read_text()) if kind == "python"]
    assert not [each for each in wrong if each]


@by_page
def test_names_in_the_text_exist(page: Path) -> None:
    assert not wrong_names(page.read_text())


def test_a_wrong_name_in_the_text_is_found() -> None:
    text = (
        "`udp_ray.dp.none`, `udp_ray.errors.UdpRayError`, `udp_ray.nothing(config)`, `udp_ray.dp`"
    )
    assert wrong_names(text) == ["udp_ray.dp.none", "udp_ray.nothing"]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import udp_ray\nudp_ray.no_such_name(1)", ["udp_ray.no_such_name"]),
        ("from udp_ray.dp.plan import NoPlan", ["udp_ray.dp.plan.NoPlan"]),
        ("from udp_ray.dp.none import Plan", ["udp_ray.dp.none.Plan"]),
        ("from udp_ray.dp.plan import PrivacyPlan", []),
        ("import udp_ray.dp.plan\nudp_ray.dp.plan.PrivacyPlan.none()", None),
        ("def f(:", None),
    ],
)
def test_wrong_python_is_found(code: str, wrong: list[str] | None) -> None:
    found = wrong_python(code)
    assert found if wrong is None else found == wrong


# ---- paths and settings in the text

PATH = re.compile(r"^(?:tests|udp_ray|jobs|deploy|demo|docs|\.github)/[\w./*{},-]*$")


def missing_paths(text: str) -> list[str]:
    """Returns the paths of the repository, and the names of tests, in a text that do not exist."""
    words = [word for code in CODE.findall(prose(text)) for word in code.split()]
    words += [word for line in commands(text) for word in line if word.startswith("tests/")]
    wrong = []
    for word in words:
        path, _, test = word.partition("::")
        if not PATH.match(path):
            continue
        found = list(ROOT.glob(path.rstrip("/")))
        if not found or (test and f"def {test.partition('[')[0]}(" not in found[0].read_text()):
            wrong.append(word)
    return wrong


@by_page
def test_every_path_exists(page: Path) -> None:
    assert not missing_paths(page.read_text())


def test_a_missing_path_is_found() -> None:
    text = "`tests/none.py`, `udp_ray/dp/`, `udp_ray/dp/none.py` and `jobs/configs/*.yaml`"
    assert missing_paths(text) == ["tests/none.py", "udp_ray/dp/none.py"]
    assert missing_paths(f"`tests/contracts/{Path(__file__).name}::test_of_nothing`")
    assert not missing_paths(
        f"`tests/contracts/{Path(__file__).name}::test_a_missing_path_is_found`"
    )


SETTING = re.compile(r"^(?:--)?((?:privacy|data|model|train|cluster|sweep)(?:\.\w+)+)\b")


def is_setting(name: str) -> bool:
    """Returns whether a dotted name is a field of the settings of a run or a sweep."""
    return any(_has_field(kind, name.split(".")) for kind in (ExperimentConfig, SweepJobConfig))


def _has_field(kind: Any, parts: Sequence[str]) -> bool:
    if not parts:
        return True
    sections = [
        k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)
    ]
    fields = [section.model_fields.get(parts[0]) for section in sections]
    return any(field is not None and _has_field(field.annotation, parts[1:]) for field in fields)


def unknown_settings(text: str) -> list[str]:
    """Returns the settings that a text names and that do not exist."""
    found = [SETTING.match(code) for code in CODE.findall(prose(text))]
    names = [match[1] for match in found if match]
    return [n for n in names if n.split(".")[-1] not in FILE_ENDINGS and not is_setting(n)]


@by_page
def test_every_setting_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("it also names settings of the past")
    assert not unknown_settings(page.read_text())


def test_an_unknown_setting_is_found() -> None:
    text = "`privacy.epsilon`, `model.lora.rank`, `--sweep.release`, `data.json`, `train.no: 1`"
    assert unknown_settings(text) == ["train.no"]
    assert unknown_settings("`privacy.clip_norm.more`")


# ---- pages that list things


def test_the_tour_names_every_module() -> None:
    spec = importlib.util.spec_from_file_location("generate_tour", DOCS / "generate_tour.py")
    assert spec is not None
    assert spec.loader is not None
    tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tour)
    page = tour.PAGE.read_text()
    listed = set(re.findall(r"^(?:\| |### )`(udp_ray(?:/[\w/.]+)?)`", page, flags=re.M))
    expected = {str(m.parent if m.name == "__init__.py" else m) for m in tour.modules()}
    assert listed == expected, "run python docs/generate_tour.py, or make docs"
    assert "udp_ray/dp/plan.py" in listed


def test_the_page_of_jobs_names_every_job() -> None:
    listed = re.findall(r"^\| `(jobs/\w+\.py)` \|", (DOCS / "jobs.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(f"jobs/{job.name}" for job in (ROOT / "jobs").glob("*.py"))


def stated_defects(text: str) -> set[int]:
    """Returns how many planted defects a page speaks of."""
    found = re.findall(r"plants (\d+) defects|catch (\d+) of (\d+)\.", " ".join(text.split()))
    return {int(number) for numbers in found for number in numbers if number}


@pytest.mark.parametrize("page", ["README.md", "docs/guarantee.md"])
def test_the_number_of_planted_defects_is_right(page: str) -> None:
    assert stated_defects((ROOT / page).read_text()) == {len(MUTANTS)}


def test_a_wrong_number_of_planted_defects_is_found() -> None:
    assert stated_defects("It plants 8 defects.\nThe tests catch 6 of 7.") == {6, 7, 8}


def test_the_readme_is_short_and_opens_with_what_it_is() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings == [
        "What is guaranteed",
        "Two commands",
        "In a notebook",
        "Your own data in five minutes",
        "On a cluster",
        "Speed",
        "Documentation",
    ]


# ---- files that other programs read


def test_the_citation_is_complete_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The udp-ray authors"}]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_the_workflow_runs_what_must_pass_on_all_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert "make lint test" in [step.get("run") for step in job["steps"]]


def test_hooks_use_the_tools_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = [hook["entry"].split()[0] for hook in hooks[0]["hooks"]]
    assert entries == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]


def test_no_page_is_missed() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/options.md", "demo/data/README.md"} <= names


CHECKS: dict[str, Callable[[str], list[str]]] = {
    "paths": missing_paths,
    "settings": unknown_settings,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_code_blocks_are_not_taken_for_text(check: Callable[[str], list[str]]) -> None:
    assert not check("```yaml\nnote: `tests/none.py` and `train.none`\n```")

"""Checks that the guarantee rests on are errors: `python -O` removes `assert` statements.

    python -m pytest tests/contracts/test_no_assert.py

An invariant of ours that does not hold raises `GuaranteeError`. Allowed are statements of the form
`assert name is not None` that tell the type checker what another check has established; each is
listed with its reason, so that a new one is noticed.
"""

import ast
import re
from pathlib import Path

import pytest

import udp_ray
from udp_ray.errors import GuaranteeError, UdpRayError

PACKAGE = Path(udp_ray.__file__).parent
# (file, condition): why the condition cannot be false. Nothing but type narrowing belongs here.
TYPE_NARROWING = {
    ("data/build.py", "self.url is not None"): "only called for a store at a URL",
    ("data/read.py", "piece.split is not None"): "pieces of a data set have a split",
    ("config/privacy.py", "size is not None"): "PrivacyConfig refuses settings without one",
}

NARROWING = re.compile(r"[\w.]+ is not None")


def asserted(source: str) -> list[str]:
    """Returns the conditions of all assert statements in a source, and raised AssertionErrors."""
    nodes = list(ast.walk(ast.parse(source)))
    found = [ast.unparse(node.test) for node in nodes if isinstance(node, ast.Assert)]
    raised = [ast.unparse(node.exc) for node in nodes if isinstance(node, ast.Raise) and node.exc]
    return found + [text for text in raised if text.startswith("AssertionError")]


def all_asserted() -> set[tuple[str, str]]:
    return {
        (file.relative_to(PACKAGE).as_posix(), condition)
        for file in sorted(PACKAGE.rglob("*.py"))
        for condition in asserted(file.read_text())
    }


def test_no_check_is_an_assert_statement() -> None:
    extra = sorted(all_asserted() - set(TYPE_NARROWING))
    assert not extra, f"raise udp_ray.errors.GuaranteeError instead of asserting: {extra}"


def test_allowed_ones_exist_and_do_nothing_but_narrow_a_type() -> None:
    assert set(TYPE_NARROWING) <= all_asserted(), "remove what is not there any more"
    assert all(NARROWING.fullmatch(condition) for _, condition in TYPE_NARROWING)


@pytest.mark.parametrize(
    "planted",
    [
        "def f(a):\n    assert a == 0, 'text'\n",
        "class A:\n    def f(self):\n        if self:\n            assert self.b.c() == 1\n",
        "def f(a):\n    raise AssertionError('a')\n",
    ],
)
def test_a_planted_assert_is_found(planted: str) -> None:
    assert len(asserted(planted)) == 1
    assert not NARROWING.fullmatch(asserted(planted)[0])


def test_a_broken_guarantee_is_no_user_error() -> None:
    # Jobs print a UdpRayError in one line with exit status 2; this one must show its traceback.
    assert not issubclass(GuaranteeError, (UdpRayError, AssertionError))

"""The documents: every path, commit, command and name in them is true."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from modeconn.backends import NAMES as BACKENDS
from modeconn.cli import COMMANDS, _parser
from modeconn.connection.rounds import METHODS
from modeconn.data.datasets import SOURCES
from modeconn.evaluation.arguments import BUFFERS, PRECISIONS
from modeconn.experiments.settings import NAMES as EXPERIMENTS
from modeconn.metrics import LOSSES, METRICS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
# Folders of the repository, with which the name of a file in it begins.
TOPS = "bench|csrc|docs|examples|kernels|modeconn|tests"
FILE = re.compile(rf"`((?:{TOPS})/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
# A line of a block of commands, or a line that is one command.
COMMAND = re.compile(r"^modeconn +([a-z][^`\n]*)$|^`modeconn +([a-z][^`\n]*)`$", re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_document_names_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    named = {ROOT / name for name in FILE.findall(text)}
    linked = {document.parent / name for name in LINK.findall(text)}
    # bench/results is not part of a source distribution
    missing = [path for path in named | linked if not path.exists() and "results" not in path.parts]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_a_document_are_parsed(document: Path):
    parser = _parser()
    for plain, quoted in COMMAND.findall(document.read_text(encoding="utf-8")):
        command = plain or quoted
        assert "run" in parser.parse_args(command.split()), command


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("docs/choosing.md", [*LOSSES, *METRICS, *SOURCES, *BACKENDS, *PRECISIONS, *BUFFERS]),
        ("docs/connect.md", [*METHODS, *EXPERIMENTS]),
        ("docs/experiments.md", EXPERIMENTS),
        ("docs/batch-norm.md", BUFFERS),
        ("README.md", [f"modeconn {c.__name__.rpartition('.')[2]}" for c in COMMANDS]),
    ],
)
def test_a_document_names_all_that_can_be_chosen(document: str, names: list[str]):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert [name for name in names if name not in text] == []


def test_the_map_of_contributors_has_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "modeconn"
    rooms = [f"`modeconn/{path.name}`" for path in package.glob("[a-z]*.py")]
    rooms += [f"`modeconn/{path.parent.name}/`" for path in package.glob("*/__init__.py")]
    assert [room for room in rooms if room not in text] == []


def test_commits_of_the_performance_ledger_exist():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists() or (ROOT / ".git" / "shallow").exists():
        pytest.skip("needs the whole repository")
    for commit in set(re.findall(r"`([0-9a-f]{7})`", (ROOT / "PERFORMANCE.md").read_text())):
        done = subprocess.run([git, "cat-file", "-e", commit], cwd=ROOT, check=False)
        assert done.returncode == 0, commit


def test_results_that_the_performance_ledger_quotes_exist():
    folder = ROOT / "bench" / "results"
    if not folder.exists():
        pytest.skip("bench/results is not part of a source distribution")
    text = (ROOT / "PERFORMANCE.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(20\d\d-[\w-]+\.json)`", text):
        assert (folder / name).exists(), name

"""What a release has besides code: version, citation, changes, and the workflow that tests it."""

import os
import re

import pytest
import yaml
from markdown_pages import README, ROOT, blocks_of

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOWS = [*(ROOT / ".github" / "workflows").iterdir()]


@pytest.fixture
def project() -> dict:
    """The table [project] of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_citation_bibtex_and_package_agree(project):
    [entry] = [block.text for block in blocks_of(README) if block.language == "bibtex"]
    bibtex = dict(re.findall(r"(\w+) = \{+([^{}]+)\}", entry))
    assert bibtex["title"] == CITATION["title"] == f"{project['name']}: {project['description']}"
    assert bibtex["version"] == CITATION["version"] == project["version"]
    assert [{"name": bibtex["author"]}] == CITATION["authors"] == project["authors"]
    assert CITATION["license"] == project["license"] == "MIT"
    required = {"cff-version": "1.2.0", "type": "software"}  # and message, title, authors
    assert CITATION.items() >= required.items()
    assert CITATION["message"]


def test_the_address_of_the_repository_is_written_in_one_place(project):
    """In `[project.urls]`, once there is one: cards read it from the package's metadata."""
    assert CITATION.keys().isdisjoint({"repository-code", "repository", "url"})
    assert project.get("urls", {}).keys() <= {"Repository"}
    if address := project.get("urls", {}).get("Repository"):
        pages = [ROOT / "CITATION.cff", ROOT / "CHANGELOG.md", README, *(ROOT / "docs").glob("*.md")]
        assert not [page.name for page in pages if address in page.read_text(encoding="utf-8")]


def test_the_changelog_begins_with_this_version(project):
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(
        r"^## \[([\d.]+|Unreleased)\](?: - (?:\d{4}-\d\d-\d\d|not released yet))?$", text, re.MULTILINE
    )
    assert len(versions) == len(re.findall("^## ", text, re.MULTILINE))
    assert next(version for version in versions if version != "Unreleased") == project["version"]
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits"}


def test_the_workflow_runs_what_runs_everywhere(project):
    [path] = WORKFLOWS
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow.keys() == {"name", True, "permissions", "concurrency", "jobs"}  # YAML 1.1 takes `on` for true
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    [job] = workflow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu-")
    assert job["timeout-minutes"] == 90
    checkout, python, tests = job["steps"]
    assert [step["uses"].partition("@")[0] for step in (checkout, python)] == [
        "actions/checkout",
        "actions/setup-python",
    ]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in (checkout, python))
    assert python["with"]["python-version"] == "3.11"  # a string: 3.10 would be the number 3.1
    assert python["with"]["cache"] == "pip"
    assert all((ROOT / file).is_file() for file in python["with"]["cache-dependency-path"].split())
    assert tests == {"run": ".ci/run"}
    assert os.access(ROOT / tests["run"], os.X_OK)

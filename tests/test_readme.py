"""README: one screen, its table what evidence/ says; its commands and links, and those of docs/, lead somewhere."""

import re
from pathlib import Path

import pytest

from engine import evidence

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("evidence/README.md")]


def test_results_are_what_evidence_says():
    """If not: python pages.py evidence --minutes 0"""
    assert README.read_text() == evidence.into_readme(README, ROOT / "evidence")


def test_the_page_of_evidence_is_what_its_files_say():
    if evidence.read(ROOT / "evidence"):
        assert (ROOT / "evidence/README.md").read_text() == evidence.page_text(ROOT / "evidence")


def test_a_newcomer_meets_all_in_one_screen():
    """What, a picture, two commands, a table: before the files"""
    above = README.read_text().partition("## Files")[0]
    start = above.partition("## Results")[0]
    assert len(start.splitlines()) <= 32 and len(above.splitlines()) <= 60
    assert start.index("](demo.png)") < start.index("    make demo ") < start.index("    make test ")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_links_are_there(path):
    text = path.read_text()
    for script in re.findall(r"(?:^|\s)python (\w+\.py)", text):
        assert (ROOT / script).is_file() or script in ("sounds.py", "serve.py", "run.py"), script
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (path.parent / link).is_file(), link

"""pages.py: marks are found and end where they end; every link leads to a line; nothing that exists is missing."""

import re
import sys

import pytest

import pages
from engine.config import types
from recipes import TrainConfig
from tasks import TASKS

SOURCE = '''"""
A file.    paper: DINOv3 §3.2, eq. 1

    one     a row of contents      DINOv3 §4.2
"""
RATE = 1  # differs: a rate; there
#   it is 2
WORDS = "paper: not a mark"


class Net:
    def run(self):
        """
        Runs.

        x        of the network
        paper:   §5.1, which
                 goes on; differs: less
        returns  y, no part of it
        """
        return None  # paper: Tab. 3


def other():
    """paper: Plain-DETR §4.1, another's"""
'''


@pytest.fixture
def marks(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "file.py").write_text(SOURCE)
    return pages.marks_of("file.py")


def test_marks_are_found_where_they_stand(marks):
    assert [tuple(mark)[1:] for mark in marks] == [
        (2, "", "paper", "DINOv3 §3.2, eq. 1"), (4, "", "paper", "one a row of contents DINOv3 §4.2"),
        (6, "", "differs", "a rate; there it is 2"), (17, "Net.run", "paper", "§5.1, which goes on"),
        (18, "Net.run", "differs", "less"), (21, "Net.run", "paper", "Tab. 3"),
        (25, "other", "paper", "Plain-DETR §4.1, another's")]


def test_the_guide_has_every_section_and_says_what_is_absent(marks):
    parts = {part.split("\n")[0].split("  ")[0]: part for part in pages.guide(marks).split("\n## ")[1:]}
    assert [f"§{section}" for section in pages.SECTIONS] == [name for name in parts if name[0] == "§"]
    assert "(code/file.py.md#L17) `Net.run`: §5.1, which goes on" in parts["§5.1"]
    absent = {name for name, part in parts.items() if "absent" in part}
    assert absent == {f"§{name}" for name in pages.SECTIONS} - {"§3.2", "§4.2", "§5.1"}
    assert "file.py:21" in parts["Tab. 3"]


def test_a_mark_of_a_whole_chapter_is_of_its_sections():
    mark = pages.Mark("x", 1, "", "paper", "DINOv3 §4")
    assert pages.sections_of(mark) == {"4.1", "4.2", "4.3"}
    assert pages.sections_of(mark._replace(text="DINOv3 §6.1.3")) == {"6.1.3"}


def test_differences_are_by_file(marks):
    assert pages.differences(marks).count("\n- ") == 2 and "## file.py" in pages.differences(marks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pages")
    pages.site(path)
    return path


def has(path, name):
    """A line of code, or a heading"""
    text = path.read_text()
    titles = re.findall("^#+ (.*)", text, re.M)
    headings = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    return f'id="{name}"' in text or name in headings


def test_links_lead_to_lines(folder):
    count = 0
    for page in folder.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, line = target.partition("#")
            assert (folder / path).is_file(), (page.name, target)
            assert not line or has(folder / path, line), (page.name, target)
            count += 1
    assert count > 150


def test_what_was_written_by_hand_is_there_with_its_pictures(folder):
    assert {"index", "adapt", "usage", "measured", "log"} <= {path.stem for path in folder.glob("*.md")}
    index, usage = ((folder / f"{name}.md").read_text() for name in ("index", "usage"))
    assert "](adapt.md)" in index and "](pictures/demo.png)" in index and "](pictures/gram.png)" in usage


def test_the_paper_is_whole(folder):
    """A section without code would be named; there is none"""
    assert "absent" not in (folder / "guide.md").read_text()


def test_options_and_tasks_are_there(folder):
    commands, tasks = (folder / "commands.md").read_text(), (folder / "tasks.md").read_text()
    assert all(f"| `--{name}` |" in commands for name in types(TrainConfig()))
    assert all(f"\n| `{name}` | " in tasks for name in TASKS) and "| 62.6 |" in tasks
    assert all(f"## {name}.py" in commands for name in pages.SCRIPTS)


def test_code_is_as_it_is(folder):
    text = (folder / "code" / "losses.py.md").read_text()
    assert text.count('<a id="L') == len((pages.ROOT / "losses.py").read_text().splitlines())
    assert "<a id=\"L1\" href=\"#L1\">   1</a>  &quot;&quot;&quot;" in text


def test_the_site(tmp_path, monkeypatch):
    """Of few files: all of them take a quarter of a minute, twice"""
    pytest.importorskip("mkdocs")
    monkeypatch.setattr(pages, "files", lambda: ["losses.py", "ops.py"])
    pages.main([str(tmp_path / "site")])
    text = (tmp_path / "site" / "guide.html").read_text()
    assert 'href="code/losses.py.html#L' in text and 'src="http' not in text and 'href="https://fonts' not in text
    pages.main([str(tmp_path / "site")])  # again: it is ours


def test_mistakes_end_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="2 words; wanted one folder, or evidence: python pages.py OUT"):
        pages.main(["a", "b"])
    monkeypatch.setitem(sys.modules, "mkdocs.commands.build", None)
    with pytest.raises(ValueError, match=r"mkdocs is not installed; pip install -e .\[pages\]"):
        pages.main([str(tmp_path / "site")])
    assert not (tmp_path / "site").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    pytest.importorskip("mkdocs")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other things"):
        pages.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

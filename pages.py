"""
The pages: a site about this code, made from this code, so that it cannot say what the code does not.

    python pages.py OUT          OUT/index.html: opens from disk, too; pip install -e ".[pages]"
    python pages.py evidence     runs what README's numbers rest on, and writes evidence/: see engine/evidence.py

    guide          section of the paper -> the lines that are it, from the `paper:` marks; what has none is named
    differences    from the paper and the released code, from the `differs:` marks
    commands       every script, what it is for, its options: what --help says
    tasks          what can be measured: metric, layout of the data, the paper's numbers: from the tasks' records
    adapt, ...     docs/, as they stand: what to change for what, all commands by use, what was measured before
    evidence       evidence/: numbers, curves, pictures, each with its command
    code           every file, by line

The site itself, its search and its layout for small screens are mkdocs's.
"""

import ast
import html
import importlib
import io
import re
import shutil
import tokenize
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from engine import config as command_line
from engine import evidence
from engine.task import GIVEN, SIZES

ROOT = Path(__file__).parent
ENDS = "py", "cpp", "cu", "h", "cuh"
FOLDERS = "", "engine", "tasks", "sets", "decoders", "csrc"
SCRIPTS = "train distill text evaluate visualize weights curate embed doctor health data shapes bench pages".split()
SECTIONS = {  # of the paper, those that can be code; what each is about, in our words
    "3.1": "which photos", "3.2": "backbone, losses, optimisation", "4.1": "patches forget as classes are learned",
    "4.2": "Gram anchoring", "4.3": "a Gram teacher of higher resolution", "5.1": "high resolution",
    "5.2": "many students of one teacher", "5.3": "words", "6.1.1": "looking at features",
    "6.1.2": "linear segmentation and depth", "6.1.3": "correspondence", "6.1.4": "objects without labels",
    "6.1.5": "tracking", "6.1.6": "videos' classes", "6.2.1": "linear classification",
    "6.2.2": "finding the same thing",
    "6.3.1": "detection", "6.3.2": "segmentation by a large decoder", "6.3.3": "relative depth",
    "6.3.4": "cameras and points", "7.1": "the family of ViTs", "7.2": "ConvNeXts", "7.3": "zero-shot with words",
    "8.1": "satellites: data", "8.2": "heights of canopies", "8.3": "benchmarks of the earth"}
MARK = re.compile(r"\b(paper|differs)(?: from the paper)?:(?!\s*(?:tuple|$)) *")
PLACE = re.compile(r"(?:(?<=DINOv3 )|(?<![a-zA-Z] ))§(\d(?:\.\d)*)|(App\. [A-Z](?:\.\d+)*)|((?:Tab|Fig)\. \d+)|"
                   r"(?i:(eq)\. (\d))")
ROW = re.compile(r"DINOv3 (?:§|App\.|Tab\.|Fig\.)")  # of a table of contents
COMMENT = re.compile(r"\s*(?:#|//)")
NEXT = re.compile(r"^\s*(?:#\s*)?(?:[\w.]+(?:, \w+)*:? {2,}|(?:returns|raises|paper|differs)\b.*:|\"\"\"|$)")


CSS = """table { display: block; overflow-x: auto } .rst-content td { white-space: normal !important; min-width: 60px }
pre.code { overflow-x: auto; font-size: 12px; line-height: 1.4 }
pre.code a { color: #999; text-decoration: none } pre.code a:target { background: #fe6 }
.wy-nav-content { max-width: 1100px }
"""


class Mark(NamedTuple):
    path: str      # from the root
    line: int      # from 1
    name: str      # of the function or class that it stands in, or nothing
    kind: str      # paper, differs
    text: str

# --------------------------------------------------------------------------------
# What is read


def files():
    """All source files, from the root"""
    found = (path for folder in FOLDERS for end in ENDS for path in (ROOT / folder).glob(f"*.{end}"))
    return [path.relative_to(ROOT).as_posix() for path in sorted(found, key=lambda path: (len(path.parts), path))]


def marks_of(path):
    """
    The marks of a file, in its order: in comments and docstrings. A mark goes on over the lines that follow it, up to
    the next key, mark, empty line or end of the comment.
    """
    lines = (ROOT / path).read_text().splitlines()
    names, prose = read_python(lines) if path.endswith(".py") else ({}, range(len(lines)))
    found = []
    for i in prose:
        starts = list(MARK.finditer(lines[i]))
        if not starts and ROW.search(lines[i]):
            found.append(Mark(path, i + 1, names.get(i, ""), "paper", " ".join(lines[i].strip(" #").split())))
        for start, after in zip_longest(starts, starts[1:]):
            end = after.start() if after else None
            words = [lines[i][start.end() : end], *(following(lines, i) if end is None else ())]
            text = " ".join(" ".join(word.strip(" #/*;") for word in words).split()).strip(" ;")
            found.append(Mark(path, i + 1, names.get(i, ""), start[1], text.split('"""')[0].strip(" ;")))
    return [mark for mark in found if mark.text]


def following(lines, i):
    """The lines after line i that go on with its sentence"""
    found, comment = [], COMMENT.search(lines[i])
    for line in lines[i + 1 :] if '"""' not in lines[i].strip()[3:] else ():
        if NEXT.match(line) or bool(comment) != bool(COMMENT.match(line)):
            break
        mark = MARK.search(line)
        found.append(line[: mark.start()] if mark else line)
        if mark or '"""' in line:
            break
    return found


def read_python(lines):
    """{line: the function or class that it stands in}; the lines of comments and docstrings. Lines from 0."""
    names, prose, text = {}, set(), "\n".join(lines)

    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            own = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                own = f"{name}.{child.name}".lstrip(".")
                names.update(dict.fromkeys(range(child.lineno - 1, child.end_lineno), own))
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                prose.update(range(child.lineno - 1, child.end_lineno))
            walk(child, own)
    walk(ast.parse(text), "")
    tokens = tokenize.generate_tokens(io.StringIO(text + "\n").readline)
    return names, sorted(prose | {token.start[0] - 1 for token in tokens if token.type == tokenize.COMMENT})

# --------------------------------------------------------------------------------
# Pages, in Markdown: {name: text}


def link(path, line, text):
    return f"[{text}](code/{path.replace('/', '.')}.md#L{line})"


def said(mark):
    """A row of a mark: where, and what it says"""
    where = link(mark.path, mark.line, f"{mark.path}:{mark.line}")
    return f"- {where}{f' `{mark.name}`' if mark.name else ''}: {prose(mark.text)}"


def prose(text):
    """For Markdown, as it stands"""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def shown(value):
    """An option of a protocol"""
    return "given" if value is GIVEN else str(value) or "none"


def sections_of(mark):
    """Sections of the paper that a mark names; of one that has others inside, as 4 or 6.1, each of them"""
    named = [m[1] for m in PLACE.finditer(mark.text) if m[1]]
    return {section for section in SECTIONS for name in named if section == name or section.startswith(name + ".")}


def others_of(mark):
    """What else of the paper it names, if it names no section"""
    named = {m[2] or m[3] or f"eq. {m[5]}" for m in PLACE.finditer(mark.text) if not m[1]}
    return [] if sections_of(mark) else sorted(named)


def guide(marks):
    marks = [mark for mark in marks if mark.kind == "paper"]
    parts = ["# Reading guide", "Sections of the paper, and the lines of the code that are them.", ""]
    for section, about in SECTIONS.items():
        here = [said(mark) for mark in marks if section in sections_of(mark)]
        parts += [f"## §{section}  {about}", "", *(here or ["- absent: nothing here says that it is of it"]), ""]
    rest = {}
    for mark in marks:
        for name in others_of(mark):
            rest.setdefault(name, []).append(said(mark))
    order = sorted(rest, key=lambda name: [int(n) if n.isdigit() else n for n in re.findall(r"\d+|\D+", name)])
    for name in order:
        parts += [f"## {name}", "", *rest[name], ""]
    return "\n".join(parts)


def differences(marks):
    parts = ["# Differences", "From the paper, and from the code that was released with it: what, and why.", ""]
    of_file = {}
    for mark in marks:
        if mark.kind == "differs":
            of_file.setdefault(mark.path, []).append(said(mark))
    for path, rows in of_file.items():
        parts += [f"## {path}", "", *rows, ""]
    return "\n".join(parts)


def help_of(script, *words):
    """What `python script.py words --help` prints"""
    printed = io.StringIO()
    with redirect_stdout(printed):
        run = importlib.import_module(script).main
        run("--help") if script == "shapes" else run(["--help"])
    return printed.getvalue()


def as_page(text):
    """--help -> Markdown: prose as it stands, options as tables"""
    parts, rows = [], []
    for line in [*text.rstrip().splitlines(), ""]:
        option = re.match(r"  --(\w+) +(\S+) +(.*)$", line)
        if option:
            rows.append(row(f"`--{option[1]}`", prose(option[2]), prose(option[3])))
            continue
        if rows:
            parts += ["", "| option | is | what it is |", "|---|---|---|", *rows, ""]
            rows = []
        parts.append("    " + line if line.strip() else "")
    return "\n".join(parts)


def commands():
    parts = ["# Commands", "What `--help` of each says. `-` is empty.", ""]
    for script in SCRIPTS:
        parts += [f"## {script}.py", "", as_page(help_of(script)), ""]
    return "\n".join(parts)


def tasks():
    from tasks import TASKS
    parts = ["# Tasks", "`python evaluate.py --task NAME`; the paper's numbers are printed beside ours where size of",
             "images, items and options are the paper's.", "",
             "| task | metric | layout of --data | decoders | pixels |", "|---|---|---|---|---|"]
    for task in TASKS.values():
        side = " or ".join(str(side) for side in dict.fromkeys(task.sides)) if any(task.sides) else "as they are"
        metric = prose(task.metric) + ", lower is better" * task.lower
        parts.append(row(f"`{task.name}`", metric, prose(task.layout), ", ".join(task.decoders), side))
    parts += ["", "## The paper's numbers", "", "| task | metric | " + " | ".join(SIZES) + " |",
              "|---|---|" + "---|" * len(SIZES)]
    for task in TASKS.values():
        for paper in task.paper:
            how = "".join(f", {name} {prose(shown(value))}" for name, value in paper.options.items())
            parts.append(row(f"`{task.name}`", f"{prose(paper.metric)}, {paper.side} px{how}",
                             *(paper.values.get(size, "") for size in SIZES)))
    return "\n".join(parts)


def code(path):
    """A file, by line: HTML inside of Markdown"""
    lines = (ROOT / path).read_text().splitlines()
    rows = "\n".join(f'<a id="L{i}" href="#L{i}">{i:>4}</a>  {html.escape(line)}' for i, line in enumerate(lines, 1))
    return f"# {path}\n\n<pre class=\"code\">{rows}\n</pre>\n"


def documents():
    """{name: file} of what was written by hand, and of what evidence has made"""
    found = dict(index=ROOT / "README.md", evidence=ROOT / "evidence/README.md", log=ROOT / "LOG.md")
    found |= {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
    return {name: path for name, path in found.items() if path.is_file()}


def document(path, names):
    """
    A file's Markdown, with links to what is a page here, and {name: file} of its pictures

    names  {file: name of its page}
    """
    text, pictures = path.read_text(), {}

    def moved(link):
        file = (path.parent / link[1]).resolve()
        if file.suffix == ".md":
            return f"]({names[file]}.md{link[2] or ''})"
        pictures[file.name] = file
        return f"](pictures/{file.name})"
    return re.sub(r"\]\((?!https?:)([\w./-]+)(#[\w-]+)?\)", moved, text), pictures

# --------------------------------------------------------------------------------
# The site


def site(folder):
    """Markdown of all pages, and their pictures, into a folder"""
    marks = [mark for path in files() for mark in marks_of(path)]
    pages = dict(guide=guide(marks), differences=differences(marks), commands=commands(), tasks=tasks()) | {
        f"code/{path.replace('/', '.')}": code(path) for path in files()}
    (folder / "pictures").mkdir()
    names = {path.resolve(): name for name, path in documents().items()}
    for name, path in documents().items():
        pages[name], pictures = document(path, names)
        for picture, file in pictures.items():
            shutil.copy(file, folder / "pictures" / picture)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    (folder / "pages.css").write_text(CSS)


def build(out):
    """The site in a folder that is not there yet, or is one of ours. Raises ValueError."""
    try:
        from mkdocs.commands.build import build as of_mkdocs
        from mkdocs.config import load_config
    except ImportError as error:
        raise ValueError("mkdocs is not installed; pip install -e .[pages]") from error
    out = Path(out)
    if out.exists() and not (out / "guide.html").is_file() and any(out.iterdir()):
        raise ValueError(f"{out} holds other things; name a new folder, or one that pages.py has made")
    with TemporaryDirectory() as temporary:
        docs = Path(temporary, "docs")
        docs.mkdir()
        site(docs)
        titles = ("Reading guide", "Differences", "Commands", "Tasks", *(
            name.capitalize() for name in documents() if name != "index"))
        names = [{"nanodino": "index.md"}, *({title: f"{title.split()[-1].lower()}.md"} for title in titles),
                 {"Code": [{path: f"code/{path.replace('/', '.')}.md"} for path in files()]}]
        config = load_config(
            config_file=io.BytesIO(b"site_name: nanodino\n"), docs_dir=str(docs), site_dir=str(out.absolute()),
            theme=dict(name="readthedocs", highlightjs=False), use_directory_urls=False, nav=names, plugins=["search"],
            extra_css=["pages.css"], strict=True)
        of_mkdocs(config)


def main(argv):
    if argv[:1] == ["evidence"]:
        if "--help" in argv or "-h" in argv:
            print(evidence.__doc__.strip(), command_line.describe(evidence.EvidenceConfig()), sep="\n\n")
            return
        evidence.main(argv[1:])
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        if argv not in (["--help"], ["-h"]):
            raise ValueError(f"{len(argv)} words; wanted one folder, or evidence: python pages.py OUT")
        print(__doc__.strip())
        return
    command_line.writable(argv[0])
    build(argv[0])
    print(f"wrote {argv[0]}/index.html: {len(files())} files of code, "
          f"{sum(mark.kind == 'paper' for path in files() for mark in marks_of(path))} marks of the paper")


if __name__ == "__main__":
    command_line.run(main)

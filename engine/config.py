"""
The command line of every script: the fields of a frozen dataclass are its options, their comments its help.

    python train.py --size s --lr 3e-4 --resume          --field value, --field=value; a bool field may stand alone

A number's comment begins with what it may be, and `apply` refuses all else; of several numbers it holds for each:

    momentum: float = 0.994              # [0, 1]: of the teacher's average
    scale: tuple = (0.3, 1.0)            # (0, 1] rising: share of the area         rising: none is below the one before
"""

import errno
import inspect
import json
import os
import re
import select
import sys
import time
import traceback
from ast import literal_eval
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

RANGE = re.compile(r"([\[(])(-?[\w.]+), (-?[\w.]+)([\])])( rising)?(?=: )")
PATIENCE = 10  # seconds in which torchrun ends the others, when the first rank has said what is wrong
ROOMS = "", "engine", "sets", "tasks", "decoders"  # the folders of our own code, from the root


def read_words(argv, known):
    """[--field value | --field=value | --flag | word]... -> ({field: text}, [words]).    known  {field: its type}"""
    values, words, argv = {}, [], list(argv)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        field, equals, text = word[2:].partition("=")
        field = field.replace("-", "_")
        if field not in known:
            near = get_close_matches(field, known, n=1, cutoff=0)[0]
            raise ValueError(f"unknown option --{field}; did you mean --{near}? --help lists all")
        if not equals and known[field] is bool and (not argv or argv[0].lower() not in ("true", "false", "auto")):
            text = "True"
        elif not equals:
            if not argv or argv[0].startswith("--"):
                raise ValueError(f"--{field} wants a value of type {known[field].__name__}; write --{field} VALUE")
            text = argv.pop(0)
        values[field] = text
    return values, words


def convert(field, text, old):
    """The text as the type of the field's old value; an int may stand for a float, nothing else converts."""
    kind = type(old)
    if kind is str:
        return text
    try:
        value = literal_eval(text.capitalize() if kind is bool else text)
        value = float(value) if kind is float and type(value) is int else value
        value = (value,) if kind is tuple and len(old) == 1 and type(value) is not tuple else value
    except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError):
        value = text
    if not fits(value, old):
        like = f"{len(old)} numbers, as in {','.join(map(str, old))}" if kind is tuple else kind.__name__
        raise ValueError(f"--{field} wants {like}, got {text!r}")
    return value


def fits(value, old):
    """Whether it has the type of the field's old value: for a tuple, as many numbers."""
    if type(old) is tuple and type(value) is tuple:
        return len(value) == len(old) and all(type(v) in (int, float) for v in value)
    return type(value) is type(old)


def apply(config, values):
    """config with {field: text} on top. Raises ValueError if a field's type or range is another."""
    given = {field: convert(field, text, getattr(config, field)) for field, text in values.items()}
    return checked(replace(config, **given))


def checked(config):
    """config, if each of its numbers lies in the range of its field; else a ValueError."""
    for field, text in ranges(type(config)).items():
        value = getattr(config, field)
        if not lies_in(value, text):
            shown = ",".join(map(str, value)) if type(value) is tuple else f"{value:.12g}"
            raise ValueError(f"--{field} is {shown}; it must be in {text}")
    if getattr(config, "data", None) == "":  # a script's variable that was not set: not the folder one stands in
        raise ValueError("--data is empty; name a folder, or shapes")
    return config


def lies_in(value, text):
    """Whether a number, or each of a tuple, is in a range like "[0, 1)" or "(0, 1] rising"; nan is in none."""
    opens, low, high, closes, rising = RANGE.match(text + ": ").groups()
    values = value if type(value) is tuple else (value,)
    above = all(v > float(low) or v == float(low) and opens == "[" for v in values)
    below = all(v < float(high) or v == float(high) and closes == "]" for v in values)
    return above and below and not (rising and list(values) != sorted(values))


@cache
def ranges(kind):
    """{field: its range}; a class that is made and not written has them in `ranges`."""
    found = {}
    for each in reversed(kind.__mro__[:-1]):
        found |= each.ranges if "ranges" in vars(each) else {
            field: legal[0] for field, note in notes(each).items() if (legal := RANGE.match(note))}
    return found


def notes(kind):
    """{field: the comment that stands beside it in the source}, of this class alone."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.M))


def types(config):
    return {field.name: type(getattr(config, field.name)) for field in fields(config)}


def choose_device(name):
    """auto, cpu, cuda or mps -> torch.device; auto takes the fastest that is there."""
    import torch
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    there = [kind for kind in there if there[kind]]
    if name != "auto" and name not in there:
        raise ValueError(f"--device {name} is not here; this machine has: {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def writable(path, folder=True, option="--out"):
    """Raises ValueError, before there is anything to lose, if no folder, or no file, can be written at a path."""
    path, kind = Path(path), "folder" if folder else "file"
    try:
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            raise ValueError(f"{option} {path} is no {kind}; name another")
        above = (path.absolute(), *path.absolute().parents)[not folder:]
        TemporaryFile(dir=next(each for each in above if os.path.lexists(each))).close()
    except OSError as error:
        raise ValueError(f"{option} {path}: no {kind} can be written there ({error.strerror}); name another") from error


@contextmanager
def whole(path):
    """
    The name of a file to write, which becomes the one at path when it is done, or is gone.

    raises  ValueError: no room, no right
    """
    new = path.with_name(f".{os.getpid()}{path.name}")
    try:
        yield new
        new.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}; name a place with room") from error
    finally:
        new.unlink(missing_ok=True)


def describe(config):
    """One line for each field: name, value, and the comment that stands beside it in the source."""
    beside = {}
    for kind in reversed(type(config).__mro__[:-1]):
        beside |= notes(kind)
    value = {field: ",".join(f"{v:.3g}" for v in old) if type(old := getattr(config, field)) is tuple else str(old)
             for field in types(config)}
    return "\n".join(f"  --{field:18} {value[field] or '-':14} {beside.get(field, '')}" for field in value)


def show(result):
    """{what: value} as a table, and last as one line of JSON"""
    for name, value in result.items():
        print(f"{name:14} {value:.3f}" if isinstance(value, float) else f"{name:14} {value}")
    print(json.dumps(result))


def run(main):
    """
    Runs main(argv) as a program. A mistake of the user ends in one line, of one rank, and exit code 2; torchrun's own
    is 1 whatever its ranks' are. Everything else is a bug, and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except BrokenPipeError as error:
        if error.filename or not closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is written at the end
        sys.exit(141)
    except (ValueError, OSError) as error:
        if not on_purpose(error):
            raise
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank != "0":  # the first finds the same mistake, and says it: to leave before it would end it, unheard
            time.sleep(PATIENCE)
        where = f"rank {rank}: " if rank != "0" else ""  # still here: it is a mistake of this machine alone
        print(f"{os.path.basename(sys.argv[0])}: {where}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def closed(stream):
    """Whether who read it has left, as `| head` does."""
    if not hasattr(select, "poll"):  # Windows, where nothing else breaks a pipe of ours
        return True
    asked = select.poll()
    asked.register(stream, 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def on_purpose(error):
    """Whether our own code raised it, in a sentence for the user; or it is of a name that no file can have."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    place = os.path.dirname(os.path.relpath(last.filename, root))
    return isinstance(error, (ValueError, OSError)) and (last.line or "").startswith("raise ") and place in ROOMS

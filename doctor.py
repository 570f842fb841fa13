"""
What is here, and what is wrong with it: to read before one asks, and to paste when one asks.

    python doctor.py             the machine, torch and extras, every kernel asked whether it is right, disks, settings
    python doctor.py --json      the same as one object; "wrong": what is wrong and what to type, a line each

It needs nothing but Python: what is missing is what it is for. The kernels' proof takes a second.

    machine, packages, kernels, room    what each finds: {what: value}, [what is wrong]
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine import config as command_line

ROOT = Path(__file__).parent
TESTED = dict(transformers="5.24", timm="1.0")  # beside which the tests pass, in the names of these versions' tensors
LEVELS = dict(AVX512=512, AVX2=256, DEFAULT=128, NEON=128, SVE256=256, SVE128=128)  # bits of a vector, by torch's word
BUILD = "python setup.py build_ext --inplace"
DISK, SHARED, MEMORY = 10e9, 1e9, 4e9  # bytes; with less free of ./runs, of /dev/shm, of memory it says so


@dataclass(frozen=True)
class DoctorConfig:
    json: bool = False         # one object instead of lines

# --------------------------------------------------------------------------------
# What is here


def said(*words):
    """The first line with a version that a program prints; "" if it is not there"""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in done.stdout.splitlines() if re.search(r"\d\.\d", line)), "")


def machine(torch):
    from engine.plan import device_memory
    from engine.ranks import cores, free_memory
    from engine.timing import processor
    level, n, memory = torch.backends.cpu.get_cpu_capability(), cores(), device_memory("cpu")
    found = dict(system=platform.platform(), processor=processor(), vectors=f"{level}, {LEVELS.get(level, '?')} bits",
                 cores=f"{n:g} of {os.cpu_count()} may be used",
                 memory=f"{min(free_memory(), memory) / 1e9:.1f} of {memory / 1e9:.1f} GB free",
                 gpu="none", compiler=said(os.environ.get("CXX", "c++").split()[0], "--version") or "none",
                 nvcc=said("nvcc", "--version") or said("/usr/local/cuda/bin/nvcc", "--version") or "none")
    driver, wrong = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), []
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        found |= dict(gpu=", ".join(names), driver=driver or "unknown", cuda=torch.version.cuda)
    elif torch.backends.mps.is_available():
        found["gpu"] = "Apple, by mps"
    elif driver:
        wrong.append(f"there is a GPU (driver {driver}) that torch {torch.__version__} does not see: install the torch "
                     "that https://pytorch.org names for this driver")
    if free_memory() < MEMORY:
        wrong.append(f"{free_memory() / 1e9:.1f} GB of memory are free: end what else runs, or --batch 8")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > max(n, 1):
        wrong.append(f"OMP_NUM_THREADS={threads} on {n:g} cores: threads wait for one another; unset OMP_NUM_THREADS")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        wrong.append("threads that wait keep the cores from the processes that read images: export "
                     "OMP_WAIT_POLICY=PASSIVE")
    found |= {name: os.environ.get(name, "not set") for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "NANODINO_CPU")}
    return found, wrong


def installed(name):
    """Version of a distribution, or "" """
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def wanted():
    """{extra: [requirement]} of pyproject.toml; "" has what is always needed"""
    text = (ROOT / "pyproject.toml").read_text()
    (always,) = re.findall(r"^dependencies = \[(.*?)\]$", text, re.M | re.S)
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    found = {"": always} | dict(re.findall(r'^(\w+) = \[((?:[^\[\]"]|"[^"]*")*)\]', extras, re.M))
    return {extra: re.findall(r'"([^"]+)"', words) for extra, words in found.items()}


def older(have, least):
    """Whether a version is below another, by their numbers"""
    def numbers(text):
        return [int(x) for x in re.findall(r"\d+", text.partition("+")[0])[:3]]
    return numbers(have) < numbers(least)


def packages():
    found, wrong = dict(python=platform.python_version()), []
    for extra, requirements in wanted().items():
        missing = []
        for requirement in requirements:
            name, _, least = requirement.partition(">=")
            have = installed(name)
            found[name] = have or "not installed"
            if have and least and older(have, least):
                wrong.append(f"{name} {have} is older than {least}: pip install -U {name}")
            missing += [] if have else [name]
        if missing and not extra:
            wrong.append(f"not installed: {', '.join(missing)}; pip install -e .")
    for name, tested in TESTED.items():
        have = installed(name)
        if have and have.split(".")[:2] != tested.split("."):
            found[name] += f", tested with {tested}"
            if older(have, tested):
                wrong.append(f"{name} {have}: tested with {tested}; pip install -U {name}, where its files do not load")
    return found, wrong


def kernels(torch):
    try:
        import ops
    except ImportError as error:
        return dict(csrc="built but broken"), [f"{str(error).removeprefix('ops: ')}"]
    from engine.proof import failure
    devices = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    found, wrong = {f"csrc on {device}": ops.describe(torch.device(device)) for device in devices}, []
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0]) and sys.platform != "win32"
    if not ops.BUILT and compiler:
        wrong.append(f"csrc is not built, and there is a compiler: {BUILD}, for faster steps")
    if any("before its last change" in word for word in found.values()):
        wrong.append(f"csrc is older than its sources: {BUILD}")
    for op in ops.OPS:
        for device in devices:
            if (op, device.split(":")[0]) not in ops.KERNELS:
                continue
            why = failure(op, torch.bfloat16 if "cuda" in device else torch.float32, 64, device)
            found[f"{op} on {device}"] = why or "right"
            if why:
                wrong.append(f"the kernel {op} on {device} is not what its definition says: {why}; {BUILD}, and "
                             "--kernels off until then")
    return found, wrong


def room():
    found, wrong = {}, []
    runs = next(folder for folder in (Path("runs").absolute(), *Path("runs").absolute().parents) if folder.is_dir())
    shared = Path("/dev/shm")
    for name, folder, least, cure in (("./runs", runs, DISK, "--out on a larger disk"),
                                      ("/dev/shm", shared, SHARED, "docker run --shm-size 8g, or --workers 0")):
        if folder.is_dir():
            free = shutil.disk_usage(folder).free
            found[f"free in {name}"] = f"{free / 1e9:.1f} GB"
            if free < least:
                wrong.append(f"{free / 1e9:.2g} GB are free in {name}: {cure}")
    return found, wrong

# --------------------------------------------------------------------------------
# The command


def examine():
    """{part: {what: value}}, [what is wrong]"""
    parts, wrong = {}, []

    def add(name, found):
        parts[name] = found[0]
        wrong.extend(found[1])
    add("packages", packages())
    try:
        import torch
        import torchvision  # noqa: F401  of another torch it fails here
    except (ImportError, OSError, RuntimeError) as error:
        wrong.append(f"torch and torchvision do not load ({str(error).partition(chr(10))[0]}): pip install -e .")
    else:
        add("machine", machine(torch))
        add("kernels", kernels(torch))
    add("room", room())
    return parts, wrong


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip(), command_line.describe(DoctorConfig()), sep="\n\n")
        return
    values, words = command_line.read_words(argv, command_line.types(DoctorConfig()))
    if words:
        raise ValueError(f"{words[0]!r} is not an option; write doctor.py or doctor.py --json")
    c = command_line.apply(DoctorConfig(), values)
    parts, wrong = examine()
    if c.json:
        print(json.dumps(parts | dict(wrong=wrong)))
        return
    for part, found in parts.items():
        print(f"\n{part}")
        print("\n".join(f"  {name:26} {value}" for name, value in found.items()))
    print("\nnothing is wrong" if not wrong else "\nwrong\n" + "\n".join(f"  {line}" for line in wrong))


if __name__ == "__main__":
    command_line.run(main)

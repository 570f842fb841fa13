"""
Builds csrc/ beside the sources, for what this machine has:    python setup.py build_ext --inplace

    a C++ compiler            the CPU kernels, once for each level of x86: the processor that runs them chooses
    nvcc and a CUDA torch     the CUDA kernels too, for the GPUs that are here; where none is, for 80, 89, 90a and PTX;
                              NANODINO_ARCHS=90a names others
    neither                   nothing; ops.py computes the same from its definitions

`pip install --no-build-isolation -e .` builds too; without the flag pip hides torch from here, and nothing is built.
"""

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from os import environ, makedirs, path
from pathlib import Path
from zlib import crc32

from setuptools import setup

LEVELS = {"baseline": []}  # {a set of instructions: the flags that allow it}; elsewhere the compiler's own is the one
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma"]
    LEVELS |= {"avx2": avx2, "avx512": [*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]}
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def cuda_home(guess):
    """CUDA_HOME, or else torch's guess or the usual place: the first that holds a whole toolkit, not only an nvcc."""
    homes = [environ["CUDA_HOME"]] if "CUDA_HOME" in environ else [guess, "/usr/local/cuda"]
    return next((home for home in homes if home and path.exists(path.join(home, "include", "cuda_runtime.h"))), None)


def cuda_obstacle(torch, home):
    """Why the CUDA kernels cannot be built, with the one thing to try; or None."""
    if not torch.version.cuda:
        return "this torch is not a CUDA build; install one from https://pytorch.org"
    nvcc = home and path.join(home, "bin", "nvcc")
    if not nvcc or not path.exists(nvcc):
        return f"no nvcc; install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME to it"
    found = re.search(r"release (\d+)\.", subprocess.check_output([nvcc, "--version"], text=True)).group(1)
    if found != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is CUDA {found}, torch {torch.version.cuda}; set CUDA_HOME to a toolkit of torch's version"


def extension():
    """ext_modules and cmdclass of setup(); prints what is built, and why not the rest."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("csrc: nothing built: no torch here; run python setup.py build_ext --inplace")
        return {}
    compiler = environ.get("CXX", "c++").split()[0]
    if sys.platform == "win32" or not shutil.which(compiler):
        print(f"csrc: nothing built: no C++ compiler ({compiler}); on Debian: apt install g++")
        return {}
    if not path.exists(path.join(sysconfig.get_path("include"), "Python.h")):
        print("csrc: nothing built: Python's headers are missing; on Debian: apt install python3-dev")
        return {}
    cpp_extension.CUDA_HOME = cuda_home(cpp_extension.CUDA_HOME)
    obstacle = cuda_obstacle(torch, cpp_extension.CUDA_HOME)
    print(f"csrc: the CPU kernels{f', not the CUDA ones: {obstacle}' if obstacle else ' and the CUDA ones'}")
    cxx, here = ["-O3", "-std=c++20", *OPENMP], {torch.cuda.get_device_capability(i)
                                                 for i in range(torch.cuda.device_count())}
    archs = environ.get("NANODINO_ARCHS", "").replace(",", " ").split()
    archs = archs or [f"{major}{minor}{'a' * (major == 9)}" for major, minor in sorted(here)]
    nvcc = ["-O3", "-std=c++20", "-lineinfo", *(f"-gencode=arch=compute_{a},code=sm_{a}"
                                                for a in archs or ("80", "89", "90a"))]
    nvcc += [] if archs else ["-gencode=arch=compute_90,code=compute_90"]  # PTX, for cards that came later
    kind = cpp_extension.CppExtension if obstacle else cpp_extension.CUDAExtension
    sources = ["csrc/binding.cpp", *([] if obstacle else sorted(glob("csrc/*.cu")))]
    module = kind("nanodino_C", sources, define_macros=[] if obstacle else [("WITH_CUDA", None)],
                  extra_compile_args=dict(cxx=cxx, nvcc=nvcc), extra_link_args=OPENMP)

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            module.extra_objects = cpu_objects(compiler, path.abspath(self.build_temp))
            super().build_extensions()

    return dict(ext_modules=[module], cmdclass=dict(build_ext=Build))


def cpu_objects(compiler, folder):
    """
    Compiles csrc/*_cpu.cpp for every level, in namespaces of their own, and the checksum that ops.py compares; the
    binding stays at the compiler's baseline. -> paths of the objects

    differs: contraction is off, as levels must round alike; the kernels write their fused multiply-adds out
    """
    makedirs(folder, exist_ok=True)
    built_from = path.join(folder, "built_from.cpp")
    sources = b"".join(Path(file).read_bytes() for file in sorted(glob("csrc/*")))
    with open(built_from, "w") as file:
        file.write(f"#include <cstdint>\nextern const int64_t BUILT_FROM = {crc32(sources)};\n")
    common = [compiler, "-c", "-O3", "-std=c++20", "-fPIC", "-fno-exceptions", "-ffp-contract=off", *OPENMP]
    todo = {path.join(folder, "built_from.o"): [built_from]}
    for level, flags in LEVELS.items():
        for source in sorted(glob("csrc/*_cpu.cpp")):
            todo[path.join(folder, f"{path.basename(source)[:-4]}_{level}.o")] = [source, f"-DLEVEL={level}", *flags]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: subprocess.check_call([*common, *item[1], "-o", item[0]]), todo.items()))
    return list(todo)


setup(**extension())

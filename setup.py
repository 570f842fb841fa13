"""
Builds csrc/ beside the sources, for what this machine has:    python setup.py build_ext --inplace

    a C++ compiler            the CPU kernels
    nvcc and a CUDA torch     the CUDA kernels too
    neither                   nothing; ops.py computes the same from its definitions

`pip install --no-build-isolation -e .` builds too; without the flag pip hides torch from here, and nothing is built.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from os import environ, path

from setuptools import setup


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
    cxx = ["-O3", "-std=c++20", "-march=native", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    cxx += ["-fopenmp"] if sys.platform == "linux" else []
    sources = sorted(glob("csrc/*.cpp")) + ([] if obstacle else sorted(glob("csrc/*.cu")))
    archs = ["80", "89", "90a"]
    nvcc = ["-O3", "-std=c++20", "-lineinfo", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)]
    nvcc += ["-gencode=arch=compute_90,code=compute_90"]  # PTX, for cards that came later
    kind = cpp_extension.CppExtension if obstacle else cpp_extension.CUDAExtension
    module = kind("nanodino_C", sources, define_macros=[] if obstacle else [("WITH_CUDA", None)],
                  extra_compile_args=dict(cxx=cxx, nvcc=nvcc), extra_link_args=[f for f in cxx if f == "-fopenmp"])
    return dict(ext_modules=[module], cmdclass=dict(build_ext=cpp_extension.BuildExtension))


setup(**extension())

"""Builds the kernel libraries; everything else about the package is in pyproject.toml.

Environment:
    DANLING_BUILD_CUDA: ``auto`` (default) builds the CUDA library if nvcc and a CUDA build of torch are there,
        ``0`` never does, ``1`` fails if it cannot.
    TORCH_CUDA_ARCH_LIST: architectures of the CUDA library, ``8.0;9.0+PTX`` if unset.
    MAX_JOBS: how many compilers run at once (with ninja).

The libraries use torch's stable ABI and no Python symbol: one wheel, tagged ``py3-none-<platform>``, serves every
CPython and every torch from 2.10 on. Without a C++ compiler the wheel is a pure one, and torch code serves instead.
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

METADATA = {"egg_info", "dist_info", "sdist"}  # commands that build nothing, and need no look at compilers
PACKAGE = "danling.tensors.kernels"
DEFINES = [
    ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # torch 2.10: newer or unstable API does not compile
    # Bare hexadecimal digits; the package refuses a library that was built for other schemas.
    ("DANLING_INTERFACE", runpy.run_path("src/danling/tensors/kernels/schemas.py")["INTERFACE"]),
]
CPU_SOURCES = ["copy.cpp", "reduce.cpp", "normalise.cpp", "scan.cpp"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden"]
# No contraction, so that every CPU gives the same bits; what is ignored besides are floating exceptions and errno alone.
CPU_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
if platform.machine() in ("x86_64", "AMD64"):
    CPU_FLAGS += ["-mavx2", "-mf16c", "-mfma"]  # since 2015 in every such CPU; load.py looks before it loads
LINK_FLAGS = ["-s"] if sys.platform == "linux" else []


def compiler_problem(cpp_extension) -> str | None:
    """Why no C++ library can be built here, or None if it can."""
    if sys.platform == "win32":
        return "the kernels are written for GCC and Clang"
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on PATH"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <torch/csrc/stable/tensor.h>\n")
        flags = [f"-D{name}={value}" for name, value in DEFINES]
        command = [compiler, "-std=c++17", "-fsyntax-only", *flags, *includes, str(probe)]
        run = subprocess.run(command, capture_output=True, text=True)
    return (
        None if run.returncode == 0 else f"{compiler} cannot compile C++17 against torch: {run.stderr.strip()[-500:]}"
    )


def find_toolkit(cpp_extension) -> Path | None:
    """The CUDA toolkit: where CUDA_HOME says, or where the nvcc on PATH really lies (it may be a link or a script)."""
    nvcc = shutil.which("nvcc")
    homes = [cpp_extension.CUDA_HOME, nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next(
        (Path(home) for home in homes if home and Path(home, "bin/nvcc").exists() and cudart_folder(home)), None
    )


def cudart_folder(home: str | Path) -> str | None:
    folders = [Path(home, name) for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    return next((str(folder) for folder in folders if (folder / "libcudart_static.a").exists()), None)


def cuda_problem(toolkit: Path | None, torch) -> str | None:
    """Why no CUDA library can be built here, or None if it can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if toolkit is None:
        return "no CUDA toolkit with nvcc and libcudart_static.a was found (CUDA_HOME)"
    told = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.", told)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version and version[1]}, torch of CUDA {torch.version.cuda}"
    return None


def warn_pure(reason: object) -> None:
    warnings.warn(
        f"danling-tensors is built without compiled kernels, torch code serves instead: {reason}", stacklevel=2
    )


def library(cpp_extension, device: str, sources: list[str], **extra) -> Extension:
    return Extension(
        f"{PACKAGE}.libdanling_{device}",
        [f"csrc/{device}/{source}" for source in sources],
        depends=[str(path) for path in Path("csrc").rglob("*.h*")],
        include_dirs=cpp_extension.include_paths(**extra.pop("include", {})),
        library_dirs=[*cpp_extension.library_paths(), *extra.pop("library_dirs", [])],
        libraries=["c10", "torch_cpu", *extra.pop("libraries", [])],
        define_macros=[*DEFINES, *extra.pop("define_macros", [])],
        extra_compile_args=extra.pop("flags"),
        extra_link_args=LINK_FLAGS,
        language="c++",
    )


def extensions(cpp_extension, torch) -> list[Extension]:
    if METADATA & set(sys.argv):
        return []
    wish = os.environ.get("DANLING_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"DANLING_BUILD_CUDA must be auto, 0 or 1, not {wish!r}")
    problem = compiler_problem(cpp_extension)
    if problem is not None:
        if wish == "1":
            raise SystemExit(f"DANLING_BUILD_CUDA=1, but {problem}")
        warn_pure(problem)
        return []
    found = [library(cpp_extension, "cpu", CPU_SOURCES, flags={"cxx": [*CXX_FLAGS, *CPU_FLAGS]})]
    toolkit = find_toolkit(cpp_extension)
    problem = "DANLING_BUILD_CUDA=0" if wish == "0" else cuda_problem(toolkit, torch)
    if problem is not None:
        if wish == "1":
            raise SystemExit(f"DANLING_BUILD_CUDA=1, but {problem}")
        print(f"danling-tensors: no CUDA kernels: {problem}")
        return found
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    cpp_extension.CUDA_HOME = str(toolkit)
    cuda = library(
        cpp_extension,
        "cuda",
        ["copy.cu", "segment.cu"],
        include={"device_type": "cuda"},
        library_dirs=[cudart_folder(toolkit)],
        libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        define_macros=[("USE_CUDA", None)],
        flags={"cxx": CXX_FLAGS, "nvcc": ["-std=c++17", "-O3", "-Xcompiler", "-fvisibility=hidden"]},
    )
    return [*found, cuda]


class WheelOfAnyPython(bdist_wheel):
    """A wheel with libraries is bound to the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    warn_pure(error)
    setup(cmdclass={"bdist_wheel": WheelOfAnyPython})
else:
    setup(
        ext_modules=extensions(cpp_extension, torch),
        cmdclass={
            "build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True),
            "bdist_wheel": WheelOfAnyPython,
        },
    )

"""Maps the two source folders to import packages and builds the C++ library.

`kernels/` is imported as `syncr1.kernels`, `engine/` as `syncr1.engine`. Neither folder has an `__init__.py`: a regular
package called `kernels` on `sys.path` would shadow Hugging Face's package of that name. Metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libsyncr1_native.so"
NO_NATIVE = "syncr1: C++ library not built ({}); the reference backend (plain PyTorch) will serve every op."


def find_sub_packages(folder: str) -> list[str]:
    """Every folder below `folder` that holds Python or data files, as `syncr1.*` package names."""
    packages = [f"syncr1.{folder}"]
    for path, folders, files in os.walk(ROOT / folder):
        folders[:] = sorted(f for f in folders if f not in {"__pycache__", "csrc"} and not f.startswith("."))
        relative = Path(path).relative_to(ROOT)
        if files and relative.parts != (folder,):
            packages.append("syncr1." + ".".join(relative.parts))
    return packages


def find_tool(name: str) -> str | None:
    """A build tool on PATH, or beside the interpreter (pip installs cmake and ninja there)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def build_native(build_dir: Path, output_dir: Path) -> str | None:
    """Runs CMake; returns None when the library is in `output_dir`, else the reason in a few words."""
    cmake = find_tool("cmake")
    if cmake is None:
        return "cmake was not found"
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"]
    ninja = find_tool("ninja")
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # A build folder that another cmake or generator configured is refused by cmake: start over instead.
    shutil.rmtree(build_dir, ignore_errors=True)
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}"]
    for step, command in (("configuring", configure), ("compiling", [cmake, "--build", str(build_dir)])):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            log = build_dir / f"{step}.log"
            build_dir.mkdir(parents=True, exist_ok=True)
            log.write_text(run.stdout + run.stderr)
            return f"{step} failed, log in {log}; is there a C++17 compiler?"
    return None


class CMakeBuild(build_ext):
    """Builds `libsyncr1_native.so` next to the sources (editable) or into the wheel; never fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = build_native(ROOT / "build" / "native", target.parent)
        if reason is not None:
            (ROOT / "kernels" / LIBRARY).unlink(missing_ok=True)  # a stale build must not be taken for this one
            print(NO_NATIVE.format(reason), flush=True)


if __name__ == "__main__":
    setup(
        packages=find_sub_packages("kernels") + find_sub_packages("engine"),
        package_dir={"syncr1.kernels": "kernels", "syncr1.engine": "engine"},
        package_data={"": ["py.typed", "*.safetensors", "*.json", "*.yaml", "*.html", "*.cpp", "*.h"]},
        ext_modules=[Extension("syncr1.kernels._native", sources=[], optional=True)],
        cmdclass={"build_ext": CMakeBuild},
    )

"""Makes a wheel of flash-attn's forward kernels: `python -m deploy.flash_attn_build.build SDIST`.

Forward and paged forward in bfloat16 for head sizes 64 and 128, causal and not, for one GPU architecture; no
backward, dropout, ALiBi, softcap or window.  What is left out raises.  Needs nvcc, g++ and PyTorch's headers
and libraries, but neither a GPU nor Python's headers: the wheel serves every Python with that PyTorch.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "libflash_attn_2_forward.so"
HEAD_SIZES = (64, 128)
KERNELS = tuple(
    f"flash_fwd_{kind}hdim{head_size}_bf16_{mask}sm80"
    for kind in ("split_", "")
    for head_size in reversed(HEAD_SIZES)  # the slowest to compile first
    for mask in ("causal_", "")
)
DISABLED = ("BACKWARD", "DROPOUT", "ALIBI", "SOFTCAP", "UNEVEN_K", "LOCAL")
# As in the package's setup.py: PyTorch's extensions switch these off, and the kernels need them.
HALF_MACROS = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
WANTED = ("flash_attn/", "csrc/flash_attn/", "csrc/cutlass/include/", "LICENSE", "PKG-INFO")
TORCH_LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")


@dataclass(frozen=True)
class Toolchain:
    torch: Path  # the installed package's folder: include/ and lib/
    cuda: Path  # bin/nvcc, include/, lib64/
    architecture: str  # such as "90"


class Build:
    """From the unpacked source distribution to a wheel; compiled files are kept in `work` and used again."""

    def __init__(self, source: Path, work: Path, tools: Toolchain) -> None:
        self._csrc = source / "csrc"
        self._source = source
        self._work = work
        self._tools = tools

    def library(self, jobs: int) -> Path:
        """Compile, the slowest first, and link."""
        commands = {name: self._nvcc(name) for name in KERNELS} | {"bindings": self._gxx()}
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(self._compile, commands, commands.values()))
        library = self._work / LIBRARY
        _run(self._link(objects, library))
        return library

    def wheel(self, library: Path, output: Path) -> Path:
        """Write the wheel into the folder `output`."""
        tag = f"py3-none-linux_{platform.machine()}"
        name, version = "flash_attn", f"{_version(self._source)}+forward.sm{self._tools.architecture}"
        info = f"{name}-{version}.dist-info"
        files = {
            "flash_attn_2_cuda.py": (HERE / "flash_attn_2_cuda.py").read_bytes(),
            LIBRARY: library.read_bytes(),
            f"{info}/METADATA": _metadata(version).encode(),
            f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
            f"{info}/licenses/LICENSE": (self._source / "LICENSE").read_bytes(),
        }
        for path in sorted((self._source / "flash_attn").rglob("*.py")):
            files[str(path.relative_to(self._source))] = path.read_bytes()
        record = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in files.items())
        files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
        output.mkdir(parents=True, exist_ok=True)
        wheel = output / f"{name}-{version}-{tag}.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in files.items():
                archive.writestr(member, data)
        return wheel

    def _compile(self, name: str, command: list[str]) -> Path:
        target = self._work / f"{name}.o"
        if not target.exists():
            start, unfinished = time.monotonic(), target.with_suffix(".part.o")
            _run([*command, "-o", str(unfinished)])
            unfinished.rename(target)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        return target

    def _includes(self) -> list[str]:
        flash, torch = self._csrc / "flash_attn", self._tools.torch / "include"
        own = [HERE / "include", flash, flash / "src", self._csrc / "cutlass" / "include"]
        system = [torch, torch / "torch" / "csrc" / "api" / "include", self._tools.cuda / "include"]
        return [f"-I{path}" for path in own] + [part for path in system for part in ("-isystem", str(path))]

    def _nvcc(self, kernel: str) -> list[str]:
        number = self._tools.architecture
        return [
            str(self._tools.cuda / "bin" / "nvcc"),
            *("-c", "-O3", "-std=c++17", "-w", "--use_fast_math", "-Xcompiler", "-fPIC"),
            *("--expt-relaxed-constexpr", "--expt-extended-lambda"),
            *("-gencode", f"arch=compute_{number},code=sm_{number}"),
            *(f"-U__CUDA_NO_{macro}__" for macro in HALF_MACROS),
            *_disabled(),
            *self._includes(),
            str(self._csrc / "flash_attn" / "src" / f"{kernel}.cu"),
        ]

    def _gxx(self) -> list[str]:
        options = ("-c", "-O2", "-std=c++17", "-w", "-fPIC")
        return ["g++", *options, *_disabled(), *self._includes(), str(HERE / "bindings.cpp")]

    def _link(self, objects: list[Path], library: Path) -> list[str]:
        return [
            *("g++", "-shared", "-o", str(library), *map(str, objects)),
            # Every symbol must be in one of the libraries, whatever those in turn need where it runs.
            *("-Wl,--no-undefined", "-Wl,--allow-shlib-undefined", "-Wl,--no-as-needed"),
            f"-L{self._tools.torch / 'lib'}",
            f"-L{self._tools.cuda / 'lib64'}",
            *(f"-l{name}" for name in (*TORCH_LIBRARIES, "cudart")),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sdist", type=Path, help="flash_attn-VERSION.tar.gz")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the wheel")
    parser.add_argument("--work", type=Path, help="folder that keeps compiled files for the next run")
    parser.add_argument("--architecture", default="90", help="of the GPU: 80, 86, 89, 90, ...")
    parser.add_argument("--torch", type=Path, help="PyTorch's folder; default: the installed one's")
    parser.add_argument(
        "--cuda", type=Path, default=Path("/usr/local/cuda"), help="toolkit of PyTorch's CUDA version"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files compiled at once")
    args = parser.parse_args()
    tools = Toolchain(args.torch or _installed_torch(), args.cuda, args.architecture)
    with tempfile.TemporaryDirectory() as folder:
        # What is kept is kept by architecture.
        work = (args.work or Path(folder)) / f"sm{args.architecture}"
        work.mkdir(parents=True, exist_ok=True)
        build = Build(unpack(args.sdist, Path(folder)), work, tools)
        print(build.wheel(build.library(args.jobs), args.output))


def unpack(sdist: Path, folder: Path) -> Path:
    """The folder with what is needed of the source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, members=_wanted(archive), filter="data")
    return next(folder.glob("flash_attn-*"))


def _wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        if member.name.partition("/")[2].startswith(WANTED):
            yield member


def _version(source: Path) -> str:
    lines = (source / "PKG-INFO").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("Version: ") for line in lines if line.startswith("Version: "))


def _metadata(version: str) -> str:
    return (
        "Metadata-Version: 2.1\nName: flash_attn\n"
        f"Version: {version}\nSummary: flash-attn's forward kernels, bfloat16, head sizes 64 and 128\n"
        "Requires-Dist: torch\nRequires-Dist: einops\n"
    )


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _disabled() -> list[str]:
    return [f"-DFLASHATTENTION_DISABLE_{part}" for part in DISABLED]


def _installed_torch() -> Path:
    # Imported here: with --torch no PyTorch needs to be installed.
    import torch

    return Path(torch.__file__).parent


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout}{finished.stderr}")


if __name__ == "__main__":
    main()

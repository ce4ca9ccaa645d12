"""What of a source distribution goes into the wheel; compiling takes nvcc and minutes, and is not tested."""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from deploy.flash_attn_build.build import LIBRARY, Build, Toolchain, unpack

FILES = {
    "PKG-INFO": b"Metadata-Version: 2.4\nName: flash-attn\nVersion: 2.8.3.post2\n",
    "LICENSE": b"BSD 3-Clause License\n",
    "flash_attn/__init__.py": b"from flash_attn.ops import answer\n",
    "flash_attn/ops.py": b"answer = 42\n",
    "csrc/flash_attn/src/flash.h": b"#pragma once\n",
    "csrc/cutlass/include/cutlass/cutlass.h": b"#pragma once\n",
    "csrc/cutlass/examples/huge.cu": b"int main() {}\n",
    "csrc/composable_kernel/include/ck.hpp": b"#pragma once\n",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sdist = tmp_path / "flash_attn-2.8.3.post2.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for path, data in FILES.items():
            member = tarfile.TarInfo(f"flash_attn-2.8.3.post2/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return unpack(sdist, tmp_path)


@pytest.fixture
def wheel(source: Path, tmp_path: Path) -> Path:
    library = tmp_path / LIBRARY
    library.write_bytes(b"\x7fELF")
    build = Build(source, tmp_path, Toolchain(tmp_path, tmp_path, "90"))
    return build.wheel(library, tmp_path / "dist")


def test_only_what_is_compiled_or_packed_is_unpacked(source: Path) -> None:
    found = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert found == set(FILES) - {"csrc/cutlass/examples/huge.cu", "csrc/composable_kernel/include/ck.hpp"}


def test_the_wheel_says_what_it_is_and_holds_the_licence(wheel: Path) -> None:
    assert wheel.name == f"flash_attn-2.8.3.post2+forward.sm90-py3-none-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = "flash_attn-2.8.3.post2+forward.sm90.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == FILES["LICENSE"]
        assert b"Version: 2.8.3.post2+forward.sm90\n" in archive.read(f"{info}/METADATA")
        assert {"flash_attn/ops.py", "flash_attn_2_cuda.py", LIBRARY} <= set(archive.namelist())


def test_the_wheels_record_is_true(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        record = next(name for name in archive.namelist() if name.endswith("RECORD"))
        lines = [line.split(",") for line in archive.read(record).decode().splitlines()]
        assert {path for path, _, _ in lines} == set(archive.namelist())
        for path, digest, size in lines:
            if path != record:
                data = archive.read(path)
                expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={expected}", len(data))


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")
def test_pip_installs_the_wheel_on_its_platform(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    options = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, timeout=120)
    run = "import flash_attn; print(flash_attn.answer)"
    finished = subprocess.run(
        [sys.executable, "-c", run], cwd=target, capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout == "42\n"

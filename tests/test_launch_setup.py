"""Set-up installs the right torch once, and returns at once afterwards.

The script, bash, venv and pip are real; the package index is a folder of tiny wheels, so nothing is downloaded.
"""

import base64
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "latentline"
version = "1.0"
dependencies = ["torch>=2.10,<2.14"]

[project.optional-dependencies]
test = ["tester"]
"""

BACKEND = """
import base64, hashlib, zipfile
from pathlib import Path

{write_wheel}

def build_editable(folder, config_settings=None, metadata_directory=None):
    return write_wheel(folder, "latentline", "1.0", requires=["torch>=2.10,<2.14", "tester; extra == 'test'"])
"""


def write_wheel(folder: str | Path, name: str, version: str, *, requires: list[str]) -> str:
    """Write a wheel that holds its metadata only; return its file name."""
    path = Path(folder) / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    members = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: test\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [
        f"{member},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},"
        for member, text in members.items()
    ]
    members[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return path.name


class House:
    """A repository in a folder with spaces, an index of its own, and a machine with or without a GPU."""

    def __init__(self, folder: Path, *, torches: list[str], gpu: bool = False) -> None:
        self.root = folder / "a b"
        self.index = folder / "index"
        self.index.mkdir()
        for version in torches:
            # As on the registry: the plain wheel brings CUDA libraries, the other does not.
            write_wheel(self.index, "torch", version, requires=[] if version.endswith("+cpu") else ["nvidia_cublas"])
        write_wheel(self.index, "nvidia_cublas", "13.0", requires=[])
        write_wheel(self.index, "tester", "1.0", requires=[])
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "setup.sh", self.root / "launch")
        (self.root / "launch" / "constraints.txt").write_text("torch==2.13.0\n")
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        (self.root / "backend.py").write_text(BACKEND.format(write_wheel=inspect.getsource(write_wheel)))
        commands = folder / "commands"
        commands.mkdir()
        (commands / "nvidia-smi").write_text("echo 'GPU 0: H'\necho 'GPU 1: H'\n" if gpu else "exit 9\n")
        (commands / "nvidia-smi").chmod(0o755)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "LATENTLINE_", "PYTHON"))
        } | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
        }

    def set_up(self, *extras: str, **more: str) -> str:
        """Run the set-up from another folder; return what it said."""
        command = ["bash", str(self.root / "launch" / "setup.sh"), *extras]
        done = subprocess.run(
            command, cwd="/", env={**self.environment, **more}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        return done.stderr

    def installed(self) -> dict[str, str]:
        folder = next((self.root / ".venv" / "lib").glob("python*")) / "site-packages"
        names = [path.name.removesuffix(".dist-info").split("-") for path in folder.glob("*.dist-info")]
        return {name: version for name, version in names if name not in {"pip", "setuptools"}}


def test_a_machine_without_gpu_gets_no_cuda_and_a_second_set_up_does_nothing(tmp_path: Path) -> None:
    house = House(tmp_path, torches=["2.13.0", "2.13.0+cpu", "2.13.5"])
    assert "installing" in house.set_up("test")
    assert house.installed() == {"latentline": "1.0", "torch": "2.13.0+cpu", "tester": "1.0"}
    stamp = (house.root / ".venv" / "latentline-setup").stat()
    assert house.set_up("test") == ""
    assert house.set_up() == ""  # Less than what is there.
    assert (house.root / ".venv" / "latentline-setup").stat().st_mtime_ns == stamp.st_mtime_ns
    # A read-only .venv, as in an image, is no obstacle when there is nothing to do.
    (house.root / ".venv" / "setup.lock").unlink()
    assert house.set_up() == ""
    assert not (house.root / ".venv" / "setup.lock").exists()


@pytest.mark.soak
def test_any_cpu_wheel_within_the_range_is_better_than_cuda(tmp_path: Path) -> None:
    house = House(tmp_path, torches=["2.13.0", "2.14.0+cpu", "2.9.0+cpu", "2.11.0+cpu", "2.12.1+cpu"])
    assert "torch 2.12.1+cpu is not the tested 2.13.0" in house.set_up()
    assert house.installed() == {"latentline": "1.0", "torch": "2.12.1+cpu"}


@pytest.mark.soak
def test_where_no_cpu_wheel_is_findable_it_says_so_and_takes_the_plain_one(tmp_path: Path) -> None:
    house = House(tmp_path, torches=["2.13.0", "2.14.0+cpu"])
    assert "no CPU wheel of torch" in house.set_up()
    assert house.installed() == {"latentline": "1.0", "torch": "2.13.0", "nvidia_cublas": "13.0"}


@pytest.mark.soak
def test_a_gpu_that_appears_later_replaces_the_cpu_wheel(tmp_path: Path) -> None:
    house = House(tmp_path, torches=["2.13.0", "2.13.0+cpu"], gpu=True)
    house.set_up(LATENTLINE_TORCH="cpu")
    assert house.installed()["torch"] == "2.13.0+cpu"
    house.set_up()
    assert house.installed() == {"latentline": "1.0", "torch": "2.13.0", "nvidia_cublas": "13.0"}
    house.set_up("test")
    assert house.installed()["torch"] == "2.13.0"


@pytest.mark.soak
def test_a_moved_folder_is_set_up_anew(tmp_path: Path) -> None:
    house = House(tmp_path, torches=["2.13.0+cpu"])
    house.set_up("test")
    house.root = house.root.rename(tmp_path / "c d")
    assert "making" in house.set_up()
    assert house.installed() == {"latentline": "1.0", "torch": "2.13.0+cpu", "tester": "1.0"}
    script = next((house.root / ".venv" / "bin").glob("pip3.*"))
    subprocess.run([script, "--version"], check=True, capture_output=True)


@pytest.mark.soak
def test_two_set_ups_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    house = House(tmp_path, torches=["2.13.0+cpu"])
    command = ["bash", str(house.root / "launch" / "setup.sh")]
    both = [
        subprocess.Popen([*command, *extra], env=house.environment, stderr=subprocess.PIPE) for extra in ([], ["test"])
    ]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    assert house.installed() == {"latentline": "1.0", "torch": "2.13.0+cpu", "tester": "1.0"}
    assert house.set_up("test") == ""

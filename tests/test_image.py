"""The commands of docker/README.md build the image without a Docker engine, and the image runs the smoke experiment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

TOOLS = ("buildah", "debootstrap")
STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "{0}/graph"\nrunroot = "{0}/run"\n'
AFTERWARDS = """
buildah --storage-driver vfs run --isolation chroot "$worker" -- bash docker/health.sh
buildah --storage-driver vfs run --isolation chroot "$worker" -- id --user
buildah --storage-driver vfs run --isolation chroot "$worker" -- find runs/smoke -name manifest.json
buildah --storage-driver vfs run --isolation chroot "$worker" -- ls -A
"""


def commands_of_the_readme() -> str:
    text = (REPOSITORY / "docker" / "README.md").read_text()
    found = re.search(r"Without a Docker engine.*?```bash\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found.group(1)


def options_for_packages(folder: Path) -> list[str]:
    """What this machine's pip knows of indexes and folders, for the build: a secret, and the folders themselves."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("cert", "find-links", "index-url", "extra-index-url", "trusted-host"):
            settings[name] = value.strip("'\"")
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    # An index names files beside its folder: what is given is the top folder that only packages are in.
    local = {place.parent if place.name == "simple" else place for place in map(Path, words) if place.is_absolute()}
    volumes = [word for place in sorted(local) for word in ("--volume", f"{place}:{place}:ro")]
    return ["--secret", f"id=pip.conf,src={folder}/pip.conf", *volumes]


def test_the_readme_s_commands_build_an_image_that_runs_the_smoke_experiment(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("building an image without an engine needs root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; Debian has packages of these names")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    house = tmp_path / "house"
    for name in filter(None, tracked.stdout.split("\0")):
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, house / name)
    (tmp_path / "storage.conf").write_text(STORAGE.format(tmp_path / "storage"))
    packages = " ".join(options_for_packages(tmp_path))
    script = (
        "set -euo pipefail\n" + commands_of_the_readme().replace("vfs build ", f"vfs build {packages} ") + AFTERWARDS
    )
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=house,
            env={**os.environ, "CONTAINERS_STORAGE_CONF": str(tmp_path / "storage.conf"), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    finally:
        # Gigabytes; but never through a mount of the machine's own folders that was left behind.
        if str(tmp_path) not in Path("/proc/self/mountinfo").read_text():
            shutil.rmtree(tmp_path, ignore_errors=True)
    assert "All stages took" in done.stderr + done.stdout
    *_, user = re.findall(r"^(\d+)$", done.stdout, flags=re.MULTILINE)
    assert user == "1000"
    manifests = re.findall(r"^runs/smoke/(\w+)/manifest.json$", done.stdout, flags=re.MULTILINE)
    assert sorted(manifests) == ["corpus", "evaluation", "latents", "unet", "vae"]
    listing = done.stdout.split()
    assert ".git" not in listing
    assert "tests" not in listing

"""Laws of committing: a reader sees all or nothing, and a dead owner holds no lock."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment, wait_until
from manifests import latents_manifest

from data.files import (
    FolderLock,
    atomic_file,
    atomic_folder,
    sha256_of,
    sweep_temporaries,
    verify_file,
    write_atomically,
    write_json,
)
from data.manifest import read_manifest, write_manifest


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_killed_writer_leaves_no_visible_file(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom data.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 100_000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], env=environment(), check=False)
    assert not (tmp_path / "file").exists()
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1
    assert sweep_temporaries(tmp_path) == left
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_whole_and_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    with pytest.raises(FileExistsError, match="never overwritten"), atomic_folder(tmp_path / "out"):
        pass


def test_a_second_owner_is_told_who_the_first_is_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom data.files import FolderLock\n"
        "FolderLock(sys.argv[1]).acquire(); print('locked', flush=True); time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(BlockingIOError, match=f"is in use by process {owner.pid} on .*another run.root"):
        FolderLock(tmp_path).acquire()
    owner.kill()
    owner.wait()
    lock = FolderLock(tmp_path)
    wait_until(lambda: lock.acquire() is None, seconds=60, what="taking the lock of a dead owner")
    lock.release()


def test_not_a_number_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_the_digest_ignores_provenance_and_key_order(tmp_path: Path) -> None:
    manifests = []
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        (tmp_path / name).mkdir()
        config = {key: {"x": 1, "y": "ü"}[key] for key in order}
        write_manifest(tmp_path / name, latents_manifest(config=config, provenance={"host": name}))
        manifests.append(read_manifest(tmp_path / name))
    assert manifests[0].digest == manifests[1].digest
    assert [manifest.provenance["host"] for manifest in manifests] == ["a", "b"]
    assert manifests[0].digest != latents_manifest(config={"x": 2, "y": "ü"}).digest


def test_reading_what_is_no_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has not finished"):
        read_manifest(tmp_path)
    for text in ("", "[]", '{"content": {}, "provenance": {}}', '{"content": 3}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="is not a manifest"):
            read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"content": {"format_version": 99}, "provenance": {}}')
    with pytest.raises(ValueError, match="format version 99"):
        read_manifest(tmp_path)


def test_a_file_that_is_not_what_its_manifest_says_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(b"0123456789")
    sha256 = sha256_of(path)
    verify_file(path, size=10, sha256=sha256)
    path.write_bytes(b"0123456780")
    with pytest.raises(ValueError, match=rf"shard\.tar has sha256 .*, its manifest says {sha256[:12]}: its content"):
        verify_file(path, size=10, sha256=sha256)
    path.write_bytes(b"012345")
    with pytest.raises(ValueError, match=r"shard\.tar has 6 bytes, its manifest says 10: it was cut or changed"):
        verify_file(path, size=10, sha256=sha256)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard\.tar is missing, but its manifest lists it"):
        verify_file(path, sha256=sha256)

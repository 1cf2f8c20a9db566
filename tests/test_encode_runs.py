"""Many hands on one set of latents: leases, publication, several runs, kills, and the checks of the whole."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Run, communicated, run_stage, stage_command, start_warm, wait_until
from killed_at import PLACES
from manifests import commit_corpus
from warm import WarmProcess

from data import loading
from data.files import FolderLock, sha256_of, write_json
from data.loading import ImageShards
from data.manifest import FileEntry
from data.samples import image_members
from data.shards.writer import ShardWriter
from data.statistics import ChannelSums
from pipelines.encode_latents import (
    EncodeLatentsConfig,
    EncodeLatentsInputs,
    EncodingProgress,
    audit_keys,
    shards_of,
)
from pipelines.model.latent_statistics import alarms, scale_in_validation, scale_of, statistics_plot
from pipelines.runtime.stage import leases as leases_module
from pipelines.runtime.stage.leases import Leases
from pipelines.runtime.stage.progress import progress_line
from pipelines.runtime.stage.work_items import make_items

KILLS = int(os.environ.get("LATENTLINE_KILLS", "50"))


def encoding_command(run: Run, root: Path, *, processes: int) -> list[str]:
    inputs = {"corpus": run.root / "corpus", "vae": run.root / "vae"}
    words = [word for name, folder in inputs.items() for word in (f"--inputs.{name}", str(folder))]
    return stage_command("encode_latents", "--run.root", str(root), *words, processes=processes)


def started(command: list[str]) -> WarmProcess:
    return start_warm(*command[1:])


def check_same_latents(run: Run, root: Path) -> None:
    for shard in run.folder("encode_latents").glob("*.tar"):
        assert sha256_of(shard) == sha256_of(root / "latents" / shard.name), shard.name
    content = json.loads((root / "latents/manifest.json").read_bytes())["content"]
    assert content == run.manifest("encode_latents")["content"]


def test_runs_that_join_share_the_work_and_one_of_them_finishes_it(two_process_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    owner = FolderLock(folder)
    owner.acquire()
    shutil.copy(two_process_run.folder("encode_latents") / "request.json", folder)  # an owner writes it as it begins
    runs = [started(encoding_command(two_process_run, tmp_path, processes=1)) for _ in range(2)]
    parts = len(two_process_run.manifest("encode_latents")["content"]["files"])
    wait_until(lambda: len(list(folder.glob("runs/*"))) == 2, seconds=180, what="joining the owner")
    wait_until(lambda: len(list(folder.glob("parts/*.json"))) == parts, seconds=180, what="encoding beside the owner")
    time.sleep(1)
    assert not (folder / "manifest.json").exists(), "two would write the manifest"
    owner.release()
    outputs = [out + err for out, err in communicated(runs)]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert all("joining it" in output for output in outputs)
    check_same_latents(two_process_run, tmp_path)
    identities = {json.loads(path.read_bytes())["run_id"] for path in folder.glob("runs/*/run.json")}
    assert len(identities) == 2
    assert not list(folder.glob("parts/*.lease"))


def test_a_bad_image_stops_encoding_by_its_name_whichever_thread_finds_it(two_process_run: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(two_process_run.folder("prepare_corpus"), corpus)
    # Two shards, so that both threads may find one; the manifest is made to agree, as if the disk had lied before.
    manifest = json.loads((corpus / "manifest.json").read_bytes())
    for entry in manifest["content"]["files"][:2]:
        path = corpus / entry["name"]
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"IDAT") + 20] ^= 0xFF
        path.write_bytes(raw)
        entry["sha256"] = sha256_of(path)
    del manifest["provenance"]["digest"]
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    words = ("--run.root", str(tmp_path), "--inputs.vae", str(two_process_run.root / "vae"))
    done = run_stage("encode_latents", *words)
    assert done.returncode == 2, done.stderr
    assert "train-00000" in done.stderr
    assert "broken_image" in done.stderr
    done = run_stage("encode_latents", *words, "--bad_samples", "quarantine", "--max_bad_fraction", "0.1")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "latents/manifest.json").read_bytes())["content"]["counts"]
    assert counts == {"in": 240, "out": 238, "quarantined": {"broken_image": 2}}


def killed_at(place: str, count: int | str, run: Run, root: Path, *, processes: int) -> WarmProcess:
    """Start encoding so that it kills itself; see ``killed_at.py``."""
    command = encoding_command(run, root, processes=processes)
    where = command.index("pipelines.encode_latents")
    # In the place of "-m pipelines.encode_latents".
    command[where - 1 : where + 1] = [str(REPOSITORY / "tests/killed_at.py"), place, str(count), "encode_latents"]
    return started(command)


def test_killed_wherever_it_is_at_work_it_ends_with_the_same_bytes(two_process_run: Run, tmp_path: Path) -> None:
    places = ("read:2", "encode:3", "write:40", "flush:2", "link:1", "linked:1", "rename:5", "renamed:5")
    out, err = killed_at(",".join(places), "-", two_process_run, tmp_path, processes=1).communicate(timeout=150)
    assert [line.split()[-1] for line in out.splitlines() if "killed at" in line] == [*places], out + err
    check_same_latents(two_process_run, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fifty_kills_change_no_byte(two_process_run: Run, tmp_path: Path) -> None:
    folder, rng, kills = tmp_path / "latents", random.Random(0), Counter[tuple[str, int]]()
    most = {"read": 5, "encode": 10, "write": 60, "flush": 12, "time": 80}
    processes, leave_out = 1, 0
    while kills.total() < KILLS:
        processes = rng.choice([n for n in (1, 2, 4) if n != processes])
        place = PLACES[kills.total() % len(PLACES)]
        process = killed_at(place, rng.randint(1, most.get(place, 6)), two_process_run, tmp_path, processes=processes)
        output = "".join(process.communicate(timeout=240))
        if process.returncode == -signal.SIGKILL:
            kills[place, processes] += 1
            leave_out = 0
        else:  # it was through before that moment came
            leave_out += 1
            assert leave_out < 10, output
        # So that there is something left to kill: the next start finds some shards, records or neither.
        (folder / "manifest.json").unlink(missing_ok=True)
        records = sorted(folder.glob("parts/*.json"))
        for record in rng.sample(records, k=max(0, len(records) - 1)):
            record.unlink()
            if rng.random() < 0.5:
                (folder / record.stem).unlink(missing_ok=True)
    last = started(encoding_command(two_process_run, tmp_path, processes=2))
    output = "".join(last.communicate(timeout=240))
    assert last.returncode == 0, output
    check_same_latents(two_process_run, tmp_path)
    print(f"{kills.total()} kills, by place and processes: {dict(sorted(kills.items()))}")


def test_images_are_decoded_by_as_many_threads_as_the_process_has_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for number in range(12):
            image = np.full((6, 6, 3), number, dtype=np.uint8)
            writer.add(f"k{number}", image_members(f"k{number}", image, label=0, caption="", metadata={}))
    assert writer.entry is not None
    manifest = commit_corpus(tmp_path, [writer.entry], resolution=6)
    six, decode = threading.Barrier(6, timeout=20), loading.decode_image

    def decode_with_five_others(payload: bytes, **bounds: Any) -> np.ndarray:
        six.wait()
        return decode(payload, **bounds)

    monkeypatch.setattr(loading, "decode_image", decode_with_five_others)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = EncodeLatentsConfig(inputs=EncodeLatentsInputs(corpus=str(tmp_path), vae=""))
    ((images, part),) = shards_of(config, manifest).values()
    batch = images.read(part.indices, carry=True)
    assert [image.item(0) for image in batch.images] == list(range(12))
    assert batch.keys == [f"k{number}" for number in range(12)]


# --- leases and publication


class Requests(Counter[str]):
    """Counts what is asked of the file system."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for holder, name in ((os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir"), (io, "open")):
            patch.setattr(holder, name, partial(self._asked, getattr(holder, name), name))

    def _asked(self, real: Callable[..., Any], name: str, *words: Any, **named: Any) -> Any:
        self[name] += 1
        return real(*words, **named)


def ranks_at_work(folder: Path, num_ranks: int, names: list[str], make: Callable[[str], Any]) -> list[threading.Thread]:
    """Start ranks, each in a thread, on items in ``folder``."""
    threads = []
    for rank in range(num_ranks):
        stage: Any = SimpleNamespace(
            folder=folder,
            is_main=False,
            accelerator=SimpleNamespace(process_index=rank, num_processes=num_ranks),
            stop=SimpleNamespace(requested=(folder / "stop").exists),
        )
        threads.append(threading.Thread(target=make_items, args=(stage, names, make), daemon=True))
        threads[-1].start()
    return threads


def test_an_idle_rank_asks_little_of_a_shared_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    names = [f"item-{number}" for number in range(500)]
    with Leases(tmp_path / "parts") as others, contextlib.ExitStack() as leased:
        for name in names:
            leased.enter_context(others.lease(name))
        with monkeypatch.context() as patch:
            requests = Requests(patch)
            (rank,) = ranks_at_work(tmp_path, 1, names, lambda name: pytest.fail(name))
            time.sleep(2)
        assert requests.total() < 40 * 6, requests
        assert requests["listdir"] >= 5, "it does not look"
        for name in names:
            write_json(tmp_path / "parts" / f"{name}.json", {})
        rank.join(timeout=20)
        assert not rank.is_alive()


def test_ranks_begin_with_items_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    is_expired = Leases.is_expired
    monkeypatch.setattr(Leases, "is_expired", lambda own, path: refused.append(path.name) or is_expired(own, path))
    made: list[str] = []
    all_begun = threading.Barrier(16, timeout=20)

    def make(name: str) -> dict[str, Any]:
        if len(made) < 16:
            made.append(name)
            all_begun.wait()
        else:
            made.append(name)
        return {}

    names = [f"item-{number:02}" for number in range(64)]
    for rank in ranks_at_work(tmp_path, 16, names, make):
        rank.join(timeout=60)
    assert sorted(made) == names, "each once"
    assert len(refused) < 64, "ranks ask for items that others are making"


def test_an_item_is_leased_by_one_and_free_again_afterwards(tmp_path: Path) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as other:
        with one.lease("a") as mine, other.lease("a") as theirs, one.lease("a") as again, other.lease("b") as another:
            assert (mine, theirs, again, another) == (True, False, False, True)
        with other.lease("a") as theirs:
            assert theirs
    assert not list(tmp_path.iterdir())


def test_a_killed_owners_lease_is_taken_over_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from pipelines.runtime.stage.leases import Leases\n"
        "with Leases(Path(sys.argv[1])) as leases, leases.lease('a'): print('leased', flush=True); time.sleep(60)\n"
    )
    owner = start_warm("-c", program, str(tmp_path))
    wait_until(lambda: owner.printed() == "leased\n", seconds=60, what="the lease")
    with Leases(tmp_path) as leases:
        with leases.lease("a") as mine:
            assert not mine
        owner.kill()
        owner.wait()
        with leases.lease("a") as mine:
            assert mine


def test_a_lease_of_another_machine_lasts_as_long_as_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.lease"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "began": 0.0}))
    with Leases(tmp_path) as leases:
        with leases.lease("a") as mine:
            assert not mine
        old = time.time() - leases_module.STALE_SECONDS - 5
        os.utime(path, (old, old))
        with leases.lease("a") as mine:
            assert mine
    monkeypatch.setattr(leases_module, "HEARTBEAT_SECONDS", 0.05)
    with Leases(tmp_path) as leases, leases.lease("a"):
        os.utime(path, (old, old))
        wait_until(lambda: path.stat().st_mtime > old + 1, seconds=60, what="a heartbeat")


def test_the_first_of_equal_files_keeps_the_name_and_a_damaged_one_loses_it(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"

    def write(text: bytes) -> int:
        with ShardWriter(path) as shard:
            shard.add("k", {"txt": text})
        return path.stat().st_ino

    first = write(b"one")
    held = path.open("rb")  # else the number of a dropped file is given to the next
    assert write(b"one") == first
    assert write(b"two") != first
    held.close()
    path.write_bytes(path.read_bytes()[:100])
    write(b"two")
    assert path.stat().st_size == 10_240
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index", path.name]


# --- progress


def test_progress_counts_images_of_all_and_its_rate_leaves_out_what_was_done_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    logged: list[tuple[int, dict[str, float]]] = []
    tracker = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    with progress_line("encode_latents", total=1000, unit="images", start=400) as line:
        progress = EncodingProgress(SimpleNamespace(tracker=tracker), line, num_shards=10, done_before=400)
        for shards, done in ((5, 500), (7, 700)):  # another rank made the sixth
            clock[0] += 10.0
            progress.show(shards, done, {"entry": {"bytes": 2_000_000, "samples": 100}})
        progress.finish()
    assert [step for step, _ in logged] == [500, 700, 1000]
    assert logged[1][1] == {
        "progress/shards": 7.0,
        "progress/images": 700.0,
        "progress/images_per_s": 15.0,
        "progress/mb_per_s": 0.3,
        "progress/eta_s": 20.0,
    }
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].endswith("] 700/1000 images  15/s  ETA 0:20  shards 7  MB/s 0.3")


def test_a_run_that_encodes_has_its_progress_and_its_alarms_in_mlflow(two_process_run: Run) -> None:
    folder = two_process_run.folder("encode_latents")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if row.get("progress/images") == 240]
    assert last["progress/shards"] == 5
    assert last["progress/images_per_s"] > 0
    events = [json.loads(line) for line in (folder / "tracking/events.jsonl").read_text().splitlines()]
    (alarms_tag,) = [event["tags"]["latents.alarms"] for event in events if "latents.alarms" in event.get("tags", {})]
    found = two_process_run.manifest("encode_latents")["content"].get("alarms", [])
    assert alarms_tag == ("; ".join(found) or "none")


# --- the whole


def sums_of(scales: list[float], *, seed: int = 0) -> ChannelSums:
    sums = ChannelSums.empty(len(scales))
    for row in range(50):
        mean = np.random.default_rng([seed, row]).standard_normal((len(scales), 8, 8))
        sums.add(np.stack([mean * np.array(scales)[:, None, None], np.full_like(mean, -5.0)]))
    return sums


def test_a_collapsed_channel_and_a_strange_scale_raise_an_alarm(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "val/latent_std": 9.0}\n{"update": 2}\n{"step": 2, "val/latent_std": 1.0}\n')
    assert scale_in_validation(tmp_path) == 1.0
    assert alarms(sums_of([1.0, 1.0]), tmp_path) == []
    assert alarms(sums_of([1.15, 1.15]), tmp_path) == []
    assert alarms(sums_of([0.85, 0.85]), tmp_path) == []
    (strange,) = alarms(sums_of([1.3, 1.3]), tmp_path)
    assert "the latents' scale is 1.28" in strange
    assert "but 1 when the VAE was validated" in strange
    (collapsed,) = alarms(sums_of([2**0.5, 1e-5]), tmp_path)
    assert "channel 1 has collapsed" in collapsed
    assert alarms(sums_of([3.0]), tmp_path / "nowhere") == []


def test_the_scale_is_that_of_all_elements_together() -> None:
    rng, sums = np.random.default_rng(0), ChannelSums.empty(2)
    means = rng.normal([[[1.0]], [[-3.0]]], [[[2.0]], [[0.5]]], size=(40, 2, 8, 8))
    for mean in means:
        sums.add(np.stack([mean, np.zeros_like(mean)]))
    assert scale_of(sums) == pytest.approx(means.std(), rel=1e-9)
    assert statistics_plot(sums).startswith(b"\x89PNG")


def test_the_audit_finds_a_latent_that_is_missing_or_too_many(two_process_run: Run, tmp_path: Path) -> None:
    corpus, latents = two_process_run.folder("prepare_corpus"), tmp_path / "latents"
    shutil.copytree(two_process_run.folder("encode_latents"), latents)
    shards = {
        part.entry.name: (images, part)
        for images in (ImageShards(corpus, split="train"), ImageShards(corpus, split="val"))
        for part in images.shards
    }
    records = [json.loads(path.read_bytes()) for path in sorted((latents / "parts").glob("*.json"))]
    assert len(records) == len(shards)
    audit_keys(latents, shards, records)
    name = records[0]["entry"]["name"]
    images, part = shards[name]
    keys = images.read(part.indices).keys
    for changed, what in ((keys[:-1], "is missing"), ([*keys, "stranger"], "'stranger' is new")):
        with ShardWriter(latents / name) as shard:
            for key in changed:
                shard.add(key, {"cls": b"1"})
        assert shard.entry is not None
        assert isinstance(shard.entry, FileEntry)
        with pytest.raises(ValueError, match=what):
            audit_keys(latents, shards, [{**records[0], "entry": asdict(shard.entry)}, *records[1:]])
    # One that was set aside is not missing.
    with ShardWriter(latents / name) as shard:
        for key in keys[:-1]:
            shard.add(key, {"cls": b"1"})
    assert shard.entry is not None
    audit_keys(latents, shards, [{"entry": asdict(shard.entry), "quarantined": [{"key": keys[-1]}]}, *records[1:]])

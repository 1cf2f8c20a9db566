"""Shards behind addresses, from real servers on loopback, with every byte counted that they really sent."""

import contextlib
import datetime
import http.server
import io
import ipaddress
import json
import logging
import queue
import socket
import ssl
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pytest
from conftest import start_warm, wait_until
from PIL import Image
from warm import WarmProcess

from data.shards.remote import range_policy, read_ranges
from data.sources import SCANS_AT_ONCE, ScanSharing, WebDatasetConfig
from data.sources.scan_cache import found_shards
from pipelines.runtime.stage.work_items import make_items

SHARDS, SAMPLES = 4, 20
STEPS = ["prepare", "listed again", "scattered", "streams", "held", "end"]  # of far_reader.py
SLACK = 30_000  # bytes of a request's head and its answer's, at most


def shard(number: int) -> bytes:
    """A tar of 20 noisy JPEGs of about 60 KB, with captions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(SAMPLES):
            rng, picture = np.random.default_rng([number, row]), io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (180, 180, 3), dtype=np.uint8)).save(picture, "JPEG", quality=95)
            for suffix, payload in (("jpg", picture.getvalue()), ("txt", b"no. %d" % row)):
                header = tarfile.TarInfo(f"s{number}-{row:03d}.{suffix}")
                header.size = len(payload)
                tar.addfile(header, io.BytesIO(payload))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def payloads() -> dict[str, bytes]:
    return {f"corpus/{number}.tar": shard(number) for number in range(SHARDS)}


class CountingProxy:
    """Passes TCP connections on to a port and counts what comes back."""

    def __init__(self, port: int) -> None:
        self.sent, self._target = 0, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                self.sent += len(chunk) if counts else 0
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@dataclass
class Service:
    """Where the shards are, what a client needs in its environment, and how much was sent."""

    prefix: str
    proxy: CountingProxy
    environment: dict[str, str] = field(default_factory=dict)

    def urls(self) -> list[str]:
        return [f"{self.prefix}/corpus/{number}.tar" for number in range(SHARDS)]


# --- three services


@contextlib.contextmanager
def s3(payloads: dict[str, bytes], folder: Path) -> Iterator[Service]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = CountingProxy(server.get_host_and_port()[1])
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEKEY",
        "AWS_SECRET_ACCESS_KEY": "an example",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        for name, payload in payloads.items():
            client.put_object(Bucket="corpora", Key=name, Body=payload)
    yield Service("s3://corpora", proxy, environment)
    proxy.close()
    server.stop()


def own_authority(folder: Path) -> tuple[Path, Path]:
    """A certificate authority of the test's own and a certificate of it for 127.0.0.1: (to be trusted, to be shown)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> object:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def certificate(subject: str, key: object, signer: object, *, authority: bool) -> object:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(name("test authority"), name(subject), key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return builder.add_extension(addresses, critical=False).sign(signer, hashes.SHA256())

    pem = serialization.Encoding.PEM
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.pem").write_bytes(certificate("test authority", root, root, authority=True).public_bytes(pem))
    key = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    shown = certificate("127.0.0.1", own, root, authority=False).public_bytes(pem)
    (folder / "server.pem").write_bytes(key + shown)
    return folder / "ca.pem", folder / "server.pem"


def web_server(payloads: dict[str, bytes], *, ranges: bool) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, *, body: bool) -> None:
            payload = payloads.get(self.path.lstrip("/"))
            if payload is None:
                self.send_error(404)
                return
            wanted = self.headers.get("Range", "")
            first, last = 0, len(payload) - 1
            if ranges and wanted:
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or last), last)
            self.send_response(206 if ranges and wanted else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("ETag", f'"{zlib.crc32(payload)}"')
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(payload)}")
            self.end_headers()
            if body:
                self.wfile.write(payload[first : last + 1])

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def log_message(self, *words: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def https(payloads: dict[str, bytes], folder: Path, *, ranges: bool = True) -> Iterator[Service]:
    authority, shown = own_authority(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), web_server(payloads, ranges=ranges))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = CountingProxy(server.server_address[1])
    yield Service(f"https://127.0.0.1:{proxy.port}", proxy, {"SSL_CERT_FILE": str(authority)})
    proxy.close()
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def gs(payloads: dict[str, bytes], folder: Path) -> Iterator[Service]:
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="corpora")
    server.start()
    proxy = CountingProxy(port)
    for name, payload in payloads.items():
        address = f"http://127.0.0.1:{port}/upload/storage/v1/b/corpora/o?uploadType=media&name={quote(name, safe='')}"
        with urlopen(Request(address, payload, {"Content-Type": "application/octet-stream"}), timeout=30) as answer:
            assert answer.status == 200
    # The emulator is_main JSON over HTTP, not gRPC.
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{proxy.port}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    yield Service("gs://corpora", proxy, environment)
    proxy.close()
    server.stop()


SERVICES: dict[str, Callable[..., contextlib.AbstractContextManager[Service]]] = {"s3": s3, "https": https, "gs": gs}


def started(service: Service, folder: Path, *words: str, **more: str) -> WarmProcess:
    return start_warm(*words, **{"LATENTLINE_CACHE": str(folder / "cache"), **service.environment, **more})


def bytes_by_step(service: Service, folder: Path, **more: str) -> tuple[dict[str, int], str]:
    """Run the reader; returns what was sent in each of its steps, and its last line."""
    corpus = folder / "corpus"
    reader = started(
        service, folder, str(Path(__file__).with_name("far_reader.py")), str(corpus), *service.urls(), **more
    )
    marks: list[int] = []
    for name in STEPS:
        wait_until(
            lambda: reader.printed().split("\n")[len(marks) : -1] or reader.poll() is not None, seconds=60, what=name
        )
        marks.append(service.proxy.sent)
        (corpus / f"{name}.go").touch()
    out, said = reader.communicate(timeout=60)
    assert reader.returncode == 0, said
    *steps, last = out.splitlines()
    assert steps == STEPS
    return {name: after - before for name, (before, after) in zip(STEPS, pairwise(marks), strict=False)}, last


@pytest.mark.parametrize("kind", SERVICES)
def test_a_full_shuffle_fetches_single_samples_and_streams_fetch_each_shard_once(
    kind: str, payloads: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    with SERVICES[kind](payloads, tmp_path) as service:
        sent, last = bytes_by_step(service, tmp_path)
    whole, train = sum(map(len, payloads.values())), sum(map(len, list(payloads.values())[:-1]))
    assert whole <= sent["prepare"] <= 1.05 * whole + 10 * SLACK
    assert sent["listed again"] <= SLACK
    # Twelve samples, each about a twentieth of a shard, with their tar headers.
    each = train / (SAMPLES * (SHARDS - 1))
    assert 12 * 0.9 * each <= sent["scattered"] <= 12 * (1.1 * each + 4_000) + SLACK
    assert sent["scattered"] < min(map(len, payloads.values())), "as much as a whole shard, for twelve samples"
    assert train <= sent["streams"] <= 1.05 * train + 10 * SLACK
    assert sent["held"] <= SLACK
    assert last == "same True copies 0 samples 60"


def test_the_user_can_insist_on_whole_shards_and_a_replaced_one_is_noticed_in_a_range_of_it(
    payloads: dict[str, bytes], tmp_path: Path
) -> None:
    import boto3

    (tmp_path / "corpus").mkdir()
    program = (
        "import sys, numpy as np; from data.loading import ImageShards\n"
        "ImageShards(sys.argv[1], split='train', scattered=True, cache_bytes=0).read(np.arange(3))\n"
    )
    with s3(payloads, tmp_path) as service:
        sent, last = bytes_by_step(service, tmp_path, LATENTLINE_REMOTE_READS="whole")
        assert sent["scattered"] >= sum(map(len, list(payloads.values())[:-1]))
        assert last.startswith("same True copies")

        for copy in (tmp_path / "cache").glob("*"):
            copy.unlink()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in service.environment.items():
                patch.setenv(name, value)
            other = payloads["corpus/1.tar"][:30_000] + payloads["corpus/0.tar"]
            boto3.client("s3").put_object(Bucket="corpora", Key="corpus/0.tar", Body=other)
        _, said = started(service, tmp_path, "-c", program, str(tmp_path / "corpus")).communicate(timeout=60)
        assert "shard_changed: s3://corpora/corpus/0.tar has no member of" in said


def test_a_server_that_knows_no_ranges_is_asked_for_whole_shards(payloads: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with https(payloads, tmp_path, ranges=False) as service:
        sent, last = bytes_by_step(service, tmp_path)
    assert sent["scattered"] <= 1.05 * sum(map(len, payloads.values())) + 10 * SLACK
    assert last.startswith("same True")


def test_a_server_that_nobody_vouches_for_is_refused(payloads: dict[str, bytes], tmp_path: Path) -> None:
    program = "import sys; from data.shards.remote import properties_of; print(properties_of(sys.argv[1])['size'])"
    with https(payloads, tmp_path) as service:
        out, _ = started(service, tmp_path, "-c", program, service.urls()[0]).communicate(timeout=60)
        assert out.strip() == str(len(payloads["corpus/0.tar"]))
        service.environment.clear()
        _, said = started(service, tmp_path, "-c", program, service.urls()[0]).communicate(timeout=60)
        assert "cannot be read (ClientConnectorCertificateError)" in said


class Flaky:
    """Answers every other range with an error, or too short."""

    def __init__(self, *, last: object) -> None:
        self.asked, self._last = 0, last

    def cat_ranges(self, urls: list[str], starts: list[int], ends: list[int], on_error: str) -> list[object]:
        self.asked += len(urls)
        bad = [OSError("cut"), b"short"]
        return [
            bad[number % 2] if self.asked < 9 and number % 3 else b"x" * (end - start) if self.asked < 9 else self._last
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]


def test_only_the_ranges_that_failed_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.remote.PAUSE_SECONDS", 0.001)
    flaky = Flaky(last=b"x" * 600)
    monkeypatch.setattr("data.shards.remote._filesystem", lambda scheme: flaky)
    assert read_ranges([("s3://b/x", 10 * n, 10 * n + 600) for n in range(6)]) == [b"x" * 600] * 6
    assert flaky.asked == 6 + 4
    for last, message in ((OSError("SECRET"), "cannot be read"), (b"", "gave 0 bytes for the range 0 to 600")):
        monkeypatch.setattr("data.shards.remote._filesystem", lambda scheme, last=last: Flaky(last=last))
        with pytest.raises(OSError, match=message) as error:
            read_ranges([("s3://b/x", 10 * n, 10 * n + 600) for n in range(12)])
        assert "SECRET" not in str(error.value)
    assert read_ranges([]) == []


def test_samples_or_shards_are_fetched_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [range_policy(scattered) for scattered in (True, False)] == [True, False]
    for wish, ranged in (("whole", False), ("ranged", True)):
        monkeypatch.setenv("LATENTLINE_REMOTE_READS", wish)
        assert [range_policy(scattered) for scattered in (True, False)] == [ranged] * 2
    monkeypatch.setenv("LATENTLINE_REMOTE_READS", "sometimes")
    with pytest.raises(ValueError, match="LATENTLINE_REMOTE_READS is auto, whole or ranged, not 'sometimes'"):
        range_policy(True)


# --- scans


class ThrottledStore:
    """A store in memory that takes its time, and counts what it is asked for."""

    def __init__(self, shards: dict[str, bytes], patch: pytest.MonkeyPatch) -> None:
        self.shards, self.tag, self.seconds = shards, "a", 0.0
        self.asked: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        patch.setattr("data.shards.remote._filesystem", lambda scheme: self)

    def info(self, url: str) -> dict[str, object]:
        return {"size": len(self.shards[url]), "ETag": self.tag}

    def open(self, url: str, mode: str, **how: object) -> io.BytesIO:
        self.asked[url] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.seconds)
        self.at_once -= 1
        return io.BytesIO(self.shards[url])


def tiny_shard(number: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in range(5):
            header = tarfile.TarInfo(f"s{number:03}-{row}.txt")
            header.size = 3
            tar.addfile(header, io.BytesIO(b"one"))
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ThrottledStore:
    monkeypatch.setenv("LATENTLINE_CACHE", str(tmp_path / "cache"))
    return ThrottledStore({f"s3://b/{number:03}.tar": tiny_shard(number) for number in range(32)}, monkeypatch)


TINY = WebDatasetConfig(urls=("s3://b/{000..031}.tar",), val_fraction=0.3)


def opened_by_ranks(folder: Path, num_ranks: int) -> list[list[str]]:
    """Open the source by several ranks together, each a thread; return what each lists."""
    mains: queue.Queue[Any] = queue.Queue()

    def listing(rank: int) -> list[str]:
        def from_main(find: Callable[[], Any]) -> Any:
            for _ in range(num_ranks) if rank == 0 else ():
                mains.put(json.loads(json.dumps(find())))
            return mains.get()

        stage: Any = SimpleNamespace(
            folder=folder,
            is_main=rank == 0,
            accelerator=SimpleNamespace(process_index=rank, num_processes=num_ranks),
            stop=SimpleNamespace(requested=lambda: False),
            log=logging.getLogger("test"),
        )
        scan_each = partial(make_items, stage, folder=folder / "scans", at_once=2)
        return [*TINY.open(ScanSharing(folder / "scans", from_main, scan_each)).listing()]

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(listing, range(num_ranks)))


def test_ranks_fetch_each_shard_once_several_at_a_time_and_never_again_to_know_what_it_holds(
    tmp_path: Path, store: ThrottledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTLINE_CACHE_GB", str(16.5 * len(tiny_shard(0)) / 1e9))
    store.seconds = 0.02
    listings = opened_by_ranks(tmp_path, 4)
    assert store.asked == dict.fromkeys(store.shards, 1), "each once, though the cache has dropped half of them"
    assert 2 < store.most_at_once <= 4 * 2
    alone = [*TINY.open().listing()]
    assert listings == [alone] * 4
    store.asked.clear()
    assert opened_by_ranks(tmp_path, 2) == [alone] * 2
    assert not store.asked, "a later start fetches nothing"
    store.tag = "b"
    monkeypatch.setenv("LATENTLINE_CACHE", str(tmp_path / "other"))
    opened_by_ranks(tmp_path, 1)
    assert store.asked == dict.fromkeys(store.shards, 1), "of a new version nothing is known"


def test_fetches_wait_for_each_other_where_the_cache_has_no_room_for_all(
    store: ThrottledStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTLINE_CACHE_GB", str(3.5 * len(tiny_shard(0)) / 1e9))
    monkeypatch.setattr("data.shards.remote.POLL_SECONDS", 0.01)
    store.seconds = 0.02
    assert TINY.open().count("train") > 0
    assert 2 <= store.most_at_once <= 3


def test_one_process_fetches_several_shards_at_a_time(store: ThrottledStore) -> None:
    store.seconds = 0.1
    source = TINY.open()
    assert 2 < store.most_at_once <= SCANS_AT_ONCE
    keys = [source.samples_of(number, split) for number in range(32) for split in ("train", "val")]
    assert sorted(found.key for each in keys for _, found in each) == [
        f"s{number:03}-{row}" for number in range(32) for row in range(5)
    ]


def test_keys_that_shards_share_are_found_without_fetching_these_again(tmp_path: Path, store: ThrottledStore) -> None:
    store.shards["s3://b/031.tar"] = store.shards["s3://b/007.tar"]
    opened_by_ranks(tmp_path, 2)
    assert set(store.asked.values()) == {1}
    source = TINY.open()
    late = [found.reason for split in ("train", "val") for _, found in source.samples_of(31, split)]
    assert late == ["duplicate_key"] * 5
    assert {found.reason for split in ("train", "val") for _, found in source.samples_of(7, split)} == {"missing_image"}


def test_a_damaged_scan_is_named_with_the_way_out(tmp_path: Path, store: ThrottledStore) -> None:
    before = opened_by_ranks(tmp_path, 1)
    kept = min((tmp_path / "scans").glob("*.keys"))
    for damaged in (kept.read_bytes()[:-8], b"", None):
        kept.write_bytes(damaged) if damaged is not None else kept.unlink()
        with pytest.raises(ValueError, match=rf"{kept} is missing or damaged. Delete .*{kept.stem}.json"):
            opened_by_ranks(tmp_path, 1)
        kept.with_suffix(".json").unlink()
        assert opened_by_ranks(tmp_path, 1) == before


def test_a_version_that_the_service_does_not_tell_is_unlike_any_other(store: ThrottledStore) -> None:
    store.tag = ""
    assert len({found_shards(["s3://b/000.tar"])[0].scan_name("ignored") for _ in range(3)}) == 3

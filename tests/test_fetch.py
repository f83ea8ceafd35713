"""Objects read in parts: the same bytes whatever fails meanwhile, and a bad part costs that part."""

from __future__ import annotations

import functools
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Plan, always, at_random
from remote_shards import put
from s3_servers import KEYS, s3_server

from latentclip import fetch as module
from latentclip.fetch import AT_ONCE, fetch
from latentclip.records import ShardCorrupt, ShardMissing
from latentclip.source import read_remote
from latentclip.storage import Folder

PART = 1000


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(request.param, tmp_path_factory.mktemp("server")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a folder of this test's own; parts are small."""
    monkeypatch.setattr(module, "PART", PART)
    for name, value in {**KEYS, "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT": server}.items():
        monkeypatch.setenv(name, value)
    return "s3://latents/" + re.sub(r"\W+", "-", request.node.name)


def through(server: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    proxy = FaultProxy(server, plan)
    monkeypatch.setenv("AWS_ENDPOINT", proxy.url)
    return proxy


@pytest.mark.parametrize("size", [1, PART - 1, PART, PART + 1, 3 * PART, 20 * PART + 7])
def test_the_parts_are_the_object(size: int, bucket: str) -> None:
    [info] = put(bucket, size=size)
    data = read_remote(info)
    assert data.readonly
    assert data == Folder(bucket).read(info.name)


def test_other_file_systems_and_plain_servers(tmp_path: Path) -> None:
    [info] = put("memory://fetch", size=3 * PART + 1)
    data = Folder("memory://fetch").read(info.name)
    assert read_remote(info) == data
    (tmp_path / info.name).write_bytes(data)
    handler = functools.partial(_Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:  # it has no ranges
        thread = threading.Thread(target=plain.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            assert read_remote(replace(info, url=f"http://127.0.0.1:{plain.server_port}/{info.name}")) == data
        finally:
            plain.shutdown()
            thread.join()


FORKED = """
import os, signal
from latentclip.fetch import fetch
from latentclip.storage import Folder
Folder("memory://forked").replace("one", b"1234")
def read():
    parts = []
    fetch("memory://forked/one", 4, lambda start, part: parts.append(bytes(part)))
    assert parts == [b"1234"]
read()
child = os.fork()
if not child:
    signal.alarm(60)
read()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=120)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


def test_several_parts_are_read_at_a_time(bucket: str) -> None:
    [info] = put(bucket, size=2 * AT_ONCE * PART)
    together = threading.Barrier(AT_ONCE)
    fetch(info.url, info.bytes, lambda start, part: together.wait(30))


@pytest.mark.parametrize("fault", ["refuse", "reset", "truncate"])
def test_a_bad_part_costs_that_part(fault: str, server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [info] = put(bucket, size=20 * PART)
    with through(server, always(fault, "GET", times=3), monkeypatch) as proxy:  # type: ignore[arg-type]
        read_remote(info)
    assert len(proxy.faults) == 3
    assert proxy.requests == 1 + 20 + 3


def test_a_bad_day_changes_no_byte(server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [info] = put(bucket, size=200 * PART)
    plan = at_random(seed=3, refuse=0.05, reset=0.02, truncate=0.02)
    with through(server, plan, monkeypatch) as proxy:
        assert read_remote(info) == Folder(bucket).read(info.name)
    assert {fault for fault, _ in proxy.faults} == {"refuse", "reset", "truncate"}


@pytest.mark.timeout(60)
def test_a_part_that_hangs_is_asked_for_once_more(server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "2s")
    [info] = put(bucket, size=10 * PART)
    with through(server, always("hang", "GET", times=1), monkeypatch) as proxy:
        read_remote(info)
    assert len(proxy.faults) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["refuse", "hang", "drip", "truncate"])
def test_a_lasting_fault_names_the_object(
    fault: str, server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTCLIP_STORE_SECONDS", "2")
    [info] = put(bucket, size=3 * PART)
    with (
        through(server, always(fault, "GET"), monkeypatch),  # type: ignore[arg-type]
        pytest.raises(OSError, match=f"{info.url}: "),
    ):
        read_remote(info)
    monkeypatch.setenv("AWS_ENDPOINT", server)
    assert read_remote(info), "the threads are free again"


def test_what_is_not_the_shard_is_named(bucket: str) -> None:
    [info] = put(bucket, size=2 * PART)
    with pytest.raises(ShardMissing, match=f"{bucket}/absent is missing; restore it"):
        read_remote(replace(info, url=f"{bucket}/absent"))
    for size in (2 * PART - 1, 2 * PART + 1):
        with pytest.raises(ShardCorrupt, match=f"{info.url} holds {2 * PART} bytes, its record says {size}"):
            read_remote(replace(info, bytes=size))
    with pytest.raises(ShardCorrupt, match=f"{info.url} was changed"):
        read_remote(replace(info, sha256="0" * 64))

"""Encoding from and into real S3 servers behind a proxy that loses, cuts, delays and refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from demo_pairs import emoji_shards
from encoded import content, encode_all
from fault_proxy import FaultProxy, Plan, always, at_random
from s3_servers import KEYS, s3_server

from latentclip._deadline import deadline_seconds
from latentclip.errors import UsageError
from latentclip.storage import Folder
from latentclip.verify import verify

SHARDS = 4


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(request.param, tmp_path_factory.mktemp("server")) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji_shards(tmp_path_factory.mktemp("pairs"), shards=SHARDS, rows=4)


@pytest.fixture(scope="module")
def expected(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    latents = tmp_path_factory.mktemp("expected")
    encode_all(pairs, latents)
    return content(latents)


@pytest.fixture(autouse=True)
def bucket(server: str, pairs: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a folder of this test's own, and pairs in the bucket."""
    for name, value in {**KEYS, "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT": server}.items():
        monkeypatch.setenv(name, value)
    for shard in pairs.iterdir():
        Folder("s3://latents/pairs").create(shard.name, shard.read_bytes())
    return "s3://latents/" + re.sub(r"\W+", "-", request.node.name)


def encode_through(proxy: FaultProxy, bucket: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", proxy.url)
        encode_all("s3://latents/pairs", bucket)


@pytest.mark.parametrize(
    "plan",
    [
        lambda: at_random(seed=1, refuse=0.05, reset=0.02, truncate=0.02, lose=0.02),
        lambda: at_random(seed=2, refuse=0.1, reset=0.1, truncate=0.1, lose=0.1),
        lambda: always("lose", "PUT", times=4),
    ],
    ids=["faults of a bad day", "four times as many", "lost acknowledgements"],
)
def test_passing_faults_change_no_byte(
    plan: Callable[[], Plan], server: str, bucket: str, expected: dict[str, bytes]
) -> None:
    with FaultProxy(server, plan()) as proxy:
        encode_through(proxy, bucket)
    assert len(proxy.faults) >= 2
    assert content(bucket) == expected
    assert verify(bucket).state == "complete"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_request_that_hangs_is_made_once_more(
    fault: str, server: str, bucket: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "3s")
    plan = always("hang", "PUT", ".parquet", times=1) if fault == "hang" else always("drip", "GET", ".tar", times=1)
    with FaultProxy(server, plan) as proxy:
        encode_through(proxy, bucket)
    assert [name for name, _ in proxy.faults] == [fault]
    assert content(bucket) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (always("hang", "PUT", "00001.parquet"), "00001.parquet"),
        (always("hang", "PUT", "00001.record.json"), "00001.record.json"),
        (always("hang", "HEAD", "00001.parquet"), "00001.parquet"),
        (always("drip", "GET", "pairs/00001.tar"), "00001.tar"),
        (always("refuse", "PUT", "00001.parquet"), "00001.parquet"),
        (always("lose", "PUT", "00001.record.json"), "00001.record.json"),
    ],
    ids=["data hangs", "record hangs", "question hangs", "pairs drip", "data refused", "record never acknowledged"],
)
def test_lasting_faults_name_the_object_and_a_rerun_completes(
    plan: Plan, name: str, server: str, bucket: str, expected: dict[str, bytes]
) -> None:
    with FaultProxy(server, plan) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTCLIP_STORE_SECONDS", "3")
        with pytest.raises(OSError, match=rf"s3://latents/.*/{name}: "):
            encode_through(proxy, bucket)
        assert content(bucket).items() <= expected.items(), "something partial is visible"
    encode_all("s3://latents/pairs", bucket)
    assert content(bucket) == expected


def test_two_jobs_at_once_agree(server: str, bucket: str, expected: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(2) as jobs:
        records = list(jobs.map(lambda _: encode_all("s3://latents/pairs", bucket), range(2)))
    assert records[0] == records[1]
    assert content(bucket) == expected


def test_a_folder_emptied_again_has_no_names(bucket: str) -> None:
    folder = Folder(bucket)
    folder.create("a", b"1")
    folder.delete("a")
    assert folder.names() == []


def test_an_operation_ends_within_a_minute_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deadline_seconds() <= 60
    for value in ("soon", "0", "inf", "nan"):
        monkeypatch.setenv("LATENTCLIP_STORE_SECONDS", value)
        with pytest.raises(UsageError, match="give a number of seconds"):
            Folder("s3://latents/x")

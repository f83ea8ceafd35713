import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_shards import JPEG, read_tar

from latentclip.errors import UsageError
from latentclip.images import open_image
from latentclip.pairs import Pair, PairShard, Refusal, ShardUnreadable
from latentclip.rejects import Reason

SHARED = (folder / "shared" / "data" / "pairs" / "caltech24" for folder in Path(__file__).parents)
PHOTOS = next(filter(Path.is_dir, SHARED), None)


def test_img2dataset_statistics_show_what_is_missing(tmp_path: Path) -> None:
    stats = tmp_path / "00042_stats.json"
    whole = hostile.tar(*hostile.sample("a"), *hostile.sample("b"))
    stats.write_text(json.dumps({"count": 9, "successes": 4}))
    shard, items = read_tar(tmp_path, whole)
    assert shard.truncated
    assert items[2:] == [Refusal("", Reason.TRUNCATED)] * 2
    for text in ('{"successes": 2}', '{"successes": 1}', "{", "[]", "{}", '{"successes": "5"}', '{"successes": 1e12}'):
        stats.write_text(text)
        shard, items = read_tar(tmp_path, whole)
        assert (shard.truncated, len(items)) == (False, 2), text
    stats.write_text(f'{{"successes": {10**12}}}')
    assert len(read_tar(tmp_path, whole)[1]) == 2


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("zero.tar", b"", "no uncompressed tar"),
        ("html.tar", b"<html>" * 500, "no uncompressed tar"),
        ("gz.tar", gzip.compress(hostile.tar(*hostile.sample("a"))), "no uncompressed tar"),
        ("half-header.tar", hostile.tar(*hostile.sample("a"))[:300], "no uncompressed tar"),
        ("zero.parquet", b"", "no sound Parquet"),
        ("magic.parquet", b"PAR1", "no sound Parquet"),
        ("magics.parquet", b"PAR1" + bytes(20) + b"PAR1", "no sound Parquet"),
        ("shard.zip", b"PK", "ends in none of .tar, .parquet"),
    ],
)
def test_unreadable_shards_are_named_with_the_reason(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ShardUnreadable, match=f"{name}: .*{why}") as caught:
        list(PairShard(tmp_path / name))
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize("url", ["absent.tar", "pipe:echo x > hit; cat x.tar", "file:///absent/x.tar"])
def test_absent_shards_are_named_and_no_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    shard = PairShard(url)
    with pytest.raises(ShardUnreadable, match=r"cannot read the pair shard .*No such file"):
        list(shard)
    with pytest.raises(ShardUnreadable, match="No such file"):
        _ = shard.size
    assert not list(tmp_path.iterdir())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.data())
def test_any_bytes_give_items_or_unreadable(tmp_path: Path, source: st.DataObject) -> None:
    suffix = source.draw(st.sampled_from([".tar", ".parquet"]))
    path = tmp_path / f"x{suffix}"
    if suffix == ".tar":
        data = bytearray(hostile.tar(*hostile.sample("a"), *hostile.sample("\u72d7" * 60), ("a.json", b"{}")))
    else:
        pq.write_table(pa.table({"key": ["a"], "jpg": [JPEG], "txt": ["t"], "n": [1]}), path)
        data = bytearray(path.read_bytes())
    for _ in range(source.draw(st.integers(0, 4))):
        data[source.draw(st.integers(0, len(data) - 1))] = source.draw(st.integers(0, 255))
    random = source.draw(st.booleans())
    path.write_bytes(
        source.draw(st.binary(max_size=2000)) if random else data[: source.draw(st.integers(0, len(data)))]
    )
    try:
        items = list(PairShard(path))
    except ShardUnreadable:
        return
    assert all(isinstance(item, Pair | Refusal) for item in items)


@pytest.mark.skipif(PHOTOS is None, reason="needs the shared photos, which a plain clone lacks")
def test_real_photos_are_all_read() -> None:
    assert PHOTOS is not None
    pairs: list[Pair] = []
    for path in sorted(PHOTOS.glob("*.tar")):
        shard = PairShard(path)
        items = list(shard)
        assert not shard.truncated
        pairs += [item for item in items if isinstance(item, Pair)]
        assert len(pairs) % 240 == 0
    assert len(pairs) == len({pair.key for pair in pairs}) == 960
    assert set(Counter(pair.metadata["label"] for pair in pairs).values()) == {40}
    assert len({pair.metadata["label"] for pair in pairs}) == 24
    assert all(open_image(pair.image).mode == "RGB" for pair in pairs[::40])


@pytest.fixture
def image_server(tmp_path: Path) -> Iterator[str]:
    """A loopback web server of four images and a page named .jpg; its address."""
    site = tmp_path / "site"
    site.mkdir()
    for i in range(4):
        (site / f"{i}.jpg").write_bytes(hostile.encode(hostile.picture(64 + i, 64), "JPEG"))
    (site / "4.jpg").write_text("<html></html>")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


IMG2DATASET = """
import sys
from img2dataset import download
if __name__ == "__main__":
    for form in ("webdataset", "parquet"):
        download(url_list=sys.argv[1], output_folder=sys.argv[2] + form, output_format=form, input_format="csv",
                 url_col="url", caption_col="caption", save_additional_columns=["label"], image_size=32,
                 processes_count=1, thread_count=2, number_sample_per_shard=10)
"""


@pytest.mark.slow
def test_what_img2dataset_writes_is_read(tmp_path: Path, image_server: str) -> None:
    rows = [f"{image_server}/{i}.jpg,caption {i},{i * 11}" for i in range(5)]
    (tmp_path / "urls.csv").write_text("\n".join(["url,caption,label", *rows]))
    (tmp_path / "program.py").write_text(IMG2DATASET)
    command = [sys.executable, *(f"{tmp_path}/{name}" for name in ("program.py", "urls.csv", ""))]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "no_proxy": "127.0.0.1"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment, cwd=tmp_path)
    for url in ("webdataset/00000.tar", "parquet/00000.parquet"):
        items = list(PairShard(tmp_path / url))
        pairs = sorted((item for item in items if isinstance(item, Pair)), key=lambda pair: pair.key)
        assert [(pair.caption, pair.metadata["label"]) for pair in pairs] == [
            (f"caption {i}", i * 11) for i in range(4)
        ]
        assert all(open_image(pair.image).size == (32, 32) for pair in pairs)
        refused = [item.reason for item in items if isinstance(item, Refusal)]
        assert refused == ([Reason.IMAGE_MISSING] if url.startswith("parquet") else [])
    clipped = tmp_path / "webdataset" / "00000.tar"
    clipped.write_bytes(clipped.read_bytes()[:8000])
    shard = PairShard(clipped)
    assert len(list(shard)) == 4
    assert shard.truncated

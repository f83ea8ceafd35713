import datetime
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentclip.errors import UsageError
from latentclip.images import open_image
from latentclip.pairs import Pair, PairColumns, PairShard, Refusal, ShardUnreadable
from latentclip.rejects import Reason

SHARED = (folder / "shared" / "data" / "pairs" / "caltech24" for folder in Path(__file__).parents)
PHOTOS = next(filter(Path.is_dir, SHARED), None)
JPEG = b"\xff\xd8\xff"


def read_tar(folder: Path, data: bytes, **options: Any) -> tuple[PairShard, list[Pair | Refusal]]:
    (folder / "00042.tar").write_bytes(data)
    shard = PairShard(folder / "00042.tar", **options)
    items = list(shard)
    assert shard.planned == len(items)
    assert shard.size == len(data)
    return shard, items


def read_parquet(folder: Path, table: pa.Table, **options: Any) -> list[Pair | Refusal]:
    pq.write_table(table, folder / "00007.parquet")
    return list(PairShard(folder / "00007.parquet", **options))


def summary(items: list[Pair | Refusal]) -> list[tuple[str, Any]]:
    return [(item.key, item.caption if isinstance(item, Pair) else item.reason) for item in items]


def test_tar_gives_pairs_in_order_of_first_appearance(tmp_path: Path) -> None:
    members = [
        ("b.JPG", JPEG),
        ("a.txt", b"an  a"),
        ("b.json", json.dumps({"key": "b", "caption": "of json", "label": 3, "nan": float("nan")}).encode()),
        ("dir/c.png", b"png"),
        ("b.txt", b"a b"),
        ("dir/c.json", b'{"text": "a c", "width": 7}'),
        ("a.jpg", b"a"),
    ]
    shard, items = read_tar(tmp_path, hostile.tar(*members))
    assert (shard.name, shard.stem, shard.truncated) == ("00042.tar", "00042", False)
    assert items == [
        Pair("b", JPEG, "a b", {"label": 3, "nan": None}),
        Pair("a", b"a", "an a", {}),
        Pair("dir/c", b"png", "a c", {"width": 7}),
    ]
    assert list(shard) == items
    assert list(PairShard((tmp_path / "00042.tar").as_uri())) == items


def test_tar_refuses_samples_by_reason(tmp_path: Path) -> None:
    deep = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    members = [
        ("no-image.txt", b"text"),
        ("no-image-either.json", b'{"caption": "x"}'),
        ("no-caption.jpg", JPEG),
        ("null-caption.jpg", JPEG),
        ("null-caption.json", b'{"caption": null}'),
        ("blank.jpg", JPEG),
        ("blank.txt", b" "),
        ("surrogate.jpg", JPEG),
        ("surrogate.json", b'{"caption": "\\ud800"}'),
        ("latin1.jpg", JPEG),
        ("latin1.txt", b"\xe9"),
        *hostile.sample("broken"),
        ("broken.json", b"{"),
        *hostile.sample("list"),
        ("list.json", b"[]"),
        *hostile.sample("deep"),
        ("deep.json", deep),
        *hostile.sample("long", "x" * 2**20 + "x"),
        *hostile.sample("large", image=bytes(1001)),
        *hostile.sample("good", image=bytes(1000)),
    ]
    _, items = read_tar(tmp_path, hostile.tar(*members), max_image_bytes=1000)
    assert summary(items) == [
        ("no-image", Reason.IMAGE_MISSING),
        ("no-image-either", Reason.IMAGE_MISSING),
        ("no-caption", Reason.CAPTION_MISSING),
        ("null-caption", Reason.CAPTION_MISSING),
        ("blank", Reason.CAPTION_EMPTY),
        ("surrogate", Reason.CAPTION_ENCODING),
        ("latin1", Reason.CAPTION_ENCODING),
        ("broken", Reason.METADATA_BROKEN),
        ("list", Reason.METADATA_BROKEN),
        ("deep", Reason.METADATA_BROKEN),
        ("long", Reason.CAPTION_TOO_LONG),
        ("large", Reason.IMAGE_TOO_LARGE),
        ("good", "a picture"),
    ]


def test_tar_duplicates_are_refused_once_a_sample(tmp_path: Path) -> None:
    members = [
        *hostile.sample("a", "first"),
        *hostile.sample("b"),
        *hostile.sample("a", "second"),
        ("a.txt", b"third"),
    ]
    _, items = read_tar(tmp_path, hostile.tar(*members))
    assert summary(items) == [
        ("a", "first"),
        ("a", Reason.DUPLICATE_KEY),
        ("a", Reason.DUPLICATE_KEY),
        ("b", "a picture"),
    ]


@pytest.mark.parametrize("key", ["", "dir/", "a\nb", "a\x7f", "x" * 513, "../../etc/passwd", "/etc/passwd", "a\udcff"])
def test_invalid_keys_are_refused_in_printable_form(tmp_path: Path, key: str) -> None:
    _, items = read_tar(tmp_path, hostile.tar(*hostile.sample(key), *hostile.sample("x" * 512)))
    assert [getattr(item, "reason", None) for item in items] == [Reason.KEY_INVALID, None]
    assert items[0].key.isascii()
    assert items[0].key.isprintable()


def test_tar_links_devices_code_and_junk_are_never_touched(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        hostile.link("a.txt", str(secret)),
        hostile.link("a.jpg", "b.jpg", tarfile.LNKTYPE),
        hostile.link("fifo.jpg", "", tarfile.FIFOTYPE),
        hostile.link("device.txt", "", tarfile.CHRTYPE),
        hostile.link("folder.jpg", "", tarfile.DIRTYPE),
        *hostile.sample("b"),
        ("b.pyd", b"import os"),
        ("b.pkl", b"cos\nsystem\n"),
        ("code.pth", b"x"),
        ("__MACOSX/._b.jpg", b"x"),
        ("._b.jpg", b"x"),
        (".DS_Store", b"x"),
        ("README", b"x"),
    ]
    _, items = read_tar(tmp_path, hostile.tar(*members))
    assert summary(items) == [("b", "a picture")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00042.tar", "secret.txt"]


def test_long_and_unicode_names_are_read(tmp_path: Path) -> None:
    keys = ["x" * 300, "\u72d7/" + "y" * 150, "./000"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name, data in (member for key in keys for member in hostile.sample(key)):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        assert summary(read_tar(tmp_path, out.getvalue())[1]) == [(key, "a picture") for key in keys]


def test_every_cut_of_a_tar_is_noticed_and_loses_only_what_is_cut(tmp_path: Path) -> None:
    image = bytes(700)
    members = [member for key in "abc" for member in hostile.sample(key, f"an {key}", image)]
    whole = hostile.tar(*members)
    content_end = 3 * (512 + 1024 + 512 + 512)
    pairs = [Pair(key, image, f"an {key}", {}) for key in "abc"]
    for cut in range(512, content_end, 128):
        shard, items = read_tar(tmp_path, whole[:cut])
        assert shard.truncated, cut
        kept = [item for item in items if isinstance(item, Pair)]
        assert kept == pairs[: len(kept)], cut
        if cut >= 2560 + 512:  # a lone sample may lack a member; it takes a second one to know
            assert len(kept) >= cut // 2560, cut
        assert [item.key for item in items] == list("abc")[: len(items)]
        refused = [item.reason for item in items if isinstance(item, Refusal)]
        assert refused in ([], [Reason.TRUNCATED]), cut
    shard, items = read_tar(tmp_path, whole[:content_end])
    assert (shard.truncated, items) == (True, pairs), "cut before the end mark"
    for cut in (content_end + 512, content_end + 700, len(whole)):
        shard, items = read_tar(tmp_path, whole[:cut])
        assert (shard.truncated, items) == (False, pairs), "nothing but padding is lost"


def test_a_corrupt_header_and_concatenated_tars_count_as_truncated(tmp_path: Path) -> None:
    first, second = hostile.tar(*hostile.sample("a"), *hostile.sample("b")), hostile.tar(*hostile.sample("c"))
    corrupt = bytearray(first)
    corrupt[2048] ^= 1
    shard, items = read_tar(tmp_path, bytes(corrupt))
    assert (shard.truncated, summary(items)) == (True, [("a", Reason.TRUNCATED)])
    shard, items = read_tar(tmp_path, first + second)
    assert (shard.truncated, summary(items)) == (True, [("a", "a picture"), ("b", "a picture")])


def test_a_negative_size_does_not_loop(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.jpg")
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    shard, items = read_tar(tmp_path, hostile.tar(*hostile.sample("b"))[:2048] + bytes(block) + bytes(1024))
    assert shard.truncated
    assert len(items) == 1


def test_a_chain_of_long_names_ends(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (header.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 5000
    shard, items = read_tar(tmp_path, hostile.tar(*hostile.sample("a"), *hostile.sample("b"))[:4096] + chain)
    assert shard.truncated
    assert summary(items) == [("a", "a picture"), ("b", "a picture")]


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


def test_an_empty_tar_is_a_shard_without_pairs(tmp_path: Path) -> None:
    shard, items = read_tar(tmp_path, hostile.tar())
    assert (shard.truncated, items) == (False, [])


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


def test_parquet_of_img2dataset_layout(tmp_path: Path) -> None:
    table = pa.table(
        {
            "url": ["u0", "u1", "u2", "u3", "u4"],
            "key": ["0", "1", None, "0", "a\0"],
            "status": ["success", "failed_to_download", "success", "success", "success"],
            "caption": ["a", "b", "c", "d", "e"],
            "similarity": [0.5, None, float("nan"), 1.0, 1.0],
            "jpg": pa.array([JPEG, None, JPEG, JPEG, JPEG], pa.binary()),
            "txt": ["an a", None, "a c", "a d", "an e"],
        }
    )
    assert read_parquet(tmp_path, table) == [
        Pair("0", JPEG, "an a", {"url": "u0", "status": "success", "similarity": 0.5}),
        Refusal("1", Reason.IMAGE_MISSING),
        Refusal("00007-000000002", Reason.KEY_INVALID),
        Refusal("0", Reason.DUPLICATE_KEY),
        Refusal("a\\x00", Reason.KEY_INVALID),
    ]


def test_parquet_of_hugging_face_layout(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": "/etc/passwd"}, None]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": pa.array(["a", "b", "c"]).dictionary_encode(),
            "mask": pa.array([{"bytes": b"m", "path": ""}] * 3),
            "embedding": pa.array([b"e"] * 3, pa.large_binary()),
            "tags": [["x", "y"], [], None],
            "when": [datetime.date(2024, 2, 29)] * 3,
            "price": [Decimal("1.50")] * 3,
        }
    )
    assert read_parquet(tmp_path, table) == [
        Pair("00007-000000000", JPEG, "a", {"tags": ["x", "y"], "when": "2024-02-29", "price": "1.50"}),
        Refusal("00007-000000001", Reason.IMAGE_MISSING),
        Refusal("00007-000000002", Reason.IMAGE_MISSING),
    ]


def test_parquet_columns_can_be_named(tmp_path: Path) -> None:
    table = pa.table({"image": ["path.jpg"], "photo": [JPEG], "alt": ["an alt"], "caption": ["x"], "id": [17]})
    columns = PairColumns(image=("image", "photo"), caption=("alt",), key="id")
    assert read_parquet(tmp_path, table, columns=columns) == [Pair("17", JPEG, "an alt", {"image": "path.jpg"})]


def test_parquet_rows_with_invalid_utf8_cost_only_themselves(tmp_path: Path) -> None:
    def broken(*values: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())

    table = pa.table(
        {
            "key": broken(b"\xff", b"1", b"2", b"3"),
            "txt": broken(b"a", b"\xff", b"b", b"c"),
            "jpg": [JPEG] * 4,
            "site": broken(b"s", b"s", b"\xff", b"s"),
        }
    )
    assert summary(read_parquet(tmp_path, table)) == [
        ("\\udcff", Reason.KEY_INVALID),
        ("1", Reason.CAPTION_ENCODING),
        ("2", Reason.METADATA_BROKEN),
        ("3", "c"),
    ]


@pytest.mark.parametrize(
    ("columns", "option"),
    [({"txt": ["a"], "image": ["path.jpg"]}, "--columns.image"), ({"jpg": [JPEG], "label": [1]}, "--columns.caption")],
)
def test_parquet_without_a_needed_column_says_what_to_pass(
    tmp_path: Path, columns: dict[str, Any], option: str
) -> None:
    with pytest.raises(ShardUnreadable, match=f"it has {next(iter(columns))} .*: pass {option} NAME"):
        read_parquet(tmp_path, pa.table(columns))


def test_parquet_page_flips_are_noticed_where_pages_have_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"jpg": [os.urandom(5000) for _ in range(8)], "txt": ["a"] * 8})
    pq.write_table(table, path, compression="none", write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardUnreadable, match=r"x\.parquet: it is no sound Parquet file .*CRC"):
        list(PairShard(path))


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

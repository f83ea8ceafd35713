import io
import json
import tarfile
from pathlib import Path

import hostile
import pytest
from pair_shards import JPEG, read_tar, summary

from latentclip.pairs import Pair, PairShard, Refusal
from latentclip.rejects import Reason


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


def test_an_empty_tar_is_a_shard_without_pairs(tmp_path: Path) -> None:
    shard, items = read_tar(tmp_path, hostile.tar())
    assert (shard.truncated, items) == (False, [])

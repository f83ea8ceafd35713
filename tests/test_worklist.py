from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from latentclip._local_store import LocalStore
from latentclip.errors import UsageError
from latentclip.storage import LIST_PAGE, Folder, list_shards
from latentclip.worklist import remaining_shards

ROOT = Path(__file__).parents[1]


def many(folder: Path, count: int = LIST_PAGE + 1) -> list[str]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.tar" for number in range(count)]
    for path in paths:
        path.touch()
    return [str(path) for path in paths]


def test_the_shards_without_a_record_are_left_and_nothing_is_opened(tmp_path: Path) -> None:
    pairs = many(tmp_path / "pairs", 4)
    latents = tmp_path / "latents"
    latents.mkdir()
    for name in ("00000.record.json", "00002.g1.record.json", "00003.parquet", "00001.log.json"):
        (latents / name).touch()  # empty: whoever opened one would fail
    assert remaining_shards(tmp_path / "pairs", Folder(latents)) == (pairs, [pairs[1], pairs[3]])
    assert remaining_shards(tmp_path / "pairs", Folder(tmp_path / "absent")) == (pairs, pairs)


def test_a_long_list_says_what_a_short_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = many(tmp_path / "pairs")
    few = many(tmp_path / "more", 3)
    for path in few:  # other names, or they would be two shards of one name
        Path(path).rename(path.replace("0000", "few"))
    few = [path.replace("0000", "few") for path in few]
    (tmp_path / "list.txt").write_text("\n".join([*paths, *few]))
    assert list_shards(tmp_path / "list.txt", (".tar",)) == [*paths, *few]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("\n".join(f"pairs/{Path(path).name}" for path in paths))
    assert list_shards("list.txt", (".tar",)) == paths
    monkeypatch.chdir(tmp_path / "pairs")
    (tmp_path / "list.txt").write_text("\n".join(Path(path).name for path in paths))
    assert list_shards(tmp_path / "list.txt", (".tar",)) == paths
    (tmp_path / "list.txt").write_text("\n".join([*paths, paths[0]]))
    with pytest.raises(UsageError, match="two shards of one name"):
        list_shards(tmp_path / "list.txt", (".tar",))
    Path(paths[7]).unlink()
    with pytest.raises(UsageError, match=r"00007\.tar does not exist"):
        list_shards(tmp_path / "list.txt", (".tar",))


def test_a_long_list_in_another_store_is_found_by_listing_its_folder() -> None:
    fs = fsspec.filesystem("memory")
    urls = [f"memory://scan/{number:05d}.tar" for number in range(LIST_PAGE)]
    for url in urls:
        fs.pipe_file(url, b"x")
    assert list_shards(",".join(urls), (".tar",)) == urls


@pytest.mark.parametrize("pairs", ["pairs", "pairs/*.tar", "list.txt"])
def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: str) -> None:
    paths = many(tmp_path / "pairs")
    (tmp_path / "list.txt").write_text("\n".join(paths))
    listed: list[str] = []
    names = LocalStore.names

    def counted(store: LocalStore) -> list[str]:
        listed.append(store.path.name)
        return names(store)

    monkeypatch.setattr(LocalStore, "names", counted)
    assert remaining_shards(tmp_path / pairs, Folder(tmp_path / "latents"))[1] == paths
    assert sorted(listed) == ["latents", "pairs", "quarantine"]


def test_the_benchmark_measures_a_scan(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/scan.py", "--records", "30", "--left", "4", "--folder", str(tmp_path)]
    for pairs in ("list", "folder"):
        ran = subprocess.run([*command, "--pairs", pairs], cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"30 finished shards, 4 left, pair shards given as a {pairs}" in ran.stdout
        assert "1 for latents, 1 for pairs" in ran.stdout
    assert list(tmp_path.iterdir()) == []

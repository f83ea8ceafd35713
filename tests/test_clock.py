"""The same bytes by another clock and in another time zone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from demo_pairs import emoji_shards
from encoded import content, encode_all

PROGRAM = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    from encoded import encode_all
    encode_all(sys.argv[2], sys.argv[3], container=sys.argv[4])
    print(time.strftime("%Y-%m-%d %Z"))
    """
)


@pytest.mark.parametrize(
    ("container", "zone", "shift"),
    [("parquet", "Asia/Kathmandu", "+2 days"), ("webdataset", "Pacific/Honolulu", "-2 days")],
)
def test_clock_and_time_zone_change_no_byte(tmp_path: Path, container: str, zone: str, shift: str) -> None:
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed (Debian: apt-get install faketime)")
    pairs = emoji_shards(tmp_path / "pairs", shards=1, rows=5)
    encode_all(pairs, tmp_path / "here", container=container)
    # The time of day alone is shifted: waiting goes by the monotonic clock.
    arguments = [str(Path(__file__).parent), str(pairs), str(tmp_path / "there"), container]
    command = ["faketime", "--exclude-monotonic", shift, sys.executable, "-c", PROGRAM, *arguments]
    told = subprocess.run(command, env={**os.environ, "TZ": zone}, check=True, stdout=subprocess.PIPE, text=True)
    day, name = told.stdout.split()
    assert abs(datetime.fromisoformat(day) - datetime.now()) > timedelta(hours=23)
    assert name not in time.tzname
    assert len(content(tmp_path / "here")) == 3
    assert content(tmp_path / "there") == content(tmp_path / "here")

"""Decoder processes: the same pixels as in this process, and their deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import numpy as np
import pytest

from latentclip import _decoder_process
from latentclip.decoders import DecoderPool, DecodersUnavailable, Preparation
from latentclip.rejects import Reason, Rejected
from latentclip.views import DRAWINGS

PREPARATION = Preparation(image_size=32, resize="pad", views=3, recipe=DRAWINGS)
PICTURE = hostile.encode(hostile.picture(60, 40), "PNG")


@pytest.fixture(scope="module")
def pool() -> DecoderPool:
    return DecoderPool(PREPARATION, size=2)


def test_a_preparation_survives_as_json() -> None:
    assert Preparation.from_json(PREPARATION.to_json()) == PREPARATION


def test_the_pixels_are_those_of_this_process_whoever_decodes(pool: DecoderPool) -> None:
    expected = PREPARATION.prepare("key", PICTURE).pixels
    assert expected.shape == (3, 32, 32, 3)
    with ThreadPoolExecutor(4) as threads:
        for pixels in threads.map(lambda _: pool.prepare("key", PICTURE).pixels, range(40)):
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.IMAGE_EMPTY),
        (b"<html>", Reason.IMAGE_FORMAT),
        (PICTURE[:-30], Reason.IMAGE_BROKEN),
        (hostile.png(30_000, 30_000), Reason.IMAGE_TOO_LARGE),
    ],
)
def test_a_reject_keeps_its_reason_and_its_decoder(data: bytes, reason: Reason, pool: DecoderPool) -> None:
    before = pool.pids
    with pytest.raises(Rejected) as caught:
        pool.prepare("key", data)
    assert (caught.value.reason, pool.pids) == (reason, before)


def test_a_killed_decoder_is_replaced_and_its_image_decoded(pool: DecoderPool) -> None:
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    for _ in range(2):
        np.testing.assert_array_equal(pool.prepare("key", PICTURE).pixels, PREPARATION.prepare("key", PICTURE).pixels)
    assert not set(before) <= set(pool.pids)
    assert len(pool.pids) == 2


@pytest.mark.parametrize(
    ("crash", "reason"),
    [
        ("os.kill(os.getpid(), 9)", Reason.DECODER_DIED),
        ("while True: pass", Reason.IMAGE_TOO_SLOW),
        ("bytearray(8 * 2**30)", Reason.IMAGE_TOO_LARGE),
    ],
)
def test_what_kills_a_decoder_is_refused_alone(
    crash: str, reason: Reason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real program, with one image of it that behaves as a hole in an image library would.
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os
            from latentclip import _decoder_process as program
            program.CPU_SECONDS = 1
            def prepare(self, key, data, original=program.Preparation.prepare):
                if key == "bad":
                    {crash}
                return original(self, key, data)
            program.Preparation.prepare = prepare
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with DecoderPool(PREPARATION, size=1) as pool:
        with pytest.raises(Rejected) as caught:
            pool.prepare("bad", PICTURE)
        assert caught.value.reason is reason
        np.testing.assert_array_equal(pool.prepare("key", PICTURE).pixels, PREPARATION.prepare("key", PICTURE).pixels)


def test_decoders_that_cannot_start_are_no_fault_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecoderPool(PREPARATION, size=1) as pool, pytest.raises(DecodersUnavailable):
        pool.prepare("key", PICTURE)


def test_decoders_end_with_their_parent_even_inside_a_library_that_hangs() -> None:
    program = """
        import os, re, signal, sys
        from latentclip.decoders import DecoderPool, Preparation
        pool = DecoderPool(Preparation(image_size=8), size=2)
        with pool._borrowed(), pool._borrowed():
            print(*pool.pids, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    assert select.select([descriptor], [], [], 10)[0], f"decoder {pid} outlived its parent"
    os.close(descriptor)


def test_a_decoder_imports_no_torch() -> None:
    code = f"import sys, {_decoder_process.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

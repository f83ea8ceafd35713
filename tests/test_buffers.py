"""Memory is lent again once nobody holds it, and not before."""

from __future__ import annotations

from latentclip.buffers import Buffers


def test_memory_that_nobody_holds_is_lent_again() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    place = first.data_ptr()
    del first
    assert buffers.take(1000).data_ptr() == place


def test_memory_that_a_view_holds_is_not_lent() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    first.fill_(7)
    part = first[10:20].view(2, 5)
    del first
    others = [buffers.take(1000).fill_(0) for _ in range(3)]
    assert part.tolist() == [[7] * 5] * 2
    assert len({other.data_ptr() for other in others}) == 3


def test_sizes_do_not_mix() -> None:
    buffers = Buffers()
    del (small := [buffers.take(10)])[0]
    assert small == []
    assert len(buffers.take(20)) == 20

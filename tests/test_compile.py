"""Compiled towers: the numbers of plain ones, to rounding, and still the same ones after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from fits import fit, lines, small_latents

import latentclip


@pytest.mark.slow
# PyTorch hides this warning of its own compiler when it is shown, which comes after an error is made of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_training_is_the_plain_one(tmp_path: Path) -> None:
    latents = small_latents(tmp_path / "latents")
    fit(latents, tmp_path / "plain").run()
    fit(latents, tmp_path / "compiled", compile=True).run()
    fit(latents, tmp_path / "parts", compile=True, until=3).run()
    fit(latents, tmp_path / "parts", compile=True).run()
    assert lines(tmp_path / "parts") == lines(tmp_path / "compiled")
    for mine, theirs in zip(lines(tmp_path / "compiled"), lines(tmp_path / "plain"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert latentclip.load(tmp_path / "compiled").grid == 4

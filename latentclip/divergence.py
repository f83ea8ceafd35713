"""Whether a training whose numbers are all finite has lost its way: the loss has risen, and does not come back.

Large trainings see spikes, most of which pass: PaLM's loss had about 20, each got over by skipping 200 to 500 batches
(Chowdhery et al., 2022, section 5.1). OPT-175B's diverged, and went on from an earlier checkpoint with a lower learning
rate (Zhang et al., 2022, section 2.5). So what counts here is a rise that outlasts a spike. It is judged from losses
alone, which a run's log holds: a training that goes on judges as one that was never stopped.
"""

from __future__ import annotations

import math
from pathlib import Path

SMOOTHED_STEPS = 20
"""Steps over which the loss is smoothed: in its exponential average a step weighs a 20th."""

LARGEST_LIFT = 0.5
"""Share of the rise by which one step lifts the smoothed loss at most, however large its own is."""


class Watch:
    """Sees every loss of a training, in order.

    Args:
        rise: nats by which the smoothed loss is above the lowest it has been when it counts as risen; None for never.
        patience: steps for which it must have been risen, without a pause, for the training to count as diverged.
    """

    def __init__(self, rise: float | None, patience: int) -> None:
        self.rise = math.inf if rise is None else rise
        self.patience = patience
        self.level, self.lowest, self.step = 0.0, math.inf, 0
        self.risen: int | None = None
        """The step from which on the loss has been risen; None while it is not."""
        self.calm = 0
        """The last step at which it was not half as high."""

    def see(self, step: int, loss: float) -> None:
        """Take in the loss of a step."""
        if math.isinf(self.lowest):
            self.level = loss
        self.level += min((loss - self.level) / SMOOTHED_STEPS, LARGEST_LIFT * self.rise)
        self.lowest, self.step = min(self.lowest, self.level), step
        if self.level - self.lowest <= self.rise / 2:
            self.calm = step
        if self.level - self.lowest <= self.rise:
            self.risen = None
        elif self.risen is None:
            self.risen = step

    @property
    def diverged(self) -> bool:
        """Whether the loss has been risen for too long."""
        return self.risen is not None and self.step - self.risen >= self.patience

    @property
    def sound_until(self) -> float:
        """The last step whose checkpoint holds nothing of a rise that is, or may be, under way.

        The smoothed loss follows a jump by the rise or more half the way within 14 steps.
        """
        return math.inf if math.isinf(self.rise) else self.calm - SMOOTHED_STEPS

    def verdict(self, good: Path | None) -> str:
        """The sentence for the user; `good` is the last good checkpoint."""
        source = f" from the last good checkpoint {good}" if good else ""
        return (
            f"the loss, smoothed over {SMOOTHED_STEPS} steps, has been more than {self.rise:g} above its lowest "
            f"({self.lowest:.4g}) since step {self.risen}, and is {self.level:.4g} at step {self.step}: start another "
            f"run{source} with a lower learning rate (--start-from), or go on with --max-rise None"
        )

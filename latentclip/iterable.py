"""The loader as a `torch.utils.data` data set, whose state is one small dictionary.

batches = LatentBatches(loader)
for batch in torch.utils.data.DataLoader(batches, batch_size=None):
    ...
    state = batches.state_dict()
batches.load_state_dict(state)  # in another process, of another rank, at another world size
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from latentclip.errors import UsageError
from latentclip.loader import Batch, LatentLoader


class LatentBatches(IterableDataset[Batch]):
    """The batches of a loader from `start` on: without end, or to the end of the step `stop - 1`.

    Give it to a DataLoader with `batch_size=None` and no workers: the loader's threads read ahead, and a copy of it in
    another process would not know where this one stands.
    """

    def __init__(self, loader: LatentLoader, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        self.loader, self.step, self.stop = loader, start, stop

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UsageError("LatentBatches reads ahead with threads of its own; give the DataLoader num_workers=0")
        with closing(self.loader.batches(self.step)) as batches:
            for step in itertools.count(self.step):
                if self.stop is not None and step >= self.stop:
                    return
                batch = next(batches)
                self.step = step + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The next step, and what the order depends on."""
        return {"step": self.step, **self.loader.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises UsageError if that was in another order."""
        for name, value in self.loader.identity().items():
            if state.get(name) != value:
                raise UsageError(
                    f"the state is of a loader whose {name} is {state.get(name)}, and here it is {value}; "
                    "make the loader as it was, or begin anew"
                )
        self.step = int(state["step"])

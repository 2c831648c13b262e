"""A trace of log.profile=(first, last), steps, for XProf in TensorBoard."""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax

from mt.base import journal
from mt.base import processes


class Profile:
  """Traces steps `first` to `last` of those that this process takes."""

  def __init__(self, workdir: pathlib.Path, steps: Sequence[int]):
    self._folder = workdir / 'tensorboard'
    first, last = steps or (1, 0)
    self._steps = range(first, last + 1) if processes.is_first() else ()
    self._running = False

  def before(self, step: int) -> None:
    """To be called before a step is dispatched."""
    if step in self._steps and not self._running:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def after(self, step: int, made: Any) -> None:
    """To be called once it is dispatched; `made` are arrays that it makes."""
    if self._running and step == self._steps[-1]:
      jax.block_until_ready(made)
      self.close()

  def close(self) -> None:
    """Writes the trace, if one is under way."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      journal.say(f'profile: {self._folder / "plugins" / "profile"}')

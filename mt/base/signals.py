"""Signals and notices while training lasts: save and leave."""

from collections.abc import Iterator
import contextlib
import os
import signal
import subprocess
import threading

import jax

from mt.base import errors
from mt.base import processes

# Seconds between two questions to a command, and until it has to answer.
_PAUSE, _PATIENCE = 5.0, 5.0


class Listener:
  """Knows the signal that asked this process to leave."""

  def __init__(self):
    self._signal = 0
    self._of_all = 0  # What all processes had heard a step ago.

  def hear(self, number: int, _frame) -> None:
    """Notes a signal; a second SIGINT ends the process on the spot."""
    if self._signal and number == signal.SIGINT:
      _tell(2, 'error: interrupted again; not saved')
      os._exit(128 + number)
    self._signal = self._signal or number
    if processes.is_first():
      _tell(
        1,
        f'{signal.Signals(number).name}: the run saves after this step and '
        'leaves; Ctrl-C again leaves at once',
      )

  def watch(self, command: str, ended: threading.Event) -> None:
    """Takes a command that succeeds for SIGTERM; asks it until `ended`."""
    while not ended.wait(_PAUSE):
      if not _status(command):
        self.hear(signal.SIGTERM, None)
        return

  def asked(self) -> int:
    """The signal that any of the processes got, or 0; the same in all.

    To be called before each step. Several processes answer with what they had
    heard one call earlier: an answer of now would wait for the step before.
    """
    if jax.process_count() == 1:
      return self._signal
    before, self._of_all = self._of_all, processes.largest(self._signal)
    return int(before)


def _tell(stream, text):
  """Not a print: the signal may have come in the middle of one."""
  with contextlib.suppress(OSError):
    os.write(stream, f'{text}\n'.encode())


def _status(command):
  """The exit code of a shell command; 1 if it takes too long, and is ended."""
  none = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
  with subprocess.Popen(
    command, shell=True, start_new_session=True, **none
  ) as shell:
    try:
      return shell.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
      return 1
    finally:  # A signal may have come, too.
      if shell.returncode is None:
        os.killpg(shell.pid, signal.SIGKILL)  # With all that it started.


def check_command(command: str) -> None:
  """Refuses a train.preempt_command that there is not; '' is none.

  Raises:
    errors.UserError: the shell cannot run it.
  """
  if command and _status(command) in (126, 127):
    raise errors.UserError(
      f'train.preempt_command is {command!r}, which the shell cannot run; a '
      'command such as `test -e FILE` expected.'
    )


@contextlib.contextmanager
def listening(command: str = '') -> Iterator[Listener]:
  """A Listener that hears signals until the context ends.

  Args:
    command: that of train.preempt_command, asked every few seconds by a thread.
  """
  listener, ended = Listener(), threading.Event()
  if command:
    watch = threading.Thread(target=listener.watch, args=[command, ended])
    watch.daemon = True
    watch.start()
  heard = errors.heard_signals(signal.SIGINT)
  old = {number: signal.signal(number, listener.hear) for number in heard}
  try:
    yield listener
  finally:
    ended.set()
    for number, handler in old.items():
      signal.signal(number, handler)


def leave(number: int, at: int) -> None:
  """Raises errors.Interrupted, with the exit code 128 + the signal's number."""
  word = 'interrupted' if number == signal.SIGINT else 'terminated'
  where = f'at step {at}, which is saved' if at else 'before its first step'
  raise errors.Interrupted(
    f'{word} {where}; the same command goes on from there', 128 + number
  )

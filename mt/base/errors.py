"""What ends a program for a reason: bad input, or a signal.

Anything else that is raised is a bug, and keeps its traceback.
"""

import signal

# Sent where a machine is taken away: by the system, by a terminal that closes,
# and as Slurm's and submitit's warning.
TAKEN_AWAY = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


def heard_signals(*others: signal.Signals) -> list[signal.Signals]:
  """Those of `others` and TAKEN_AWAY that nobody wants ignored.

  As nohup does with SIGHUP, and a shell's script with SIGINT of what it starts
  in the background.
  """
  every = *others, *TAKEN_AWAY
  return [n for n in every if signal.getsignal(n) != signal.SIG_IGN]


class UserError(Exception):
  """Bad input; the message names what was found, expected and what to do.

  It is one line: what a terminal would not show as it is, such as a line break
  in a name, becomes an escape.
  """

  code = 2  # The program's exit code.

  def __init__(self, message: str):
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in message)
    super().__init__(''.join(shown))


class ExitNow(UserError):
  """Something does not come back, and an orderly end would wait for it."""


class Interrupted(Exception):
  """A signal asked the program to end; with its exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code

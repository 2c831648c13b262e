"""The one exception whose text is meant for the person at the terminal."""


class UserError(Exception):
  """Bad input; the message names what was found, expected and what to do.

  Entry points print it as one line on stderr and exit with `EXIT_CODE`.
  """


EXIT_CODE = 2

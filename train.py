"""Fine-tunes Gemma to translate: python train.py --config=configs/….py"""

import pathlib

from absl import flags
from ml_collections import config_flags

from mt import errors

_CONFIG = config_flags.DEFINE_config_file(
  'config', 'configs/gemma3_270m.py', 'Knobs: see configs/default.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Folder of the run; runs/CONFIG where none is given.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'Of several processes: HOST:PORT of process 0, or auto on a cluster.',
)
_PROCESSES = flags.DEFINE_integer('processes', 0, 'How many processes.')
_PROCESS = flags.DEFINE_integer('process', -1, 'Which of them this is, from 0.')
_PLAN = flags.DEFINE_bool(
  'plan', False, 'Only says what the run would take; reads no weights.'
)


def main(argv):
  if len(argv) > 1:
    raise errors.UserError(
      f'{argv[1]!r} is no flag; write --config.knob=value, with the dashes.'
    )
  path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
  if not path.is_file():
    raise errors.UserError(f'--config={path}: no such file; see configs/.')
  if _PLAN.value:
    from mt import plan  # After the flags: --help takes no seconds.

    plan.run(_CONFIG.value)
    return
  from mt import distributed

  distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  from mt import loop

  folder = _WORKDIR.value or pathlib.Path('runs') / path.stem
  with distributed.together():
    loop.run(_CONFIG.value, folder)


if __name__ == '__main__':
  errors.run(main)

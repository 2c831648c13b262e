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


def main(argv):
  if len(argv) > 1:
    raise errors.UserError(
      f'{argv[1]!r} is no flag; write --config.knob=value, with the dashes.'
    )
  path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
  if not path.is_file():
    raise errors.UserError(f'--config={path}: no such file; see configs/.')
  from mt import loop  # After the flags: --help takes no seconds.

  loop.run(_CONFIG.value, _WORKDIR.value or pathlib.Path('runs') / path.stem)


if __name__ == '__main__':
  errors.run(main)

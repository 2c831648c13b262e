"""Fine-tunes Gemma to translate: python train.py --config=configs/….py"""

import pathlib

from absl import flags

from mt import errors

_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Folder of the run; runs/CONFIG where none is given.'
)


def main(argv):
  config, path = errors.read_config(argv)
  from mt import loop  # After the flags: --help takes no seconds.

  loop.run(config, _WORKDIR.value or pathlib.Path('runs') / path.stem)


if __name__ == '__main__':
  errors.define_config()
  errors.run(main)

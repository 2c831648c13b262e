"""Fine-tunes Gemma to translate: python train.py --config=configs/….py"""

import pathlib

from absl import flags

from mt.base import accelerator
from mt.base import cli
from mt.base import errors

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
_ON = flags.DEFINE_string(
  'on',
  '',
  'With --plan: the accelerator that it is for, such as h100, h100:8, v5e:2x4; '
  'the devices here where none is given.',
)
_JSON = flags.DEFINE_bool(
  'json', False, 'With --plan: one JSON object on stdout, the rest on stderr.'
)


def main(_):
  config, path = cli.read_config()
  if config.train.deterministic:
    accelerator.set_deterministic()
  if _PLAN.value:
    if _ON.value:
      from mt.train import targets

      targets.prepare()  # Before anything imports JAX.
    from mt.train import plan  # After the flags: --help takes no seconds.

    plan.run(config, _ON.value, _JSON.value)
    return
  if _ON.value or _JSON.value:
    raise errors.UserError('--on and --json are of --plan, which is not given.')
  from mt.base import processes

  processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  from mt.train import run

  with processes.exit_if_peer_lost():
    run.run(config, _WORKDIR.value or pathlib.Path('runs') / path.stem)


if __name__ == '__main__':
  cli.define_config()
  cli.run(main)

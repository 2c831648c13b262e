"""What a run is made of: each part is made once, before the loop."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any
import zlib

from jax.sharding import Mesh
import ml_collections
import orbax.checkpoint as ocp

from mt.base import recorder as recorder_lib
from mt.base import run_folder
from mt.data import directions
from mt.data import lines
from mt.data import splits
from mt.data import template as template_lib
from mt.evaluate import report
from mt.gemma import parameters
from mt.train import checkpoint
from mt.train import state as state_lib
from mt.train import step
from mt.translate import translator as translator_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """What does not change while a run lasts."""

  config: ml_collections.ConfigDict  # With each `auto` chosen.
  workdir: pathlib.Path  # The folder of the run.
  train_step: Callable[
    [state_lib.TrainState, step.Batch],
    tuple[state_lib.TrainState, step.Metrics],
  ]
  eval_step: Callable[[state_lib.TrainState, step.Batch], step.Metrics]
  translator: translator_lib.Translator  # Of the first direction.
  data: splits.Data
  identity: dict[str, Any]  # Of the pretrained model: checkpoint.identity.
  compared: bool  # Whether this start or one before it compares by chrF.
  checkpoints: ocp.CheckpointManager
  # None until it is known after which step the metrics go on.
  recorder: recorder_lib.Recorder | None
  curves: report.Curves  # Of metrics, for the report.
  mesh: Mesh | None  # None for a single device.
  started: float  # time.monotonic() at the start.

  def translator_of(self, direction: str) -> translator_lib.Translator:
    """The translator of one of the directions of data.pair."""
    config = directions.only(self.config, direction)
    template = template_lib.from_config(config)
    return dataclasses.replace(self.translator, template=template)

  def eval_model(self, state: state_lib.TrainState) -> parameters.Params:
    """The parameters that translate, low-rank factors beside their matrices."""
    return state_lib.model_params(
      self.config.train, state.eval_params, state.frozen
    )

  def translations(self, split: str, name: str) -> pathlib.Path:
    """The file of a split's sources, references or translations."""
    return self.workdir / 'translations' / f'{split}.{name}.txt'

  def newest_checkpoint(self) -> str:
    """For a message: which one there is, once all are written."""
    checkpoint.wait(self.checkpoints)
    at = self.checkpoints.latest_step()
    return (
      f'the newest checkpoint is of step {at}' if at else 'no checkpoint yet'
    )

  def checkpoint_identity(self) -> dict[str, Any]:
    """What a checkpoint of this run must agree with."""
    compared = self.texts_of_chrf() if self.compared else {}
    return self.identity | {
      'texts': self.data.train_texts | compared,
      'data': self.data.train_digest,
      'config': run_folder.step_knobs(self.config),
    }

  def of_chrf(self, split: str) -> list[lines.Pair]:
    """The pairs of validation whose chrF checkpoints are compared by."""
    return self.data.scored[split][: self.config.eval.chrf_pairs or None]

  def texts_of_chrf(self) -> dict[str, int]:
    """CRC-32 of these pairs, under what a message calls them."""
    return {
      f'the text of {name}': zlib.crc32(
        json.dumps([[p.source, p.target] for p in self.of_chrf(name)]).encode()
      )
      for name in directions.named(self.config.data.pair, 'valid')
    }

"""What does not change while a run lasts."""

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh
import ml_collections
import orbax.checkpoint as ocp

from mt.base import events
from mt.base import journal
from mt.base import run_folder
from mt.data import splits
from mt.gemma import lora
from mt.gemma import model
from mt.train import step
from mt.translate import translator as translator_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """A run: its config, its folder, what it reads and what translates.

  Attributes:
    config: see configs/default.py.
    workdir: the run's folder.
    data: see mt/data/splits.py.
    identity: of the pretrained model, see checkpoint.identity.
    checkpoints: Orbax's manager.
    translator: see translator.Translator.
    events: the TensorBoard writer, see mt/base/events.py.
    mesh: of several devices, or None.
    started: time.monotonic() at the start.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  data: splits.Data
  identity: dict[str, Any]
  checkpoints: ocp.CheckpointManager
  translator: translator_lib.Translator
  events: events.Writer
  mesh: Mesh | None
  started: float

  @property
  def checkpoint_identity(self) -> dict[str, Any]:
    return self.identity | {
      'data': self.data.train_digest,
      'config': run_folder.step_knobs(self.config),
    }

  @property
  def metrics_path(self) -> pathlib.Path:
    return self.workdir / 'metrics.jsonl'

  @property
  def scores_path(self) -> pathlib.Path:
    return self.workdir / 'scores.json'


def record(run: Run, line: dict[str, Any]) -> None:
  """Writes the metrics of a step where they are kept."""
  journal.add_metrics(run.metrics_path, line)
  events.add(run.events, line)


def folded(run: Run, state: step.TrainState) -> model.Params:
  """The parameters that translate: low-rank products added in."""
  return lora.fold(
    step.model_params(run.config.train, state.eval_params, state.frozen)
  )

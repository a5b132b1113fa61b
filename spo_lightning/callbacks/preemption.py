"""Ends a run between two iterations when it is told to end, so that it can go on exactly."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException

from spo_lightning.callbacks.checkpoint import IterationCheckpoint, validation_follows
from spo_lightning.module import SPOModule
from spo_lightning.types import PromptBatch

# What schedulers send: SIGTERM (kill, timeout, SLURM, Kubernetes), SIGUSR1 where SLURM is asked to (--signal=USR1@600).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# A scheduler that signals a launcher and its processes, while the launcher passes the signal on, means it once.
ONE_NOTICE_S = 5.0


class NotedSignals(_SignalConnector):
    """Lightning's place for signal handlers, with one that only makes a note.

    Lightning's own run a collective within the handler, where the other ranks are in another one, or save in the middle
    of an iteration. The note counts during ``fit`` from the first iteration on; until then a signal does what it does
    to the program at large.
    """

    noted_at: float | None = None

    def register_signal_handlers(self) -> None:
        """Leave the signals alone."""
        self.received_sigterm = False

    def listen(self) -> None:
        """Take notes until ``teardown`` gives the signals back; without effect outside the main thread."""
        self.noted_at = None
        self._original_handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            self._register_signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Keep the time of the first notice; one that comes later is from somebody who will not wait.

        Raises:
            SIGTERMException: notice was given before.
        """
        if self.noted_at is None:
            self.noted_at = time.monotonic()
        elif time.monotonic() - self.noted_at > ONE_NOTICE_S:
            raise SIGTERMException


class Preemption(Callback):
    """Ends training after the iteration in which a ``STOP_SIGNALS`` arrives, with a checkpoint of that iteration.

    The ranks agree at the end of every iteration, so that all stop after the same one, whichever of them were told. A
    validation that follows the iteration, or in which the signal arrives, is finished first; the checkpoint is written
    before it goes on, in case the time does not suffice. In a run's last iteration there is nothing to stop.

    Needs ``NotedSignals`` in the trainer, as ``SPOTrainer`` has it.
    """

    def __init__(self) -> None:
        self._agreed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen, after a start that is drawn: nothing is worth a checkpoint until then."""
        self._agreed = False
        _signals(trainer).listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Agree; the checkpoint callbacks, which come last, save."""
        self._agree(trainer, pl_module)
        if not validation_follows(trainer, batch.iteration + 1):
            self._stop_if_agreed(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Agree within a validation too: a checkpoint that waits for its end may come too late."""
        self._agree(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where the validation has been waited for."""
        self._stop_if_agreed(trainer)

    def _agree(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask all ranks, until one has been told; then have the checkpoint saved."""
        if self._agreed:
            return
        told = _signals(trainer).noted_at is not None
        self._agreed = any(cast(SPOModule, pl_module).ranks.gather(told))
        for callback in trainer.checkpoint_callbacks:
            if self._agreed and isinstance(callback, IterationCheckpoint):
                callback.request()

    def _stop_if_agreed(self, trainer: Trainer) -> None:
        """Have the loop end by ``SIGTERMException`` once it has logged the iteration's metrics."""
        if self._agreed and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            _signals(trainer).received_sigterm = True


def _signals(trainer: Trainer) -> NotedSignals:
    signals = trainer._signal_connector
    if not isinstance(signals, NotedSignals):
        raise TypeError(f"Preemption needs a trainer with NotedSignals, such as SPOTrainer; this one has {signals!r}")
    return signals

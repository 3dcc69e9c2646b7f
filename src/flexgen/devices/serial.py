"""A device that never computes and copies at the same time, for runs that show what overlap is worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flexgen.base.recorder import COMPUTE, WAITING, Recorder, recorded
from flexgen.devices.base import Device, Event
from flexgen.devices.wrapped import WrappedDevice


class SerialDevice(WrappedDevice):
    """A device on which a copy begins when all computing before it is over, and has ended when the call returns.

    Copies do not overlap with computing as long as the thread that computes submits nothing while another one copies: it waits for
    the weights that `copy_in` brings, and makes all other copies itself.

    Args:
        device: The device.
        recorder: The recorder of the trace, which shows where the computing thread waits for its copies; None without one.
    """

    def __init__(self, device: Device, recorder: Recorder | None = None) -> None:
        super().__init__(device)
        self._recorder = recorder

    def copy_in(self, destination: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        return self._alone(partial(super().copy_in, destination, source, after))

    def copy_in_urgently(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        with recorded(self._recorder, COMPUTE, "wait for a copy", WAITING):
            return self._alone(partial(super().copy_in_urgently, destination, source))

    def copy_out(self, destination: torch.Tensor, source: torch.Tensor) -> Event:
        with recorded(self._recorder, COMPUTE, "wait for a copy", WAITING):
            return self._alone(partial(super().copy_out, destination, source))

    def _alone(self, copy: Callable[[], Event]) -> Event:
        """Make a copy when the device has nothing else to do, and return its completion, which has happened."""
        self.marker().wait()
        event = copy()
        event.wait()
        return event

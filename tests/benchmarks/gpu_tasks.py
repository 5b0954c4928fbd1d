"""Tasks that behave badly, for a worker process to run."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.gpu.session import AbsentError


def number(value, setting, seconds):
    return {"value": value, "process": os.getpid(), "rehearse": setting.rehearse}


def fails(setting, seconds):
    raise ArithmeticError("no good\nsecond line")


def absent(setting, seconds):
    raise AbsentError("needs a package: pip install it")


def dies(setting, seconds):
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(setting, seconds):
    time.sleep(600)

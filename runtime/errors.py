"""Errors of the runtime: each is one line for a person, with the remedy in it.

EngineError                    exit 2
├── ConfigError  (ValueError)  an engine option, model folder or config that can't be served
├── RequestError (ValueError)  a sampling parameter or prompt that can't be served
├── WeightError  (ValueError)  a checkpoint that is damaged or doesn't fit its port
├── PortError    (ValueError)  no port for an architecture, or a port file that can't be used
└── WorkerError                a tensor-parallel process failed
    └── MachineError           it was killed or never started: the machine's doing, whatever it was to run
"""


class EngineError(Exception):
    """What is wrong (`message`) and what to do about it (`remedy`), shown as one line."""

    exit_code = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.message}; {self.remedy}" if self.remedy else self.message
        return " ".join(line.split())


class ConfigError(EngineError, ValueError):
    """An engine option, a model folder or its config can't be served."""


class RequestError(EngineError, ValueError):
    """A sampling parameter or a prompt can't be served."""


class WeightError(EngineError, ValueError):
    """A checkpoint is damaged or does not fit its port."""


class PortError(EngineError, ValueError):
    """No port is known for an architecture, or a port file can't be used."""


class WorkerError(EngineError):
    """A tensor-parallel process failed or died."""


class MachineError(WorkerError):
    """A tensor-parallel process was killed from outside or did not start in time: nothing is said of its model."""

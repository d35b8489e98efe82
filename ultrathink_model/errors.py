"""The typed errors of the package: one class for each kind of failure a user can mend.

Each error says four things: the field, its value, the rule it breaks and the remedy. The command
line turns any `UltrathinkError` into that message and its exit code, without a traceback.
"""

from typing import ClassVar

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_GATE_NOT_MET = 3
EXIT_STOPPED_AFTER_SAVING = 75


class UltrathinkError(Exception):
    """A failure with a remedy that the user can apply."""

    exit_code: ClassVar[int] = EXIT_USER_ERROR


class ConfigError(UltrathinkError):
    """A key, a value or a combination of values in the config that cannot be run."""


class DataError(UltrathinkError):
    """A dataset, a file or a row that cannot be had or read."""


class SourceLostError(DataError):
    """A source that could be read, and then no more: what was prepared of it is kept."""


class TokenizerError(DataError):
    """A tokenizer that cannot be had, or that does not fit the model or the checkpoint."""


class MediaError(DataError):
    """An image or a sound that cannot be used.

    Args:
        rule: What it should keep, as a statement.
        found: What was found in place of that.
    """

    def __init__(self, rule: str, found: str) -> None:
        super().__init__(f"{found}; the rule is: {rule}.")
        self.rule, self.found = rule, found


class CheckpointError(UltrathinkError):
    """A checkpoint or a model folder that is missing, damaged or does not fit."""


class DistributedError(UltrathinkError):
    """Ranks, launchers or strategies that cannot work together as configured."""


class DependencyError(UltrathinkError):
    """An optional package that the requested feature needs and that is not installed."""


class CriticError(UltrathinkError):
    """A critic that cannot be asked, or whose answers cannot be used."""


class RewardError(UltrathinkError):
    """A reward that cannot be computed, or that is no finite number."""


class RegistryError(UltrathinkError):
    """A model registry that cannot be reached, or that does not hold what is asked of it."""


class TrainingStoppedError(UltrathinkError):
    """Training was stopped by a signal after its state had been saved; start again to go on."""

    exit_code: ClassVar[int] = EXIT_STOPPED_AFTER_SAVING


class GateError(UltrathinkError):
    """A model that does not meet the bound that was set for it."""

    exit_code: ClassVar[int] = EXIT_GATE_NOT_MET

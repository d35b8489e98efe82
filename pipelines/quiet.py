"""Keeping from the terminal what ZenML logs about itself."""

import logging

from zenml.exceptions import RunInterruptedException

from ultrathink_model.errors import UltrathinkError

# At INFO these speak of ZenML itself, the others of the run.
QUIET_LOGGERS = ("zenml.pipelines", "zenml.zen_stores", "zenml.config", "zenml.client", "zenml.utils")


def quiet_zenml() -> None:
    """Keeps from the terminal what ZenML logs about itself, and its tracebacks of a user's mistakes."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _WithoutUserErrors) for known in handler.filters):
            handler.addFilter(_WithoutUserErrors())


class _WithoutUserErrors(logging.Filter):
    """Drops what ZenML logs about errors that the command line prints itself, once and without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("zenml"):
            return True
        arguments = record.args if isinstance(record.args, tuple) else ()
        errors = (record.exc_info[1] if record.exc_info else None, *arguments)
        return not any(isinstance(error, UltrathinkError | RunInterruptedException) for error in errors)

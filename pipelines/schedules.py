"""When a schedule runs a workflow: a cron expression, checked, in the words of the orchestrator's scheduler."""

import re

from ultrathink_model.errors import ConfigError

DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
FIELD = re.compile(r"[\w*/,-]+")


def schedule_expression(cron: str, flavor: str) -> str:
    """A cron expression of five fields as the orchestrator of a flavor takes it.

    SageMaker's schedules are EventBridge's: a sixth field for the year, `?` for one of the two fields of days, days of the
    week from 1, and steps from a number
    (https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html).

    Args:
        cron: Minute, hour, day of the month, month, day of the week.
        flavor: The orchestrator's.

    Raises:
        ConfigError: It has not five fields, or EventBridge has no words for it.
    """
    fields = cron.split()
    if len(fields) != 5 or not all(map(FIELD.fullmatch, fields)):
        raise ConfigError(
            f"--schedule {cron}: a cron expression has five fields (minute, hour, day of the month, month, day of the "
            'week), as in "0 3 * * 0" for Sundays at three.'
        )
    if flavor != "sagemaker":
        return cron
    minute, hour, day, month, weekday = fields
    if "*" not in (day, weekday):
        raise ConfigError(
            f"--schedule {cron}: EventBridge takes a day of the month or one of the week; set one of them to *."
        )
    weekday = re.sub(r"(?<![/\w])[0-7]", lambda match: DAYS[int(match[0])], weekday)
    days = ("?", _from(weekday, 1)) if weekday != "*" else (_from(day, 1), "?")
    return " ".join([_from(minute, 0), _from(hour, 0), days[0], _from(month, 1), days[1], "*"])


def _from(field: str, first: int) -> str:
    return field.replace("*/", f"{first}/")

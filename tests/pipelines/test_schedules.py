import pytest

from pipelines.schedules import schedule_expression
from ultrathink_model.errors import ConfigError


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 3 * * 0", "0 3 ? * SUN *"),
        ("*/15 */2 * * 1-5", "0/15 0/2 ? * MON-FRI *"),
        ("30 4 1,15 */3 *", "30 4 1,15 1/3 ? *"),
        ("5 0 * * 6,7", "5 0 ? * SAT,SUN *"),
        ("5 0 * * TUE", "5 0 ? * TUE *"),
        ("* * * * *", "* * * * ? *"),
    ],
)
def test_cron_is_put_into_event_bridges_words_and_left_alone_elsewhere(cron, expected):
    assert schedule_expression(cron, "sagemaker") == expected
    assert schedule_expression(cron, "vertex") == cron


@pytest.mark.parametrize("cron", ["daily", "0 3 * *", "0 3 * * 0 *", "cron(0 3 ? * 1 *)", "0 3 * * ?", ""])
def test_what_is_no_cron_expression_is_refused(cron):
    with pytest.raises(ConfigError, match="five fields"):
        schedule_expression(cron, "vertex")


def test_days_of_both_kinds_are_refused_where_the_scheduler_has_no_words_for_them():
    with pytest.raises(ConfigError, match=r"set one of them to \*"):
        schedule_expression("0 3 1 * 0", "sagemaker")
    assert schedule_expression("0 3 1 * 0", "kubernetes") == "0 3 1 * 0"

"""Runs that a deployment starts, as from the Playground of ZenML's dashboard: they have the settings that were deployed."""

from zenml import get_step_context
from zenml.deployers.server import runtime

from ultrathink_model.errors import ConfigError


def refuse_other_settings() -> None:
    """Has a deployment's run end where its request asks for other settings than those that were deployed.

    A deployment holds the plan that it was made with; ZenML would pass over the request's values in silence.

    Raises:
        ConfigError: A value of the request is another one.
    """
    if not runtime.is_active():
        return
    deployed = get_step_context().pipeline_run.config.parameters or {}
    # ZenML has no public name for what the request asks for.
    for name, value in runtime._get_context().pipeline_parameters.items():
        if value is not None and value != deployed.get(name):
            raise ConfigError(
                f"{name}={value!r}: the deployment was made with {deployed.get(name)!r} and runs that. For other "
                "settings deploy it again (zenml pipeline deploy NAME -c FILE --update), or run "
                "`python run.py rerun RUN --set KEY=VALUE`."
            )

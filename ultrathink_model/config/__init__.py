"""The config: frozen pydantic models, one for each section of the YAML, with no import of torch."""

from ultrathink_model.config.load import (
    config_hash,
    dump_config,
    load_config,
    make_config,
    override_config,
    save_config,
)
from ultrathink_model.config.root import Config

__all__ = ["Config", "config_hash", "dump_config", "load_config", "make_config", "override_config", "save_config"]

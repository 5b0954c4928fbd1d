"""A run's configuration: every field in one place, checked before anything is loaded."""

from cosup_fast.config.run import ConfigError, RunConfig, config_of, dump_config, explain, field_names, load_config

__all__ = ["ConfigError", "RunConfig", "config_of", "dump_config", "explain", "field_names", "load_config"]

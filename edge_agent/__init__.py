"""Edge AI agent: camera frames in, model results out over MQTT."""

__version__ = "0.1.0"

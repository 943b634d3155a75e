"""What people can tell the agent over MQTT: one handler a command, one last reply a command.

A handler is an async function decorated with `@command(name, arguments)`: a struct says what arguments there are. It
returns what goes into the reply, or raises an `EdgeAgentError`. One file a group.
"""

from edge_agent.commands import agent, camera, model, tuning
from edge_agent.commands._base import Call, Services, command, registered
from edge_agent.commands.agent import described
from edge_agent.commands.dispatch import Dispatcher

__all__ = ["Call", "Dispatcher", "Services", "agent", "camera", "command", "described", "model", "registered", "tuning"]

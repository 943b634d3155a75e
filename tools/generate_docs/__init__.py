"""What is generated from the message types: `docs/asyncapi.yaml`."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_agent import commands, messages

_RETAINED = {"status", "health", "models", "cameras/{camera}/status"}
_PARAMETERS = {
    "prefix": "`[mqtt] prefix`, `edge` unless configured",
    "device": "`[agent] device`, or made from host name and machine id",
    "camera": "the camera's name in the configuration",
    "id": "the command's id",
    "group": "a group of devices, by mqtt.groups of each",
}


def asyncapi() -> dict[str, Any]:
    """The MQTT interface as an AsyncAPI 3.0 document."""
    contract = messages.contract()
    kinds = [*contract.values(), messages.Command, messages.SignedCommand, messages.Changed]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    _, arguments = msgspec.json.schema_components(
        [entry.arguments for entry in commands.registered().values()], ref_template="#/components/schemas/{name}"
    )
    channels = {_channel_name(leaf): _channel(leaf, kind.__name__) for leaf, kind in contract.items()}
    channels |= {name: _commanded(address) for name, address in messages.commanded().items()}
    channels["available"] = _plain("available", "text/plain", {"type": "string", "enum": ["online", "offline"]})
    channels["snapshot"] = _plain("cameras/{camera}/snapshot", "image/jpeg", {"type": "string", "format": "binary"})
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "edge_agent",
            "version": str(messages.SCHEMA_VERSION),
            "description": "What the agent says and hears over MQTT. Generated from edge_agent/messages.py.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": {name: _operation(name) for name in channels},
        "components": {"schemas": {name: _one_line(schema) for name, schema in {**schemas, **arguments}.items()}},
        "x-commands": {
            name: {
                "description": told["description"],
                "long": told["is_long"],
                "args": f"#/components/schemas/{commands.registered()[name].arguments.__name__}",
            }
            for name, told in commands.described().items()
        },
    }


def _one_line(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the line breaks of the docstring, whose indentation is not the same in every Python."""
    return {**schema, "description": " ".join(schema["description"].split())} if "description" in schema else schema


def _channel_name(leaf: str) -> str:
    return {
        "cameras/{camera}/status": "cameraStatus",
        "cameras/{camera}/results": "results",
        "cameras/{camera}/events": "events",
        "reply/{id}": "reply",
        "jobs/{id}": "jobs",
    }.get(leaf, leaf)


def _channel(leaf: str, schema: str) -> dict[str, Any]:
    payload = {"$ref": f"#/components/schemas/{schema}"}
    return {
        **_address(leaf),
        "messages": {schema: {"payload": payload}},
        "bindings": {"mqtt": {"retain": leaf in _RETAINED}},
    }


def _commanded(address: str) -> dict[str, Any]:
    kinds = (messages.Command, messages.SignedCommand)
    told = {kind.__name__: {"payload": {"$ref": f"#/components/schemas/{kind.__name__}"}} for kind in kinds}
    return {**_parameters(address), "messages": told}


def _plain(leaf: str, content_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {**_address(leaf), "messages": {"payload": {"contentType": content_type, "payload": schema}}}


def _address(leaf: str) -> dict[str, Any]:
    return _parameters(f"{{prefix}}/{{device}}/{leaf}")


def _parameters(address: str) -> dict[str, Any]:
    used = {name: {"description": text} for name, text in _PARAMETERS.items() if f"{{{name}}}" in address}
    return {"address": address, "parameters": used}


def _operation(channel: str) -> dict[str, Any]:
    return {
        "action": "receive" if channel in messages.commanded() else "send",
        "channel": {"$ref": f"#/channels/{channel}"},
    }

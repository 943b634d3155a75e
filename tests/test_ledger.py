"""Which commands were done, and what was replied, over restarts and kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent.commands import ledger as module
from edge_agent.commands.ledger import Ledger


def test_a_reply_is_found_again_also_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "commands.db"
    first = Ledger(path, "rig")
    assert first.find("a") is None
    first.begin("a")
    first.end("a", b"done")
    assert first.find("a") == b"done"
    first.close()
    second = Ledger(path, "rig")
    assert second.find("a") == b"done"
    assert second.find("b") is None
    second.close()


def test_what_was_begun_and_not_ended_is_answered_interrupted(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "commands.db", "rig")
    first.begin("cut")
    first.close()
    second = Ledger(tmp_path / "commands.db", "rig")
    reply = json.loads(second.find("cut") or b"")
    second.close()
    assert (reply["id"], reply["device"], reply["status"], reply["code"]) == ("cut", "rig", "error", "interrupted")


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool) -> None:
    monkeypatch.setattr(module, "_MOST", 5)
    ledger = Ledger(tmp_path / "commands.db" if on_disk else None, "rig")
    for number in range(8):
        ledger.begin(f"{number}")
        ledger.end(f"{number}", b"done")
    assert [ledger.find(f"{number}") for number in range(8)] == [None] * 3 + [b"done"] * 5
    ledger.close()


def test_where_there_is_no_disk_memory_has_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ledger = Ledger(tmp_path / "file" / "commands.db", "rig")
    ledger.begin("a")
    assert b"interrupted" in (ledger.find("a") or b"")
    ledger.end("a", b"done")
    assert ledger.find("a") == b"done"
    ledger.close()

"""The table of faults: it can be made here, and says what happened."""

from __future__ import annotations

from typing import Any

import pytest

from gllm_benchmarks import faults


def test_every_fault_is_made_for_every_kind_of_ranks() -> None:
    cases = faults.cases()
    assert len(cases) == len(set(cases)) == 3 * (len(faults.FAULTS) + 1) - 2
    assert ("worker killed", "one rank") not in cases and ("worker killed", "TP2") in cases


def test_a_row_tells_what_did_not_come() -> None:
    seen: dict[str, Any] = {
        "clients": "4 x hangs",
        "error_s": None,
        "end": "left: nothing",
    }
    hangs = seen | {"refuses_until_undone": False, "again_s": None}
    none = hangs | {"again_s": 0.0}
    waits = seen | {"refuses_until_undone": True, "again_s": 0.25, "error_s": 1.0}
    assert faults.rows({"a": hangs, "b": waits, "c": none}) == [
        ["a", "4 x hangs", "", "not in 60 s", "left: nothing"],
        ["b", "4 x hangs", "1.0 s", "0.2 s after it is undone", "left: nothing"],
        ["c", "4 x hangs", "", "not interrupted", "left: nothing"],
    ]


@pytest.mark.server
@pytest.mark.timeout(300)
def test_a_worker_is_killed() -> None:
    """One case of the table, with what every case needs: a server, streams, a fault, its end."""
    try:
        seen = faults.observe("worker killed", "TP2")
    except SystemExit as error:
        if "no mount namespace" not in str(error):
            raise
        pytest.skip(str(error))
    assert seen["clients"].count("worker 1 (node 0) is lost") == seen["clients"].count(" x ")
    assert seen["error_s"] < 5.0 and seen["again_s"] is not None
    assert not seen["refuses_until_undone"]
    assert seen["end"] == "stops with status 0; left: nothing"

"""Reports of steps travel as numbers."""

import pytest

from ouro_runtime.engine.outputs import pack_report, unpack_report
from ouro_runtime.reports import PARTS, StepReport


@pytest.mark.parametrize(
    "report",
    [
        StepReport(kv_pages=[3, 0]),
        StepReport([5, 3], [4, 4], tokens=2),
        StepReport([5, 3], [4, 4], [7, 6], 2, dict.fromkeys(PARTS, 0.25)),
    ],
    ids=["idle", "no pages", "all"],
)
def test_a_report_arrives_as_it_was_sent(report: StepReport) -> None:
    packed = pack_report(report).routed_experts
    assert packed is not None
    got = unpack_report(packed)
    report.seconds = report.seconds or dict.fromkeys(PARTS, 0.0)
    assert got == report

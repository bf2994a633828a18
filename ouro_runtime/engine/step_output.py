"""What a step tells the scheduler besides tokens; rides on `ModelRunnerOutput.ouro`."""

from dataclasses import dataclass

from ouro_runtime.config import StepReport


@dataclass
class StepOutput:
    """Depths of a step.

    Attributes:
        depths, loops_run: request id -> one entry per token sampled in the step.
        exit_cdf: request id -> per token, CDF(1)..CDF(depth) of the gate, then zeros, [T].
        report: what the passes did.
    """

    depths: dict[str, list[int]]
    loops_run: dict[str, list[int]]
    exit_cdf: dict[str, list[list[float]]]
    report: StepReport

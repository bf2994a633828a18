"""A few golden cases with the lane kernels in Triton's interpreter; run with TRITON_INTERPRET=1.

A process of its own: the interpreter is chosen when Triton is first imported.
"""

from ouro_kernels._backend import interpreting
from tests.engine.cases import CHECKPOINTS, golden_cases
from tests.gpu.fake_engine import FakeEngine, params

TOKENS = 6
CHOSEN = (("full", 1.0), ("skip", 0.5), ("exact", 0.3))


def main() -> None:
    assert interpreting()
    engine = FakeEngine(CHECKPOINTS["t6-gqa"], buckets=(1, 2, 4), slots=4, budget=16)
    cases = [
        case
        for case in golden_cases("t6-gqa")
        if len(case.prompt) == 5 and (case.mode, case.threshold) in CHOSEN
    ]
    assert len(cases) == len(CHOSEN)
    for case in cases:
        engine.add(case.name, case.prompt, params(TOKENS, case.depth_fields))
    results = engine.run()
    for case in cases:
        out = results[case.name]
        assert out.tokens == list(case.tokens[:TOKENS]), (case.name, out.tokens)
        assert out.depths == list(case.depths[:TOKENS]), (case.name, out.depths)
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()

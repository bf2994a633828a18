"""Two ranks on CPU, through HTTP: tensor parallel, data parallel, and data parallel over two hosts.

Answers are those of the released code, token for token and depth for depth, in every mode; metrics
add up over ranks, engines and API processes; defaults are changed, or refused to be, as documented.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from ouro_runtime.training.tokenizer import render
from ouro_server.checkpoint import shipped
from tests.engine.cases import Case
from tests.engine.compare import assert_case, assert_same
from tests.reference.model import Reference
from tests.server.live import KEY, LOOPS, Live, environment, free_port, left_behind, start

pytestmark = pytest.mark.slow

# Two ranks, API processes and the tests share what cores there are.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
QUESTIONS = ("What is 904821 + 583397?", "What is 12 + 34?", "Who are you?")
TOKENS = 16
MODES = {"full": 1.0, "skip": 0.5, "exact": 0.5}
AT_ONCE = 6
PRESETS = """
presets:
  fast: {exit_threshold: 0.3}
  full: {exit_threshold: 1.0}
priority_classes:
  standard: {floor: 0.5}
default_priority_class: standard
"""

Answer = dict[str, Any]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """What the released code answers to every question in every mode; lossless is full."""
    reference, tok = Reference(shipped()), Tokenizer.from_file(str(shipped() / "tokenizer.json"))
    found = []
    for question in QUESTIONS:
        prompt = tok.encode(render([("user", question)], reply=True)).ids
        for mode, threshold in MODES.items():
            run = reference.generate(prompt, TOKENS, threshold=threshold, mode=mode)
            margin = min(run.min_logit_margin, run.min_cdf_margin)
            outcome = tuple(run.tokens), tuple(run.depths), tuple(run.logprobs)
            found.append(Case("ouro-mini", tuple(prompt), mode, threshold, *outcome, margin))
    return found


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("presets") / "presets.yaml"
    file.write_text(PRESETS)
    return file


def ask(live: Live, case: Case, fields: dict[str, Any]) -> Answer:
    """One answer, over a connection of its own: of several API processes any may take it."""
    body = {
        "model": live.model,
        "prompt": list(case.prompt),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_depths": True,
        **fields,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{live.url}/v1/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def samples(live: Live) -> Counter[tuple[str, str]]:
    """Every sample of `/metrics`, summed over labels but `engine`, for each value of that."""
    headers = {"Authorization": f"Bearer {KEY}"}
    found: Counter[tuple[str, str]] = Counter()
    text = httpx.get(f"{live.url}/metrics", headers=headers, timeout=60).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                found[sample.name, sample.labels.get("engine", "")] += sample.value
    return found


def answers_as_released(live: Live, cases: list[Case]) -> list[Answer]:
    """All that was answered: every case in its mode, and losslessly."""
    asked = [(case, case.depth_fields) for case in cases]
    full = [case for case in cases if case.mode == "full"]
    lossless = {"exit_mode": "lossless", "exit_threshold": 0.5}
    asked += [(case, lossless) for case in full]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda pair: ask(live, *pair), asked))
    for (case, fields), answer in zip(asked, answers, strict=True):
        (choice,) = answer["choices"]
        tokens, depths = choice["token_ids"], choice["depths"]
        if fields is lossless:
            assert_same(case.name, tokens, [LOOPS] * TOKENS, case.tokens, case.depths)
            assert set(depths) <= set(range(1, LOOPS + 1))
            assert answer["usage"]["depth"]["loops_skipped"] == 0
        else:
            assert_case(case, tokens, depths, choice["logprobs"]["token_logprobs"])
    return answers


def metrics_add_up(live: Live, answers: list[Answer]) -> Counter[tuple[str, str]]:
    """`/metrics` counts each token and loop once, whichever process is asked; returns it."""
    told = [answer["usage"]["depth"] for answer in answers]
    wanted = {
        "ouro_tokens_total": TOKENS * len(answers),
        "ouro_source_tokens_total": TOKENS * len(answers),
        "ouro_requests_total": len(answers),
        "ouro_request_mean_depth_count": len(answers),
        "ouro_loops_run_total": sum(depth["loops_run"] for depth in told),
        "ouro_loops_skipped_total": sum(depth["loops_skipped"] for depth in told),
        "ouro_drafts_total": None,
    }
    seen = [samples(live) for _ in range(4)]
    for found in seen:
        for name, value in wanted.items():
            assert (name, "") in found
            assert value is None or found[name, ""] == value, name
    steps = ("ouro_step_tokens_sum", "ouro_pass_rows_count", "ouro_cells_total")
    assert all(found[name, ""] == seen[0][name, ""] for found in seen for name in steps)
    # What is sampled in steps is every token, and what lossless took back.
    assert seen[0]["ouro_step_tokens_sum", ""] >= TOKENS * len(answers)
    generated = sum(v for (name, _), v in seen[0].items() if name == "vllm:generation_tokens_total")
    assert generated == TOKENS * len(answers)
    return seen[0]


def defaults_change(live: Live, case: Case) -> None:
    """`PUT /v1/depth` holds for whichever engine answers."""
    assert live.http.get("/v1/depth").json()["controller"]["active"]
    assert live.http.put("/v1/depth", json={"max_loops": 2}).status_code == 200
    for _ in range(4):
        (choice,) = ask(live, case, {})["choices"]
        assert max(choice["depths"]) <= 2
    assert live.http.put("/v1/depth", json={"max_loops": LOOPS}).status_code == 200


def test_tensor_parallel_answers_as_one(cases: list[Case], presets: Path) -> None:
    options = ["--tensor-parallel-size", "2", "--presets", str(presets)]
    with start(*options, "--target-tpot-ms", "10000", **UNBOUND) as live:
        answers = answers_as_released(live, cases)
        metrics_add_up(live, answers)
        defaults_change(live, cases[0])


def test_data_parallel_behind_two_api_processes_answers_as_one(cases: list[Case]) -> None:
    with start("--data-parallel-size", "2", "--api-server-count", "2", **UNBOUND) as live:
        answers = answers_as_released(live, cases)
        found = metrics_add_up(live, answers)
        assert all(found["vllm:request_success_total", engine] > 0 for engine in "01")
        refused = live.http.put("/v1/depth", json={"exit_threshold": 0.6})
        assert refused.status_code == 409
        assert "--api-server-count 1" in refused.json()["error"]["message"]


@contextmanager
def headless(*options: str) -> Iterator[Path]:
    """Another host's engine, until the block ends; its log. It must end by SIGTERM alone, with
    status 0, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        log, scratch = Path(folder) / "log", Path(folder) / "tmp"
        scratch.mkdir()
        command = [sys.executable, "-m", "ouro_server", "--headless", *options]
        command += ["--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "128M"]
        with log.open("w") as sink:
            process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment() | {"TMPDIR": str(scratch)} | UNBOUND,
            )
        try:
            yield log
            assert process.poll() is None, log.read_text()[-5000:]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        assert status == 0, log.read_text()[-5000:]
        assert left_behind(scratch) == []


def test_data_parallel_over_two_hosts_answers_as_one(cases: list[Case], presets: Path) -> None:
    """vLLM's launcher, with both hosts on loopback: the first takes requests, both answer."""
    shared = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
    shared += ["--data-parallel-address", "127.0.0.1"]
    shared += ["--data-parallel-rpc-port", str(free_port())]
    first = ["--api-server-count", "1", "--presets", str(presets), "--target-tpot-ms", "10000"]
    with (
        headless(*shared, "--data-parallel-start-rank", "1"),
        start(*shared, *first, **UNBOUND) as live,
    ):
        answers = answers_as_released(live, cases)
        found = metrics_add_up(live, answers)
        assert all(found["vllm:request_success_total", engine] > 0 for engine in "01")
        defaults_change(live, cases[0])

"""Starting and stopping `ouro-serve`: what it says when it cannot, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pydantic
import pytest

from ouro_server import beside, checkpoint, cli, log_filter, run_folder, settings
from tests.server.live import environment, free_port, left_behind

ARGS = Namespace(host="h", port=80, kv_cache_memory_bytes=1, middleware=["mid.Ware"])


def served(folder: Path, *options: str) -> subprocess.Popen:
    """A real `ouro-serve` whose temporary files go to `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "ouro_server", "--enforce-eager", *options],
        env=environment() | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_port_in_use_is_one_line_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory() as base, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = served(Path(base), "--port", str(port))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        said = f"port {port} of 127.0.0.1 is in use; choose another with --port"
        assert err == f"ouro-serve: error: {said}\n"
        assert left_behind(Path(base)) == []


@pytest.mark.slow
def test_sigterm_while_the_engine_starts_ends_every_process_without_a_word() -> None:
    with tempfile.TemporaryDirectory() as base:
        process = served(Path(base), "--port", str(free_port()))
        server, deadline = psutil.Process(process.pid), time.monotonic() + 120
        # The engine, and Python's tracker of what processes share.
        while len(family := server.children()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (128 + signal.SIGTERM, "")
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert left_behind(Path(base)) == []


def test_only_the_first_signal_ends_a_start() -> None:
    from ouro_server import stopping

    before = [signal.getsignal(number) for number in stopping.SIGNALS]

    def start(number: int) -> None:
        with stopping.stoppable():
            # What vLLM does as the first thing of its start.
            stopping.api_server.signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    for number in stopping.SIGNALS:
        with pytest.raises(SystemExit) as stopped:
            start(number)
        assert stopped.value.code == 128 + number
        assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert stopping.api_server.signal is signal


def test_an_engine_core_does_not_outlive_a_server_that_is_killed() -> None:
    core = "from ouro_runtime.engine.core_process import end_with_parent as end; end()"
    core += "; print(flush=True); import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {core!r}])"
    code += "; print(p.pid, flush=True); p.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        engine = psutil.Process(int(server.stdout.readline()))
        assert server.stdout.readline() == "\n"
        server.kill()
        assert psutil.wait_procs([engine], timeout=10)[1] == []


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache")

    monkeypatch.setattr(settings, "environment", refused)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "ouro-serve: error: /cache: Permission denied\n"
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    with pytest.raises(PermissionError):
        cli.main([])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EADDRINUSE, "x"), "port 80 of h is in use"),
        (OSError(errno.EACCES, "x"), "port 80 of h may not be used"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "h is no address of this machine"),
        (socket.gaierror(-2, "x"), "h: no such host"),
        (OSError(errno.ENOSPC, "No space left on device", "/c"), "/c: No space left on device"),
        (RuntimeError("a\n b"), "a b"),
        (RuntimeError("Failed core proc(s): {'e': -9}"), "most likely memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "do not fit into memory"),
        (RuntimeError("No working C++ compiler found"), "install g++, or --enforce-eager"),
        (
            AssertionError("x. Please try to bind threads manually or decrease DP/TP/PP."),
            "x. Set VLLM_CPU_OMP_THREADS_BIND in the environment: nobind",
        ),
        (KeyError("added"), "KeyError: 'added' (VLLM_LOGGING_LEVEL=DEBUG shows where)"),
        (KeyError("no such parser: x"), "no such parser: x"),
        (AssertionError(), "AssertionError (VLLM_LOGGING_LEVEL=DEBUG shows where)"),
        (ImportError("No module named 'mid'", name="mid"), "--middleware: No module named 'mid'"),
        (ImportError("No module named 'else'", name="else"), "No module named 'else'"),
        (ValueError("x. Try increasing `gpu_memory_utilization`. See"), "a larger --kv-cache-mem"),
    ],
)
def test_why_a_start_failed_in_the_users_words(error: Exception, said: str, tmp_path: Path) -> None:
    from ouro_server import failure

    why = failure.why(error, ARGS, tmp_path)
    assert said in why
    assert "\n" not in why


def test_an_option_out_of_range_is_named_once(tmp_path: Path) -> None:
    from ouro_server import failure

    several = {"max_num_seqs": (int, pydantic.Field(ge=1)), "else": (int, pydantic.Field(ge=1))}
    model = pydantic.create_model("Config", **several)
    with pytest.raises(pydantic.ValidationError) as refusal:
        model(max_num_seqs=0, **{"else": 0})
    said = "Input should be greater than or equal to 1"
    args = Namespace(**vars(ARGS), max_num_seqs=0)
    assert failure.why(refusal.value, args, tmp_path) == f"--max-num-seqs: {said}; {said}"
    assert failure.why(refusal.value, ARGS, tmp_path) == said
    inner = pydantic.create_model("Inner", max_num_seqs=(int | dict, ...))
    with pytest.raises(pydantic.ValidationError) as refusal:
        inner(max_num_seqs="x")
    assert failure.why(refusal.value, args, tmp_path).startswith("--max-num-seqs: Input should be")


def test_the_cause_in_a_worker_is_told_without_its_surroundings(tmp_path: Path) -> None:
    from ouro_server import failure

    text = "Worker failed with error 'it's full', please check the stack trace above for the cause"
    assert failure.why(RuntimeError(text), ARGS, tmp_path) == "it's full"


@pytest.mark.parametrize("deep", [False, True])
def test_sockets_fit_whatever_the_temporary_folder(
    deep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as short:
        base = tmp_path / ("x" * 100) if deep else Path(short)
        base.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
        with run_folder.run_folder() as folder, socket.socket(socket.AF_UNIX) as sock:
            assert (folder.parent == base) == (not deep)
            assert os.environ[run_folder.FOLDER] == str(folder)
            # The length of vLLM's names.
            sock.bind(os.path.join(os.environ["VLLM_RPC_BASE_PATH"], "0" * 36))
        assert not folder.exists()
        assert run_folder.FOLDER not in os.environ
        with run_folder.run_folder(one_host=False):
            assert "VLLM_RPC_BASE_PATH" not in os.environ


def test_folders_of_servers_that_are_no_more_are_swept(tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    names = [f"ouro-serve-{done.pid}-a", f"ouro-serve-{os.getpid()}-a", "ouro-serve-notes-a"]
    for name in names:
        (tmp_path / name).mkdir()
    run_folder.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names[1:])


def test_the_log_does_not_repeat_why_a_server_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EngineDeadError(RuntimeError):
        """vLLM's, by name."""

    def keeps(level: int, error: Exception | None = None) -> bool:
        info = None if error is None else (type(error), error, None)
        return log_filter.NoEcho().filter(
            logging.LogRecord("vllm", level, "", 0, "x", None, exc_info=info)
        )

    monkeypatch.delenv(run_folder.FOLDER, raising=False)
    assert keeps(logging.ERROR, EngineDeadError())
    monkeypatch.setenv(run_folder.FOLDER, str(tmp_path))
    assert keeps(logging.WARNING)
    assert not keeps(logging.ERROR, ValueError())
    run_folder.now_serves()
    assert keeps(logging.ERROR, ValueError())
    assert not keeps(logging.ERROR, EngineDeadError())


def test_the_logging_file_names_the_filter() -> None:
    config = json.loads(settings.LOGGING.read_text())
    module, _, name = config["filters"]["no_echo"]["()"].rpartition(".")
    assert (module, name) == (log_filter.__name__, log_filter.NoEcho.__name__)
    assert config["handlers"]["out"]["filters"] == ["no_echo"]


@pytest.mark.parametrize("name", [beside.TOKENIZER, beside.TOKENIZER_CONFIG, beside.GENERATION])
@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_broken_file_of_the_tokenizer_is_named(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    checkpoint.check_files(str(tmp_path), weights=False)
    (tmp_path / name).write_text(text)
    with pytest.raises(checkpoint.RefusedError, match=f"{re.escape(name)} {said}"):
        checkpoint.check_files(str(tmp_path), weights=False)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"added_tokens": 3}])
def test_a_tokenizer_that_is_none_is_named(content: dict, tmp_path: Path) -> None:
    (tmp_path / beside.TOKENIZER).write_text(json.dumps(content))
    with pytest.raises(checkpoint.RefusedError, match=r"tokenizer\.json is no tokenizer"):
        checkpoint.check_files(str(tmp_path), weights=False)
    checkpoint.check_files(str(checkpoint.shipped()))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", "hot", "a number of 0 or more, or null, got 'hot'"),
        ("temperature", -1, "a number of 0 or more"),
        ("temperature", True, "a number of 0 or more"),
        ("top_p", 0, "a number above 0, up to 1"),
        ("top_k", 2.5, "an integer of -1 or more"),
        ("min_p", [0.1], "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("presence_penalty", 3, "a number from -2 to 2"),
        ("max_new_tokens", 0, "an integer of 1 or more"),
        ("eos_token_id", "</s>", "a token id under 9 or a list of them"),
        ("eos_token_id", [2, 9], "a token id under 9 or a list of them"),
    ],
)
def test_a_wrong_default_of_sampling_is_named(
    name: str, value: object, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    file = tmp_path / beside.GENERATION
    for good in (None, 1, 1 if name != "eos_token_id" else [0, 8]):
        file.write_text(json.dumps({name: good, "do_sample": True}))
        checkpoint.check_files(str(tmp_path), weights=False)
    file.write_text(json.dumps({name: value}))
    with pytest.raises(
        checkpoint.RefusedError, match=f"generation_config.json: {name} must be {said}"
    ):
        checkpoint.check_files(str(tmp_path), weights=False)


def test_an_end_of_answers_that_is_no_token_of_the_model_is_named(tmp_path: Path) -> None:
    """In `config.json`, where there is no `generation_config.json`."""
    (tmp_path / "config.json").write_text('{"vocab_size": 9, "eos_token_id": 9}')
    with pytest.raises(
        checkpoint.RefusedError, match=r"config\.json: eos_token_id must be a token"
    ):
        checkpoint.check_files(str(tmp_path), weights=False)


def test_wrong_files_that_options_name_are_refused(tmp_path: Path) -> None:
    from ouro_server import launch

    (tmp_path / "t.jinja").write_text("{% if %}")
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    (tmp_path / beside.GENERATION).write_text('{"top_p": 7}')
    none = {"chat_template": None, "tokenizer": None, "generation_config": "auto"}
    launch.check_named_files(Namespace(**none | {"chat_template": "{{ messages }}" * 100}))
    for wrong, said in (
        (
            {"chat_template": str(tmp_path / "t.jinja")},
            "^--chat-template: chat_template is no Jinja",
        ),
        ({"chat_template": "{{ x | nope }}"}, "^--chat-template: chat_template is no Jinja"),
        (
            {"tokenizer": str(tmp_path)},
            "^--tokenizer: .*: chat_template.jinja: chat_template is no",
        ),
        (
            {"generation_config": str(tmp_path)},
            "^--generation-config: .*: generation_config.json: top",
        ),
    ):
        with pytest.raises(checkpoint.RefusedError, match=said):
            launch.check_named_files(Namespace(**none | wrong))


def test_paths_that_the_server_would_miss_late_are_refused(tmp_path: Path) -> None:
    from ouro_server import launch

    here = tmp_path / "file"
    here.touch()
    none: dict = dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "uds"))
    none |= {"tokenizer": None, "generation_config": "auto", "port": 80, "shutdown_timeout": 0}
    none |= {"distributed_executor_backend": None, "data_parallel_backend": "mp"}
    launch.check_paths(Namespace(**none))
    key = {"ssl_keyfile": str(here), "ssl_certfile": str(here)}
    launch.check_paths(Namespace(**none | key | {"uds": str(here)}))
    for field in ("ssl_ca_certs", "uds", "tokenizer", "generation_config"):
        option = "--" + field.replace("_", "-")
        with pytest.raises(checkpoint.RefusedError, match=f"{option}: .*/no/file"):
            launch.check_paths(Namespace(**none | {field: str(tmp_path / "no" / "file")}))
    for wrong, said in (
        ({"port": 65536}, "--port"),
        ({"shutdown_timeout": -1}, "--shutdown-timeout must be 0 or more seconds, got -1"),
        (key | {"ssl_certfile": None}, "--ssl-cert"),
        ({"distributed_executor_backend": "ray"}, "Ouro Serve does not support Ray on CPU: .{20,}"),
        ({"data_parallel_backend": "ray"}, "Ouro Serve does not support Ray on CPU: .{20,}"),
    ):
        with pytest.raises(checkpoint.RefusedError, match=said):
            launch.check_paths(Namespace(**none | wrong))


def test_weights_and_pool_beyond_free_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"0" * 60)
    (tmp_path / "b.safetensors").write_bytes(b"0" * 40)
    checkpoint.check_memory(str(tmp_path), 20, 120)
    with pytest.raises(checkpoint.RefusedError, match=r"does not fit into memory: .* free"):
        checkpoint.check_memory(str(tmp_path), 21, 120)

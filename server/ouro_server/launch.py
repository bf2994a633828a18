"""From a command line to a running vLLM server. Imports vLLM: call `settings.environment` first."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from ouro_runtime.config import GATE, LOSSLESS, RULE
from ouro_runtime.engine.config_hook import NO_RAY, UnsupportedError, needs_ray
from ouro_runtime.model.checkpoint import CheckpointError
from ouro_server import beside, checkpoint, settings
from ouro_server.cli import plain
from ouro_server.presets import PresetBook
from ouro_server.vllm_api import (
    EngineArgs,
    FlexibleArgumentParser,
    ServeSubcommand,
    cli_env_setup,
    configure_logging_from_args,
    current_platform,
    make_arg_parser,
    validate_parsed_serve_args,
)

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
MOST_PORT = 65535
AUTO_LENGTH = -1
"""vLLM's `--max-model-len auto`: as long as one request can be in the K/V pool."""

DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "uvicorn_log_level": "warning",
    "shutdown_timeout": 25,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}
"""Where vLLM's own default would be another. A user's choice wins, on the line or in --config."""

_EPILOG = (
    "ouro-serve --help=all lists every vLLM option; --help=SECTION one section, e.g. Frontend;\n"
    "--help=WORD the options whose name contains the word, e.g. --help=max-model-len."
)


class ServeParser(settings.OneLineParser, FlexibleArgumentParser):
    """vLLM's parser, saying what is wrong in one line."""

    def _pull_args_from_config(self, args: list[str]) -> list[str]:
        try:
            return super()._pull_args_from_config(args)
        except (AssertionError, ValueError) as error:
            self.error(f"argument --config: {plain(error)}")

    def load_config_file(self, file_path: str) -> list[str]:
        """The options in the file of `--config`."""
        try:
            with open(file_path, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"argument --config: {plain(error)}")
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            self.error(f"argument --config: {file_path} must map options to values (port: 8000)")
        return super().load_config_file(file_path)


def build_parser() -> argparse.ArgumentParser:
    """vLLM's server options with our defaults."""
    parser = make_arg_parser(
        ServeParser(
            prog="ouro-serve",
            usage="ouro-serve [MODEL] [depth options] [options]",
            description="Options of vLLM's server",
        )
    )
    parser.epilog = _EPILOG
    parser.set_defaults(**DEFAULTS)
    return parser


def parse_engine(model: str, argv: Sequence[str]) -> argparse.Namespace:
    """Options of vLLM's engine alone, without a server's."""
    args = EngineArgs.add_cli_args(ServeParser(prog="ouro-serve")).parse_args(list(argv))
    args.model = model
    args.disable_log_stats = True
    return args


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """vLLM's options, MODEL in `model`: the shipped checkpoint if none, or its name, was given."""
    parser = build_parser()
    args = parser.parse_args(list(argv))
    unnamed = args.model_tag is None and args.model == parser.get_default("model")
    if args.model_tag is not None:
        args.model = args.model_tag
    if unnamed or checkpoint.is_shipped(args.model):
        args.model = str(checkpoint.shipped())
        args.served_model_name = args.served_model_name or [checkpoint.SHIPPED_NAME]
        outputs = args.structured_outputs_config
        if outputs.backend == "auto":
            # Left free to, so small a model fills JSON with spaces until max_tokens.
            args.structured_outputs_config = replace(
                outputs, backend="xgrammar", disable_any_whitespace=True
            )
    # The subcommand prefers `model_tag`, and one that is set hides a model from --config.
    args.model_tag = None
    args.subparser = "serve"
    return args


def complete(
    args: argparse.Namespace, depth: dict[str, Any], config: dict[str, Any] | None
) -> None:
    """Put on `args` what depends on the checkpoint, only where the user did not choose."""
    args.additional_config = settings.merge_additional_config(args.additional_config, depth)
    if not args.reasoning_parser and checkpoint.separates_reasoning(args.model):
        args.reasoning_parser = "ouro"
    if args.reasoning_parser == "ouro" and not args.reasoning_parser_plugin:
        args.reasoning_parser_plugin = "ouro_runtime.engine.reasoning"
    # vLLM's bar is drawn anew in lines of a log.
    args.use_tqdm_on_load = args.use_tqdm_on_load and sys.stdout.isatty()
    if args.dtype == "auto" and config is not None and checkpoint.stored_dtype(config) == "float32":
        # vLLM would round to bfloat16, and near a threshold a depth with it.
        args.dtype = "float32"
    if config is None or not current_platform.is_cpu():
        return
    available = psutil.virtual_memory().available
    chosen = args.kv_cache_memory_bytes
    checkpoint.check_memory(args.model, chosen or 0, available)
    if KV_SPACE not in os.environ and chosen is None:
        size = checkpoint.kv_pool_bytes(config, available, _length(args))
        args.kv_cache_memory_bytes = size
        if args.max_model_len is None and size < checkpoint.full_request_bytes(config):
            args.max_model_len = AUTO_LENGTH
        say(
            f"K/V pool: {size / 2**20:,.0f} MiB, room for {checkpoint.FULL_REQUESTS} requests of "
            f"full length or a quarter of free memory ({KV_SPACE}, in GiB, sets another)"
        )


def check_paths(args: argparse.Namespace) -> None:
    """Refuse files and places that vLLM would miss only when the engine is up.

    Raises:
        RefusedError: naming the option.
    """
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        file = getattr(args, name)
        if file and not os.access(file, os.R_OK):
            option = "--" + name.replace("_", "-")
            raise checkpoint.RefusedError(f"{option}: {file} is no file that can be read")
    if args.ssl_keyfile and not args.ssl_certfile:
        raise checkpoint.RefusedError("--ssl-keyfile needs --ssl-certfile beside it")
    for name in ("tokenizer", "generation_config"):
        place = getattr(args, name)
        if place and Path(place).is_absolute() and not Path(place).exists():
            option = "--" + name.replace("_", "-")
            raise checkpoint.RefusedError(f"{option}: {place}: no such file or folder")
    if not 0 <= args.port <= MOST_PORT:
        raise checkpoint.RefusedError(f"--port must be from 0 to {MOST_PORT}, got {args.port}")
    if args.shutdown_timeout < 0:
        raise checkpoint.RefusedError(
            f"--shutdown-timeout must be 0 or more seconds, got {args.shutdown_timeout}"
        )
    if current_platform.is_cpu() and needs_ray(args):
        # vLLM would ask for Ray to be installed first.
        raise checkpoint.RefusedError(str(UnsupportedError(NO_RAY)))
    if args.uds and not Path(args.uds).absolute().parent.is_dir():
        raise checkpoint.RefusedError(f"--uds: {args.uds} is in no folder that exists")


def displaced(args: argparse.Namespace) -> list[str]:
    """Of the files beside a checkpoint's weights, those whose place an option takes. (With
    `--generation-config vllm` the checkpoint's is read for its ends of answers all the same.)"""
    named = {
        beside.TOKENIZER: args.tokenizer or args.skip_tokenizer_init,
        beside.TEMPLATE: args.chat_template,
        beside.GENERATION: args.generation_config not in ("auto", "vllm"),
    }
    return [name for name, option in named.items() if option]


def check_named_files(args: argparse.Namespace) -> None:
    """Refuse a chat template or default sampling parameters that the options name, if they are
    wrong: vLLM would tell every client.

    Raises:
        RefusedError: naming the option.
    """
    template, tokenizer, defaults = args.chat_template, args.tokenizer, args.generation_config
    option = "--chat-template"
    try:
        if template:
            named = os.path.isfile(template)
            beside.check_template(option, Path(template).read_text() if named else template)
        option = f"--tokenizer: {tokenizer}"
        if tokenizer and os.path.isdir(tokenizer):
            for name, text in beside.chat_templates(Path(tokenizer)):
                beside.check_template(name, text)
        option = f"--generation-config: {defaults}"
        if os.path.isdir(defaults):
            beside.check_generation(Path(defaults), None)
    except (CheckpointError, OSError, UnicodeError) as error:
        said = str(error)
        raise checkpoint.RefusedError(
            said if said.startswith(option) else f"{option}: {said}"
        ) from None


def check_targets(args: argparse.Namespace, book: PresetBook, depth: Mapping[str, Any]) -> None:
    """Refuse a server that cannot hold its `args.targets`, or audit as they say.

    Args:
        depth: the server's own defaults, as far as they were given.

    Raises:
        RefusedError: saying what is missing.
    """
    targets: settings.Targets = args.targets
    rule = depth.get(RULE, GATE)
    if targets.audit and args.max_logprobs == 0:
        raise checkpoint.RefusedError(
            "--audit reads log-probabilities, which --max-logprobs 0 forbids"
        )
    if targets.agreement is not None:
        _check_steering("--target-agreement", args, book, rule)
        if depth.get("exit_mode") == LOSSLESS:
            raise checkpoint.RefusedError(
                "--target-agreement has nothing to steer with --exit-mode lossless: every answer "
                "is that of full depth"
            )
        if args.logits_processors:
            raise checkpoint.RefusedError(
                "--target-agreement cannot tell what full depth would say after --logits-processors"
            )
    if targets.tpot_ms is not None:
        _check_steering("--target-tpot-ms", args, book, rule)
        if args.disable_log_stats:
            raise checkpoint.RefusedError(
                "--target-tpot-ms needs the statistics that --disable-log-stats switches off"
            )


def _check_steering(option: str, args: argparse.Namespace, book: PresetBook, rule: str) -> None:
    """Refuse a server whose default depth, by the exit rule `rule`, cannot be steered, as `option`
    asks."""
    if (args.api_server_count or 1) > 1:
        raise checkpoint.RefusedError(
            f"{option} needs one API process, which sees every token; "
            f"--api-server-count is {args.api_server_count}"
        )
    if not book.floors:
        raise checkpoint.RefusedError(
            f"{option} needs priority_classes in the presets file: they hold the floors"
        )
    if rule != GATE:
        raise checkpoint.RefusedError(
            f"{option} moves the threshold of --exit-rule gate, and floors are of that "
            f"rule; the default rule is {rule}"
        )
    if not args.headless:
        # With data parallelism vLLM's default is more than one.
        args.api_server_count = 1


def _length(args: argparse.Namespace) -> int | None:
    length = args.max_model_len
    return length if isinstance(length, int) and length > 0 else None


def run(args: argparse.Namespace) -> None:
    """Serve until stopped."""
    cli_env_setup()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)

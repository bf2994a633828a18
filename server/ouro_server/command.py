"""The command itself: the depth options, then vLLM's server."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ouro_runtime.config import DepthError
from ouro_server import checkpoint, settings
from ouro_server.presets import PresetBook, PresetError

DIED = 1
USAGE_ERROR = 2
_OPTION = {name: "--" + name.replace("_", "-") for name in settings.DEPTH_FIELDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Exit status 2, and one line, for what cannot be served; 1 for an engine
    that dies later."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["calibrate"]:
        from ouro_server.calibrate import command as calibrate

        return calibrate.main(argv[1:])
    parser = settings.depth_parser()
    if any(arg in ("-h", "--help") or arg.startswith("--help=") for arg in argv):
        return _help(argv)
    options, rest = parser.parse_known_args(argv)
    depth = settings.depth_settings(options)
    model = settings.guess_model(rest)
    if model is not None:
        model = checkpoint.locate(model)
    elif settings.names_no_model(rest):
        model = str(checkpoint.shipped())
    try:
        # What can be told before vLLM is imported; `_serve` checks again when all is known.
        config = None if model is None else checkpoint.read_config(model)
        checkpoint.check_depth_defaults(config, depth)
        _check_presets(options.presets, config)
        targets = settings.Targets.of(options)
        _prepare_environment(argv, local_model=config is not None)
        return _serve(rest, depth, options.presets, targets)
    except DepthError as error:
        return _fail(_in_terms_of_options(error))
    except (checkpoint.RefusedError, PresetError) as error:
        return _fail(str(error))


def _serve(
    rest: Sequence[str], depth: dict[str, object], presets: Path, targets: settings.Targets
) -> int:
    from ouro_server import launch

    args = launch.parse(rest)
    config = checkpoint.read_config(args.model)
    checkpoint.check_overrides(args.hf_overrides)
    merged = settings.merge_additional_config(args.additional_config, depth)
    checkpoint.check_depth_defaults(config, merged["ouro"])
    book = _check_presets(presets, config)
    args.presets = presets
    args.targets = targets
    launch.check_paths(args)
    launch.check_named_files(args)
    launch.check_targets(args, book, merged["ouro"])
    if config is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        weights = args.load_format in ("auto", "safetensors")
        checkpoint.check_files(args.model, weights, launch.displaced(args))
    name = (args.served_model_name or [args.model])[0]
    launch.say(f"Ouro Serve: loading {name} and warming up; this can take a minute")
    launch.complete(args, depth, config)
    return _run(args)


def _run(args: Any) -> int:
    """Serve until stopped: status 2 if it cannot start, 1 if its engine dies."""
    from ouro_runtime.engine.config_hook import needs_ray
    from ouro_server import failure, launch
    from ouro_server.run_folder import run_folder, serves
    from ouro_server.stopping import stoppable

    with stoppable(), run_folder(one_host=not needs_ray(args)) as folder:
        try:
            launch.run(args)
        except Exception as error:
            if os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG":
                raise
            status = DIED if serves(folder) else USAGE_ERROR
            return _fail(failure.why(error, args, folder), status)
        death = failure.death(args, folder)
    return 0 if death is None else _fail(f"the engine died: {death}", DIED)


def _check_presets(file: Path, config: Mapping[str, Any] | None) -> PresetBook:
    """PresetError for a file that the served model cannot use, as far as its loops are known."""
    return PresetBook.load(
        file, checkpoint.ANY_LOOPS if config is None else config["total_ut_steps"]
    )


def _help(argv: Sequence[str]) -> int:
    settings.depth_parser().print_help()
    print("\nloading vLLM's options ...", file=sys.stderr, flush=True)
    _prepare_environment(argv, local_model=True)
    from ouro_server import launch

    wanted = [arg for arg in argv if arg.startswith("--help=")] or ["--help"]
    print()
    sys.stdout.flush()
    launch.build_parser().parse_args(wanted[:1])
    return 0


def _prepare_environment(argv: Sequence[str], local_model: bool) -> None:
    os.environ.update(settings.environment(os.environ, argv, local_model))


def _in_terms_of_options(error: DepthError) -> str:
    """A depth error as the command line's user knows the field."""
    option = _OPTION.get(error.param, error.param)
    return str(error).replace(error.param, option, 1)


def _fail(message: str, status: int = USAGE_ERROR) -> int:
    print(f"ouro-serve: error: {message}", file=sys.stderr, flush=True)
    return status

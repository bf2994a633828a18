"""The command line's own part: depth options, and the environment vLLM is started in."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from ouro_runtime.config import DEPTH_FIELDS, DRAFTS, MODES, RULE, RULES, DepthError
from ouro_server.cli import USAGE_ERROR, one_line
from ouro_server.presets import SHIPPED

PLUGINS = ("ouro", "ouro_depth", "ouro_metrics")
"""Our entry points in vLLM's plugin groups. `VLLM_PLUGINS` filters every group."""

OPEN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)

QUIET = "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker"
"""Warnings of vLLM's child processes that say nothing to who serves."""

OWN_LOGGING = ("--log-", "--log_", "--logging", "--pylog")
"""Options of who wants vLLM's log another way; `--logprobs-mode` is none."""

AUDIT_SHARE = 0.02
"""Of `--audit`, where a target agreement asks for audits and nobody says how many."""

LOGGING = Path(__file__).with_name("logging.yaml")
"""vLLM's loggers at WARNING, but for the few lines that show how far loading has come. vLLM reads
JSON here, which YAML contains."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, instead of printing options too."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def depth_parser() -> argparse.ArgumentParser:
    """The depth options. Values stay text: `depth_settings` turns them into numbers."""
    parser = OneLineParser(
        prog="ouro-serve",
        usage="ouro-serve [MODEL] [depth options] [any option of vLLM's server]",
        description="Serve an Ouro (looped) language model over HTTP, OpenAI-compatible. MODEL is "
        "a checkpoint folder or a Hugging Face id; without it the shipped ouro-mini is served.\n"
        "`ouro-serve calibrate --help` is about finding a threshold that keeps a promise.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group(
        "depth options",
        "Defaults of requests that set none; a request overrides each with the field of the same\n"
        "name. T is the model's number of loops (total_ut_steps in config.json).",
    )
    group.add_argument(
        "--exit-threshold",
        "--exit_threshold",
        metavar="Q",
        help="A token leaves the loop as soon as the gate's cumulative exit probability reaches\n"
        "Q, from 0 to 1. Lower is faster and shallower; 1 runs every loop (the plain model).\n"
        "Default: early_exit_threshold in config.json. With another --exit-rule it has that\n"
        "rule's unit.",
    )
    group.add_argument(
        "--exit-rule",
        "--exit_rule",
        metavar="RULE",
        help="What a token leaves by, at the threshold Q:\n"
        "gate: the gate's cumulative exit probability is at least Q. The default.\n"
        "margin: the gap between the two largest probabilities of the loop's own read-out is at\n"
        "least Q, from 0 to 1; every loop of such requests is read out. 1 runs every loop.\n"
        "delta: the state changed by at most Q since the loop before, relative to its length,\n"
        "from 0 to 2; lower is slower and deeper. 0 runs every loop.\n"
        "margin and delta need --exit-threshold, and run on CPU only.",
    )
    group.add_argument(
        "--exit-mode",
        "--exit_mode",
        metavar="MODE",
        help="skip: the loops after the exit are not run, which is what saves time.\n"
        "exact: they are run off the read-out, so that later tokens see the K/V of the full\n"
        "model; nothing is saved.\n"
        "shared: as skip, over one K/V for all loops: less memory, other answers.\n"
        "lossless: the token read out at the exit is a draft, which loop T confirms or takes\n"
        "back: the answer is that of every loop.\n"
        "auto: lossless where every loop is asked for, else skip. Default: auto.",
    )
    group.add_argument(
        "--no-drafts",
        "--no_drafts",
        action="store_true",
        help="Never draft: lossless requests only run every loop.",
    )
    group.add_argument(
        "--min-loops",
        "--min_loops",
        metavar="N",
        help="No token leaves before loop N, from 1 to T. Default: 1.",
    )
    group.add_argument(
        "--max-loops",
        "--max_loops",
        metavar="N",
        help="Every token leaves at loop N at the latest, from 1 to T. Default: T.",
    )
    group.add_argument(
        "--presets",
        metavar="FILE",
        type=Path,
        default=SHIPPED,
        help="YAML file of presets: named depth controls, which a request chooses with\n"
        "depth_preset, with OpenAI's reasoning_effort, or by asking for the model NAME@PRESET;\n"
        "and of priority classes. Default: the shipped file, with the presets fast, balanced,\n"
        "quality and full. docs/api.md describes the file; GET /v1/depth shows what is in force.",
    )
    group.add_argument(
        "--target-tpot-ms",
        "--target_tpot_ms",
        metavar="MS",
        help="Hold the 95th percentile of time per output token at MS milliseconds by giving up\n"
        "depth under load: the default threshold of each priority class moves between its floor\n"
        "(presets file) and --exit-threshold. Requests that set depth themselves are not touched.\n"
        "Default: off.",
    )
    group.add_argument(
        "--audit",
        metavar="SHARE",
        help="Read this share of the answers that skipped loops, above 0 and at most 1, once more\n"
        "at full depth when nobody waits, and count how many agree. Default: off.",
    )
    group.add_argument(
        "--target-agreement",
        "--target_agreement",
        metavar="SHARE",
        help="Let audits move the default thresholds: each priority class gets the lowest, down\n"
        "to its floor, at which this share of greedy answers is that of full depth, token for\n"
        "token, with 95 %% confidence; from 0.5 to below 1. With --target-tpot-ms thresholds\n"
        f"go down only under load, and no further. Implies --audit {AUDIT_SHARE:g}. Default: off.",
    )
    return parser


@dataclass(frozen=True)
class Targets:
    """What the server holds, and how it knows.

    Attributes:
        tpot_ms: the latency controller's target; None if there is to be none.
        agreement: the share of answers that shall be those of full depth; None as above.
        audit: the share of answers that is audited; 0 for none.
    """

    tpot_ms: float | None = None
    agreement: float | None = None
    audit: float = 0.0

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Targets":
        """From the command line.

        Raises:
            DepthError: naming the option and what is allowed.
        """
        agreement = _share(
            "--target-agreement",
            options.target_agreement,
            "from 0.5 to below 1",
            lambda v: 0.5 <= v < 1,
        )
        audit = _share("--audit", options.audit, "above 0 and at most 1", lambda v: 0 < v <= 1)
        implied = AUDIT_SHARE if agreement is not None else 0.0
        return cls(target_tpot_ms(options), agreement, implied if audit is None else audit)


def _share(
    name: str, text: str | None, allowed: str, holds: Callable[[float], bool]
) -> float | None:
    value = None if text is None else _number(text)
    if value is not None and (isinstance(value, str) or not holds(value)):  # NaN compares false
        raise DepthError(name, f"{name} must be a number {allowed}, got {text!r}")
    return value


def target_tpot_ms(options: argparse.Namespace) -> float | None:
    """The latency controller's target; None if there is to be none.

    Raises:
        DepthError: unless a number above 0.
    """
    text = options.target_tpot_ms
    if text is None:
        return None
    value = _number(text)
    if isinstance(value, str) or not 0 < value < math.inf:  # NaN compares false
        name = "--target-tpot-ms"
        raise DepthError(name, f"{name} must be a number of milliseconds above 0, got {text!r}")
    return float(value)


def depth_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The depth options that were given, as numbers where they are; text that is no number stays
    text, for the check that knows what is allowed to name it."""
    given = {
        name: value if name in ("exit_mode", RULE) else _number(value)
        for name in DEPTH_FIELDS
        if (value := getattr(options, name)) is not None
    }
    return given | ({DRAFTS: False} if options.no_drafts else {})


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def merge_additional_config(given: Any, depth: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `additional_config` with the depth options under `ouro`; options win over it.

    Raises:
        DepthError: unless it is an object, and `ouro` in it another.
    """
    given = {} if given is None else given
    ours = given.get("ouro") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(ours, (Mapping, type(None))):
        name = "--additional-config"
        allowed = "a JSON object, and ouro in it another (depth fields by name)"
        raise DepthError(name, f"{name} must be {allowed}, got {given!r}")
    return {**given, "ouro": {**(ours or {}), **depth}}


def guess_model(argv: Sequence[str]) -> str | None:
    """MODEL on a command line that vLLM's parser has not seen yet; None if there seems to be none.

    Used for what must be settled before vLLM is imported. The parser decides.
    """
    if argv and not argv[0].startswith("-"):
        return argv[0]
    for i, arg in enumerate(argv):
        if arg == "--model" and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith("--model="):
            return arg.partition("=")[2]
    return next((arg for arg in argv if (Path(arg) / "config.json").is_file()), None)


def names_no_model(argv: Sequence[str]) -> bool:
    """Whether a command line, seen by nobody yet, can name no model: it has options only."""
    return all(arg.startswith("-") and not arg.startswith("--config") for arg in argv)


def environment(
    current: Mapping[str, str], argv: Sequence[str], local_model: bool
) -> dict[str, str]:
    """What to add to the environment before vLLM is imported; the user's own values stand."""
    theirs = current["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in current else _installed()
    plugins = dict.fromkeys([*filter(None, theirs), *PLUGINS])
    added = {"VLLM_PLUGINS": ",".join(plugins)}
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": QUIET,
        # Of what torch's C++ code says, errors.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if local_model:
        defaults["HF_HUB_OFFLINE"] = "1"
    own_logging = any(arg.startswith(OWN_LOGGING) for arg in argv)
    if "VLLM_LOGGING_LEVEL" not in current and not own_logging:
        defaults["VLLM_LOGGING_CONFIG_PATH"] = str(LOGGING)
    return {**added, **{k: v for k, v in defaults.items() if k not in current}}


def _installed() -> list[str]:
    """Plugins that vLLM loads when `VLLM_PLUGINS` is unset: all but endpoint plugins."""
    return [entry.name for group in OPEN_GROUPS for entry in entry_points(group=group)]


assert set(RULES) == {"gate", "margin", "delta"}, "the help of --exit-rule explains these"
assert set(MODES) == {"auto", "skip", "exact", "shared", "lossless"}, "--exit-mode explains these"

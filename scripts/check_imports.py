"""Imports point one way: server -> runtime -> kernels, and inside the runtime as the table says.

Reads the source, imports nothing. Every import counts, also one inside a function or for types
only. Run by `make check`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ouro_runtime", "kernels/ouro_kernels", "server/ouro_server")


@dataclass(frozen=True)
class Rule:
    """Modules that match `who` and not `but` must not import what matches `never`.

    All three are names with `*`; a name stands for what is inside it too. Names in `only`, where
    given, are the only imports allowed beside the standard library and the module's own package.
    """

    who: str
    why: str
    never: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def forbids(self, module: str, imported: str) -> bool:
        if not matches(module, self.who) or any(matches(module, name) for name in self.but):
            return False
        if self.only:
            own = module.partition(".")[0]
            first = imported.partition(".")[0]
            return first not in (*self.only, own) and first not in sys.stdlib_module_names
        return any(matches(imported, name) for name in self.never)


RULES = (
    Rule("ouro_kernels", "kernels know torch and triton only", only=("torch", "triton")),
    Rule("ouro_runtime", "the server is built on the runtime", never=("ouro_server",)),
    *(
        Rule(f"ouro_runtime.{room}", "engine -> loop -> exit, cache, model", never=never)
        for room, never in {
            "loop": ("ouro_runtime.engine",),
            "exit": ("ouro_runtime.engine", "ouro_runtime.loop"),
            "cache": ("ouro_runtime.engine", "ouro_runtime.loop"),
            "model": ("ouro_runtime.engine", "ouro_runtime.loop"),
            "checkpoint_config": ("ouro_runtime.*",),
            "config": ("ouro_runtime.[!c]*", "ouro_runtime.cache"),
            "reports": ("ouro_runtime.*",),
            "metrics": ("ouro_runtime.engine", "ouro_runtime.loop", "ouro_runtime.model"),
        }.items()
    ),
    Rule(
        "ouro_runtime",
        "only engine and model, and the plugin that registers them, import vLLM",
        never=("vllm",),
        but=("ouro_runtime.engine", "ouro_runtime.model", "ouro_runtime.plugin"),
    ),
    Rule(
        "ouro_server",
        "what the server takes from vLLM goes through ouro_server.vllm_api",
        never=("vllm",),
        but=("ouro_server.vllm_api",),
    ),
    Rule("ouro_runtime.loop.planner*", "planning is plain Python and numpy", never=("torch",)),
    Rule(
        "ouro_runtime.model.checkpoint",
        "a wrong folder is refused before anything heavy is imported",
        never=("torch", "vllm", "transformers"),
    ),
)


def matches(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern` or lies inside it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything a module imports; `from a import b` gives a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                up = parts[: len(parts) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(root: Path = ROOT) -> list[str]:
    """One line for each import that breaks a rule: where, what, why."""
    found = []
    for package in PACKAGES:
        top = root / package
        for file in sorted(top.rglob("*.py")):
            parts = file.relative_to(top.parent).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            for line, imported in imports(ast.parse(file.read_text()), module, is_package):
                found += [
                    f"{file.relative_to(root)}:{line}: imports {imported}: {rule.why}"
                    for rule in RULES
                    if rule.forbids(module, imported)
                ]
    return found


if __name__ == "__main__":
    lines = violations()
    print("\n".join(lines) if lines else "import rules: all kept")
    sys.exit(bool(lines))

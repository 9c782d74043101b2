"""How far is it from a module to everything that it imports?

    python tests/import_metric.py [MODULE...]

prints, for each module, how many modules of star_jax any `from star_jax` import loads (imports
inside functions and under TYPE_CHECKING count), and the longest path of imports.
"""

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'star_jax'
TARGETS = (
    'star_jax.training.program',
    'star_jax.training.transformer_job',
    'star_jax.sampling.pipeline',
)

Graph = Mapping[str, frozenset[str]]


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """The path of every module of a package, by its dotted name."""
    found = {}
    for path in sorted(package.rglob('*.py')):
        parts = path.relative_to(package.parent).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def import_graph(package: Path = PACKAGE) -> Graph:
    """The modules of the package that each of them imports by name."""
    known = modules(package)
    return {name: frozenset(_imported(path, known)) - {name} for name, path in known.items()}


def _imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f'{node.module}.{alias.name}' for alias in node.names]
            submodules = [name for name in names if name in known]
            yield from submodules
            if len(submodules) < len(names):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def reachable(graph: Graph, module: str) -> frozenset[str]:
    """The modules that a module imports, directly or through others; itself included."""
    found, open_modules = {module}, [module]
    while open_modules:
        new = graph[open_modules.pop()] - found
        found |= new
        open_modules.extend(new)
    return frozenset(found)


def longest_path(graph: Graph, module: str) -> list[str]:
    """The longest chain of imports that starts at a module; a cycle is followed once."""

    @functools.cache
    def longest(name: str) -> tuple[str, ...]:
        if name in active:
            return ()
        active.add(name)
        path = max((longest(part) for part in sorted(graph[name])), key=len, default=())
        active.discard(name)
        return (name, *path)

    active: set[str] = set()
    return list(longest(module))


def main(targets: list[str]) -> None:
    graph = import_graph()
    for target in targets:
        path = longest_path(graph, target)
        sys.stdout.write(f'{target}: {len(reachable(graph, target))} modules, path {len(path)}\n')
        sys.stdout.write(
            '    ' + ' > '.join(name.removeprefix('star_jax.') for name in path) + '\n'
        )


if __name__ == '__main__':
    main(sys.argv[1:] or list(TARGETS))

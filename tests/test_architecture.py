"""The laws of the house (CONTRIBUTING.md) that a parser can check."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "aloha_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from those before it; within a package like `engines` its modules are free.
ORDER = [
    "startup",
    "atomic",
    "signals",
    "typed_json",
    "settings",
    "config",
    "presets",
    "host",
    "decimation",
    "scene",
    "visual",
    "expert",
    "engines",
    "tasks",
    "quality",
    "actions",
    "pixels",
    "archive",
    "history",
    "env_state",
    "conditions",
    "starts",
    "views",
    "env",
    "factory",
    "networks",
    "policy",
    "memory",
    "ppo",
    "augmentation",
    "rollout",
    "training",
    "checkpoints",
    "origins",
    "video",
    "judge",
    "trials",
    "evaluation",
    "metrics",
    "plots",
    "profiling",
    "run_directory",
    "hints",
    "run",
    "launch",
    "cli",
    "gym",
    "__init__",
]

# Library -> the modules that may know it.
CONFINED = {
    "dm_control": {"judge"},
    "gymnasium": {"judge", "gym"},
    "imageio": {"video"},
    "matplotlib": {"plots"},
    "orbax": {"checkpoints"},
    "rich": {"metrics"},
    "tensorboardX": {"metrics"},
    "tyro": {"cli"},
}

# Libraries that run code when they read data; no file that we read needs them.
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}

LONGEST_FILE = 400


def module_of(source: pathlib.Path) -> str:
    """`aloha_jax/engines/c.py` belongs to `engines`."""
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[str]:
    """Every absolute dotted name that is imported anywhere in a file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_laws(module: str, code: str) -> list[str]:
    broken = []
    for name in imports(ast.parse(code)):
        library, _, rest = name.partition(".")
        if library == "aloha_jax":
            imported = rest.split(".")[0]
            if imported not in ORDER:  # `import aloha_jax`, or a name of its __init__
                imported = "__init__"
            if imported != module and ORDER.index(imported) >= ORDER.index(module):
                broken.append(f"{module} imports {imported}, which comes after it")
        elif library in PICKLERS:
            broken.append(f"{module} imports {library}: data must not run code")
        elif module not in CONFINED.get(library, {module}):
            broken.append(f"{module} imports {library}, which only {sorted(CONFINED[library])} may know")
    return broken


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
def test_a_source_file_keeps_the_laws(source: pathlib.Path) -> None:
    code = source.read_text()
    module = module_of(source)
    assert module in ORDER, f"give {module} its place in ORDER"
    assert broken_laws(module, code) == []
    assert len(code.splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("scene", "from aloha_jax import env"),
        ("scene", "import aloha_jax.env"),
        ("pixels", "from aloha_jax.env import EnvState"),
        ("env", "def f():\n    from aloha_jax import make"),
        ("env", "import aloha_jax"),
        ("training", "import orbax.checkpoint as ocp"),
        ("training", "from rich import print"),
        ("env", "import gymnasium as gym"),
        ("checkpoints", "import pickle"),
        ("checkpoints", "from joblib import load"),
    ],
)
def test_a_broken_law_is_noticed(module: str, code: str) -> None:
    assert len(broken_laws(module, code)) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("env", "from aloha_jax import scene"),
        ("engines", "from aloha_jax.engines import Physics"),
        ("checkpoints", "import orbax.checkpoint as ocp"),
        ("judge", "import gymnasium"),
        ("__init__", "from aloha_jax.factory import make"),
    ],
)
def test_what_is_allowed_passes(module: str, code: str) -> None:
    assert broken_laws(module, code) == []

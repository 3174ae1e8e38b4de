"""The house plan: a room imports from the floors below its own and from nowhere else in the package.

A room is a module or a package directly below ``pt_jax``. Within a room everything may import everything; two
rooms of one floor do not know each other: a loss can be used without the model, the sampler without the trainer.
"""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "pt_jax"
FLOORS = [
    {"checks", "folders", "signals"},
    {"weights", "tracking", "rewards"},
    {"logps"},
    {"divergences"},
    {"advantages", "losses", "objectives", "models", "data"},
    {"sampling", "training"},
    {"recipes", "evaluation", "scale"},
    {"commands"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# flax.nnx breaks with newer jax; torch is there to compare with, in tests
FORBIDDEN = ("flax.nnx", "torch")


def modules(package):
    """Every file of the package: the parts of its dotted name, and its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        yield parts, ast.parse(path.read_text(), str(path))


def imports(parts, tree):
    """The dotted names that a module imports, wherever in the file: inside a function is an import too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = parts[: -node.level] if node.level else []  # ".": the package that the file is in
            base = ".".join([*here, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms(package):
    return {p.stem for p in package.glob("*.py")} - {"__init__"} | {p.parent.name for p in package.glob("*/*.py")}


def bad_arrows(package):
    """The imports between rooms that do not go down, as sentences."""
    bad = []
    for parts, tree in modules(package):
        here = parts[1]
        for name in imports(parts, tree):
            target = name.split(".")
            if target[0] != package.name:
                continue
            there = target[1] if len(target) > 1 else ""
            if here == there:
                continue
            if there not in FLOOR:
                bad.append(f"{'.'.join(parts)} imports {name}, which is no room")
            elif here == "__init__" or FLOOR[there] >= FLOOR.get(here, -1):
                bad.append(f"{'.'.join(parts)} imports {name}")
    return bad


def forbidden_imports(package):
    return [
        f"{'.'.join(parts)} imports {name}"
        for parts, tree in modules(package)
        for name in imports(parts, tree)
        for root in FORBIDDEN
        if f"{name}.".startswith(f"{root}.")
    ]


def test_every_room_has_a_floor():
    assert rooms(PACKAGE) - set(FLOOR) == set()


def test_no_room_is_on_two_floors():
    assert sum(map(len, FLOORS)) == len(FLOOR)


def test_imports_go_downwards_only():
    assert bad_arrows(PACKAGE) == []


@pytest.mark.parametrize("root", FORBIDDEN)
def test_nobody_imports_what_is_forbidden(root):
    assert [x for x in forbidden_imports(PACKAGE) if f"imports {root}" in x] == []


def test_the_plan_is_read_of_a_house_that_has_rooms():
    """An empty folder keeps every law."""
    assert {"checks", "weights", "losses", "objectives", "models"} <= rooms(PACKAGE)
    assert sum(1 for _ in modules(PACKAGE)) > 10


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("losses/preference.py", "from pt_jax.models import decoder"),  # sideways
        ("losses/preference.py", "from ..models import decoder"),
        ("losses/deep/er.py", "from ...models.decoder import apply"),
        ("sampling/decode.py", "import pt_jax.training.step as step"),
        ("training/step.py", "def f():\n    from pt_jax import sampling"),  # hidden in a function
        ("weights.py", "from pt_jax import logps"),  # upwards
        ("weights.py", "from . import logps"),
        ("checks.py", "from pt_jax import folders"),
        ("checks.py", "if TYPE_CHECKING:\n    from pt_jax.weights import token_mean"),
        ("models/__init__.py", "from pt_jax.recipes import sft"),
        ("losses/preference.py", "import pt_jax"),  # says nothing of what it will reach for
        ("losses/preference.py", "from pt_jax.attic import box"),  # a room without a floor
        ("attic.py", "from pt_jax import checks"),
        ("__init__.py", "from pt_jax import losses"),  # would make every import of a room an import of all
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path, file, line):
    path = tmp_path / "pt_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(bad_arrows(tmp_path / "pt_jax")) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("losses/preference.py", "from pt_jax import checks, weights\nimport jax"),
        ("losses/preference.py", "from pt_jax.losses import likelihood\nfrom . import likelihood"),
        ("recipes/dpo.py", "from pt_jax.losses.preference import dpo\nfrom ..sampling import decode"),
        ("weights.py", "from pt_jax import checks"),
        ("cli.py", "import pt_jax.commands.train"),
    ],
)
def test_a_right_arrow_is_let_through(tmp_path, file, line):
    path = tmp_path / "pt_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert bad_arrows(tmp_path / "pt_jax") == []


@pytest.mark.parametrize(
    "line", ["from flax import nnx", "import flax.nnx as n", "from flax.nnx import Module", "import torch.nn as n"]
)
def test_a_forbidden_import_is_seen(tmp_path, line):
    (tmp_path / "pt_jax").mkdir()
    (tmp_path / "pt_jax" / "checks.py").write_text(f"def f():\n    {line}\n    import flax.struct, torchlike")
    assert len(forbidden_imports(tmp_path / "pt_jax")) == 1

"""The structure holds: imports go down, outside dependencies have one owner, importing is cheap and harmless, files and functions are short."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rlpjepa_zoo"

ORDER = [
    {"cli"},
    {"report", "bench"},
    {"training"},
    {"evaluation", "embedding"},
    {"models"},
    {"data"},
    {"config"},
    {"hub", "objectives"},
    {"sparse"},
    {"ops"},
    {"core"},
    {"distributions", "errors", "moved", "progress"},
    {"text"},
]
"""Rooms from top to bottom. A room imports from the rooms below it and from itself; rooms in one row do not import each other."""

LEVEL = {room: len(ORDER) - row for row, rooms in enumerate(ORDER) for room in rooms}
ROOM_OF_ITS_OWN = {"data/files", "data/sources", "evaluation/probes", "training/tasks"}
"""Sub-folders that are counted as rooms, so their files do not count for the room around them."""

OWNERS = {
    "torch.distributed": {"core.distributed"},
    "accelerate": {"training.setup"},
    "huggingface_hub": {"hub"},
    "pickle": set(),
    "typer": {"cli"},
    "matplotlib": {"hub.card_figures", "report"},
    "triton": {"ops"},
    "peft": {"training.tasks.lora"},
}
"""Outside packages, and the only modules or rooms that import them."""

EMBEDDING = ("embedding", "sparse", "models")
TRAINING = ("training", "objectives", "accelerate")
MOST_LINES, MOST_FILES, MOST_FUNCTION_LINES = 350, 9, 60

Modules = dict[str, ast.Module]


def modules(root: Path) -> Modules:
    """Modules by dotted name inside the package, without the package's own __init__ and __main__."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__", "_shipped"):
            found[".".join(parts)] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.AST) -> set[str]:
    """Dotted names of everything a module imports; imports inside the package start with a dot."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] + (node.module or "").split(".") * bool(node.module)
            found |= {"." + ".".join([*base, alias.name]) for alias in node.names}
    return found


def inside(name: str, trees: Modules) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for imported in imports(name, trees[name]):
        dotted = imported.removeprefix(".")
        if imported.startswith("."):
            candidates = (dotted, f"{dotted}.__init__", dotted.rpartition(".")[0], f"{dotted.rpartition('.')[0]}.__init__")
            found |= {next((c for c in candidates if c in trees), dotted)}
    return {other for other in found if other in trees or "." in other or other in LEVEL} - {name}


def room(name: str) -> str:
    return name.partition(".")[0]


def upward(trees: Modules) -> list[str]:
    """Imports between rooms that do not go down."""
    return [
        f"{name} -> {other}"
        for name in trees
        for other in sorted(inside(name, trees))
        if room(other) != room(name) and LEVEL.get(room(other), 99) >= LEVEL.get(room(name), 0)
    ]


def cycles(trees: Modules) -> list[str]:
    """Modules that import themselves through others."""
    graph = {name: inside(name, trees) & trees.keys() for name in trees}
    found = []
    for start in graph:
        reached, todo = set[str](), [*graph[start]]
        while todo:
            if (name := todo.pop()) not in reached:
                reached.add(name)
                todo += graph[name]
        found += [start] if start in reached else []
    return found


@pytest.fixture(scope="module")
def trees() -> Modules:
    return modules(PACKAGE)


def test_every_room_has_a_place_in_the_order(trees: Modules) -> None:
    assert {room(name) for name in trees} - {"resnet"} == set(LEVEL)


def test_imports_only_go_down(trees: Modules) -> None:
    assert upward({name: tree for name, tree in trees.items() if name != "resnet"}) == []


def test_there_are_no_import_cycles(trees: Modules) -> None:
    assert cycles(trees) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [("sparse.embeddings", "from ..training.tasks.pretrain import train"), ("objectives.base", "def f():\n    from .. import models")],
)
def test_a_planted_upward_import_is_found(trees: Modules, module: str, line: str) -> None:
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    planted = trees | {module: ast.parse(f"{source}\n{line}\n")}
    assert len(upward(planted)) == len(upward(trees)) + 1


def test_a_planted_cycle_is_found(trees: Modules) -> None:
    source = (PACKAGE / "core/files.py").read_text()
    assert cycles(trees | {"core.files": ast.parse(f"{source}\nfrom . import package\n"), "core.package": ast.parse("from . import files")})


def test_embedding_never_reaches_training(trees: Modules) -> None:
    reached, todo = set[str](), [name for name in trees if name.startswith(EMBEDDING)]
    while todo:
        name = todo.pop()
        if name in trees and name not in reached:
            reached.add(name)
            todo += inside(name, trees)
    assert not [name for name in reached if name.startswith(TRAINING)]


def test_outside_dependencies_have_one_owner(trees: Modules) -> None:
    for name, tree in trees.items():
        for outside, owners in OWNERS.items():
            used = any(i == outside or i.startswith(outside + ".") for i in imports(name, tree))
            assert not used or name in owners or room(name) in owners, f"{name} imports {outside}, which belongs to {owners or 'nobody'}"


def test_files_and_rooms_are_small() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > MOST_LINES}
    assert not long
    folders = {p.parent for p in PACKAGE.rglob("*.py")} - {PACKAGE}
    for folder in folders:
        own = [p for p in folder.iterdir() if p.suffix in (".py", ".j2") and p.stem not in ("__init__",)]
        own += [p for p in folder.iterdir() if p.is_dir() and f"{folder.name}/{p.name}" not in ROOM_OF_ITS_OWN and any(p.glob("*.py"))]
        assert len(own) <= MOST_FILES, f"{folder.name} has {len(own)} files"


def functions(name: str, tree: ast.AST) -> list[tuple[str, int]]:
    """Dotted names of functions and the lines of their bodies, docstrings left out."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}.{child.name}")
            elif isinstance(child, ast.FunctionDef):
                body = [n for n in child.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
                found.append((f"{prefix}.{child.name}", (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0))
                visit(child, f"{prefix}.{child.name}")
            else:
                visit(child, prefix)

    visit(tree, name)
    return found


def test_functions_are_short(trees: Modules) -> None:
    lengths = [entry for name, tree in trees.items() for entry in functions(name, tree)]
    assert [entry for entry in lengths if entry[1] > MOST_FUNCTION_LINES] == []


def test_there_is_no_assert_in_the_package(trees: Modules) -> None:
    assert not [name for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def probe(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout.strip()


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "timm", "numpy", "pydantic", "accelerate", "jinja2")
    code = f"import sys\nfrom rlpjepa_zoo.cli.app import run\nrun(['--help'])\nprint([m for m in {heavy} if m in sys.modules])"
    assert probe(code).splitlines()[-1] == "[]"


IMPORTS = """
import os, sys, torch, timm
torch.set_num_threads(1)
assert "rlpjepa_zoo" not in sys.modules

child = os.fork()  # both halves begin with torch and timm only, whose import takes most of the time
if child == 0:
    import rlpjepa_zoo as rz
    enc = rz.create_encoder("test_resnet", dim=8)
    enc.embed(torch.zeros(1, 3, 32, 32))
    print([m for m in ("accelerate", "datasets", "matplotlib", "typer", "sklearn") if m in sys.modules], flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0

import importlib, random, warnings, datasets, accelerate, matplotlib.figure, sklearn.linear_model, scipy.optimize, tqdm.auto
import torchvision.transforms.v2, pyarrow.parquet, huggingface_hub, safetensors.torch, typer, pydantic

def state():
    return dict(os.environ), list(warnings.filters), torch.get_rng_state().sum().item(), random.getstate(), torch.get_num_threads()

before = state()
for name in NAMES:
    importlib.import_module("rlpjepa_zoo." + name)
print([a == b for a, b in zip(before, state())])
"""


@pytest.fixture(scope="module")
def imported(trees: Modules) -> list[str]:
    """Lines that one new process prints: packages that embedding has imported; which global states are equal after all modules were."""
    names = sorted(name.removesuffix(".__init__") for name in trees)
    return probe(IMPORTS.replace("NAMES", repr(names))).splitlines()


def test_embedding_imports_neither_accelerate_nor_datasets(imported: list[str]) -> None:
    assert imported[0] == "[]"


def test_importing_every_module_changes_no_global_state(imported: list[str]) -> None:
    assert imported[1] == "[True, True, True, True, True]"


def test_public_names_are_listed_and_typed() -> None:
    import rlpjepa_zoo

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname}
    assert typed == set(rlpjepa_zoo._HOME) == set(rlpjepa_zoo.__all__) - {"__version__"}
    assert (PACKAGE / "py.typed").is_file()

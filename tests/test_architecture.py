"""The house holds: imports flow one way, outside dependencies have one owner, importing is cheap and harmless, functions stay short."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rlpjepa_zoo"

LEVELS = [
    {"errors", "streams", "collectives", "interrupts", "precision", "triton_kernels"},
    {"slices", "kernels", "distributions", "folder", "metrics", "golden", "network", "served"},
    {"sparse", "images", "resnet", "zoo", "sliced", "diagnostics", "page", "dial"},
    {"recipe_text"},
    {"recipe", "objectives", "variance", "preprocess", "pictures", "hub", "probes", "classifier_card"},
    {"sigreg", "sources", "views", "card", "publish", "charts", "journal", "feeds", "scores", "tuning_recipe"},
    {"encoder", "evalsets"},
    {"classifier"},
    {"loading", "export"},
    {"data", "model", "guard", "optim", "checkpoint", "evaluation", "record"},
    {"task", "cached", "sections", "extraction"},
    {"engine"},
    {"training", "tuning"},
    {"demo", "report", "bench"},
    {"cli"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
OWNERS = {
    "torch.distributed": {"collectives"},
    "accelerate": {"engine"},
    "huggingface_hub": {"hub", "publish", "network"},
    "pickle": set(),
    "typer": {"cli"},
    "matplotlib": {"pictures", "charts"},
    "triton": {"kernels", "triton_kernels"},
}
EMBEDDING = {"encoder", "loading", "sparse", "images"}
TRAINING = {"training", "engine", "objectives", "sliced", "sigreg", "optim", "data", "sources"}
LONG = {"go"}


def modules(root: Path) -> dict[str, ast.Module]:
    return {p.stem: ast.parse(p.read_text()) for p in root.glob("*.py") if p.stem not in ("__init__", "__main__")}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported anywhere in a module; relative ones start with a dot."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            found |= {f"{dots}{node.module}"} if node.module else set()
            found |= {f"{dots}{node.module + '.' if node.module else ''}{alias.name}" for alias in node.names}
    return found


def inside(tree: ast.AST) -> set[str]:
    """Modules of the package that a module imports."""
    return {name.lstrip(".").split(".")[0] for name in imports(tree) if name.startswith(".")} & set(LEVEL)


def upward(trees: dict[str, ast.Module]) -> list[str]:
    """Imports that do not go down."""
    return [f"{name} -> {other}" for name, tree in trees.items() for other in inside(tree) if LEVEL[other] >= LEVEL[name]]


def test_every_module_has_a_level() -> None:
    assert set(modules(PACKAGE)) == set(LEVEL)


def test_imports_only_go_down() -> None:
    assert upward(modules(PACKAGE)) == []


@pytest.mark.parametrize(
    ("name", "line"), [("sparse", "from .training import train"), ("objectives", "def f():\n    from . import encoder")]
)
def test_a_planted_upward_import_is_found(tmp_path: Path, name: str, line: str) -> None:
    for file in PACKAGE.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    with open(tmp_path / f"{name}.py", "a") as file:
        file.write(f"\n{line}\n")
    assert len(upward(modules(tmp_path))) == 1


def test_embedding_never_reaches_training() -> None:
    trees, reached, todo = modules(PACKAGE), set(EMBEDDING), list(EMBEDDING)
    while todo:
        new = inside(trees[todo.pop()]) - reached
        reached |= new
        todo += new
    assert not reached & TRAINING


def test_outside_dependencies_have_one_owner() -> None:
    for name, tree in modules(PACKAGE).items():
        for outside, owners in OWNERS.items():
            used = any(i == outside or i.startswith(outside + ".") for i in imports(tree))
            assert not used or name in owners, f"{name} imports {outside}, which belongs to {owners or 'nobody'}"


def test_functions_stay_short() -> None:
    for name, tree in modules(PACKAGE).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= 60 or node.name in LONG, f"{name}.{node.name} has {length} lines"


def test_no_assert_in_the_package() -> None:
    assert not [name for name, tree in modules(PACKAGE).items() for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def probe(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout.strip()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom rlpjepa_zoo.cli import run\nrun(['--help'])\nprint([m for m in ('torch', 'timm', 'numpy', 'pydantic', 'accelerate') if m in sys.modules])"
    assert probe(code).splitlines()[-1] == "[]"


def test_loading_and_embedding_import_neither_accelerate_nor_datasets() -> None:
    code = (
        "import sys, torch, rlpjepa_zoo as rz\ntorch.set_num_threads(1)\n"
        "enc = rz.create_encoder('test_resnet', dim=8)\nenc.embed(torch.zeros(1, 3, 32, 32))\n"
        "print([m for m in ('accelerate', 'datasets', 'matplotlib', 'typer', 'sklearn') if m in sys.modules])"
    )
    assert probe(code) == "[]"


def test_importing_every_module_changes_no_global_state() -> None:
    names = sorted(LEVEL)
    code = (
        "import os, random, warnings, torch, timm, datasets, accelerate, matplotlib.figure, sklearn.linear_model, scipy.optimize, tqdm.auto\n"
        "import torchvision.transforms.v2, pyarrow.parquet, huggingface_hub, safetensors.torch, typer, pydantic\n"
        "before = dict(os.environ), list(warnings.filters), torch.get_rng_state().sum().item(), random.getstate(), torch.get_num_threads()\n"
        f"import importlib\n[importlib.import_module('rlpjepa_zoo.' + n) for n in {names}]\n"
        "after = dict(os.environ), list(warnings.filters), torch.get_rng_state().sum().item(), random.getstate(), torch.get_num_threads()\n"
        "print([a == b for a, b in zip(before, after)])"
    )
    assert probe(code) == "[True, True, True, True, True]"


def test_public_names_are_listed_and_typed() -> None:
    import rlpjepa_zoo

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname}
    assert typed == set(rlpjepa_zoo._HOME) == set(rlpjepa_zoo.__all__) - {"__version__"}
    assert (PACKAGE / "py.typed").is_file()

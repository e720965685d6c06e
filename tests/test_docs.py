"""The documents hold: their blocks run, links and named files exist, claims equal result files, tables and manifest are up to date."""

import csv
import doctest
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import FakeHub, User
from PIL import Image
from processes import run_alone

from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.config.finetune import TuningRecipe
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.hub import zoo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MOST_WORDS = 900


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def sections(page: str) -> Iterator[tuple[str, str, str]]:
    """(page, heading, text) of each section of a page that has Python blocks."""
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.M)[1:]:
        heading, _, text = section.partition("\n")
        if blocks(text, "python"):
            yield page, heading, text


IN_THIS_PROCESS = [
    section
    for page in ("README.md", "docs/quickstart.md", "docs/hub.md", "docs/loss.md", "docs/pretraining.md")
    for section in sections(page)
]
IN_A_PROCESS_OF_THEIR_OWN = list(sections("docs/extending.md"))
"""Sections that add entries to registries."""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Path:
    """A working folder with photos/, as the README supposes."""
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog", "hat"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_blocks_to_run() -> None:
    assert len(blocks(README, "python")) >= 2 and len(blocks(README, "bash")) >= 4
    assert sum(len(blocks(text, "python")) for _, _, text in IN_THIS_PROCESS) >= 8 and len(IN_A_PROCESS_OF_THEIR_OWN) == 4


@pytest.mark.parametrize(("page", "heading", "text"), IN_THIS_PROCESS, ids=[f"{page}-{heading}" for page, heading, _ in IN_THIS_PROCESS])
def test_python_blocks_run(photos: Path, page: str, heading: str, text: str) -> None:
    namespace: dict[str, object] = {}
    for block in blocks(text, "python"):
        exec(compile(block, f"{page}, {heading}", "exec"), namespace)


EXAMPLES = """
import os, sys, traceback, torch, timm
torch.set_num_threads(1)
assert "rlpjepa_zoo" not in sys.modules
for folder in sys.argv[1:]:
    child = os.fork()  # each example begins with torch and timm only, whose import takes most of the time
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            exec(compile(open("example.py").read(), "example.py", "exec"), globals())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def example_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of the example of each section, each in a process of its own."""
    folders = [tmp_path_factory.mktemp("example") for _ in IN_A_PROCESS_OF_THEIR_OWN]
    for folder, (_, _, text) in zip(folders, IN_A_PROCESS_OF_THEIR_OWN, strict=True):
        (folder / "example.py").write_text("\n".join(blocks(text, "python")))
    command = [sys.executable, "-c", EXAMPLES, *map(str, folders)]
    codes = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=True).stdout.split()
    results = [(int(code), (folder / "output").read_text()) for code, folder in zip(codes, folders, strict=True)]
    return dict(zip([text for _, _, text in IN_A_PROCESS_OF_THEIR_OWN], results, strict=True))


@pytest.mark.parametrize("text", [pytest.param(text, id=heading) for _, heading, text in IN_A_PROCESS_OF_THEIR_OWN])
def test_examples_of_extending_run(example_results: dict[str, tuple[int, str]], text: str) -> None:
    code, output = example_results[text]
    assert code == 0, output


def test_commands_of_the_pages_run_or_are_valid(
    photos: Path, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rlpjepa_zoo as rz

    rz.create_encoder("test_vit", dim=16, hidden_dim=16, img_size=32, patch_size=8).save_pretrained("runs/mine/encoder")
    hub_server.users["hf_you"] = User("you")
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    pages = [
        (ROOT / page).read_text() for page in ("README.md", "docs/hub.md", "docs/pretraining.md", "docs/cost.md", "docs/finetuning.md")
    ]
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith(("rlpjepa ", "accelerate ", "torchrun "))]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[words.index("rlpjepa_zoo") + 1 :] if "rlpjepa_zoo" in words else words[1:]
        if words[0] in (
            "train",
            "finetune",
        ):  # only the recipe and its overrides are checked here; test_pretrain and test_finetune run them
            options = words[2 : words.index("--out")]
            (Recipe if words[0] == "train" else TuningRecipe).load(words[1], options)
        else:
            quick = {"embed": ["--quiet"], "eval": ["--quiet", "--seeds", "1", "--limit", "200"], "check": ["train.batch_size=2"]}
            more = quick.get(words[0], [])
            assert cli.run([*words, *more]) == 0, (line, capsys.readouterr().err)
    pushed = [entry.title for entry in hub_server.log("you/photos-sparse")]  # README.md pushes, docs/hub.md pushes with new results
    assert pushed == ["Update sparse encoder", "Upload sparse encoder", "initial commit"]


def test_the_readme_is_short() -> None:
    text = re.sub(r"```.*?```|<!-- results: .*?<!-- end of results -->", "", README, flags=re.S)
    assert 300 < len(text.split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page}: {target}"


def test_the_tree_of_the_readme_is_that_of_the_package() -> None:
    (tree,) = (block for block in blocks(README, "text") if block.startswith("rlpjepa_zoo/"))
    package, rooms, room = ROOT / "rlpjepa_zoo", set(), ""
    for line in tree.partition("\nrecipes/")[0].splitlines()[1:]:
        if name := re.match(r"( {2}| {4})(\w+)/ ", line):
            room = f"{room.partition('/')[0]}/{name[2]}" if len(name[1]) == 4 else name[2]
            rooms.add(room)
        folder = package if line.startswith("  errors.py") else package / room
        assert [file for file in re.findall(r"\w+\.py", line) if not (folder / file).is_file()] == [], line
    assert rooms == {str(path.parent.relative_to(package)) for path in package.rglob("*/__init__.py")}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_that_the_pages_name_exist(page: str) -> None:
    """Paths in backticks: from the root of the repository, or from the package."""
    names = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)(?:::\w+)?`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S))
    package = ROOT / "rlpjepa_zoo"
    folders = {path.name for base in (ROOT, package) for path in base.iterdir()}
    ours = [name for name in names if name.split("/")[0] in folders]
    assert [name for name in ours if not (ROOT / name).exists() and not (package / name).exists()] == []


def test_the_table_of_changes_has_ten_rows() -> None:
    rows = re.search(r"\| to change \| open \|\n\|---\|---\|\n((?:\|.*\n)+)", README)
    assert rows and len(rows[1].splitlines()) == 10


DOWNSTREAM = (ROOT / "docs/downstream.md").read_text()
SMALLER = {
    "folder-resnet18": ["encoder.backbone=test_resnet", "encoder.dim=32", "data.image_size=32", "views.blur=0", "objective.num_directions=64", "train.epochs=2",
                        "optim.warmup_epochs=1", "train.batch_size=16", "train.num_workers=0", "train.precision=no"],
    "finetune-folder": ["train.epochs=2", "optim.warmup_epochs=0.5", "classifier.linear_epochs=1", "train.batch_size=8", "train.num_workers=0", "train.precision=no"],
}  # fmt: skip
"""Overrides that shorten the training commands of docs/downstream.md, by recipe."""


def test_blocks_of_downstream_run_in_order(
    tmp_path: Path, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    for name, colour in (("cat", (200, 60, 60)), ("dog", (60, 60, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02d}.jpg")
    monkeypatch.chdir(tmp_path)
    hub_server.users["hf_you"] = User("you")
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    page = re.findall(r"```(bash|python)\n(.*?)```", DOWNSTREAM, flags=re.S)
    assert len(page) >= 10
    for language, text in page:
        if language == "python":
            exec(compile(text, "docs/downstream.md", "exec"), {})
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            words = words[words.index("rlpjepa_zoo") + 1 :] if "rlpjepa_zoo" in words else words[1:]
            more = ["--quiet"] if words[0] not in ("push",) else []
            assert cli.run([*words, *SMALLER.get(words[1], []), *more]) == 0, (line, capsys.readouterr().err)
    assert ("model", "you/photos-sparse-encoder") in hub_server.repos and ("dataset", "you/photos-embeddings") in hub_server.repos


def test_few_label_accuracies_equal_the_result_file() -> None:
    accuracies, page = json.loads((ROOT / "docs/measured/few-labels.json").read_text()), (ROOT / "docs/finetuning.md").read_text()
    for arm in ("pretrained", "scratch"):
        assert ", ".join(f"{100 * top1:.1f} %" for top1 in accuracies[arm]) in page
        assert f"(mean {100 * sum(accuracies[arm]) / 3:.1f})" in page


def test_density_curves_equal_the_result_files() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import density_curves
    finally:
        sys.path.pop(0)
    reports = density_curves.reports()
    assert density_curves.table() in DOWNSTREAM
    assert all(sum(data == name for data, _ in reports) >= 2 for name in ("digits", "cifar10"))
    assert all(report["seeds"] == 3 for report in reports.values())


def test_tables_of_codes_equal_the_result_files() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import codes_figure
    finally:
        sys.path.pop(0)
    page = (ROOT / "docs/codes.md").read_text()
    assert codes_figure.section(codes_figure.reports()) in page and codes_figure.density_section() in page


def test_files_and_keys_in_pretraining_exist() -> None:
    page = (ROOT / "docs/pretraining.md").read_text()
    commands = re.findall(r"\| `([^`]*--out DIR)`", page)
    assert len(commands) == 8
    for name in re.findall(r"recipes/[\w./-]+|tests/[\w./-]+\.py", page):
        assert (ROOT / name).is_file(), name
    known = set(re.findall(r"`((?:train|data|views|optim)\.[a-z_]+)", page))
    values = Recipe.load("digits").model_dump()
    assert len(known) >= 15
    for key in known:
        section, _, name = key.partition(".")
        assert name in values[section], key


def test_readme_has_the_two_install_commands() -> None:
    assert "pip install -e . && rlpjepa demo" in README and "pip install -e '.[test]' && pytest" in README


MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in sorted((ROOT / "rlpjepa_zoo").rglob("*.py"))
]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def public_objects() -> list[tuple[str, object]]:
    import rlpjepa_zoo

    return [(name, getattr(rlpjepa_zoo, name)) for name in rlpjepa_zoo.__all__ if name != "__version__"]


@pytest.mark.parametrize(("name", "thing"), public_objects())
def test_public_names_are_documented(name: str, thing: object) -> None:
    text = thing.__doc__ or ""
    assert len(text) > 60, name
    if callable(thing) and not name.startswith("load"):
        assert "Example:" in text or "Args:" in text, name


def test_manifest_table_and_notes_are_up_to_date(tmp_path: Path) -> None:
    manifest = json.loads((ROOT / "hub/manifest.json").read_text())["encoders"]
    assert manifest and all(zoo.describe(ROOT / "hub" / name).items() <= {**record}.items() for name, record in strip(manifest).items())
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import add_to_zoo
    finally:
        sys.path.pop(0)
    assert add_to_zoo.table() in README and add_to_zoo.notes() in BENCHMARKS
    assert add_to_zoo.rows() == (ROOT / "hub/zoo.csv").read_text()


def test_the_table_of_the_zoo_agrees_with_the_manifest_and_the_folders() -> None:
    manifest = json.loads((ROOT / "hub/manifest.json").read_text())["encoders"]
    with open(ROOT / "hub/zoo.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == manifest.keys()
    for name, row in rows.items():
        info = json.loads((ROOT / "hub" / name / "config.json").read_text())["rlpjepa_zoo"]["info"]
        listed = {"backbone": "architecture", "knn_z": "knn_z", "linear_z": "linear_z", "knn_features": "knn_features"}
        listed |= {
            key: key for key in ("parameters", "data", "dim", "density", "license", "megabytes", "bytes_per_image", "linear_features")
        }
        assert {column: row[column] for column in listed} == {column: str(manifest[name][key]) for column, key in listed.items()}
        assert row["image_size"] == "x".join(map(str, manifest[name]["image_size"]))
        assert (row["minutes"], row["hardware"]) == (str(info["training"]["minutes"]), info["training"]["hardware"])
        assert row["command"] == f"rlpjepa train {row['recipe']}" and row["recipe"] == info["recipe"]
        curve = info["results"]["curve"]
        assert row["evaluation"] == info["results"].get("command", "")
        for probe in ("knn", "linear"):
            cells = {key: cell for key, cell in row.items() if key.startswith(f"{probe}_z_k") and cell}
            assert cells == {f"{probe}_z_k{k}": str(value) for k, value in zip(curve["active"], curve[probe], strict=True)}


def strip(manifest: dict[str, dict]) -> dict[str, dict]:
    """Records as `describe` makes them, before the Hub's repository and commit are known."""
    return {name: {**record, "repo": None, "commit": None} for name, record in manifest.items()}


@pytest.mark.parametrize("name", zoo.list_encoders())
def test_shipped_encoders_load_and_verify(name: str) -> None:
    import rlpjepa_zoo as rz

    enc = rz.load_encoder(name)
    assert enc.config.info["results"]["knn_z"] > 0.3 and enc.config.dim == zoo.entry(name)["dim"]


def test_no_local_path_and_no_registry_host() -> None:
    texts = [
        p
        for p in ROOT.rglob("*")
        if p.suffix in (".py", ".md", ".yaml", ".toml", ".json", ".cff") and "hub/" not in str(p.relative_to(ROOT))
    ]
    texts += list((ROOT / "hub").rglob("*.json")) + list((ROOT / "hub").rglob("*.md")) + list((ROOT / "hub").rglob("*.yaml"))
    for path in texts:
        if path == Path(__file__) or any(
            part.startswith((".venv", ".git", "venv", "runs", "rlpjepa-demo")) for part in path.relative_to(ROOT).parts
        ):
            continue
        forbidden = re.search(r"/(root|home|work)/\w+|pypi\.org|/tmp/\w+", path.read_text())
        assert not forbidden, f"{path}: {forbidden[0]}"


def test_step_speed_equals_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/training_step.json").read_text())
    claimed = re.search(r"runs ([0-9.]+) times as fast as the loop", BENCHMARKS)
    assert claimed and abs(float(claimed[1]) - results["ratio"]) < 0.05


def test_data_pipeline_speed_equals_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/data_pipeline.json").read_text())
    small, large = results["cifar10"]["ratio"], results["photographs"]["ratio"]
    claimed = re.search(
        r"makes ([0-9.]+) times as many views.*?Photographs.*? ([0-9.]+) times as many on a CPU.*?make ([0-9.]+) times", BENCHMARKS, re.S
    )
    assert claimed and small["ours"] >= 2
    for text, measured in zip(claimed.groups(), (small["ours"], large["ours"], large["for a GPU"]), strict=True):
        assert abs(float(text) - measured) < 0.06


def test_embedding_speed_equals_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/embedding.json").read_text())
    claimed = re.search(r"`embed` is ([0-9.]+) times .*?: ([0-9.]+) times as fast with .*? and ([0-9.]+) times as fast", BENCHMARKS, re.S)
    forward, ends = (
        results["forward"]["resnet18, 224 pixels"]["ratio"],
        [end["ratio"]["ours to plain"] for end in results["end to end"].values()],
    )
    assert claimed and forward["embed to bare, channels_last"] > 0.98 and results["memory"]["ratio"] < 1.05
    for text, measured in zip(claimed.groups(), (forward["embed to bare"], *ends), strict=True):
        assert abs(float(text) - measured) < 0.06


def test_what_was_tried_on_a_cpu_equals_the_result_file() -> None:
    page, found = (ROOT / "docs/pretraining.md").read_text(), json.loads((ROOT / "docs/measured/cifar-cpu.json").read_text())
    for run in found["runs"]:
        row = f"| {run['tried']} | {run['steps']} | {run['views']:,} | {run['knn_features']:.3f} | {run['knn_z']:.3f} |"
        assert row in page


def test_reused_memory_equals_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/memory.json").read_text())
    ratios = [round(row["ratio"], 1) for kind in ("forward", "step") for row in results[kind].values()]
    text = BENCHMARKS.split("## Memory of tensors on a CPU")[1].split("\n## ")[0]
    claimed = [float(number) for number in re.findall(r"([0-9.]+) times", text)]
    assert claimed == ratios[:-1] and 0.95 < ratios[-1] < 1.05  # the last: no faster


def test_loss_speed_and_tables_equal_the_result_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results, page = json.loads((ROOT / "benchmarks/loss.json").read_text()), (ROOT / "docs/loss.md").read_text()
    for name, content in runpy.run_path(str(ROOT / "benchmarks/loss.py"))["tables"](results).items():
        assert f"<!-- {name} -->\n{content}\n<!-- /{name} -->" in page or f"<!-- {name} -->{content}<!-- /{name} -->" in page, name
    rows = results["compared"]["rows"]
    same, near, early = rows["random"], rows["hadamard, equal error near"], rows["hadamard, equal error early"]
    claimed = re.search(
        r"the loss is ([0-9.]+) times as fast.*? make it ([0-9.]+) to ([0-9.]+) times as fast, in a twelfth of the memory", BENCHMARKS, re.S
    )
    assert claimed
    for text, row in zip(claimed.groups(), (same, near, early), strict=True):
        assert abs(float(text) - row["faster"]) < 0.51
    assert same["faster"] >= 3.5 and near["faster"] >= 10 and early["faster"] >= 15
    assert near["memory"] <= 1 / 12 and early["memory"] <= 1 / 12, "a twelfth of the memory"
    for error in results["compared"]["gradient_error"].values():
        assert error["seen"] <= error["random"]


def test_monitoring_and_start_times_equal_the_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/path.json").read_text())
    claimed = re.search(
        r"online probes ([0-9.]+) %, logging every 20 steps ([0-9.]+) %.*?checkpoint takes ([0-9.]+) s.*?takes ([0-9.]+) times",
        BENCHMARKS,
        re.S,
    )
    watching, saved = results["watching"], results["anatomy"]["parts"]["checkpoint"]["median"]
    log = next(share for name, share in watching.items() if name.startswith("log every"))
    assert claimed and watching["probes, share of a step"] + log <= 0.03
    for text, measured in zip(
        claimed.groups(), (100 * watching["probes, share of a step"], 100 * log, saved, results["loading"]["ratio"]), strict=True
    ):
        assert abs(float(text) - measured) < 0.06


def run_benchmark(name: str, words: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.argv = [name, *words]
    runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")


def test_training_step_benchmark_runs(tmp_path: Path) -> None:
    words = ["--batch", "4", "--directions", "16", "--repeats", "1", "--json", str(tmp_path / "result.json")]
    run_alone(run_benchmark, "training_step.py", words)
    assert json.loads((tmp_path / "result.json").read_text())["ratio"] > 0

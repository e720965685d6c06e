"""`rlpjepa report`: the page needs no network, its figures are those of the encoder, and missing data are named."""

import html
import json
import logging
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from markupsafe import Markup
from objectives import Spread

from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.config.pretrain import Recipe
from rlpjepa_zoo.core.rng import generator
from rlpjepa_zoo.data.sources import open_source
from rlpjepa_zoo.errors import OutputError, UsageError
from rlpjepa_zoo.evaluation.diagnostics import choose_queries, neighbours
from rlpjepa_zoo.models.factory import create_encoder
from rlpjepa_zoo.models.pretrained import load_encoder
from rlpjepa_zoo.objectives import OBJECTIVES
from rlpjepa_zoo.report import charts
from rlpjepa_zoo.report.report import write_report
from rlpjepa_zoo.training.run_dir import history, read_run
from rlpjepa_zoo.training.tasks.pretrain import train

TINY = [
    "data.limit=192", "encoder.backbone=test_resnet", "encoder.dim=32", "encoder.hidden_dim=32", "objective.num_directions=64",
    "train.batch_size=64", "train.epochs=4", "train.num_workers=0", "train.log_every=1", "train.precision=no", "optim.lr=0.02",
    "optim.warmup_epochs=0.5", "probe.every_epochs=2", "probe.bank=100", "probe.eval_images=60", "train.checkpoint_minutes=1000",
    "target.hold=false", "reconstruction=null",
]  # fmt: skip
IMAGES = 200


class Reader(HTMLParser):
    """Reads tags with attributes and all text of a page; fails if tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ") + ("" if self.open[-1:] == ["text"] else " ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    train(Recipe.load("digits", TINY), run, progress=False)
    return run


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """The page of the run, and its figures."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    figures = write_report(trained, out, images=IMAGES)
    return out.read_text(), figures


@pytest.fixture(scope="module")
def dense(trained: Path) -> tuple[np.ndarray, np.ndarray]:
    """z and labels of the images that the page measures, encoded one by one without the code of the report."""
    encoder = load_encoder(trained / "encoder").eval()
    test = open_source(Recipe.load(trained / "recipe.yaml").data).eval
    rows = np.sort(torch.randperm(360, generator=generator(0, "report"))[:IMAGES].numpy())
    with torch.no_grad():
        z = torch.cat([encoder(encoder.transform(test.read(int(i))).unsqueeze(0)) for i in rows])
    return z.numpy(), test.labels[rows]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "*.html")))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts keep their text and lose their drawing, in tests that read only the words of the page: 1 s a page."""
    monkeypatch.setattr(charts, "_svg", lambda figure, alt: charts.Chart(alt, "0 0 1 1", Markup("")))


def visible(path: Path) -> str:
    return Reader(path.read_text()).text


# --- the page -------------------------------------------------------------------------------------------------------------------------


def test_page_loads_nothing_from_outside(made: tuple[str, dict]) -> None:
    text = made[0]
    page = Reader(text)
    assert page.open == [] and text.startswith("<!doctype html>")
    for name, attributes in page.tags:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "source"), name
        for key in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
            value = attributes.get(key) or ""
            assert not value or (value.startswith("data:image/png;base64,") if name == "img" else value.startswith("#")), (name, value)
        assert not any(key.startswith("on") for key in attributes)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r'src="data:[^"]*"', "", text))


def test_page_has_text_for_every_picture(made: tuple[str, dict]) -> None:
    tags = Reader(made[0]).tags
    units = len(re.findall(r"Unit \d+: \d of \d are \d<", made[0]))
    assert 4 <= units <= 12 and sum(n == "img" for n, _ in tags) == 8 * 7 + units
    assert all(a.get("alt") for n, a in tags if n == "img")
    drawings = [a for n, a in tags if n == "svg"]
    assert len(drawings) == 9 + 6 and all(a["role"] == "img" and len(a["aria-label"] or "") > 15 for a in drawings)
    assert [n for n, _ in tags if n in ("h1", "h2")] == ["h1"] + ["h2"] * 6
    names = [a["id"] for _, a in tags if "id" in a]
    assert len(names) == len(set(names)) > 0
    pointed = {m for m in re.findall(r'(?:url\(#|href="#)([^)"]+)', made[0])}
    assert pointed and pointed <= set(names)


def test_charts_say_first_and_last_values(made: tuple[str, dict], trained: Path) -> None:
    spoken = [a["aria-label"] or "" for n, a in Reader(made[0]).tags if n == "svg"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert spoken[0] == f"Loss over steps. loss: {losses[0]:.4g} at step 1, {losses[-1]:.4g} at step 12"
    assert "kNN, z" in spoken[4] and f"{rows[-1]['knn_z']:.4g} at step 12" in spoken[4]
    assert "evaluation mode" in spoken[3] and "evaluation mode" in spoken[5]


def test_same_inputs_give_the_same_bytes(made: tuple[str, dict], trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    write_report(trained, again, images=IMAGES, batch_size=256)
    assert again.read_text() == made[0]


def test_foreign_names_are_escaped(run: Path, tmp_path: Path) -> None:
    name = "<script>alert('x')</script>&amp;\"'"
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub("^name: .*$", lambda m: f"name: {json.dumps(name)}", recipe.read_text(), flags=re.M))
    moved = run.rename(tmp_path / "<b>run & co")
    page = Reader(Path(write_report(moved, images=20)["page"]).read_text())
    assert not [n for n, _ in page.tags if n == "script"] and ("b", {}) not in page.tags[:40]
    assert name in page.text and "<b>run & co" in page.text and f"name: {json.dumps(name)}" in page.text


def test_foreign_facts_are_escaped_in_tables(run: Path) -> None:
    summary, encoder = json.loads((run / "summary.json").read_text()), run / "encoder"
    summary["info"]["training"] = {"<i>": "<u>&", "<b>": "\"'<s>"}
    (run / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(encoder)
    write_report(run)
    page = Reader((run / "report.html").read_text())
    assert not [name for name, _ in page.tags if name in "ibus"]
    words = page.text.split()
    assert words[words.index("<i>") : words.index("<i>") + 4] == ["<i>", "<u>&", "<b>", "\"'<s>"]


# --- its figures ----------------------------------------------------------------------------------------------------------------------


def test_figures_equal_those_of_the_encoder(made: tuple[str, dict], dense: tuple[np.ndarray, np.ndarray], trained: Path) -> None:
    text, figures = Reader(made[0]).text, made[1]
    active = np.array([[value > 0 for value in row] for row in dense[0].tolist()])
    density = active.sum() / active.size
    half = 1.96 * active.mean(1).std(ddof=1) / np.sqrt(IMAGES)
    assert figures["images"] == IMAGES and figures["density"] == pytest.approx(density, abs=1e-6)
    assert figures["density_high"] - figures["density_low"] == pytest.approx(2 * half, rel=1e-3)
    dead, always = sum(not column.any() for column in active.T), sum(column.all() for column in active.T)
    assert (figures["dead"], figures["always_on"]) == (dead, always)
    assert f"Density measured {density:.3f} 95 % interval" in text and f"{dead} of 32 dimensions are dead" in text
    assert f"Mean {active.sum(1).mean():.1f} of 32" in text and f"Median {np.median(active.mean(0)):.3f}" in text
    last = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    assert figures["knn_z"] == last["knn_z"] and f"{100 * last['knn_z']:.1f} %" in text and "n = 60 images" in text
    assert figures["finished"] and figures["steps"] == 12 and "finished after 12 steps" in text
    difference = f"{abs(density / figures['density_theory'] - 1):.1%}".replace("%", " %")
    assert f"{density:.3f} against 0.120 in theory: {difference}" in text


def test_neighbours_equal_brute_force(dense: tuple[np.ndarray, np.ndarray], made: tuple[str, dict]) -> None:
    z, labels = dense
    queries = choose_queries(z, labels)
    assert len(set(labels[queries])) == len(queries) == 8
    for query, near in zip(queries, neighbours(z, queries), strict=True):
        cosines = {
            i: float(np.dot(z[i].astype(float), z[query].astype(float)) / np.linalg.norm(z[i]) / np.linalg.norm(z[query]))
            for i in range(len(z)) if i != query and z[i].any()
        }  # fmt: skip
        best = sorted(cosines.values(), reverse=True)[:6]
        np.testing.assert_allclose([n.cosine for n in near], best, atol=1e-5)
        for n in near:
            assert cosines[n.row] == pytest.approx(n.cosine, abs=1e-5) and n.row != query
            assert n.shared == sum(a > 0 and b > 0 for a, b in zip(z[n.row], z[query], strict=True))
    first = neighbours(z, queries[:1])[0]
    shown = re.findall(r'<figure class="(?:right|wrong)">.*?</figure>', made[0])
    expected = [("✓" if labels[n.row] == labels[queries[0]] else "✗", int(labels[n.row]), n.cosine, n.shared) for n in first]
    for tile, (mark, label, cosine, shared) in zip(shown, expected, strict=False):
        words = Reader(tile).text.split()
        assert words == [mark, str(label), "cos", f"{cosine:.2f}", str(shared), "shared"]


def test_share_with_a_neighbour_of_the_same_class(dense: tuple[np.ndarray, np.ndarray], made: tuple[str, dict]) -> None:
    z, labels = dense
    unit = z / np.linalg.norm(z, axis=1, keepdims=True).clip(1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    share = float((labels[cosine.argmax(1)] == labels).mean())
    assert f"Of all n = {IMAGES} labelled images, {100 * share:.1f} %" in Reader(made[0]).text


# --- incomplete runs ----------------------------------------------------------------------------------------------------------


def test_unfinished_run_has_its_progress(run: Path) -> None:
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[8][:40])
    figures = write_report(run, images=50)
    text = visible(run / "report.html")
    assert not figures["finished"] and (figures["step"], figures["steps"]) == (6, 12)
    assert "at step 6 of 12 (50 %), not finished" in text
    assert "1 line of metrics.jsonl cannot be read" in text
    assert "published at step 12; the curves go to step 6" in text
    assert len(history(run / "metrics.jsonl")) == 7


def test_summary_of_an_earlier_shorter_run_is_ignored(run: Path, undrawn: None) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "steps": 6}))
    assert read_run(run).summary == {} and not write_report(run, images=20)["finished"]


def test_steps_are_counted_from_epochs_without_other_records(run: Path) -> None:
    shutil.rmtree(run / "encoder")
    (run / "summary.json").unlink()
    assert write_report(run)["steps"] == 12
    assert "n ≤ 100 images, evaluation mode, by the run itself" in visible(run / "report.html")


def test_without_an_encoder_the_page_has_curves(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "encoder")
    with caplog.at_level(logging.INFO, "rlpjepa_zoo"):
        figures = write_report(run)
    assert len(caplog.records) == 1 and "has not published an encoder" in caplog.text and "curves only" in caplog.text
    page = Reader((run / "report.html").read_text())
    assert "has not published an encoder" in page.text and "Law of z" not in page.text
    assert sum(n == "svg" for n, _ in page.tags) == 9 and sum(n == "img" for n, _ in page.tags) == 0
    assert "density" not in figures and figures["density_eval"] is not None and "by the run itself" in page.text


@pytest.mark.parametrize("damage", ["data", "weights"])
def test_missing_data_or_damaged_encoder_leave_the_curves(run: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    if damage == "weights":
        content = bytearray((run / "encoder/head.safetensors").read_bytes())
        content[-1] ^= 1
        (run / "encoder/head.safetensors").write_bytes(content)
        overrides, word = [], "head.safetensors"
    else:
        overrides, word = ["data.source=folder", "data.path=/no/such/place"], "/no/such/place"
    with caplog.at_level(logging.INFO, "rlpjepa_zoo"):
        figures = write_report(run, overrides=overrides)
    assert len(caplog.records) == 1 and word in figures["missing"] and word in visible(run / "report.html")
    assert "Training" in visible(run / "report.html") and "Law of z" not in visible(run / "report.html")


def test_rows_without_probes_or_evaluation_are_drawn(run: Path) -> None:
    shutil.rmtree(run / "encoder")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 3, "kind": "train", "loss": 2.5, "grad_norm": NaN, "l0": 0.3, "skipped": 2}\n')
    figures = write_report(run)
    text = visible(run / "report.html")
    assert figures["skipped"] == 2 and "Steps skipped 2" in text and "Accuracy" not in text and "Norm of the gradient" not in text
    assert sum(n == "svg" for n, _ in Reader((run / "report.html").read_text()).tags) == 2


def test_unknown_terms_of_an_objective_get_a_chart(run: Path) -> None:
    shutil.rmtree(run / "encoder")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = [row | {"repulsion": 1.5 * row["step"]} if row["kind"] == "train" else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in terms))
    write_report(run)
    spoken = [a["aria-label"] or "" for n, a in Reader((run / "report.html").read_text()).tags if n == "svg"]
    assert len(spoken) == 10 and spoken[3] == "repulsion over steps. repulsion: 1.5 at step 1, 18 at step 12"


def test_objective_without_a_target_law_has_no_law_section(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES._load(), "spread", Spread)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"objective": {"name": "spread"}}
    del recipe["target"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    figures = write_report(run, images=30)
    text = visible(run / "report.html")
    assert figures["density_theory"] is None and figures["density_asked"] is None and not any("density" in a for a in figures["alarms"])
    assert "Law of z" not in text and "in theory" not in text and "target law" not in text and "Density measured" in text
    assert "Firing rates" in text and "Nearest neighbours" in text


def test_missed_density_gives_a_warning(run: Path, undrawn: None) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"l0_eval": 0.5, "dead_eval": 0.75}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = write_report(run, images=20)
    warnings = re.findall(r'<p class="alarm">(.*?)</p>', (run / "report.html").read_text())
    assert len(figures["alarms"]) == 2 and any("Density missed: 0.5 measured, 0.12 in theory" in html.unescape(w) for w in warnings)
    assert any("75% of the dimensions are dead" in w for w in warnings)


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_collapsed_encoder_is_drawn(run: Path, bias: float) -> None:
    encoder = create_encoder("test_resnet", dim=8, projector_depth=1)
    with torch.no_grad():
        encoder.projector[0].bias.fill_(bias)
    shutil.rmtree(run / "encoder")
    encoder.save_pretrained(run / "encoder")
    figures = write_report(run, images=30)
    assert (figures["dead"], figures["always_on"]) == ((8, 0) if bias < 0 else (0, 8))
    text = visible(run / "report.html")
    assert f"{'8' if bias < 0 else '0'} of 8 dimensions are dead" in text
    assert 'class="alarm">Measured density' in (run / "report.html").read_text()


def test_folder_without_labels_and_with_unreadable_files(trained: Path, run: Path, image_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in image_folder.rglob("*.png"):
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    (flat / "<i>.png").write_bytes(b"no image")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("source: digits", "source: folder").replace("limit: 192", "limit: null"))
    figures = write_report(run, overrides=[f"data.path={flat}"])
    text = visible(run / "report.html")
    assert figures["images"] == 40 and "n = 40 training images" in text and "1 of the training images chosen" in text
    assert "labelled" not in text and "✓" not in text and "✗" not in text and "fire most strongly" in text


# --- the command ----------------------------------------------------------------------------------------------------------------------


def test_command_prints_the_path(run: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(run), "data.source=digits", "--images", "60", "--quiet", "--device", "cpu", "--batch-size", "16"]) == 0
    assert capsys.readouterr() == (f"{run}/report.html\n", "")
    assert f"rlpjepa report {run} data.source=digits --images 60" in visible(run / "report.html")
    assert [p.name for p in run.iterdir() if "partial" in p.name] == []


def test_command_prints_json(run: Path, undrawn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.html"
    assert cli.run(["report", str(run), "--out", str(out), "--images", "60", "--quiet", "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["page"] == str(out) and out.is_file() and not (run / "report.html").exists()
    assert figures["images"] == 60 and figures["missing"] is None
    assert 0 <= figures["density_low"] < figures["density"] < figures["density_high"]


@pytest.mark.slow
def test_missing_data_give_one_warning_line(run: Path) -> None:
    arguments = [str(run), "data.source=folder", "data.path=/no/such/place", "--quiet", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "rlpjepa_zoo", "report", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == f"{run}/report.html\n"
    assert len(done.stderr.splitlines()) == 1 and "/no/such/place" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["NOWHERE"], 2, ["no such file or folder", "rlpjepa train"]),
        (["EMPTY"], 2, ["no recipe.yaml"]),
        (["PARENT"], 2, ["did you mean", "/run"]),
        (["UNSTARTED"], 2, ["no measurement yet"]),
        (["RUN", "optim.lr=1"], 2, ["optim.lr=1", "data.path=DIR"]),
        (["RUN", "data.pth=x"], 2, ["data.pth", "Did you mean 'path'"]),
        (["RUN", "data.image_size=64"], 2, ["data.image_size", "data.path"]),
        (["RUN", "data.path=x"], 2, ["data.path", "digits"]),
        (["RUN", "--images", "1"], 2, ["images", "at least 2", "got 1"]),
        (["RUN", "--device", "tpu9"], 2, ["--device", "tpu9"]),
        (["RUN", "--out", "/no/such/dir/x.html"], 6, ["/no/such/dir"]),
        ([], 2, ["RUN"]),
    ],
)
def test_mistakes_give_one_line_and_their_exit_code(
    run: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str], capsys
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(run, tmp_path / "unstarted" / "x")
    (tmp_path / "unstarted/x/metrics.jsonl").write_text("")
    names = {"RUN": run, "NOWHERE": tmp_path / "no", "EMPTY": tmp_path / "empty", "PARENT": tmp_path, "UNSTARTED": tmp_path / "unstarted/x"}
    shutil.rmtree(tmp_path / "unstarted") if "PARENT" in arguments else None
    assert cli.run(["report", *[str(names.get(a, a)) for a in arguments], "--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and all(word in err for word in words), err


def test_mistakes_in_python_raise(run: Path, undrawn: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        write_report(run, images=1)
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(OutputError, match="taken"):
        write_report(run, tmp_path / "taken.html", images=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "taken.html"]

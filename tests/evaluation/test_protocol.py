"""All probes together: sparse and dense rows, chance, missing labels, and the text of the protocol."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import codes, sparse
from refusals import refused
from scipy.sparse import csr_array

from rlpjepa_zoo.core.measures import MEASURES, measure_label
from rlpjepa_zoo.errors import DataError, UsageError
from rlpjepa_zoo.evaluation.probes import PROBES, base
from rlpjepa_zoo.evaluation.probes.clustering import clustering
from rlpjepa_zoo.evaluation.protocol import ProbeBar, Protocol, default_probes, measure, probe_names


def test_sparse_and_dense_rows_give_the_same_scores(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng, 200), codes(rng, 150)
    protocol = Protocol(("all",), seeds=2, shots=(1, 5), draws=20)
    a, b = measure(x, y, test_x, test_y, protocol), measure(sparse(x), y, sparse(test_x), test_y, protocol)
    assert set(a.mean) == {"knn", "linear", "one_shot", "shot_5", "mlp", "map", "precision_at_1", "precision_at_10", "nmi"} == set(b.mean)
    near = {"linear": 0.02, "mlp": 0.02, "nmi": 0.05}  # k-means from centres that differ by rounding may end elsewhere
    for name, value in a.mean.items():
        assert b.mean[name] == pytest.approx(value, abs=near.get(name, 1e-6)), name
    assert set(a.spread) == {"linear", "one_shot", "shot_5", "mlp", "nmi"} and len(a.chosen_c) == 2


def test_sparse_rows_are_made_dense_only_in_tiles(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (test_x, test_y) = codes(rng, 400), codes(rng, 300)
    sizes: list[int] = []
    original = csr_array.toarray

    def recorded(self: Any, *given: Any, **options: Any) -> Any:
        sizes.append(math.prod(self.shape))
        return original(self, *given, **options)

    monkeypatch.setattr(csr_array, "toarray", recorded)
    monkeypatch.setattr(csr_array, "todense", recorded)
    monkeypatch.setattr(base, "TILE", 4000)
    protocol = Protocol(("all",), seeds=1, shots=(1, 2), draws=3)
    tiled = measure(sparse(x), y, sparse(test_x), test_y, protocol)
    assert sizes and max(sizes) <= 4000 and not tiled.skipped
    monkeypatch.undo()
    at_once = measure(sparse(x), y, sparse(test_x), test_y, protocol)
    assert tiled.mean == pytest.approx(at_once.mean, abs=1e-9)


def test_separable_classes_are_separated(rng: np.random.Generator) -> None:
    y = rng.permutation(np.repeat(np.arange(4), 30))
    x = np.eye(4, 20, dtype=np.float32)[y] + np.where(rng.random((120, 20)) < 0.1, 0.01, 0).astype(np.float32)
    for form in (np.asarray, sparse):
        scores = measure(form(x), y, form(x), y, Protocol(("all",), seeds=1, shots=(1, 5)))
        assert {name: round(value, 9) for name, value in scores.mean.items() if name != "nmi"} == dict.fromkeys(
            set(scores.mean) - {"nmi"}, 1.0
        )
        best = max(clustering(form(x), y, seed) for seed in range(8))
        assert best == pytest.approx(1.0)  # one start of k-means may end in a poorer optimum


def test_shuffled_labels_give_chance(rng: np.random.Generator) -> None:
    (x, y), (test_x, test_y) = codes(rng, 400, noise=0.3), codes(rng, 400, noise=0.3)
    means = measure(x, rng.permutation(y), test_x, rng.permutation(test_y), Protocol(("all",), seeds=1, shots=(1, 10))).mean
    assert means.pop("nmi") < 0.05
    for name, value in means.items():
        assert abs(value - 0.25) < 0.1, name


def test_rows_without_a_label_are_left_out(rng: np.random.Generator) -> None:
    x, y = codes(rng)
    more, labels = np.concatenate([x, 9 * np.ones((9, 40), np.float32)]), np.concatenate([y, np.full(9, -1)])
    protocol = Protocol(("all",), seeds=1, shots=(1,), draws=5)
    for form in (np.asarray, sparse):
        assert measure(form(more), labels, form(more), labels, protocol).mean == measure(form(x), y, form(x), y, protocol).mean
    for pair in ((labels * 0 - 1, labels), (labels, labels * 0 - 1)):
        with pytest.raises(DataError, match="no labelled images"):
            measure(more, pair[0], more, pair[1], protocol)


def test_measures_that_fail_are_skipped_with_a_reason(rng: np.random.Generator) -> None:
    x, y = codes(rng, 40)
    scores = measure(x, y, x, y, Protocol(shots=(1, 500)))
    assert "one_shot" in scores.mean and "shot_500" not in scores.mean and "training images" in scores.skipped["shot_500"]
    alone = measure(x[:3], np.arange(3), x, y, Protocol(("linear", "knn")))
    assert set(alone.mean) == {"knn"} and "held-out" in alone.skipped["linear"]


def test_protocol_text_names_the_hyper_parameters() -> None:
    text = Protocol(("all",), seeds=4, shots=(1, 5), k=9, queries=50).describe(n_train=7, n_test=80)
    for words in (
        "k = 7",
        "T = 0.07",
        "0.0001, 0.001",
        "1, 5-shot",
        "mean of 400 draws",
        "layer of 256",
        "50 test images drawn at random",
        "4 seeds",
    ):
        assert words in text, words
    assert (
        Protocol(("linear",), grid=(1.0,), seeds=1).describe(9, 9) == "linear: logistic regression, L-BFGS of at most 300 iterations, C = 1"
    )
    assert len(probe_names()) == len(text.replace("(±", "").split("; "))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probes": ("knm",)}, "Did you mean 'knn'"), ({"probes": ("zzz",)}, "Known probes: knn"), ({"probes": ()}, "at least one"),
        ({"shots": (0, 1)}, "shots: expected"), ({"shots": ()}, "got none"), ({"seeds": 0}, "seeds: expected >= 1"), ({"k": 0}, "k: expected"),
        ({"temperature": 0.0}, "temperature"), ({"grid": ()}, "grid"), ({"queries": -1}, "queries"),
    ],
)  # fmt: skip
def test_invalid_protocols_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Protocol(**options)


def test_every_file_of_probes_registers_one_probe() -> None:
    files = {path.stem for path in Path(base.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {cls.__module__.rpartition(".")[2] for cls in PROBES.values()} == files == set(PROBES)
    known = ["knn", "linear", "few_shot", "mlp", "retrieval", "clustering"]
    assert [name for name in probe_names() if name in known] == known
    assert [name for name in default_probes() if name in known] == known[:3]
    assert all(measure_label(name) for name in MEASURES if "{}" not in MEASURES[name])


def test_probes_run_in_the_order_of_reports_and_take_their_options() -> None:
    protocol = Protocol(("clustering", "few_shot", "knn"), k=3, draws=7)
    assert list(protocol.probes) == ["knn", "few_shot", "clustering"]
    assert protocol.probes["knn"].k == 3 and protocol.probes["few_shot"].draws == 7
    with pytest.raises(TypeError, match="options of no probe: neighbours"):
        Protocol(neighbours=3)


def test_probe_registered_late_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    late = type("Late", (PROBES["knn"],), {"order": 99})
    monkeypatch.setitem(PROBES._entries, "late", late)
    assert list(Protocol(("late",)).probes) == ["late"] and "late" in Protocol(("all",)).probes and "late" in probe_names()


@pytest.mark.parametrize("name", probe_names())
def test_size_of_class_numbers_does_not_matter(name: str) -> None:
    y, test_y = np.arange(60) % 3, np.arange(30) % 3
    x, test_x = np.eye(3, 8)[y] + 0.01, np.eye(3, 8)[test_y] + 0.01
    large = np.array([5, 10**9, 2**62])
    protocol = Protocol((name,), seeds=1, shots=(1, 5), draws=5)
    small, big = (measure(x, of[y], test_x, of[test_y], protocol) for of in (np.arange(3), large))
    assert big.mean == small.mean and min(big.mean.values()) > 0.99


def test_options_of_one_probe_are_checked_against_its_own() -> None:
    protocol = Protocol({"knn": {"k": 3}, "linear": {"grid": (1.0,)}, "few_shot": {"draws": 7, "shots": (2,)}}, seeds=1)
    text = protocol.describe(100, 50)
    assert list(protocol.probes) == ["knn", "linear", "few_shot"]
    assert "k = 3" in text and "C = 1" in text and "mean of 7 draws" in text and "2-shot" in text
    with refused(UsageError, match=r"probes.few_shot: no option 'drws'. Did you mean 'draws'"):
        Protocol({"few_shot": {"drws": 3}})
    with refused(UsageError, match=r"probes.knn: no option 'shots'. It has k, temperature"):
        Protocol({"knn": {"shots": 3}})
    with refused(UsageError, match="k: expected >= 1, got 0"):
        Protocol({"knn": {"k": 0}})
    with refused(UsageError, match="Did you mean 'linear'"):
        Protocol({"linaer": {}})


def test_every_measurement_is_named_in_the_log_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    x, y = np.eye(6), np.arange(6) % 2
    protocol = Protocol(("knn", "retrieval"))
    for shown, names in ((True, ["knn of z", "retrieval of z"]), (False, [])):
        caplog.clear()
        with caplog.at_level("INFO", "rlpjepa_zoo"), ProbeBar(2, not shown) as bar:
            measure(x, y, x, y, protocol, bar, "z")
        assert [record.message.removeprefix("measured ").partition(" in ")[0] for record in caplog.records] == names

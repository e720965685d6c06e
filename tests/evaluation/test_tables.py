"""The text of a report."""

from rlpjepa_zoo.evaluation.tables import accuracy_table


def test_table_shows_measures_comparisons_and_curve() -> None:
    report = {
        "n_train": 5, "n_test": 4, "protocol": "so", "knn_z": 0.5, "shot_5_z": 0.25, "knn_pixels": 0.75, "skipped": {"shot_10": "too few"},
        "curve": {"active": [1, 2], "knn": [0.1, 0.2]},
        "against": {"other": {"knn_features": 0.125, "differences": [
            {"measure": "knn", "space": "z", "minus": "features", "difference": 0.375, "low": 0.1, "high": 0.6, "n": 4}]}},
    }  # fmt: skip
    text = accuracy_table(report)
    for words in ("kNN", "5-shot", "0.500", "0.750", "0.125", "other:", "+0.375 (95 % +0.100 to +0.600, n = 4)", "too few", "active of z"):
        assert words in text, words

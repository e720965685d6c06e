"""Error classes: exit codes and messages."""

import pytest

from rlpjepa_zoo.errors import DataError, HubError, ModelError, NonFiniteError, OutputError, RecipeError, UsageError, ZooError, did_you_mean


@pytest.mark.parametrize(
    ("kind", "code", "also"),
    [
        (UsageError, 2, ValueError), (RecipeError, 2, UsageError), (DataError, 3, ValueError), (ModelError, 4, ValueError),
        (HubError, 5, OSError), (OutputError, 6, OSError), (NonFiniteError, 7, ArithmeticError),
    ],
)  # fmt: skip
def test_exit_codes_and_base_classes(kind, code, also):
    assert kind.exit_code == code
    assert issubclass(kind, ZooError)
    assert issubclass(kind, also)
    assert str(kind("one line")) == "one line"


@pytest.mark.parametrize("kind", [UsageError, DataError, ModelError, HubError, OutputError])
def test_error_messages_are_one_line(kind):
    assert len(str(kind("a\nb.jpg: cannot be read\r\n")).splitlines()) == 1


def test_did_you_mean_names_the_nearest_or_nothing():
    assert did_you_mean("resnet81", ["vit", "resnet18"]) == " Did you mean 'resnet18'?"
    assert did_you_mean("zzz", ["vit", "resnet18"]) == ""
    assert did_you_mean("x", []) == ""

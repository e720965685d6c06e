"""Old module names keep working."""

import subprocess
import sys
from importlib import import_module

import pytest

from rlpjepa_zoo.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_name_is_the_new_object_and_warns(old):
    module, _, name = old.rpartition(".")
    home, _, new_name = MOVED[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"rlpjepa_zoo\.{old} is now rlpjepa_zoo\.{MOVED[old]}"):
        value = getattr(import_module(f"rlpjepa_zoo.{module}"), name)
    assert value is getattr(import_module(f"rlpjepa_zoo.{home}"), new_name)


def test_old_modules_import_nothing_until_used_and_refuse_other_names():
    code = (
        "import sys, rlpjepa_zoo.images as old\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
        "try:\n    old.nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "module 'rlpjepa_zoo.images' has no attribute 'nothing'\n"

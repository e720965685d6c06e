"""Loading published encoders: untrusted files, and global state."""

import pytest
import torch
from published import tensors
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo.errors import ModelError
from rlpjepa_zoo.hub.folder import write_folder


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.update(images=torch.zeros(2000, 1, 1, 3, dtype=torch.uint8)), lambda g: g.update(images=g["images"][:, :0]),
        lambda g: g.update(images=torch.zeros(2, 1, 200_000, 3, dtype=torch.uint8)), lambda g: g.update(features=g["features"] > 0),
        lambda g: g.update(inputs=g["inputs"].half()), lambda g: g.update({f"x{i}": torch.zeros(0) for i in range(100_000)}),
    ],
)  # fmt: skip
def test_oversized_golden_file_is_refused_by_its_header(tmp_path, contents, change):
    path = write_folder(tmp_path / "enc", contents)
    with tensors(path, "golden.safetensors") as golden:
        change(golden)
    with refused(ModelError, match="golden.safetensors"):
        rz.load_encoder(path)


def test_loading_changes_neither_default_dtype_nor_random_state(tmp_path, contents, encoder):
    path = write_folder(tmp_path / "enc", contents)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert rz.load_encoder(path).fingerprint() == encoder.fingerprint()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)

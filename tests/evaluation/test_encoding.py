"""Images to features, embeddings and pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import settled

from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation import encoding
from rlpjepa_zoo.evaluation.encoding import encode, encode_sparse
from rlpjepa_zoo.evaluation.metrics import dead, l0, l1, sparse_densities
from rlpjepa_zoo.models.encoder import SparseEncoder
from rlpjepa_zoo.models.factory import create_encoder


@pytest.fixture(scope="module")
def encoder() -> SparseEncoder:
    torch.manual_seed(0)
    return create_encoder("test_resnet", dim=16, hidden_dim=16)


def test_encode_equals_the_encoder_in_evaluation_mode(encoder: SparseEncoder, image_folder: Path) -> None:
    images = labelled_folder(image_folder)
    train = images.take(range(0, len(images), 2))
    features, z, labels = encode(encoder, train, batch_size=7)
    encoder.eval()
    with torch.no_grad():
        expected = encoder.both(torch.stack([encoder.transform(train.read(i)) for i in range(len(train))]))
    encoder.train()
    assert torch.allclose(features, expected.features, atol=1e-5) and torch.allclose(z, expected.z, atol=1e-5)
    assert labels.tolist() == train.labels.tolist() and features.dtype == z.dtype == torch.float32


def test_unreadable_images_alone_are_refused(encoder: SparseEncoder) -> None:
    with pytest.raises(DataError, match="none of the images"):
        encode(encoder, Images(lambda i: b"junk", range(3), [0, 1, 0]))


def test_encoding_in_chunks_equals_encoding_at_once(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = settled().eval()
    (image_folder / "red" / "04.png").write_bytes(b"junk")
    photos = labelled_folder(image_folder)
    features, z, y = encode(encoder, photos)
    monkeypatch.setattr(encoding, "MOST_DENSE", 24 * 7)
    chunked_features, chunked_z, chunked_y = encode_sparse(encoder, photos, batch_size=5)
    assert np.allclose(chunked_features, features, atol=1e-5) and np.allclose(chunked_z.to_dense(), z, atol=1e-5)
    assert np.array_equal(chunked_y, y) and len(y) == 39
    densities = sparse_densities(chunked_z)
    for name, function in (("l0", l0), ("l1", l1), ("dead", dead)):
        assert densities[name] == pytest.approx(float(function(z)), abs=1e-6)

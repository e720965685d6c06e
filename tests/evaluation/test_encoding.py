"""Images to features, embeddings and pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import settled

from rlpjepa_zoo.data.images import Images
from rlpjepa_zoo.data.preprocess import Preprocess
from rlpjepa_zoo.data.sources.folder import labelled_folder
from rlpjepa_zoo.errors import DataError
from rlpjepa_zoo.evaluation.encoding import encode, encode_sparse, pixel_size
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


def test_sparse_encoding_in_batches_equals_dense_encoding(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = settled().eval()
    (image_folder / "red" / "04.png").write_bytes(b"junk")
    photos = labelled_folder(image_folder)
    features, z, y = encode(encoder, photos)
    with caplog.at_level("WARNING", "rlpjepa_zoo"):
        batched = encode_sparse(encoder, photos, "test", batch_size=5)
    assert np.allclose(batched.features, features, atol=1e-5) and np.allclose(batched.z.to_dense(), z, atol=1e-5)
    assert np.array_equal(batched.labels, y) and len(y) == 39 and batched.pixels is None
    assert "1 of 40 test images cannot be read" in caplog.text and "red/04.png" in caplog.text
    densities = sparse_densities(batched.z)
    for name, function in (("l0", l0), ("l1", l1), ("dead", dead)):
        assert densities[name] == pytest.approx(float(function(z)), abs=1e-6)


def test_pixels_are_those_of_the_input_or_means_of_its_areas(image_folder: Path) -> None:
    images = labelled_folder(image_folder).take(range(0, 40, 9))
    small, large = settled().eval(), settled(preprocess=Preprocess((96, 64), crop_pct=1.0)).eval()
    shown = [small.config.preprocess.pixels(images.read(i)) for i in range(5)]
    found = encode_sparse(small, images, batch_size=2, with_pixels=True).pixels
    assert found is not None and np.array_equal(found, [picture.transpose(2, 0, 1).ravel() for picture in shown])
    found = encode_sparse(large, images, batch_size=2, with_pixels=True).pixels
    assert pixel_size(large.config.preprocess) == (32, 21) and found is not None and found.shape == (5, 3 * 32 * 21)
    for row, i in zip(found, range(5), strict=True):
        whole = large.config.preprocess.pixels(images.read(i)).transpose(2, 0, 1).astype(float)
        first = whole[:, :3, :4].mean((1, 2))  # 96 rows on 32, 64 columns on 21: the area of a corner is 3 x 4
        assert np.abs(row.reshape(3, 32, 21)[:, 0, 0] - first).max() <= 0.5

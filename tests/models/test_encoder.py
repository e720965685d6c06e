"""SparseEncoder over tiny real timm models: shapes, projector, freezing, refusals, and embed() on every kind of source."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn as nn
from PIL import Image
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo import create_encoder
from rlpjepa_zoo.data.preprocess import Preprocess
from rlpjepa_zoo.errors import DataError, HubError, ModelError, NonFiniteError, UsageError
from rlpjepa_zoo.models.classifier import make_classifier
from rlpjepa_zoo.ops.modules import make_projector
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings

VIT = {"img_size": 32, "patch_size": 4}
BACKBONES = [
    ("test_resnet", {}, 32), ("test_vit", VIT, 32), ("test_convnext3", {}, 64), ("test_efficientnet", {}, 64),
    ("resnet10_small_narrow", {}, 32), ("resnet18_small", {}, 32), ("resnet34_small", {}, 32), ("resnet50_small", {}, 32),
]  # fmt: skip
backbones = pytest.mark.parametrize(("name", "options", "size"), BACKBONES, ids=[b[0] for b in BACKBONES])
SMALL = Preprocess((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 0.9)


def make(name="test_resnet", dim=24, **options):
    torch.manual_seed(0)
    return create_encoder(name, dim=dim, hidden_dim=20, **{"preprocess": SMALL, **options})


def batch(size=32, n=3, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# --- shapes and signs ----------------------------------------------------------------------------------------------------------------


@backbones
def test_codes_are_sparse_and_features_have_the_configured_width(name, options, size):
    enc = make(name, dim=64, **options)
    enc.eval()
    with torch.no_grad():
        features, z = enc.both(batch(size))
    assert features.shape == (3, enc.config.features)
    assert z.shape == (3, 64)
    assert (z >= 0).all()
    assert (z == 0).any(1).all()
    assert (z > 0).any(1).all()
    assert features.std() > 0


@backbones
def test_forward_features_and_projector_agree_with_timm(name, options, size):
    import timm

    enc = make(name, **options).eval()
    plain = timm.create_model(name, num_classes=0, **options).eval()
    plain.load_state_dict(enc.backbone.state_dict())
    x = batch(size)
    with torch.no_grad():
        features = enc.features(x)
        assert torch.equal(features, plain(x))
        assert torch.equal(enc(x), enc.projector(features))
        assert torch.equal(enc(x), enc.both(x).z)


def test_gradient_reaches_every_parameter():
    enc = make()
    enc(batch(n=8)).square().sum().backward()
    assert [name for name, p in enc.named_parameters() if p.grad is None] == []
    assert enc.backbone.conv1[0].weight.grad.abs().sum() > 0


def test_new_encoder_is_in_training_mode_and_on_the_cpu():
    enc = make()
    assert all(module.training for module in enc.modules())
    assert enc.device == torch.device("cpu")


def test_global_seed_determines_the_weights():
    first, second = make(), make()
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != create_encoder("test_resnet", dim=24, hidden_dim=20, preprocess=SMALL).fingerprint()


def test_fingerprint_depends_on_weights_buffers_and_preprocessing():
    reference = make().fingerprint()
    weight, buffer = make(), make()
    weight.projector[0].weight.data.view(-1)[7] += 1e-6
    buffer.projector[1].running_var[3] += 1e-6
    prints = [reference, weight.fingerprint(), buffer.fingerprint(), make(preprocess=Preprocess((32, 32))).fingerprint()]
    assert len(set(prints)) == 4


def test_fingerprint_notices_weights_that_are_changed_through_data(pictures, tmp_path):
    encoder = make()
    before = encoder.embed(pictures)
    for weight in encoder.parameters():
        weight.data.mul_(1.5)  # torch counts no new version
    after = encoder.embed(pictures)
    assert before.meta["model"] != after.meta["model"]
    with pytest.raises(UsageError, match="different encoders"):
        SparseEmbeddings.concat([before, after])
    encoder.save_pretrained(tmp_path / "encoder")
    assert rz.load_encoder(tmp_path / "encoder").fingerprint() == encoder.fingerprint() == after.meta["model"]


# --- projector -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "kinds"),
    [
        (1, [nn.Linear, nn.ReLU]),
        (2, [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.ReLU]),
        (3, [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.ReLU]),
    ],
)
def test_projector_layout(depth, kinds):
    enc = make(projector_depth=depth)
    assert [type(layer) for layer in enc.projector] == kinds
    linear = [layer for layer in enc.projector if isinstance(layer, nn.Linear)]
    widths = [enc.config.features] + [20] * (depth - 1) + [24]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(zip(widths, widths[1:], strict=False))
    assert not isinstance(enc.projector[-2], nn.modules.batchnorm._NormBase)


def test_projector_does_not_overwrite_the_features():
    head = make_projector(6, 5, 4, 3).eval()
    features = torch.randn(3, 6)
    kept = features.clone()
    head(features)
    assert torch.equal(features, kept)


# --- freezing ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet10_small_narrow"])
def test_frozen_backbone_is_unchanged_while_the_projector_learns(name):
    enc = make(name, freeze_backbone=True).train()
    before, head = snapshot(enc.backbone), snapshot(enc.projector)
    x = batch(64, n=8)
    enc(x).square().sum().backward()
    optimizer = torch.optim.SGD([p for p in enc.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in enc.backbone.parameters())
    assert not any(module.training for module in enc.backbone.modules())
    assert unchanged(enc.backbone, before)
    assert all(module.training for module in enc.projector.modules())
    assert not torch.equal(enc.projector[0].weight, head["0.weight"])
    assert not torch.equal(enc.projector[1].running_mean, head["1.running_mean"])


def test_buffers_of_an_unfrozen_backbone_change():
    enc = make()
    before = snapshot(enc.backbone)
    enc(batch(n=8))
    assert not unchanged(enc.backbone, before)


# --- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet81", "resnet18"), ("resnet18_smal", "resnet18_small"), ("vit_tiny_patch16_225.x", "vit_tiny_patch16_224")],
)
def test_unknown_backbone_is_refused_with_the_nearest_name(name, nearest):
    with refused(ModelError, match=f"Did you mean '{nearest}'"):
        create_encoder(name)


NO_BACKBONES = ["", "os.system", "torch.nn.Linear", "../x", "test_resnet.no_such_tag", "foo:bar", "local-dir:/no/such/folder", "a\nb"]


@pytest.mark.parametrize("name", NO_BACKBONES)
def test_invalid_backbone_names_are_refused(name):
    with refused(ModelError):
        create_encoder(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"nonsense": 3}),
        ("test_resnet", {"num_classes": 10}),
        ("test_resnet", {"features_only": True}),
        ("test_resnet", {"in_chans": 1}),
        ("test_resnet", {"global_pool": ""}),
        ("test_resnet", {"act_layer": "no_such_layer"}),
        ("test_resnet", {"checkpoint_path": "/no/such/file.safetensors"}),
        ("test_vit", {"img_size": "x"}),
        ("test_vit", {"patch_size": 0}),
        ("test_vit", {"embed_dim": 63}),
        ("resnet18_small", {"stem_type": "deep"}),
        ("resnet18_small", {"stem_padding": "x"}),
    ],
    ids=repr,
)
def test_invalid_timm_arguments_are_refused_by_name(name, options):
    with refused(ModelError, match=next(iter(options))):
        create_encoder(name, **options)


@pytest.mark.parametrize("argument", ["dim", "hidden_dim", "projector_depth"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(argument, value):
    with refused(UsageError, match=f"^{argument}: "):
        create_encoder("test_resnet", **{argument: value})


def test_pretrained_weights_without_network_are_refused_in_one_line():
    with refused(ModelError, HubError, match="test_resnet"):
        create_encoder("test_resnet", pretrained=True)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 32, 32), torch.zeros(2, 3, 32), torch.zeros(2, 3, 32, 32).byte(), torch.zeros(2, 3, 32, 32).long(),
     torch.zeros(2, 1, 32, 32), torch.zeros(2, 4, 32, 32), torch.zeros(2, 32, 32, 3)],
    ids=lambda x: f"{x.dtype}{tuple(x.shape)}",
)  # fmt: skip
def test_input_of_a_wrong_shape_or_type_is_refused(x):
    enc = make().eval()
    with refused(UsageError, match=r"\(B, 3, H, W\)"):
        enc(x)
    if x.dtype != torch.uint8:  # bytes are pixels for embed
        with refused(UsageError, DataError, match=r"\(B, 3, H, W\)"):
            enc.embed(x)


# --- small-image ResNets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10_small_narrow", "resnet18_small", "resnet50_small"])
@pytest.mark.parametrize(("padding", "side"), [(1, 4), (2, 5)])
def test_last_feature_map_of_a_32_pixel_image(name, padding, side):
    backbone = make(name, stem_padding=padding).backbone.eval()
    with torch.no_grad():
        assert backbone.forward_features(batch(n=1)).shape[-2:] == (side, side)
    assert (backbone.conv1.kernel_size, backbone.conv1.stride, backbone.conv1.padding) == ((3, 3), (1, 1), (padding, padding))
    assert isinstance(backbone.maxpool, nn.Identity)


def test_without_an_option_the_resolution_is_kept():
    assert make("resnet18_small").backbone.conv1.padding == (1, 1)
    assert make("resnet18_small", preprocess=None).config.preprocess.size == (32, 32)


def test_numbers_of_parameters():
    def count(name):
        return sum(p.numel() for p in make(name).backbone.parameters())

    assert count("resnet18_small") == 11_168_832
    assert 1.15e6 < count("resnet10_small_narrow") < 1.3e6


def test_resnet18_small_counts_by_hand():
    def block(inside, outside):
        shortcut = inside * outside + 2 * outside if inside != outside else 0
        return 9 * inside * outside + 9 * outside**2 + 4 * outside + shortcut

    widths = [64, 64, 128, 256, 512]
    stages = sum(block(a, b) + block(b, b) for a, b in zip(widths, widths[1:], strict=False))
    assert 27 * 64 + 2 * 64 + stages == 11_168_832


def test_reported_reductions_are_correct():
    backbone = make("resnet18_small").backbone.eval()
    maps = {}
    for info in backbone.feature_info:
        backbone.get_submodule(info["module"]).register_forward_hook(lambda m, i, o, name=info["module"]: maps.update({name: o.shape[-1]}))
    with torch.no_grad():
        backbone(batch(n=1))
    assert {info["module"]: 32 // info["reduction"] for info in backbone.feature_info} == maps


# --- preprocessing -------------------------------------------------------------------------------------------------------------------


def test_transform_resizes_crops_and_normalises(rng):
    enc = make()
    x = enc.transform(Image.new("RGB", (50, 40), (255, 0, 51)))
    assert x.shape == (3, 32, 32)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    torch.testing.assert_close(x, expected[:, None, None].expand(3, 32, 32))


@pytest.mark.parametrize("size", [(1, 1), (500, 3), (3, 500)])
def test_transform_takes_odd_sizes(size):
    assert make().transform(Image.new("RGB", size)).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_preprocessing_follows_the_image_size_of_a_vit(name):
    enc = make(name, preprocess=None, depth=1, **VIT)
    assert enc.config.preprocess.size == (32, 32)
    assert enc.embed([Image.new("RGB", (40, 50))]).shape == (1, 24)


# --- embed: values -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(rng):
    sizes = [(20, 30), (64, 40), (32, 32), (33, 90), (50, 50), (8, 9), (40, 31)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def dense_codes(enc, pictures):
    was = enc.training
    enc.eval()
    with torch.no_grad():
        x = torch.stack([enc.transform(p.convert("RGB")) for p in pictures])
        z = enc(x.contiguous(memory_format=torch.channels_last))  # as embed feeds it
        np.testing.assert_allclose(enc(x), z, rtol=1e-4, atol=1e-6)
    enc.train(was)
    return z.numpy()


@pytest.mark.parametrize(("name", "options"), [("test_resnet", {}), ("test_vit", VIT), ("resnet10_small_narrow", {})])
def test_embed_is_the_dense_forward_in_input_order(pictures, name, options):
    enc = make(name, **options)
    expected = dense_codes(enc, pictures)
    e = enc.embed(pictures)
    np.testing.assert_array_equal(e.to_dense(), expected)
    assert 0 < e.l0 < 1
    np.testing.assert_array_equal(enc.embed(pictures[::-1]).to_dense(), dense_codes(enc, pictures[::-1]))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 1000])
def test_embed_does_not_depend_on_the_batch_size(pictures, batch_size):
    enc = make()
    whole, parts = enc.embed(pictures).to_dense(), enc.embed(pictures, batch_size=batch_size).to_dense()
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(parts > 0, whole > 0)


def test_one_worker_gives_the_same_rows_and_ids(image_folder):
    enc = make()
    assert enc.embed(image_folder, batch_size=7, num_workers=1) == enc.embed(image_folder, batch_size=7)


def test_embed_uses_evaluation_mode_and_changes_nothing(pictures):
    enc = make().train()
    enc(batch(n=8))
    before, expected = snapshot(enc), dense_codes(enc, pictures)
    with torch.no_grad():
        training = enc(torch.stack([enc.transform(p) for p in pictures])).numpy()
    enc.load_state_dict(before)
    np.testing.assert_array_equal(enc.embed(pictures).to_dense(), expected)
    assert not np.allclose(training, expected)
    assert all(module.training for module in enc.modules())
    assert unchanged(enc, before)
    np.testing.assert_array_equal(enc.eval().embed(pictures).to_dense(), expected)
    assert not any(module.training for module in enc.modules())


def test_embed_restores_the_mode_of_every_module(pictures):
    enc = make().train()
    enc.backbone.eval()
    enc.embed(pictures)
    assert enc.training
    assert enc.projector.training
    assert not enc.backbone.training


def test_embed_restores_the_mode_after_an_error(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    enc = make().train()
    with refused(DataError):
        enc.embed(tmp_path)
    assert enc.training


def test_embed_does_not_change_the_global_random_state(pictures):
    enc = make()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    enc.embed(pictures)
    assert torch.equal(torch.rand(3), expected)


def test_training_continues_after_embed(pictures):
    enc = make()
    enc.embed(pictures)
    enc(batch(n=4)).sum().backward()
    assert enc.projector[0].weight.grad is not None


@pytest.mark.parametrize("k", [1, 3, 1000])
def test_max_active_keeps_the_largest(pictures, k):
    enc = make()
    full = enc.embed(pictures)
    bounded = enc.embed(pictures, max_active=k)
    assert bounded == full.top_k(k)
    assert np.diff(bounded.indptr).max() <= k
    assert np.diff(full.indptr).max() > 3


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0}, {"batch_size": -3}, {"batch_size": 2.0}, {"batch_size": "2"}, {"batch_size": True}, {"max_active": 0},
        {"max_active": 1.5}, {"num_workers": None}, {"num_workers": -1}, {"on_error": "ignore"},
    ],
    ids=repr,
)  # fmt: skip
def test_bad_options_are_refused(pictures, options):
    with refused(UsageError, match=f"{next(iter(options))}: expected"):
        make().embed(pictures, **options)
    if "max_active" not in options:  # which a classifier does not have
        with refused(UsageError, match=f"{next(iter(options))}: expected"):
            make_classifier(make(), ["a", "b"]).predict(pictures, **options)


def test_numbers_of_numpy_are_numbers(pictures):
    enc = make()
    assert enc.embed(pictures, batch_size=np.int64(2), num_workers=np.int32(1), max_active=np.int8(4)) == enc.embed(pictures, 2, 1, 4)


def test_embed_opens_its_source_with_the_options_of_the_caller(pictures, tmp_path):
    enc = make()
    table = datasets.Dataset.from_dict({"left": pictures, "right": pictures[::-1]}).cast(
        datasets.Features({"left": datasets.Image(), "right": datasets.Image()})
    )
    table.to_parquet(tmp_path / "t.parquet")
    for source in (table, tmp_path / "t.parquet"):
        rows = [enc.embed(source, image_column=name).to_dense() for name in ("left", "right")]
        assert (rows[0] == rows[1][::-1]).all()
    pictures[0].save(tmp_path / "a.png")
    failures = []
    assert len(enc.embed([tmp_path / "a.png", tmp_path / "gone.png"], on_error="skip", failures=failures)) == 1
    assert [name for name, _ in failures] == [str(tmp_path / "gone.png")]


def test_meta_names_the_encoder_and_other_encoders_are_refused(pictures):
    enc, other = make(), make(projector_depth=2)
    a, b = enc.embed(pictures), other.embed(pictures)
    assert a.meta == {"model": enc.fingerprint(), "architecture": "test_resnet"}
    with refused(UsageError, match="different encoders"):
        SparseEmbeddings.concat([a, b])


@pytest.mark.parametrize("where", ["backbone", "projector"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_reported(pictures, where, value):
    enc = make()
    next(getattr(enc, where).parameters()).data.view(-1)[0] = value
    with refused(NonFiniteError, match="NaN or infinity"):
        enc.embed(pictures)


def test_embed_works_where_there_is_no_stderr(pictures, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # pythonw, services
    assert len(make().embed(pictures, progress=True)) == len(pictures)


def test_progress_is_shown_on_stderr_only_when_asked(pictures, capfd):
    enc = make()
    enc.embed(pictures)
    assert capfd.readouterr() == ("", "")
    for source in (pictures, batch()):
        enc.embed(source, progress=True)
        out, err = capfd.readouterr()
        assert out == ""
        assert "embed" in err


# --- embed: sources and ids ----------------------------------------------------------------------------------------------------------


def test_ids_of_a_folder_are_relative_posix_paths(image_folder):
    e = make().embed(image_folder, batch_size=16)
    assert e.ids.tolist() == [f"{c}/{i:02d}.png" for c in ("blue", "red") for i in range(20)]
    assert e == make().embed(str(image_folder), batch_size=16)


def test_ids_of_paths_are_the_given_paths(image_folder):
    paths = [image_folder / "red" / "03.png", str(image_folder / "blue" / "00.png"), image_folder / "red" / "03.png"]
    enc = make()
    e = enc.embed(paths)
    assert e.ids.tolist() == [str(p) for p in paths]
    np.testing.assert_array_equal(e.to_dense(), dense_codes(enc, [Image.open(p) for p in paths]))


def test_ids_of_pil_images_and_tensors_are_row_numbers(pictures):
    enc = make()
    assert enc.embed(pictures, batch_size=3).ids.tolist() == list(range(7))
    x = batch(n=5)
    e = enc.embed(x, batch_size=2)
    assert e.ids.tolist() == list(range(5))
    with torch.no_grad():
        np.testing.assert_allclose(e.to_dense(), enc.eval()(x).numpy(), rtol=1e-4, atol=1e-5)


def test_ids_of_a_dataset_are_row_numbers_and_its_order_is_kept(pictures):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1, 0, 1, 0]}, features=features)
    enc = make()
    e = enc.embed(data.select([4, 1, 6]))
    assert e.ids.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(e.to_dense(), dense_codes(enc, [pictures[i] for i in (4, 1, 6)]))


def test_one_file_and_one_image_give_one_row(image_folder, pictures):
    enc = make()
    assert enc.embed(image_folder / "red" / "00.png").ids.tolist() == [str(image_folder / "red" / "00.png")]
    assert enc.embed(pictures[0]).shape == (1, 24)


def test_empty_list_and_an_empty_tensor_give_no_rows():
    enc = make()
    for source in ([], torch.zeros(0, 3, 32, 32)):
        e = enc.embed(source)
        assert (e.shape, e.nnz) == ((0, 24), 0)
        assert e.meta["model"] == enc.fingerprint()


@pytest.fixture
def partly_damaged(image_folder):
    for i in (1, 2, 5):
        (image_folder / "blue" / f"{i:02d}.png").write_bytes(b"not an image" if i == 2 else b"")
    return image_folder


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_an_error_that_names_it(partly_damaged, workers):
    with refused(DataError, match=r"^blue/01\.png: .*on_error='skip'"):
        make().embed(partly_damaged, num_workers=workers)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_unreadable_images_can_be_skipped_and_are_listed(partly_damaged, batch_size):
    enc, failures = make(), []
    e = enc.embed(partly_damaged, batch_size=batch_size, on_error="skip", failures=failures)
    damaged = ["blue/01.png", "blue/02.png", "blue/05.png"]
    assert [name for name, _ in failures] == damaged
    assert all(name in reason and len(reason.splitlines()) == 1 for name, reason in failures)
    assert e.ids.tolist() == [name for c in ("blue", "red") for i in range(20) if (name := f"{c}/{i:02d}.png") not in damaged]
    np.testing.assert_allclose(e.to_dense(), dense_codes(enc, [Image.open(partly_damaged / name) for name in e.ids]), rtol=1e-4, atol=1e-5)
    assert len(enc.embed(partly_damaged, batch_size=batch_size, on_error="skip")) == 37


def test_a_missing_file_of_a_list_can_be_skipped(image_folder):
    failures = []
    e = make().embed([image_folder / "red/01.png", image_folder / "gone.png"], on_error="skip", failures=failures)
    assert len(e) == 1 and "gone.png" in failures[0][1]


def test_embed_takes_the_options_of_a_table(image_folder):
    (image_folder / "table").mkdir()
    cells = [{"bytes": None, "path": str(image_folder / "red" / "01.png")}]
    pq.write_table(pa.table({"left": cells, "right": cells}), image_folder / "table" / "t.parquet")
    assert make().embed(image_folder / "table", image_column="left", allow_paths=True).shape == (1, 24)
    for options, words in (({"image_column": "left"}, "allow_paths"), ({"allow_paths": True}, "image_column")):
        with refused(DataError, match=words):
            make().embed(image_folder / "table", **options)
    with refused(UsageError, match="columns"):
        make().embed([Image.open(image_folder / "red" / "01.png")], image_column="left")


def test_no_readable_image_gives_no_rows(tmp_path):
    (tmp_path / "x.png").touch()
    failures = []
    e = make().embed(tmp_path, on_error="skip", failures=failures)
    assert e.shape == (0, 24)
    assert len(failures) == 1


def test_broken_row_of_a_dataset_is_skipped_by_number(pictures):
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG")
    good = {"bytes": buffer.getvalue(), "path": None}
    rows = [good, {"bytes": good["bytes"][:60], "path": None}, None, good]
    data = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    failures = []
    e = make().embed(data, on_error="skip", failures=failures)
    assert e.ids.tolist() == [0, 3]
    assert [row for row, _ in failures] == [1, 2]


def test_truncated_pil_image_is_unreadable(tmp_path, pictures):
    pictures[4].save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:700])
    with refused(DataError):
        make().embed([pictures[0], Image.open(tmp_path / "x.jpg")])


def test_missing_sources_are_refused(tmp_path):
    for source in (tmp_path / "none", [tmp_path / "none.png"], tmp_path):
        with refused(DataError, match=tmp_path.name):
            make().embed(source)


def test_tensor_and_files_of_the_same_images_give_the_same_codes(image_folder):
    enc = make()
    files = sorted(image_folder.rglob("*.png"))[:6]
    x = torch.stack([enc.transform(Image.open(f)) for f in files])
    np.testing.assert_array_equal(enc.embed(x).to_dense(), enc.embed(files).to_dense())


def test_error_in_a_worker_leaves_no_process(image_folder):
    import multiprocessing

    (image_folder / "red" / "05.png").write_bytes(b"broken")
    enc = rz.create_encoder("test_resnet", dim=8)
    with pytest.raises(DataError) as caught:
        enc.embed(image_folder, batch_size=4, num_workers=2)
    assert multiprocessing.active_children() == [] and caught.value is not None


def test_load_and_save_again_keeps_recipe_and_record(tmp_path):
    first = rz.load_encoder("test_resnet.digits")
    again = rz.load_encoder(first.save_pretrained(tmp_path / "again"))
    assert again.config.recipe == first.config.recipe is not None and again.config.info == first.config.info

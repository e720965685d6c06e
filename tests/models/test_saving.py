"""What is made can be saved and loaded again, or is refused when it is made."""

import os
import tempfile
import threading

import numpy as np
import pytest
import timm
import torch
from models import SMALL
from models import settled as make
from PIL import Image
from refusals import refused

import rlpjepa_zoo as rz
from rlpjepa_zoo import create_encoder
from rlpjepa_zoo.core.files import remove_partials
from rlpjepa_zoo.data.images import ImageRows, Row
from rlpjepa_zoo.errors import DataError, ModelError, OutputError, UsageError
from rlpjepa_zoo.models.classifier import make_classifier
from rlpjepa_zoo.ops.tensors import tensor_bytes
from rlpjepa_zoo.sparse.embeddings import SparseEmbeddings


def pictures(n=3):
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 52, 3), dtype=np.uint8)) for i in range(n)]


# --- weights -------------------------------------------------------------------------------------------------------------------------


class Packed(torch.nn.Linear):
    """Has an entry in `state_dict` that is not a tensor, as torch's quantised layers have."""

    def get_extra_state(self):
        return ("packed",)


def test_weights_without_values_and_quantised_ones_are_refused(tmp_path):
    empty, quantised = make(), make()
    empty.to("meta")
    quantised.projector[0] = Packed(quantised.projector[0].in_features, quantised.projector[0].out_features)
    for encoder, reason in ((empty, "device meta"), (quantised, "quantised layers")):
        for use in (lambda e: e.save_pretrained(tmp_path / "encoder"), lambda e: e.embed(pictures()), lambda e: e.fingerprint()):
            with refused(UsageError, match=reason):
                use(encoder)
    assert not (tmp_path / "encoder").exists()


# --- architectures -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("poolformerv2_s12", {}),  # replaces layers while it is built
        ("test_efficientnet_gn", {}),
        ("coat_lite_tiny", {"embed_dims": [16, 32, 48, 64], "serial_depths": [1, 1, 2, 2]}),  # uses a layer in several places
    ],
)
def test_model_that_replaces_or_shares_layers_is_loaded_back(tmp_path, name, options):
    enc = create_encoder(name, dim=8, hidden_dim=8, **options).eval()
    enc.save_pretrained(tmp_path / "enc")
    assert rz.load_encoder(tmp_path / "enc").fingerprint() == enc.fingerprint()
    plain = timm.create_model(f"local-dir:{tmp_path / 'enc'}", pretrained=True).eval()
    x = torch.randn(1, 3, *enc.config.preprocess.size)
    with torch.no_grad():
        assert torch.allclose(plain(x), enc.features(x), atol=1e-5)


def test_shared_tensors_are_each_written_in_full():
    from safetensors.torch import load

    weight = torch.arange(4.0)
    written = load(tensor_bytes({"a": weight, "b": weight, "c": weight[1:3]}))
    assert {name: tensor.tolist() for name, tensor in written.items()} == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3], "c": [1, 2]}


@timm.models.register_model
def backbone_of_a_user(pretrained=False, **options):
    settings = {"block": timm.models.resnet.BasicBlock, "layers": (1, 1, 1, 1), "channels": (8,) * 4, **options}
    return timm.models.build_model_with_cfg(timm.models.ResNet, "backbone_of_a_user", pretrained, **settings)


def test_backbone_that_a_module_registers_is_loaded_while_it_is_known(tmp_path, monkeypatch):
    enc = create_encoder("backbone_of_a_user", dim=8, hidden_dim=8, preprocess=SMALL).eval()
    enc.save_pretrained(tmp_path / "enc")
    assert rz.load_encoder(tmp_path / "enc").fingerprint() == enc.fingerprint()
    monkeypatch.setattr(timm, "is_model", lambda name: False)
    with refused(ModelError, match=r"backbone_of_a_user.*import that module first \(--import MODULE"):
        rz.load_encoder(tmp_path / "enc")


# --- limits --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [("projector_depth", 65), ("dim", 2**20 + 1), ("hidden_dim", 2**20 + 1), ("dim", 2.0), ("dim", "8"), ("hidden_dim", None)],
)
def test_sizes_that_do_not_load_are_refused_when_the_encoder_is_made(argument, value):
    with refused(UsageError, match=argument):
        create_encoder("test_resnet", **{argument: value})


def test_largest_depth_and_integers_of_numpy_are_saved_and_loaded(tmp_path):
    enc = create_encoder("test_resnet", dim=np.int64(4), hidden_dim=np.int32(4), projector_depth=64, preprocess=SMALL).eval()
    enc.save_pretrained(tmp_path / "enc")
    assert rz.load_encoder(tmp_path / "enc").config.projector_depth == 64


@pytest.mark.parametrize(
    "options",
    [{"act_layer": torch.nn.GELU}, {"norm_layer": lambda x: x}, {"drop_rate": float("nan")}, {"block_args": {"a": {1, 2}}},
     {"stem_width": 10**6}, {"act_layer": "a b"}, {"dtype": torch.float16}, {"device": "cpu"}, {"checkpoint_path": "x.pth"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_arguments_that_do_not_load_are_refused_when_the_encoder_is_made(options):
    with refused(ModelError, match=next(iter(options))):
        create_encoder("test_resnet", **options)


def test_arguments_are_kept_as_config_json_gives_them_back(tmp_path):
    enc = create_encoder("test_vit", dim=4, hidden_dim=4, img_size=(32, 48), patch_size=np.int64(8).item()).eval()
    enc.save_pretrained(tmp_path / "enc")
    loaded = rz.load_encoder(tmp_path / "enc")
    assert loaded.config.preprocess.size == (32, 48) and loaded.fingerprint() == enc.fingerprint()


@pytest.mark.parametrize("change", ["backbone", "projector"])
def test_layers_that_were_changed_are_refused_when_saving(tmp_path, change):
    enc = make()
    if change == "backbone":
        enc.backbone.extra = torch.nn.Linear(2, 2)
    else:
        enc.projector[-2] = torch.nn.Linear(20, 7)
    with refused(UsageError, match=rf"^{change}.*cannot be loaded again"):
        enc.save_pretrained(tmp_path / "enc")
    assert os.listdir(tmp_path) == []


# --- wrappers ------------------------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "parallel": torch.nn.DataParallel,
    "both": lambda module: torch.compile(torch.nn.DataParallel(module), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_layers_keep_the_names_of_their_weights(tmp_path, wrap):
    plain, enc = make().eval(), make().eval()
    enc.backbone, enc.projector = wrap(enc.backbone), wrap(enc.projector)
    enc.backbone.requires_grad_(False)
    assert list(enc.state_dict()) == list(plain.state_dict()) or set(enc.state_dict()) == set(plain.state_dict())
    assert enc.fingerprint() == plain.fingerprint()
    assert len(SparseEmbeddings.concat([enc.embed(pictures()), plain.embed(pictures())])) == 6
    enc.save_pretrained(tmp_path / "enc")
    assert rz.load_encoder(tmp_path / "enc").fingerprint() == plain.fingerprint()
    other = make(projector_depth=3)
    with torch.no_grad():
        other.projector[0].weight.add_(1)
    enc.load_state_dict(other.state_dict())
    assert enc.fingerprint() == other.fingerprint()


def test_wrapped_encoder_and_classifier_are_saved(tmp_path):
    plain = make().eval()
    compiled = torch.compile(make().eval(), backend="eager")
    compiled.save_pretrained(tmp_path / "enc")
    assert rz.load_encoder(tmp_path / "enc").fingerprint() == plain.fingerprint() == compiled.fingerprint()
    classifier = make_classifier(make(), ["a", "b"]).eval()
    classifier.backbone = torch.compile(classifier.backbone, backend="eager")
    classifier.save_pretrained(tmp_path / "classifier")
    assert rz.load_classifier(tmp_path / "classifier").fingerprint() == classifier.fingerprint()


# --- precision -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tolerance"), [("half", 1e-2), ("bfloat16", 1e-1), ("double", 1e-4)])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_encoder_and_classifier_of_any_precision_prepare_their_images(name, tolerance, precision):
    enc = make().eval()
    expected = enc.embed(pictures()).to_dense()
    got = getattr(make().eval(), name)().embed(pictures(), precision=precision).to_dense()
    assert got.dtype == np.float32 and abs(got - expected).max() <= tolerance * expected.max()
    probabilities = getattr(make_classifier(make(), ["a", "b"]), name)().predict(pictures()).probabilities
    assert probabilities.dtype == np.float32 and np.allclose(probabilities.sum(1), 1, atol=1e-2)


def test_encoder_of_two_precisions_works():
    enc = make().eval()
    enc.backbone.half()
    assert len(enc.embed(pictures())) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_tensors_of_any_precision_are_embedded(dtype):
    enc = make().eval()
    x = torch.stack([enc.transform(image) for image in pictures()])
    expected = enc.embed(x).to_dense()
    assert abs(enc.embed(x.to(dtype)).to_dense() - expected).max() <= 0.1 * expected.max()
    with torch.no_grad():
        assert enc(x.to(dtype)).dtype == torch.float32


def test_bytes_are_pixels_and_are_prepared_as_images_are():
    enc = make().eval()
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures()])
    assert np.array_equal(enc.embed(pixels).to_dense(), enc.embed(pictures()).to_dense())
    assert enc.embed(pixels[:0]).shape == (0, 24)


def test_size_that_the_backbone_refuses_is_named():
    enc = create_encoder("vit_tiny_patch16_224", dim=4, hidden_dim=4, img_size=32, depth=1).eval()
    assert enc.size_problem(32, 32) is None and "48" in enc.size_problem(48, 48)
    with refused(DataError, match="48 x 48 pixels .*gives 32 x 32"):
        enc.embed(torch.zeros(1, 3, 48, 48))


# --- threads -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["the same", "of another budget"])
def test_threads_embed_with_shared_weights_in_training_mode(other):
    enc = make()
    expected, before = enc.embed(pictures(4), batch_size=2, num_workers=0).to_dense(), enc.fingerprint()
    second = enc if other == "the same" else enc.with_budget(24)
    inside, ended, found = threading.Event(), threading.Event(), {}

    def rows(wait):
        def read(i):
            wait(i)
            return pictures(4)[i]

        return ImageRows(lambda start: (Row(i, lambda i=i: read(i), {}) for i in range(start, 4)), 4, {})

    def short():
        inside.wait(60)
        found["short"] = enc.embed(pictures(4), batch_size=2, num_workers=0).to_dense()
        enc.train()
        ended.set()

    thread = threading.Thread(target=short)
    thread.start()
    found["long"] = second.embed(
        rows(lambda i: inside.set() if i == 0 else ended.wait(60) if i == 2 else None), batch_size=2, num_workers=0
    )
    thread.join()
    assert np.array_equal(found["short"], expected) and np.array_equal(found["long"].to_dense(), expected)
    assert all(module.training for module in enc.modules()) and enc.fingerprint() == before


# --- disks ---------------------------------------------------------------------------------------------------------------------------


def test_saving_needs_no_temporary_folder_of_the_system(tmp_path, monkeypatch):
    def none():
        raise AssertionError("the system's temporary folder was asked for")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    make().save_pretrained(tmp_path / "enc")
    assert os.listdir(tmp_path) == ["enc"]


class SafetensorError(Exception):
    """An error class that a writer brings along."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:820] . PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_any_writer_is_an_output_error(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("rlpjepa_zoo.hub.folder.write_durably", full)
    with refused(OutputError, match="enc: cannot write the model") as caught:
        make().save_pretrained(tmp_path / "enc")
    assert caught.value.exit_code == 6
    assert "No space" not in str(error) or "MB, " in str(caught.value) and "MB are free" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_unfinished_folders_of_dead_processes_are_removed_at_the_next_save(tmp_path):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    dead, running, other = f".enc.{process}.partial", f".enc.{os.getppid()}.partial", f".other.{process}.partial"
    foreign = f".enc.{process}-00000000.partial"  # of another machine
    for name in (dead, running, other, foreign):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    make().save_pretrained(tmp_path / "enc")
    assert set(os.listdir(tmp_path)) == {"enc", running, other, foreign}
    (tmp_path / f".result.{process}.partial.json").touch()
    remove_partials(tmp_path)
    assert set(os.listdir(tmp_path)) == {"enc", running, foreign}

"""Exported files: the encoder's numbers and zeros, any batch size, metadata, no pickle, nothing touched, nothing left after a refusal."""

import errno
import functools
import io
import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from images import photo
from models import settled as make
from refusals import refused

from rlpjepa_zoo.cli import app as cli
from rlpjepa_zoo.core import package
from rlpjepa_zoo.errors import ModelError, NonFiniteError, OutputError, UsageError
from rlpjepa_zoo.models import export as module
from rlpjepa_zoo.models.classifier import make_classifier
from rlpjepa_zoo.models.encoder import Preprocess
from rlpjepa_zoo.models.export import export

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CASES = {
    "resnet": ("test_resnet", {}),
    "vit": ("test_vit", {"img_size": 32, "patch_size": 4, "depth": 2}),
    "convnext": ("test_convnext3", {"preprocess": Preprocess((64, 64))}),
    "small resnet": ("resnet10_small_narrow", {}),
    "one layer and a dial": ("test_resnet", {"projector_depth": 1}),
}
SUFFIXES = (".onnx", ".pt2")
BY_DEFAULT = {("resnet", ".onnx"), ("resnet", ".pt2"), ("vit", ".onnx"), ("one layer and a dial", ".pt2")}
FILES = [
    pytest.param(case, suffix, marks=[] if (case, suffix) in BY_DEFAULT else [pytest.mark.slow]) for case in CASES for suffix in SUFFIXES
]  # the test of autocast compares the numbers of a small resnet in .onnx
TOLERANCE = 2e-5  # of the largest value; the worst of 41 architectures was 2e-6


def images(enc, n):
    return torch.randn(n, 3, *enc.config.preprocess.size, generator=torch.Generator().manual_seed(1))


def run(path, x):
    """What a program without this package does."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip(("z", "features"), map(torch.from_numpy, session.run(["z", "features"], {"images": x.numpy()})), strict=True))


def metadata(path):
    if path.suffix == ".pt2":
        found = {"preprocess": ""}  # torch fills every name in, but only into a dictionary that is not empty
        torch.export.load(path, extra_files=found)
        return found
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(encoder, file) of a case and a suffix, made once."""

    @functools.cache
    def encoder_of(case):
        name, options = CASES[case]
        enc = make(name, **options)
        return enc.with_budget(3) if case.endswith("dial") else enc

    @functools.cache
    def get(case, suffix):
        enc = encoder_of(case)
        return enc, export(enc, tmp_path_factory.mktemp("exported") / f"enc{suffix}")

    return get


@pytest.fixture(scope="module")
def encoder():
    return make("resnet10_small_narrow", projector_depth=1)


@pytest.fixture(scope="module")
def plain_file(encoder, tmp_path_factory):
    return export(encoder, tmp_path_factory.mktemp("plain") / "enc.pt2")


@pytest.fixture
def converted(plain_file, monkeypatch):
    """Exports of `encoder` to .pt2 reuse one conversion, in tests of what precedes and follows it."""
    monkeypatch.setattr(module, "_trace", lambda *_: None)
    monkeypatch.setattr(module.EXPORT_FORMATS[".pt2"], "convert", lambda *_: plain_file.read_bytes())


# --- numbers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "suffix"), FILES)
def test_file_gives_the_encoders_outputs_for_any_batch(exported, case, suffix):
    enc, file = exported(case, suffix)
    for n in (1, 2, 7):
        x = images(enc, n)
        with enc.evaluating(), torch.no_grad():
            wanted = enc.both(x)
        given = run(file, x)
        assert given["z"].shape == (n, 24) and given["features"].shape == (n, enc.config.features)
        assert given["z"].dtype == given["features"].dtype == torch.float32
        for got, want in ((given["z"], wanted.z), (given["features"], wanted.features)):
            assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())
        assert torch.equal(given["z"] == 0, wanted.z == 0) and float(given["z"].min()) >= 0
        assert 0.1 < float((wanted.z == 0).float().mean()) < 0.9  # else equal zeros would say little


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exported_encoder_keeps_its_dial(exported, suffix):
    enc, file = exported("one layer and a dial", suffix)
    x = images(enc, 4)
    with enc.evaluating(), torch.no_grad():
        wanted = enc(x)
    z = run(file, x)["z"]
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-5)
    assert enc.config.dial is not None and (z > 0).sum(1).tolist() == [3] * 4


def test_evaluation_mode_is_exported_from_any_mode(exported):
    enc, file = exported("resnet", ".pt2")
    x = images(enc, 7)
    with torch.no_grad():
        trained = make()(x)
    assert enc.training and not torch.allclose(run(file, x)["z"], trained, atol=1e-2)


def test_names_and_shapes_in_the_onnx_file(exported):
    enc, file = exported("vit", ".onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [("images", ["batch", 3, 32, 32], "tensor(float)")]
    assert {o.name: o.shape for o in session.get_outputs()} == {"z": ["batch", 24], "features": ["batch", enc.config.features]}
    onnx.checker.check_model(str(file), full_check=True)


@pytest.mark.slow
def test_pt2_file_runs_without_this_package_and_timm(exported):
    _, file = exported("vit", ".pt2")
    code = (
        "import sys, torch\ntorch.set_num_threads(1)\n"
        f"out = torch.export.load({str(file)!r}).module()(torch.zeros(3, 3, 32, 32))\n"
        "print(tuple(out['z'].shape), [m for m in ('timm', 'rlpjepa_zoo') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 24) []"


# --- what is in the file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_holds_preprocessing_and_fingerprint(exported, suffix):
    enc, file = exported("resnet", suffix)
    found = metadata(file)
    assert found["architecture"] == "test_resnet" and found["fingerprint"] == enc.fingerprint()
    assert json.loads(found["preprocess"]) == {
        "size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "crop_pct": 0.9,
    }  # fmt: skip
    assert json.loads(found["versions"]) == package.versions() and {"torch", "timm"} <= set(package.versions())


def pickles(data: bytes) -> list[str]:
    """Members of a zip archive that are pickles or archives of pickles."""
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            member = archive.read(name)
            if zipfile.is_zipfile(io.BytesIO(member)):
                found += [f"{name}/{inner}" for inner in pickles(member)]
                continue
            try:
                *_, (last, _, position) = pickletools.genops(member)
            except ValueError:
                continue
            if last.name == "STOP" and position == len(member) - 1:  # raw numbers do not parse as a pickle to their last byte
                found.append(name)
    return found


def test_no_member_of_the_pt2_file_is_a_pickle(exported):
    for case in CASES:
        assert pickles(exported(case, ".pt2")[1].read_bytes()) == []


def test_pickle_scan_finds_pickles():
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), buffer)
    assert [name.split("/", 1)[1] for name in pickles(buffer.getvalue())] == ["data/sample_inputs/model.pt/archive/data.pkl"]
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/plain", pickle.dumps({"a": 1}))
    assert "archive/plain" in pickles(buffer.getvalue())


def test_opening_the_pt2_file_unpickles_nothing(exported, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch._C, "_pickle_load_obj")):
        monkeypatch.setattr(owner, name, never)
    assert run(exported("vit", ".pt2")[1], torch.zeros(1, 3, 32, 32))["z"].shape == (1, 24)


def test_torch_that_would_pickle_is_refused(tmp_path, encoder, monkeypatch):
    save = torch.export.save

    def pickling(program, *args, **kwargs):
        program.example_inputs = ((images(encoder, 2),), {})
        save(program, *args, **kwargs)

    monkeypatch.setattr(torch.export, "save", pickling)
    with refused(ModelError, match="sample_inputs"):
        export(encoder, tmp_path / "enc.pt2")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_path_of_this_machine_is_in_the_file(exported, suffix):
    data = exported("vit", suffix)[1].read_bytes()
    for text in ("site-packages", str(Path(module.__file__).parent), os.path.expanduser("~")):
        assert text.encode() not in data
    assert b"Attention" in data  # names of layers are there, uncompressed: the search can find something


# --- the encoder is not touched ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_export_changes_no_mode_weight_gradient_or_random_state(tmp_path, capfd, suffix):
    enc = make("resnet10_small_narrow", freeze_backbone=True)
    enc.projector[1].eval()
    enc(images(enc, 4)).sum().backward()
    modes, state = [m.training for m in enc.modules()], {k: v.clone() for k, v in enc.state_dict().items()}
    asks = [(p.requires_grad, None if p.grad is None else p.grad.clone(), p.device) for p in enc.parameters()]
    random = torch.get_rng_state()
    path = export(enc, str(tmp_path / f"enc{suffix}"))
    assert path == tmp_path / f"enc{suffix}" and os.listdir(tmp_path) == [path.name]
    assert capfd.readouterr().out == ""
    assert len(set(modes)) == 2 and [m.training for m in enc.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in enc.state_dict().items())
    for parameter, (asked, grad, device) in zip(enc.parameters(), asks, strict=True):
        assert parameter.requires_grad == asked and parameter.device == device
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
def test_autocast_and_memory_format_do_not_change_the_file(tmp_path, encoder, plain_file, recwarn):
    x = images(encoder, 3)
    plain = run(plain_file, x)["z"]
    with torch.inference_mode():
        assert torch.equal(run(export(encoder, tmp_path / "inference.pt2"), x)["z"], plain)
    with torch.autocast("cpu", torch.bfloat16):
        path = export(encoder, tmp_path / "autocast.onnx")
    assert torch.allclose(run(path, x)["z"], plain, atol=1e-6)
    path = export(make("resnet10_small_narrow", projector_depth=1).to(memory_format=torch.channels_last), tmp_path / "last.pt2")
    assert torch.allclose(run(path, x)["z"], plain, atol=1e-6)
    assert not [w for w in recwarn if "complete tensor" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_encoder_on_a_gpu_stays_there_and_its_file_runs_on_the_cpu(tmp_path, suffix):
    enc = make().cuda()
    path = export(enc, tmp_path / f"enc{suffix}")
    assert {p.device.type for p in enc.state_dict().values()} == {"cuda"}
    with enc.evaluating(), torch.no_grad():
        wanted = enc(images(enc, 4).cuda()).cpu()
    assert torch.allclose(run(path, images(enc, 4))["z"], wanted, atol=1e-2 * float(wanted.max()))


# --- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["enc.pt", "enc.onnx.gz", "enc", "enc.ONNX", ".pt2"])
def test_unknown_suffix_is_refused(tmp_path, encoder, name):
    with refused(UsageError, match=r"\.onnx.* or \.pt2"):
        export(encoder, tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_existing_file_is_replaced_only_when_asked(tmp_path, encoder):
    path = tmp_path / "enc.pt2"
    path.write_text("kept")
    with refused(UsageError, match="exists"):
        export(encoder, path)
    assert path.read_text() == "kept" and os.listdir(tmp_path) == ["enc.pt2"]
    os.link(path, tmp_path / "old")
    assert export(encoder, path, overwrite=True) == path
    assert run(path, images(encoder, 1))["z"].shape == (1, 24) and sorted(os.listdir(tmp_path)) == ["enc.pt2", "old"]
    assert (tmp_path / "old").read_text() == "kept"  # a new file took the name
    (tmp_path / "folder.pt2").mkdir()
    with refused(UsageError, match="exists"):
        export(encoder, tmp_path / "folder.pt2", overwrite=True)


def test_path_that_cannot_be_written_is_refused(tmp_path, encoder):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "enc.pt2", tmp_path / "missing" / "enc.pt2", tmp_path / ("x" * 300 + ".pt2")):
        with refused(OutputError, match="cannot write"):
            export(encoder, path)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_full_disk_leaves_only_the_old_file(tmp_path, encoder, converted, monkeypatch):
    def full(path, data):
        path.write_bytes(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "enc.pt2").write_text("kept")
    monkeypatch.setattr(module.files, "write_durably", full)
    with refused(OutputError, match="No space left"):
        export(encoder, tmp_path / "enc.pt2", overwrite=True)
    assert os.listdir(tmp_path) == ["enc.pt2"] and (tmp_path / "enc.pt2").read_text() == "kept"


def spoiled(change):
    """The exported file gives something else than the encoder."""

    def opened(file):
        inside = torch.export.load(file).module()
        return lambda x: change(inside(x))

    return opened


SPOILT = {
    "number": (lambda out: {**out, "z": out["z"] + 1e-3 * (out["z"] > 0)}, "z of the exported file differs"),
    "features": (lambda out: {**out, "features": out["features"] * 1.01}, "features of the exported file differs"),
    "not a number": (lambda out: {**out, "features": out["features"] * float("nan")}, "differs .* by nan"),
    "zeros": (lambda out: {**out, "z": out["z"] + 5e-5 * (out["z"] == 0)}, "other zeros"),
    "lost": (lambda out: {**out, "z": torch.where(out["z"] > 0, out["z"], -1e-9)}, "other zeros"),
    "shape": (lambda out: {**out, "z": out["z"][:, :1]}, "shape"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_file_with_other_outputs_is_refused_and_the_old_file_kept(tmp_path, encoder, converted, monkeypatch, kind):
    change, match = SPOILT[kind]
    (tmp_path / "enc.pt2").write_text("kept")
    monkeypatch.setattr(module.EXPORT_FORMATS[".pt2"], "open", spoiled(change))
    with refused(ModelError, match=match):
        export(encoder, tmp_path / "enc.pt2", overwrite=True)
    assert os.listdir(tmp_path) == ["enc.pt2"] and (tmp_path / "enc.pt2").read_text() == "kept"


def test_rounding_differences_are_accepted(tmp_path, encoder, converted, monkeypatch):
    def rounded(out):
        z = out["z"]
        return {**out, "z": torch.where(z == 0, 1e-6 * z.max(), z * (1 + 1e-6))}

    monkeypatch.setattr(module.EXPORT_FORMATS[".pt2"], "open", spoiled(rounded))
    assert export(encoder, tmp_path / "enc.pt2").is_file()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_that_does_not_open_is_refused(tmp_path, encoder, monkeypatch, suffix):
    monkeypatch.setattr(module.EXPORT_FORMATS[suffix], "convert", lambda *_: b"no model")
    with refused(ModelError, match="does not open"):
        export(encoder, tmp_path / f"enc{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_onnx_packages_only_onnx_is_refused(tmp_path, encoder, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with refused(UsageError, match=rf"{missing} .*pip install 'rlpjepa-zoo\[export\]'"):
        export(encoder, tmp_path / "enc.onnx")
    assert os.listdir(tmp_path) == []


def test_pt2_needs_no_onnx_package(tmp_path, encoder, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert export(encoder, tmp_path / "enc.pt2").is_file()


def test_weights_beyond_the_limit_of_protobuf_are_refused(tmp_path, encoder, converted, monkeypatch):
    total = sum(t.nbytes for t in encoder.state_dict().values())
    monkeypatch.setattr(module, "MAX_ONNX", total - 1)
    with refused(UsageError, match="export to .pt2"):
        export(encoder, tmp_path / "enc.onnx")
    assert os.listdir(tmp_path) == [] and module.MAX_ONNX < 2**31
    assert export(encoder, tmp_path / "enc.pt2").is_file()


class OnePerBatch(torch.nn.Module):
    """A backbone that looks at values, which cannot be traced."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x) if float(x.sum()) > 0 else self.inside(x) + 1


class Unknown(OnePerBatch):
    """A backbone with an operator that ONNX does not have."""

    def forward(self, x):
        return self.inside(x) + torch.linalg.eigvalsh(x[:, 0] + x[:, 0].mT)[:, :1]


@pytest.mark.parametrize(("kind", "suffix"), [(OnePerBatch, ".pt2"), (OnePerBatch, ".onnx"), (Unknown, ".onnx")])
def test_unexportable_architecture_is_refused_with_the_reason(tmp_path, capfd, kind, suffix):
    enc = make("resnet10_small_narrow")
    enc.backbone = kind(enc.backbone)
    with refused(ModelError, match=rf"'resnet10_small_narrow' cannot be exported to {suffix}: \w.{{10}}") as info:
        export(enc, tmp_path / f"enc{suffix}")
    assert "\x1b" not in str(info.value) and os.listdir(tmp_path) == []
    out, err = capfd.readouterr()
    assert out == "" and "def forward" not in err  # torch prints whole graphs


def test_model_with_a_fixed_batch_size_is_refused(tmp_path):
    class Fixed(OnePerBatch):
        def forward(self, x):
            return self.inside(x) + torch.arange(2).view(2, 1) if len(x) == 2 else self.inside(x)

    enc = make()
    enc.backbone = Fixed(enc.backbone)
    with refused(ModelError, match="cannot be exported"):
        export(enc, tmp_path / "enc.pt2")
    assert os.listdir(tmp_path) == []


def test_weights_that_are_not_finite_or_not_float32_are_refused(tmp_path):
    with refused(UsageError, match=r"torch.bfloat16.*\.float\(\)"):
        export(make().bfloat16(), tmp_path / "enc.pt2")
    enc = make()
    enc.projector[1].running_var[0] = float("inf")
    with refused(NonFiniteError, match="running_var"):
        export(enc, tmp_path / "enc.pt2")
    assert os.listdir(tmp_path) == []


# --- other programs ------------------------------------------------------------------------------------------------------------------


def small():
    return make("test_resnet", preprocess=Preprocess((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 0.875))


def wide():
    return make("test_resnet", preprocess=Preprocess((32, 48), crop_pct=0.9))


@pytest.mark.parametrize(("encoder_of", "height", "width"), [pytest.param(small, 60, 151, marks=pytest.mark.slow), (wide, 97, 61)])
def test_example_of_the_documents_gives_the_embedding_of_the_encoder(tmp_path, monkeypatch, rng, encoder_of, height, width):
    """The example prepares a photograph that is not square without this package."""
    page = (Path(__file__).parents[2] / "docs/hub.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "onnxruntime" in block]
    load = 'rz.load_encoder("test_resnet.digits")'
    assert load in example
    (tmp_path / "photos").mkdir()
    photo(rng, height, width).save(tmp_path / "photos/cat.jpg")
    monkeypatch.chdir(tmp_path)
    namespace = {"ENCODER": encoder_of().eval()}
    exec(compile(example.replace(load, "ENCODER"), "docs/hub.md", "exec"), namespace)
    ours, theirs = namespace["ENCODER"].embed("photos/cat.jpg").to_dense()[0], namespace["z"][0]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.999


@pytest.mark.parametrize(
    ("layer", "suffix"),
    [
        ("features", ".pt2"),
        ("z", ".onnx"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("features", ".onnx"), ("z", ".pt2"))),
    ],
)
def test_classifier_gives_logits_and_probabilities(tmp_path, layer, suffix):
    classifier = make_classifier(make(), ["cat", "dög", "hat"], layer)
    classifier.save_pretrained(tmp_path / "saved")
    assert cli.run(["export", str(tmp_path / "saved"), "--out", str(tmp_path / f"c{suffix}")]) == 0
    x = images(classifier, 5)
    with classifier.evaluating(), torch.no_grad():
        wanted = classifier(x)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(tmp_path / "c.onnx"), providers=["CPUExecutionProvider"])
        logits, probabilities = map(torch.from_numpy, session.run(["logits", "probabilities"], {"images": x.numpy()}))
        assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["cat", "dög", "hat"]
    else:
        logits, probabilities = (torch.export.load(tmp_path / "c.pt2").module()(x)[name] for name in ("logits", "probabilities"))
    assert torch.allclose(logits, wanted, atol=1e-4) and torch.allclose(probabilities, wanted.softmax(1), atol=1e-4)


def test_compiled_encoder_is_exported(tmp_path):
    enc = make().eval()
    file = export(torch.compile(enc, backend="eager"), tmp_path / "e.pt2")
    x = images(enc, 2)
    assert torch.allclose(run(file, x)["z"], enc(x), atol=1e-4)

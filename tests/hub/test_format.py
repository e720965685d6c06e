"""The published folder: exact round trip, plain timm and transformers, damage, hostile configs, sources, saving under faults, the card."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from models import SMALL, settled
from PIL import Image
from published import config_of, read_config, reseal, tensors
from refusals import refused

import rlpjepa_zoo
from rlpjepa_zoo import create_encoder, load_encoder
from rlpjepa_zoo.core import files
from rlpjepa_zoo.data.preprocess import Preprocess
from rlpjepa_zoo.errors import HubError, ModelError, NonFiniteError, OutputError, UsageError

RECIPE = "model:\n  backbone: test_resnet\n"
INFO = {
    "target": {"p": 1.0, "mu": -0.5, "sigma": 0.7071},
    "density": {"asked": 0.31, "theory": 0.303, "train": 0.29, "eval": None},
    "results": {"knn_z": 0.7125, "linear_features": 0.8, "protocol": "one seed"},
    "data": "digits",
    "recipe": "digits-test",
    "training": {"epochs": 3, "seed": 0},
}
FILES = {"config.json", "model.safetensors", "head.safetensors", "golden.safetensors", "recipe.yaml", "README.md"}
PLAIN = {
    "test_vit": {"img_size": 32, "patch_size": 4, "preprocess": SMALL},
    "test_resnet": {"preprocess": SMALL},
    "test_convnext3": {"preprocess": Preprocess((64, 64))},
    "resnet10_small_narrow": {},
}


def make(name="test_resnet", **options):
    return settled(name, **options).eval()


def batch(size=32, n=4):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def encoder():
    return make()


@pytest.fixture(scope="session")
def published(encoder, tmp_path_factory):
    return encoder.save_pretrained(tmp_path_factory.mktemp("published") / "enc", recipe=RECIPE, info=INFO)


@pytest.fixture
def copy(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "enc"))


# --- round trip ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"projector_depth": 1, "act_layer": "gelu", "global_pool": "max"}),
        ("test_vit", {"img_size": 32, "patch_size": 4, "projector_depth": 2, "global_pool": "avg", "depth": 2}),
        ("test_efficientnet", {"preprocess": None}),
        ("resnet10_small_narrow", {"stem_padding": 2}),
    ],
)
def test_loaded_encoder_gives_the_same_bits(tmp_path, name, options):
    enc = make(name, **options)
    loaded = load_encoder(enc.save_pretrained(tmp_path / "enc"))
    x = batch()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        assert torch.equal(loaded(x), enc(x))
        assert torch.equal(loaded.features(x), enc.features(x))
    assert torch.equal(loaded.transform(picture), enc.transform(picture))
    assert loaded.fingerprint() == enc.fingerprint()
    assert loaded.config.preprocess == enc.config.preprocess
    assert not any(module.training for module in loaded.modules())


def test_second_round_trip_writes_the_same_files(published, tmp_path):
    loaded = load_encoder(published)
    assert loaded.config.info == INFO
    again = loaded.save_pretrained(tmp_path / "again", recipe=RECIPE)
    for name in FILES - {"config.json"}:
        assert (again / name).read_bytes() == (published / name).read_bytes(), name
    assert read_config(again) == read_config(published)


def test_saving_changes_neither_mode_nor_weights(tmp_path):
    enc = make().train()
    before = {name: tensor.clone() for name, tensor in enc.state_dict().items()}
    enc.save_pretrained(tmp_path / "enc")
    assert all(module.training for module in enc.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in enc.state_dict().items())


def test_channels_last_weights_are_saved_with_the_same_bytes(tmp_path, encoder, published):
    enc = make().to(memory_format=torch.channels_last)
    path = enc.save_pretrained(tmp_path / "enc")
    assert (path / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert load_encoder(path).fingerprint() == encoder.fingerprint() == enc.fingerprint()


def test_encoder_on_a_plain_timm_folder_can_be_saved_and_loaded(tmp_path, encoder):
    import timm

    timm.models.save_for_hf(encoder.backbone, tmp_path / "plain", safe_serialization=True)
    enc = create_encoder(f"local-dir:{tmp_path / 'plain'}", dim=8, hidden_dim=8, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(enc.features(batch()), encoder.features(batch()))
    loaded = load_encoder(enc.save_pretrained(tmp_path / "enc"))
    shutil.rmtree(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(loaded(batch()), enc(batch()))


# --- float16 -------------------------------------------------------------------------------------------------------------------------


def test_rounded_weights_take_half_the_bytes_and_load_as_they_are(tmp_path, encoder, published):
    import timm

    before = encoder.fingerprint()
    rounded = encoder.rounded()
    assert encoder.fingerprint() == before != rounded.fingerprint() and rounded(batch()).dtype == torch.float32
    path = rounded.with_budget(4).save_pretrained(tmp_path / "half")
    sizes = [sum((folder / name).stat().st_size for name in ("model.safetensors", "head.safetensors")) for folder in (path, published)]
    assert sizes[0] < 0.65 * sizes[1]
    block = read_config(path)["rlpjepa_zoo"]
    assert (block["format"], block["weights"]) == (4, "float16") and "weights" not in read_config(published)["rlpjepa_zoo"]

    loaded = load_encoder(path)
    assert all(value.dtype != torch.float16 for value in loaded.state_dict().values())
    assert loaded.config.dial is not None and loaded.fingerprint() == rounded.with_budget(4).fingerprint()
    again = loaded.save_pretrained(tmp_path / "again")  # such as with results on the card: the weights stay as they are
    assert all((again / name).read_bytes() == (path / name).read_bytes() for name in ("model.safetensors", "head.safetensors"))
    backbone = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(backbone(batch()), rounded.features(batch()))
        difference = (rounded.features(batch()) - encoder.features(batch())).abs().max() / encoder.features(batch()).abs().max()
    assert 0 < difference < 5e-3


def test_weights_beyond_float16_are_not_rounded():
    wide = make()
    with torch.no_grad():
        wide.last_layer.weight[0, 0] = 7e4
    with refused(UsageError, match="projector.6.weight holds values beyond 65504"):
        wide.rounded()


@pytest.mark.parametrize("value", [None, "bfloat16", 1], ids=repr)
def test_other_types_of_weights_are_refused(tmp_path, encoder, value):
    path = encoder.rounded().save_pretrained(tmp_path / "half")
    with config_of(path) as config:
        if value is None:
            del config["rlpjepa_zoo"]["weights"]  # then the files should be float32
        else:
            config["rlpjepa_zoo"]["weights"] = value
    with refused(ModelError, match="is F16 of shape|weights: expected float16, got"):
        load_encoder(path)


# --- what is in the folder -----------------------------------------------------------------------------------------------------------


def test_config_json_is_timms_plus_one_block(published):
    config = read_config(published)
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 0
    assert "num_classes" not in config["model_args"]
    assert {key: config["pretrained_cfg"][key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")} == {
        "input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "crop_pct": 0.9,
    }  # fmt: skip
    block = config["rlpjepa_zoo"]
    assert block["format"] == 2
    assert block["projector"] == {"dim": 24, "hidden_dim": 20, "depth": 3}
    assert block["info"] == INFO
    assert {"torch", "timm"} <= set(block["versions"])


def test_config_json_holds_size_and_sha256_of_every_other_file(published):
    listed = read_config(published)["rlpjepa_zoo"]["files"]
    assert set(listed) == FILES - {"config.json"} == set(os.listdir(published)) - {"config.json"}
    for name, entry in listed.items():
        data = (published / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_no_file_is_a_pickle_or_an_archive(published):
    for path in published.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            header = int.from_bytes(data[:8], "little")
            sizes = [entry["data_offsets"][1] for name, entry in json.loads(data[8 : 8 + header]).items() if name != "__metadata__"]
            assert 8 + header + max(sizes) == len(data)
        else:
            assert path.suffix in (".json", ".yaml", ".md")
            assert data.decode().isprintable() or data.decode().replace("\n", "").isprintable()


def test_model_file_is_the_backbone_and_head_file_the_projector(published, encoder):
    for name, module in (("model", encoder.backbone), ("head", encoder.projector)):
        saved = safetensors.torch.load_file(published / f"{name}.safetensors")
        assert saved.keys() == module.state_dict().keys()
        assert all(torch.equal(saved[key], tensor) for key, tensor in module.state_dict().items())


def test_golden_codes_are_those_of_the_golden_images(published, encoder):
    golden = safetensors.torch.load_file(published / "golden.safetensors")
    e = encoder.embed([Image.fromarray(pixels.numpy()) for pixels in golden["images"]])
    np.testing.assert_allclose(e.to_dense(), golden["codes"].numpy(), rtol=1e-4, atol=1e-6)
    assert golden["images"].dtype == torch.uint8
    assert len(golden["codes"]) == 2
    assert 0 < e.l0 < 1


def test_folder_holds_no_path_of_this_machine(published):
    for path in published.iterdir():
        assert str(published.parent).encode() not in path.read_bytes()
        assert os.fsencode(Path.home()) + b"/" not in path.read_bytes()


# --- plain timm and transformers -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import numpy as np, timm, torch

torch.set_num_threads(1)
root, report, features = sys.argv[1], {}, {}
for name in ("test_vit", "test_resnet", "test_convnext3"):
    model = timm.create_model(f"local-dir:{root}/{name}", pretrained=True).eval()
    with torch.no_grad():
        features[name] = model(torch.from_numpy(np.load(f"{root}/{name}.npy"))).numpy()
    found = timm.data.resolve_model_data_config(model)
    report[name] = [list(found["input_size"]), list(found["mean"]), list(found["std"]), found["interpolation"], found["crop_pct"]]
small = f"local-dir:{root}/resnet10_small_narrow"
try:
    timm.create_model(small, pretrained=True)
    report["refusal"] = None
except RuntimeError as error:
    report["refusal"] = str(error)
report["imported"] = [name for name in sys.modules if name.startswith("rlpjepa_zoo")]
import rlpjepa_zoo.resnet
with torch.no_grad():
    model = timm.create_model(small, pretrained=True).eval()
    features["resnet10_small_narrow"] = model(torch.from_numpy(np.load(f"{root}/resnet10_small_narrow.npy"))).numpy()
np.savez(f"{root}/features.npz", **features)
print(json.dumps(report))
"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """What a process that never imports rlpjepa_zoo sees of four published folders."""
    root, expected = tmp_path_factory.mktemp("plain"), {}
    for name, options in PLAIN.items():
        enc = make(name, **options)
        enc.save_pretrained(root / name, name=f"someone/{name}")
        x = batch(enc.config.preprocess.size[0])
        np.save(root / f"{name}.npy", x.numpy())
        with torch.no_grad():
            expected[name] = enc.features(x).numpy()
    env = {**os.environ, "PYTHONPATH": str(Path(rlpjepa_zoo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, root], env=env, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout), expected, dict(np.load(root / "features.npz"))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext3"])
def test_plain_timm_opens_it_with_equal_features_and_preprocessing(elsewhere, name):
    _, report, expected, found = elsewhere
    assert report["imported"] == []
    np.testing.assert_array_equal(found[name], expected[name])
    want = PLAIN[name]["preprocess"]
    assert report[name] == [[3, *want.size], list(want.mean), list(want.std), want.interpolation, want.crop_pct]


def test_small_resnet_needs_this_package_and_the_card_says_so(elsewhere):
    root, report, expected, found = elsewhere
    assert "resnet10_small_narrow" in report["refusal"]
    np.testing.assert_array_equal(found["resnet10_small_narrow"], expected["resnet10_small_narrow"])
    card = (root / "resnet10_small_narrow" / "README.md").read_text()
    assert card.count("import rlpjepa_zoo.resnet  # registers the architecture\n") == 2
    assert 'timm.create_model("hf-hub:someone/test_vit"' in (root / "test_vit" / "README.md").read_text()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext3"])
def test_transformers_opens_it_with_equal_pooled_features(elsewhere, name):
    from transformers import AutoModel

    root, _, expected, _ = elsewhere
    model = AutoModel.from_pretrained(root / name).eval()
    with torch.no_grad():
        pooled = model(pixel_values=torch.from_numpy(np.load(root / f"{name}.npy"))).pooler_output
    assert pooled.shape == expected[name].shape
    np.testing.assert_allclose(pooled.numpy(), expected[name], rtol=1e-4, atol=1e-6)


# --- damage --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES - {"config.json"}))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_one_flipped_byte_is_refused_by_file(copy, name, share):
    data = bytearray((copy / name).read_bytes())
    data[int(share * len(data))] ^= 1
    (copy / name).write_bytes(data)
    with refused(ModelError, match=rf"{name}: differs from the sha256"):
        load_encoder(copy)


def test_any_flipped_bit_in_config_json_is_refused(copy):
    whole = (copy / "config.json").read_bytes()
    for at in range(0, len(whole), 7):
        for bit in (1, 32):
            (copy / "config.json").write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with refused(ModelError, match="config.json"):
                load_encoder(copy)


def test_lowering_the_format_does_not_avoid_the_sha256(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"format": 2', '"format": 1').replace('"asked": 0.31', '"asked": 0.32'))
    with refused(ModelError, match="its own sha256"):
        load_encoder(copy)


def test_folder_of_format_1_loads_with_its_codes():
    frozen = Path(__file__).parents[1] / "frozen" / "format1"
    enc = load_encoder(frozen)
    golden = safetensors.torch.load_file(frozen / "golden.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(enc(golden["inputs"]), golden["codes"], rtol=1e-4, atol=1e-5)
    assert read_config(frozen)["rlpjepa_zoo"]["format"] == 1
    assert (golden["codes"] == 0).any()
    assert enc.config.recipe == "name: digits-test\n"
    assert enc.config.info["density"]["asked"] == 0.31


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file_is_refused_by_name(copy, name):
    (copy / name).unlink()
    with refused(ModelError, match=name):
        load_encoder(copy)


@pytest.mark.parametrize("name", sorted(FILES))
def test_folder_in_place_of_a_file_is_refused_by_name(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    with refused(ModelError, match=name):
        load_encoder(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors", "golden.safetensors"])
@pytest.mark.parametrize("sealed", [False, True])
def test_truncated_tensor_file_is_refused_by_name(copy, name, sealed):
    whole = (copy / name).read_bytes()
    for cut in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        (copy / name).write_bytes(whole[:cut])
        if sealed:
            reseal(copy)
        with refused(ModelError, match=name):
            load_encoder(copy)


@pytest.mark.parametrize("content", [b"\x80\x04N.", b"PK\x03\x04", b"{}", b"\xff" * 64], ids=repr)
def test_file_that_is_not_safetensors_is_refused_by_content(copy, content):
    (copy / "head.safetensors").write_bytes(content)
    reseal(copy)
    with refused(ModelError, match="head.safetensors"):
        load_encoder(copy)


def test_pickles_beside_the_weights_are_not_opened(copy):
    torch.save({"x": torch.zeros(1)}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").rename(copy / "model.bak")
    with refused(ModelError, match="model.safetensors"):
        load_encoder(copy)


@pytest.mark.parametrize(("name", "key"), [("model.safetensors", "conv1.0.weight"), ("head.safetensors", "0.weight")])
def test_missing_extra_misshapen_and_nan_tensors_are_refused_by_name(published, tmp_path, name, key):
    def missing(content):
        del content[key]

    def extra(content):
        content["stowaway"] = torch.zeros(1)

    def prefixed(content):
        content[f"module.{key}"] = content.pop(key)

    def shape(content):
        content[key] = content[key][1:].contiguous()

    def transposed(content):
        content[key] = content[key].transpose(0, 1).contiguous()

    def nan(content):
        content[key].view(-1)[3] = float("nan")

    def infinite(content):
        content[key].view(-1)[3] = float("inf")

    for change in (missing, extra, prefixed, shape, transposed, nan, infinite):
        named = "stowaway" if change is extra else key
        path = Path(shutil.copytree(published, tmp_path / change.__name__))
        with tensors(path, name) as content:
            change(content)
        with refused(ModelError, match=rf"{name}: .*{named}"):
            load_encoder(path)


def test_tensor_of_another_type_is_refused(copy):
    with tensors(copy, "head.safetensors") as content:
        content["0.weight"] = content["0.weight"].to(torch.int32)
    with refused(ModelError):
        load_encoder(copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precision_loads_again_or_is_refused_when_saving(tmp_path, dtype):
    enc = make().to(dtype)
    try:
        path = enc.save_pretrained(tmp_path / "enc")
    except UsageError:
        return
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(path)(batch()), enc(batch().to(dtype)).float(), rtol=0.05, atol=0.05)


def test_weights_and_head_of_another_encoder_are_refused(copy, tmp_path):
    other = make(act_layer="gelu").save_pretrained(tmp_path / "other")
    for name in ("head.safetensors", "model.safetensors"):
        shutil.copy(other / name, copy / name)
    with refused(ModelError, match="differs from the sha256"):
        load_encoder(copy)


# --- golden codes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "station"), [("codes", "codes"), ("features", "backbone features"), ("inputs", "preprocessing"), ("images", "preprocessing")]
)
def test_changed_golden_tensors_are_refused_by_processing_step(copy, key, station):
    with tensors(copy, "golden.safetensors") as golden:
        golden[key] = 255 - golden[key] if key == "images" else golden[key] + 0.1 * golden[key].abs().max()
    with refused(ModelError, match=f"golden.safetensors: {station} differ"):
        load_encoder(copy)


def test_golden_codes_detect_a_changed_backbone_weight(copy):
    with tensors(copy, "model.safetensors") as content:
        content["conv1.0.weight"] *= 1.05
    with refused(ModelError, match="golden.safetensors: backbone features differ"):
        load_encoder(copy)


def test_golden_codes_detect_a_changed_projector_weight(copy):
    with tensors(copy, "head.safetensors") as content:
        content["6.weight"] *= 1.05
    with refused(ModelError, match="golden.safetensors: codes differ"):
        load_encoder(copy)


def test_golden_codes_detect_another_normalisation(copy):
    with config_of(copy) as config:
        config["rlpjepa_zoo"]["preprocess"]["std"] = [0.1, 0.25, 0.3]
    with refused(ModelError, match="golden.safetensors: preprocessing differ"):
        load_encoder(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.pop("codes"),
        lambda g: g.pop("images"),
        lambda g: g.update(codes=g["codes"][:1].contiguous()),
        lambda g: g.update(codes=g["codes"] * float("nan")),
        lambda g: g.update(images=g["images"].float()),
        lambda g: g.update(images=g["images"][0, 0].contiguous()),
        lambda g: g.update(inputs=g["inputs"][:, :1].contiguous()),
        lambda g: g.update(inputs=g["inputs"].to(torch.int32)),
        lambda g: g.update({k: v[:0].contiguous() for k, v in g.items()}),
    ],
    ids=["no codes", "no images", "one code", "nan", "float images", "flat images", "grey inputs", "integer inputs", "no rows"],
)
def test_malformed_golden_file_is_refused_by_name(copy, change):
    with tensors(copy, "golden.safetensors") as golden:
        change(golden)
    with refused(ModelError, match="golden.safetensors"):
        load_encoder(copy)


# --- config.json ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"", b"not json", b"{", b"[]", b"null", b'"text"', b"{} {}", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"a": NaN}', b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}', b'{"x": {"a": 1, "a": 2}}', b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000,
        b'{"a": "' + b"x" * (1 << 20) + b'"}',
    ],
    ids=lambda t: repr(t[:24]),
)  # fmt: skip
def test_config_that_is_not_strict_json_is_refused(copy, text):
    (copy / "config.json").write_bytes(text)
    with refused(ModelError, match="config.json"):
        load_encoder(copy)


def test_nan_in_a_valid_config_is_refused(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"asked": 0.31', '"asked": NaN'))
    with refused(ModelError, match="config.json: .*NaN"):
        load_encoder(copy)


@pytest.mark.parametrize("value", [5, 99, 0, -1, "1", None, 1.0, [1]], ids=repr)
def test_another_format_is_refused(copy, value):
    with config_of(copy) as config:
        config["rlpjepa_zoo"]["format"] = value
    with refused(ModelError, match="config.json: format"):
        load_encoder(copy)


def test_plain_timm_folder_is_refused_with_a_fix_that_works(tmp_path, encoder):
    import timm

    timm.models.save_for_hf(encoder.backbone, tmp_path / "plain", safe_serialization=True)
    with refused(ModelError, match="no 'rlpjepa_zoo' block") as info:
        load_encoder(tmp_path / "plain")
    assert f"create_encoder('local-dir:{tmp_path / 'plain'}', pretrained=True)" in str(info.value)
    enc = create_encoder(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(enc.features(batch()), encoder.features(batch()))


HOSTILE = {
    "architecture": [None, 3, [], "", "os.system", "no_such_net", "resnet18", "test_resnet.no_tag"],
    "model_args": [None, [], "x", {"nonsense": 1}, {"num_classes": 5}, {"features_only": True}, {"in_chans": 1}, {"act_layer": 3},
                   {"global_pool": ""}, {"name": "resnet18"}, {"dim": 3}, {"preprocess": None}, {"pretrained": True},
                   {"checkpoint_path": "/no/such/file.pth"}, {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}},
                   {"freeze_backbone": True}, {"pretrained_filter_fn": "x"}, {"cache_dir": "here"}, {"layers": [2000, 2, 2, 2]},
                   {"layers": [2] * 200}, {"base_width": 10**9}, {"base_width": -5}, {"base_width": 1e300}, {"x": [[[[[[1]]]]]]},
                   {"act_layer": "../../etc"}, {"act_layer": "a" * 500}, {"act_layer": "os.system('x')"}],
    "block": [None, [], "x", 3],
    "block.files": [None, [], "x", {}, {"../config.json": {"sha256": "0", "size": 0}}, {"/etc/passwd": {"sha256": "0", "size": 0}},
                    {"pytorch_model.bin": {"sha256": "0", "size": 0}}],
    "block.projector": [None, [], {}, {"dim": 24, "hidden_dim": 20}],
    "block.projector.dim": [None, "x", [24], 0, -24, 25, 10**15, 24.5],
    "block.projector.hidden_dim": [None, "x", 0, -1, 21],
    "block.projector.depth": [None, "x", 0, -1, 2, 4],
    "block.preprocess": [None, [], {"nonsense": 1}],
    "block.preprocess.size": [None, "x", 32, [32], [32, 32, 32], [0, 32], [-32, 32], ["a", "b"], [31, 31]],
    "block.preprocess.mean": [None, "x", [], [0.5], [0.5] * 4, ["a", "b", "c"]],
    "block.preprocess.std": [None, [], [0, 0, 0], [0.5] * 4],
    "block.preprocess.interpolation": [None, 3, "nearest-ish", ["bilinear"]],
    "block.preprocess.crop_pct": [None, 0, -1, "x", [1]],
    "block.info": [[], "x", 3],
}  # fmt: skip


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in HOSTILE.items() for value in values], ids=repr)
def test_config_with_a_wrong_type_or_hostile_value_is_refused(copy, place, value):
    with config_of(copy) as config:
        *way, last = place.replace("block", "rlpjepa_zoo").split(".")
        at = config
        for key in way:
            at = at[key]
        at[last] = value
    with refused(ModelError):
        load_encoder(copy)


@pytest.mark.parametrize("scheme", ["local-dir:", "hf-hub:"])
def test_architecture_cannot_point_to_another_model(copy, published, scheme):
    with config_of(copy) as config:
        config["architecture"] = f"{scheme}{published}" if scheme == "local-dir:" else "hf-hub:someone/else"
    with refused(ModelError, match="architecture"):
        load_encoder(copy)


def test_file_that_is_not_listed_with_its_sha256_is_refused(copy):
    with config_of(copy) as config:
        del config["rlpjepa_zoo"]["files"]["head.safetensors"]
    with refused(ModelError, match="head.safetensors is not listed"):
        load_encoder(copy)


# --- sources -------------------------------------------------------------------------------------------------------------------------


def test_folder_is_accepted_as_path_text_and_local_dir(published, encoder, monkeypatch):
    monkeypatch.chdir(published.parent)
    monkeypatch.setenv("HOME", str(published.parent))
    for source in (published, str(published), f"local-dir:{published}", "enc", Path("enc"), "local-dir:enc", "./enc/", "~/enc"):
        assert load_encoder(source).fingerprint() == encoder.fingerprint()


def test_encoder_is_loaded_to_the_given_device(published):
    assert load_encoder(published, device=torch.device("cpu")).device.type == "cpu"
    assert load_encoder(published, device="meta").device.type == "meta"


@pytest.fixture
def zoo_names(monkeypatch):
    monkeypatch.setattr(rlpjepa_zoo.hub.zoo, "_manifest", lambda: {"cifar10-resnet18": {"repo": "someone/x"}, "digits-vit": {}})


def test_unknown_name_is_refused_with_the_nearest(zoo_names):
    with refused(UsageError, match="Did you mean 'cifar10-resnet18'"):
        load_encoder("cifar10-resnet81")
    with refused(UsageError, match="cifar10-resnet18, digits-vit"):
        load_encoder("something")


def test_missing_folder_is_refused(tmp_path):
    for source in (tmp_path / "none", str(tmp_path / "none"), f"local-dir:{tmp_path / 'none'}", "./none/here", "local-dir:owner/repo"):
        with refused(UsageError, ModelError, match="none|owner/repo"):
            load_encoder(source)


def test_path_object_is_never_a_repository():
    with refused(UsageError, ModelError, match="runs/missing"):
        load_encoder(Path("runs/missing"))


def test_empty_folder_is_refused(tmp_path):
    with refused(ModelError, match="no config.json"):
        load_encoder(tmp_path)


MALFORMED = ["~no-such-user/x", "~no-such-user", "x" * 300, "a\0b", "hf-hub:", "hf-hub:a/b/c", "a b/c", "/", "a\nb"]


@pytest.mark.parametrize("source", MALFORMED, ids=lambda s: ascii(s)[:30])
def test_malformed_sources_are_refused(source):
    with refused(UsageError, ModelError):
        load_encoder(source)


@pytest.mark.parametrize("source", ["owner/repo", "hf-hub:owner/repo", "hf-hub:owner/repo@main", "owner/repo@v1"])
def test_offline_repository_outside_the_cache_is_a_hub_error(source, tmp_path):
    with refused(HubError, match="owner/repo"):
        load_encoder(source, cache_dir=tmp_path)


# --- saving under faults -------------------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["os.fsync", "os.rename", "rlpjepa_zoo.models.base.save_config_for_hf"])
def test_interrupted_first_save_leaves_nothing(monkeypatch, tmp_path, encoder, step):
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with refused(OutputError, match="No space left"):
            encoder.save_pretrained(tmp_path / "enc")
    assert os.listdir(tmp_path) == []
    assert load_encoder(encoder.save_pretrained(tmp_path / "enc")).fingerprint() == encoder.fingerprint()


def test_failed_write_leaves_the_old_folder_unchanged(monkeypatch, copy, encoder):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle: full() if len(calls) == 3 else calls.append(handle))
    with refused(OutputError):
        make(projector_depth=1).save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert os.listdir(copy.parent) == ["enc"]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_half_replaced_folder_does_not_load(monkeypatch, copy, after):
    replace, calls = os.replace, []

    def failing(source, target):
        if len(calls) == after:
            full()
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with refused(OutputError):
            make(projector_depth=1).save_pretrained(copy)
    assert len(calls) == after
    with refused(ModelError, match="differs from the sha256"):
        load_encoder(copy)


def test_saving_again_keeps_other_files(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "sub").mkdir()
    other = make(projector_depth=1)
    assert other.save_pretrained(copy) == copy
    assert (copy / "notes.txt").read_text() == "mine"
    assert set(os.listdir(copy)) == FILES - {"recipe.yaml"} | {"notes.txt", "sub"}
    assert load_encoder(copy).fingerprint() == other.fingerprint()
    assert os.listdir(copy.parent) == ["enc"]


def test_missing_parents_are_made(tmp_path, encoder):
    path = encoder.save_pretrained(str(tmp_path / "a" / "b" / "enc"))
    assert load_encoder(path).fingerprint() == encoder.fingerprint()


def test_current_folder_can_be_saved_into(tmp_path, monkeypatch, encoder):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    encoder.save_pretrained(".")
    assert load_encoder(tmp_path / "here").fingerprint() == encoder.fingerprint()
    assert os.listdir(tmp_path) == ["here"]


def test_path_that_cannot_be_a_folder_is_an_output_error(tmp_path, encoder):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "enc", tmp_path / ("x" * 300)):
        with refused(OutputError, match="cannot write"):
            encoder.save_pretrained(path)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_encoder_with_infinite_weights_is_not_saved(copy):
    before = (copy / "config.json").read_bytes()
    enc = make()
    enc.projector[1].running_var[0] = float("inf")
    with refused(NonFiniteError, match="running_var"):
        enc.save_pretrained(copy)
    assert (copy / "config.json").read_bytes() == before


@pytest.mark.parametrize("info", [{"loss": float("nan")}, {"array": np.zeros(2)}], ids=["nan", "array"])
def test_info_that_is_not_json_is_refused_and_nothing_is_written(tmp_path, encoder, info):
    with pytest.raises((UsageError, NonFiniteError)):
        encoder.save_pretrained(tmp_path / "enc", info=info)
    assert os.listdir(tmp_path) == []


# --- strict JSON ---------------------------------------------------------------------------------------------------------------------


def test_parse_json_accepts_json():
    value = {"a": [1, 2.5, None, True, "é\n"], "b": {"a": {}}}
    assert files.parse_json(json.dumps(value, ensure_ascii=False).encode(), "x") == value


def test_parse_json_names_the_duplicate_and_the_file():
    with refused(ModelError, match="x.json: .*'b' is given twice"):
        files.parse_json(b'{"a": {"b": 1, "c": 2, "b": 3}}', "x.json")


# --- card ----------------------------------------------------------------------------------------------------------------------------


def front_matter(path):
    text = (path / "README.md").read_text()
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1]), text.split("---\n", 2)[2]


def test_front_matter_is_yaml_and_names_library_task_and_licence(published):
    data, _ = front_matter(published)
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "license" not in data  # nobody stated one
    assert {"timm", "rlpjepa_zoo", "sparse"} <= set(data["tags"])


def test_hub_client_reads_the_results_from_the_model_index(published):
    from huggingface_hub import ModelCard

    card = ModelCard.load(published / "README.md")
    found = {(r.metric_name, r.metric_value, r.dataset_name) for r in card.data.eval_results}
    assert found == {("kNN, sparse embedding z", 0.7125, "digits"), ("linear probe, dense backbone features", 0.8, "digits")}


def test_card_states_target_density_results_and_how_to_load(published):
    _, text = front_matter(published)
    for part in ("p = 1, mu = -0.5, sigma = 0.7071", "| 0.310 | 0.303 | 0.290 | - |", "71.2 %", "80.0 %", "one seed", "- epochs: 3"):
        assert part in text
    assert 'rz.load_encoder("owner/repo")' in text
    assert "recipe.yaml" in text


def test_card_of_an_untrained_encoder_claims_no_results(elsewhere):
    data, text = front_matter(elsewhere[0] / "test_resnet")
    assert "model-index" not in data
    assert "not trained" in text
    assert "## Results" not in text
    assert "## Density" not in text


def test_folder_with_a_foreign_readme_is_not_changed(tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    with refused(UsageError, match="README.md"):
        create_encoder("test_resnet", dim=8).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"] and (tmp_path / "README.md").read_text() == "my notes"

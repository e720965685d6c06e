"""Evaluation mode that threads share, and the names of weights in wrapped modules."""

import threading

import pytest
import torch
import torch.nn as nn

from rlpjepa_zoo.ops.modules import as_weights, evaluating, plain_copy, set_mode, unwrapped


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_last_of_several_blocks_restores_every_mode() -> None:
    model = layers()
    model[1][0].eval()
    before = modes(model)
    first, second = evaluating(model), evaluating(model[1])  # the second holds some of the modules of the first
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert modes(model[1]) == [False] * 3 and model[0].training
    second.__exit__(None, None, None)
    assert modes(model) == before


def test_mode_set_inside_a_block_is_the_mode_after_it() -> None:
    model = layers().eval()
    with evaluating(model):
        thread = threading.Thread(target=set_mode, args=(model, True, [model[1]]))
        thread.start()
        thread.join()
        assert not any(modes(model))
    assert modes(model) == [True, True, False, False, False]


def test_module_that_clears_its_cache_in_training_mode_is_told() -> None:
    class Cached(nn.Module):
        cache: object = None

        def train(self, mode: bool = True) -> nn.Module:
            self.cache = None if mode else self.cache
            return super().train(mode)

    model = nn.Sequential(Cached())
    with evaluating(model):
        model[0].cache = "of these weights"  # as timm's LeViT caches its attention biases
    assert model[0].cache is None and model[0].training


def test_copy_has_no_wrappers_and_keeps_shared_modules() -> None:
    inner = nn.Linear(2, 2)
    model = nn.Sequential(nn.DataParallel(inner), torch.compile(nn.Sequential(nn.DataParallel(inner), nn.ReLU()), backend="eager"))
    copied = plain_copy(model)
    assert [name for name, _ in copied.named_parameters(remove_duplicate=False)] == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert copied[0] is copied[1][0] and copied[0] is not inner
    x = torch.randn(3, 2)
    assert torch.equal(copied(x), model(x))
    assert unwrapped(torch.compile(nn.DataParallel(inner), backend="eager")) is inner


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floats_take_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    x = torch.ones(2, dtype=dtype)
    assert as_weights(x, nn.Linear(2, 2)).dtype == torch.float32
    assert as_weights(x, nn.ReLU()) is x  # no weights
    assert as_weights(x.to("meta"), nn.Linear(2, 2)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert as_weights(x, nn.Linear(2, 2)).dtype == (torch.float32 if dtype == torch.float64 else dtype)

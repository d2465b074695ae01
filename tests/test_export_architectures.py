"""Architectures recorded or transformed equal a plain run at other images and batches, and refuse other sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from architectures import make_architecture, make_images
from torch._subclasses.fake_tensor import FakeTensorMode

from effvit.tokens import fix_traced_size
from effvit.windows import live_cells

# One of each kind of size handling: windows with partial cells, tables of one size, cells, convolutions, fixed grids.
CASES = (
    *("stvit", "stvit_r_swin", "stvit_r_swin tables", "stvit_r_swin dense", "stvit_swin", "stvit_swin 16"),
    *("supertoken_options", "casvit", "sit", "lookupvit"),
)
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # checks of shapes are constants of a trace
    pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated:DeprecationWarning"),  # and still supported
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented"),
]


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Traces are run as recorded: the same operations, without the time that optimising the graph takes."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.mark.parametrize("case", CASES)
class TestRecorded:
    """The expectation is the model itself, run plainly."""

    def test_trace_equals_a_plain_run_at_another_batch(self, case: str) -> None:
        model = make_architecture(case)
        with torch.no_grad():
            traced = torch.jit.trace(model, make_images(case), check_trace=False)
            for batch in (2, 3):
                x = make_images(case, batch)
                assert torch.allclose(traced(x), model(x), rtol=1e-4, atol=1e-5)

    def test_trace_is_right_or_refuses_another_size(self, case: str) -> None:
        model = make_architecture(case)
        x = make_images(case, resized=True)
        with torch.no_grad():
            traced = torch.jit.trace(model, make_images(case), check_trace=False)
            try:
                scores = traced(x)
            except RuntimeError:
                return
            assert torch.allclose(scores, model(x), rtol=1e-4, atol=1e-5)

    def test_vmap_equals_a_batch(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        with torch.no_grad():
            scores = torch.vmap(lambda image: model(image[None])[0])(x)
            assert torch.allclose(scores, model(x), rtol=1e-4, atol=1e-5)

    def test_fake_and_meta_tensors_give_shapes(self, case: str) -> None:
        model, x = make_architecture(case), make_images(case)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == (2, 7)
        assert model.to("meta")(x.to("meta")).shape == (2, 7)


@pytest.mark.parametrize("case", ["casvit", "supertoken_options", "stvit_swin", "lookupvit"])
def test_gradients_of_each_image_equal_those_of_one(case: str) -> None:
    model, x = make_architecture(case), make_images(case)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x[1:]).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max() + 1e-3
            assert (each[name][1] - parameter.grad).abs().max() < 1e-3 * scale, name


@pytest.mark.parametrize("window", [3, 4, 7])
def test_live_cells_are_those_with_a_real_position(window: int) -> None:
    """By the definition: cell i of a window covers floor(i w / s) to ceil((i + 1) w / s), as in adaptive pooling."""
    for samples in range(1, window + 1):
        for side in range(1, 3 * window + 1):
            starts = [n * window + i * window // samples for n in range(4) for i in range(samples)]
            assert live_cells(side, window, samples) == sum(start < side for start in starts)


def test_traced_size_is_fixed_in_the_dimensions_named_only() -> None:
    traced = torch.jit.trace(lambda x: fix_traced_size(x, 1) + 1, torch.zeros(2, 3, 4))
    assert traced(torch.zeros(5, 3, 6)).shape == (5, 3, 6)
    with pytest.raises(RuntimeError, match=r"expanded size of the tensor \(3\) must match the existing size \(4\)"):
        traced(torch.zeros(2, 4, 4))

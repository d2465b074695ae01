"""Reduced models trained by two processes: DistributedDataParallel and FSDP2, over gloo on the CPU.

Two processes are started once, do everything and leave what they find in files, which the tests read: starting them
takes as long as all that they do. The expectation is what one process computes on the images of both, in double
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import effvit
from effvit.hosts.host import ReducedHost
from effvit.reducers import METHODS, dynamicvit
from effvit.testing.models import SIZE, example, make_host, make_images, make_model

PROCESSES = 2
HOST = "class_token"
STEPS = 2  # DistributedDataParallel tells of an unused parameter in the step after
METHOD_NAMES = sorted(METHODS)
RAGGED = [(method, ragged) for method in ("ats", "dymu") for ragged in ("padded", "packed")]
SHARDED = ["ats", "dymu", "evit", "tome"]
Found = dict[str, Any]


def trained(method: str, **settings: Any) -> ReducedHost:
    return make_model(method, HOST, **settings).double().train()


def all_images() -> Tensor:
    """Two images for each process; those of the second are smooth, so that fewer or more of their tokens stay."""
    images = make_images(make_host(HOST), 2 * PROCESSES).double()
    images[2:] = functional.avg_pool2d(images[2:], 9, 1, 4)
    return images


def noise_of_all_images(generator: torch.Generator, like: Tensor) -> Tensor:
    """Gumbel noise (B, N, 2) that is the same for every image, another in each block and step."""
    return -torch.empty_like(like[:1]).exponential_(generator=generator).log().expand_as(like)


def train(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Losses of some steps of plain gradient descent: Adam's would magnify what rounding leaves of a zero.

    DynamicViT samples which patches to drop. All images get the same noise here: what one process drew for its images
    would not be what each of two draws for its own.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        with mock.patch.object(dynamicvit, "gumbel_noise", partial(noise_of_all_images, generator)):
            loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(model: ReducedHost, **settings: Any) -> ReducedHost:
    """The model under FSDP2, as docs/tutorials/many_gpus.md does it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model put together, on the first process; empty on the others if it is sharded."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def replicate(images: Tensor, labels: Tensor, method: str, **settings: Any) -> Found:
    model = trained(method, **settings)
    lengths = model.forward_tokens(images).tokens.counts().tolist()
    return {"losses": train(DistributedDataParallel(model), images, labels), "state": whole(model), "lengths": lengths}


def shard(images: Tensor, labels: Tensor, method: str) -> Found:
    model = sharded(trained(method))
    losses = train(model, images, labels)
    return {"losses": losses, "state": whole(model), "held": [p.to_local().numel() for p in model.parameters()]}


def follow_a_schedule(wrap: Callable[[ReducedHost], nn.Module]) -> list[list[int]]:
    model = trained("evit")
    wrap(model)
    counts = []
    for step in range(6):
        model.set_keep_rate(effvit.cosine_keep_rate(step, 1, 0.5, start_epoch=1, epochs=4))
        counts.append(model.token_counts())
    return counts


def train_beside_a_dense_model(images: Tensor, labels: Tensor, wrap: Callable[[ReducedHost], nn.Module]) -> Found:
    dense = make_host(HOST).double()
    model = effvit.sparsify(dense, "evit", **example("evit")).train()
    train(wrap(model), images, labels)
    return {"dense": dense.state_dict(), "reduced": whole(model)}


def wrap_weights_that_differ(wrap: Callable[[ReducedHost], nn.Module]) -> Tensor:
    """The whole of a weight in which every process had its own number in every place."""
    model = trained("evit")
    nn.init.constant_(model.norm.weight, dist.get_rank())
    wrap(model)
    weight = model.norm.weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def gradients_of_maps(images: Tensor) -> Found:
    """Gradients after a call past DistributedDataParallel, and after calls of a wrapped module that returns maps."""
    model = trained("evit")
    DistributedDataParallel(model)
    maps: Any = model.forward_intermediates(images, intermediates_only=True)
    maps[-1].square().mean().backward()
    settings = {"img_size": SIZE["img_size"], "depth": 4, "embed_dim": 48, "num_heads": 3}
    features = timm.create_model("evit_deit_tiny_patch16_224", features_only=True, **settings).double()
    parallel = DistributedDataParallel(features)
    for _ in range(STEPS):
        features.zero_grad()
        parallel(images)[-1].square().mean().backward()
    return {"past": model.pos_embed.grad, "features": features.model.pos_embed.grad}


def call_past_forward(images: Tensor) -> Found:
    model = sharded(trained("evit"))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        model.forward_tokens(images)
    for name in ("forward_tokens", "forward_intermediates"):
        register_fsdp_forward_method(model, name)
    maps: Any = model.forward_intermediates(images, intermediates_only=True)
    return {"tokens": model.forward_tokens(images).x.detach(), "maps": [x.detach() for x in maps]}


def work(rank: int, folder: Path) -> None:
    """One of the processes: everything that the tests ask about, left in a file of its number."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    images = all_images().chunk(PROCESSES)[rank]
    labels = torch.arange(2 * PROCESSES).chunk(PROCESSES)[rank]
    found = {
        "ddp": {method: replicate(images, labels, method) for method in METHOD_NAMES},
        "ragged": {pair: replicate(images, labels, pair[0], ragged=pair[1]) for pair in RAGGED},
        "fsdp": {method: shard(images, labels, method) for method in SHARDED},
        "schedules": [follow_a_schedule(wrap) for wrap in (DistributedDataParallel, sharded)],
        "shared": [train_beside_a_dense_model(images, labels, wrap) for wrap in (DistributedDataParallel, sharded)],
        "different": [wrap_weights_that_differ(wrap) for wrap in (DistributedDataParallel, sharded)],
        "maps": gradients_of_maps(images),
        "past forward": call_past_forward(images),
    }
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / str(rank)) for rank in range(PROCESSES)]


def assert_trained_as_one(parts: list[Found], method: str, **settings: Any) -> None:
    """The mean loss of the processes is that of one on all images, and so are the weights afterwards."""
    model = trained(method, **settings)
    losses = train(model, all_images(), torch.arange(2 * PROCESSES))
    means = torch.tensor([part["losses"] for part in parts], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(parts[0]["state"], dict(model.state_dict()), rtol=1e-9, atol=1e-9)


class TestReplicated:
    @pytest.mark.parametrize("method", METHOD_NAMES)
    def test_steps_are_those_of_one_process(self, found: list[Found], method: str) -> None:
        """And no parameter is unused, of which DistributedDataParallel would have said so."""
        assert_trained_as_one([part["ddp"][method] for part in found], method)

    @pytest.mark.parametrize(("method", "ragged"), RAGGED)
    def test_ragged_batches_may_be_of_other_lengths(self, found: list[Found], method: str, ragged: str) -> None:
        parts = [part["ragged"][method, ragged] for part in found]
        assert max(parts[0]["lengths"]) != max(parts[1]["lengths"])
        assert_trained_as_one(parts, method, ragged=ragged)

    def test_dense_model_goes_on_sharing_the_weights(self, found: list[Found]) -> None:
        dense, reduced = (found[0]["shared"][0][name] for name in ("dense", "reduced"))
        assert all(torch.equal(value, reduced[name]) for name, value in dense.items())
        assert not torch.equal(dense["norm.weight"], make_host(HOST).double().state_dict()["norm.weight"])

    def test_weights_of_the_first_process_are_those_of_all(self, found: list[Found]) -> None:
        assert [part["different"][0].unique().tolist() for part in found] == [[0], [0]]

    def test_maps_are_trained_on_through_a_module_that_returns_them(self, found: list[Found]) -> None:
        """A call past the wrapper leaves each process its own gradients."""
        first, second = (part["maps"] for part in found)
        assert not torch.allclose(first["past"], second["past"])
        torch.testing.assert_close(first["features"], second["features"])


class TestSharded:
    @pytest.mark.parametrize("method", SHARDED)
    def test_steps_are_those_of_one_process(self, found: list[Found], method: str) -> None:
        assert_trained_as_one([part["fsdp"][method] for part in found], method)

    @pytest.mark.parametrize("method", SHARDED)
    def test_each_process_holds_its_part_and_the_file_is_whole(self, found: list[Found], method: str) -> None:
        model = trained(method)
        held = torch.tensor([part["fsdp"][method]["held"] for part in found])
        assert held.sum(0).tolist() == [parameter.numel() for parameter in model.parameters()]
        assert held.sum(1).max() < 0.6 * held.sum()  # what has one row, as the class token, cannot be shared
        assert found[1]["fsdp"][method]["state"] == {}
        model.load_state_dict(found[0]["fsdp"][method]["state"])

    def test_dense_model_keeps_its_weights_and_is_not_trained(self, found: list[Found]) -> None:
        before = make_host(HOST).double().state_dict()
        for part in found:
            assert all(torch.equal(value, before[name]) for name, value in part["shared"][1]["dense"].items())
        assert not torch.equal(found[0]["shared"][1]["reduced"]["norm.weight"], before["norm.weight"])

    def test_each_process_gives_its_own_part_of_the_weights(self, found: list[Found]) -> None:
        half = len(make_host(HOST).norm.weight) // PROCESSES
        assert [part["different"][1].tolist() for part in found] == [[0] * half + [1] * half] * PROCESSES

    def test_tokens_and_maps_need_their_methods_registered(self, found: list[Found]) -> None:
        model = trained("evit")
        maps: Any = model.forward_intermediates(all_images(), intermediates_only=True)
        tokens = model.forward_tokens(all_images()).x
        parts = [part["past forward"] for part in found]
        torch.testing.assert_close(torch.cat([part["tokens"] for part in parts]), tokens)
        for block, expected in enumerate(maps):
            torch.testing.assert_close(torch.cat([part["maps"][block] for part in parts]), expected)


def test_keep_rates_of_a_schedule_agree_in_all_processes(found: list[Found]) -> None:
    expected = follow_a_schedule(lambda model: model)
    assert len({counts[-1] for counts in expected}) > 3
    assert all(part["schedules"] == [expected, expected] for part in found)


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone, in which FSDP2 does everything but exchange."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
class TestAlone:
    BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    @pytest.mark.parametrize("host", [HOST, "eva02"])
    def test_weights_gathered_in_another_dtype_are_no_fault(self, host: str) -> None:
        """A warning is an error here; DyMU's thresholds and RoPE's frequencies are buffers, which stay in float32."""
        model = sharded(make_model("dymu", host).train(), mp_policy=self.BFLOAT16)
        model(make_images(model)).float().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_bias_in_a_buffer_needs_autocast_also_in_timm(self) -> None:
        """timm's Eva joins the biases of q, k and v, and that of k is a buffer."""
        for model in (make_host("dinov3"), make_model("tome", "dinov3")):
            sharded(model, mp_policy=self.BFLOAT16)
            with pytest.raises(RuntimeError, match="self and mat2 must have the same dtype"):
                model(make_images(model))
        model = sharded(make_model("tome", "dinov3"))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(make_images(model)).isfinite().all()

    @pytest.mark.parametrize(
        ("wrap", "message"),
        [
            (sharded, r"are sharded \(FSDP\); sparsify the model first, then shard it"),
            (DistributedDataParallel, r"sparsify that part, effvit.sparsify\(model.module, ...\), and wrap"),
        ],
    )
    def test_sharded_and_wrapped_models_are_refused(
        self, wrap: Callable[[ReducedHost], nn.Module], message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            effvit.sparsify(wrap(make_model("evit", HOST)), "tome")

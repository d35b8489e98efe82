import copy

import pytest
import torch
from gloo_ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ultrathink_model.config import make_config
from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.errors import ConfigError
from ultrathink_model.models.transformer import build_model
from ultrathink_model.training.muon import Muon
from ultrathink_model.training.optimizer import fused_matrices, make_optimizer
from ultrathink_model.training.orthogonal import orthogonalise


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)
        self.square = nn.Linear(8, 8, bias=False)
        self.router = nn.Linear(8, 4, bias=False)
        self.norm = nn.RMSNorm(8)
        self.experts = Experts()


class Net(nn.Module):
    """Weights of every kind that the optimizer tells apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 20, bias=False)


MUON = TrainingConfig(optimizer="muon", learning_rate=1e-2, muon_learning_rate=0.05, weight_decay=0.1)


def fill_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            shards = gradient.chunk(parameter.device_mesh.size())
            rank = parameter.device_mesh.get_local_rank()
            own = shards[rank] if rank < len(shards) else gradient[:0]
            gradient = DTensor.from_local(
                own,
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        parameter.grad = gradient


def test_groups_tell_matrices_of_blocks_from_the_rest():
    net = Net()
    optimizer = make_optimizer(MUON, net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    muon, decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert muon == {f"blocks.{i}.{part}" for i in (0, 1) for part in MUON_PARTS}
    assert decayed == {"embedding.weight", "head.weight", "blocks.0.router.weight", "blocks.1.router.weight"}
    assert plain == {"blocks.0.norm.weight", "blocks.1.norm.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.05, 1e-2, 1e-2]


MUON_PARTS = ("up.weight", "down.weight", "square.weight", "experts.weight")


def test_adamw_takes_the_config_and_leaves_frozen_weights_out():
    net = Net()
    net.head.weight.requires_grad_(False)
    training = TrainingConfig(optimizer="adamw", adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-5, learning_rate=0.3)
    optimizer = make_optimizer(training, net)
    assert type(optimizer) is torch.optim.AdamW
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"], group["fused"]) == ((0.8, 0.9), 1e-5, 0.3, True)
        assert all(parameter is not net.head.weight for parameter in group["params"])


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8), (3, 5, 16, 6)])
def test_newton_schulz_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(1)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalise(matrices) @ vh.mT
    diagonal = torch.diagonal(rotated, dim1=-2, dim2=-1)
    # The iteration is an odd polynomial in the matrix, so it commutes with the SVD to rounding.
    assert torch.allclose(rotated, torch.diag_embed(diagonal), atol=1e-9)
    # The polynomial's own range over [0.002, 1], by evaluating it; smaller ones may still be on their way up.
    risen = values > 0.002 * torch.linalg.matrix_norm(matrices)[..., None]
    assert diagonal[risen].min() > 0.68
    assert diagonal.max() < 1.21


def test_bfloat16_products_give_nearly_the_same_direction():
    torch.manual_seed(2)
    matrices = torch.randn(6, 32, 80)
    exact, rounded = orthogonalise(matrices), orthogonalise(matrices.bfloat16()).float()
    # 8 bits of mantissa through five rounds: a few percent of the factor's norm.
    assert torch.linalg.matrix_norm(rounded - exact).max() < 0.05 * torch.linalg.matrix_norm(exact).min()


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_muon_follows_a_plain_reference_over_several_steps():
    net = Net()
    optimizer = make_optimizer(MUON, net)
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if name.endswith(MUON_PARTS)}
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(4):
        fill_gradients(net, step)
        gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        for name, weight in weights.items():
            momenta[name] = 0.95 * momenta[name] + 0.05 * gradients[name]
            weight.mul_(1 - 0.05 * 0.1)
            weight.sub_(0.05 * reference_direction(0.05 * gradients[name] + 0.95 * momenta[name]))
    for name, parameter in net.named_parameters():
        if name in weights:
            # The same sums in another order, blown up by the iteration's slope of 3.4^5 at zero.
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-4, atol=1e-5)


def reference_direction(update: Tensor) -> Tensor:
    """One matrix at a time, the textbook iteration on the matrix as it stands, in float64."""
    if update.ndim == 3:
        return torch.stack([reference_direction(matrix) for matrix in update])
    x = update.double() / update.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return (x * max(1, update.shape[0] / update.shape[1]) ** 0.5).float()


def test_adamw_part_of_muon_equals_torchs_adamw():
    net = Net()
    twin = copy.deepcopy(net)
    ours = make_optimizer(MUON, net)
    theirs = make_optimizer(MUON.model_copy(update={"optimizer": "adamw"}), twin)
    for step in range(3):
        for module, optimizer in ((net, ours), (twin, theirs)):
            fill_gradients(module, step)
            optimizer.step()
    for name in ("embedding.weight", "head.weight", "blocks.0.norm.weight", "blocks.1.router.weight"):
        assert torch.equal(net.get_parameter(name), twin.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_found_inf_leaves_weights_and_state_alone(kind):
    net = Net()
    optimizer = make_optimizer(MUON.model_copy(update={"optimizer": kind}), net)
    fill_gradients(net, 0)
    optimizer.step()
    weights = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in net.parameters():
        parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(net.state_dict()[name], weights[name]) for name in weights)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][name], value) for i, values in state.items() for name, value in values.items())


def test_masked_step_of_a_device_equals_no_step():
    """The path that a GPU takes, which may not ask whether the step is bad, run here on the processor."""
    net = Net()
    optimizer = make_optimizer(MUON, net)
    fill_gradients(net, 0)
    optimizer.step()
    group = optimizer.param_groups[0]
    weights = [parameter.detach().clone() for parameter in group["params"]]
    buffers = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in group["params"]]
    for parameter in group["params"]:
        parameter.grad.fill_(torch.inf)
    assert isinstance(optimizer, Muon)
    with torch.no_grad():
        optimizer._muon_step(group, group["params"], torch.ones(()))
    for parameter, weight, buffer in zip(group["params"], weights, buffers, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], buffer)


def test_gradient_scale_of_a_loss_scaler_is_taken_out():
    net, twin = Net(), Net()
    plain, scaled = make_optimizer(MUON, net), make_optimizer(MUON, twin)
    fill_gradients(net, 0)
    fill_gradients(twin, 0)
    for parameter in twin.parameters():
        parameter.grad *= 1024
    scaled.grad_scale = torch.tensor(1024.0)
    plain.step()
    scaled.step()
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_muon_refuses_flat_weights():
    with pytest.raises(ConfigError, match=r"flat weight of shape \(12,\).*adamw"):
        Muon([{"params": [nn.Parameter(torch.zeros(12))], "rule": "muon", "lr": 1.0, "weight_decay": 0.0}])


def test_sharded_and_replicated_muon_move_like_one_process():
    net = Net()
    optimizer = make_optimizer(MUON, net)
    for step in range(3):
        fill_gradients(net, step)
        optimizer.step()
    run_ranks(2, _compare_over_ranks, {name: p.detach() for name, p in net.named_parameters()})


def _compare_over_ranks(rank: int, expected: dict[str, Tensor]) -> None:
    for sharded in (False, True):
        net = Net()
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for block in net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
        optimizer = make_optimizer(MUON, net)
        for step in range(3):
            fill_gradients(net, step)
            optimizer.step()
        for name, parameter in net.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            torch.testing.assert_close(whole.detach(), expected[name], rtol=1e-4, atol=1e-5)


def test_fused_weights_are_orthogonalised_matrix_by_matrix():
    """Queries, keys and values lie in one weight, as do gate and up: each moves as if it stood alone."""
    config = make_config(
        {"model": {"vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}}
    )
    model = build_model(config)
    block = model.blocks[0]
    parts = {block.attention.qkv.weight: (16, 8, 8), block.feed_forward.gate_up.weight: (64, 64)}
    assert fused_matrices(model) == parts
    before = {weight: weight.detach().clone() for weight in parts}
    fill_gradients(model, 3)
    optimizer = make_optimizer(MUON, model)
    optimizer.step()
    for weight, rows in parts.items():
        moved = weight.detach() - before[weight] * (1 - 0.05 * 0.1)
        for piece, gradient in zip(moved.split(rows), weight.grad.split(rows), strict=True):
            expected = -0.05 * reference_direction(0.05 * gradient + 0.95 * 0.05 * gradient)
            torch.testing.assert_close(piece, expected, rtol=1e-3, atol=1e-5)

import pytest
import torch
from torch import nn

from ultrathink_model.config import override_config
from ultrathink_model.distributed.state import initialise_state, load_optimizer_state, optimizer_state
from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.transformer import build_model
from ultrathink_model.training.optimizer import make_optimizer


@pytest.fixture(params=["adamw", "muon"])
def trained(tiny_config, request):
    config = override_config(tiny_config, [f"training.optimizer={request.param}"])
    model = build_model(config)
    return model, make_optimizer(config.training, model)


def test_state_before_the_first_step_is_whole_and_zero_and_moves_no_weight(trained):
    model, optimizer = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    state = optimizer_state(optimizer, model)
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(tensor.count_nonzero() == 0 for tensors in state.values() for tensor in tensors.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(parameter.grad is None for parameter in model.parameters())


def test_state_that_is_there_stays(trained):
    model, optimizer = trained
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {name: {k: t.clone() for k, t in part.items()} for name, part in optimizer_state(optimizer, model).items()}
    initialise_state(optimizer)
    after = optimizer_state(optimizer, model)
    assert all(torch.equal(after[n][k], t) for n, part in before.items() for k, t in part.items())


def test_weights_that_no_step_has_moved_get_their_state_and_the_others_keep_theirs(trained):
    model, optimizer = trained
    moved, resting = model.blocks[0], model.blocks[1]
    for parameter in moved.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = optimizer_state(optimizer, model)
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(t.count_nonzero() == 0 for p in resting.parameters() for t in optimizer.state[p].values())
    assert all(t.count_nonzero() > 0 for p in moved.parameters() for t in optimizer.state[p].values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_state_of_another_optimizer_is_refused(tiny_config):
    model = build_model(tiny_config)
    muon = make_optimizer(override_config(tiny_config, ["training.optimizer=muon"]).training, model)
    adamw = make_optimizer(tiny_config.training, model)
    with pytest.raises(CheckpointError, match=r"tensors are missing.*training.optimizer that saved it"):
        load_optimizer_state(adamw, model, optimizer_state(muon, model))


def test_state_is_copied_from_other_tensors():
    model = nn.Linear(3, 2)
    first, second = (torch.optim.AdamW(model.parameters(), fused=True) for _ in range(2))
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
    first.step()
    load_optimizer_state(second, model, optimizer_state(first, model))
    first.step()
    assert second.state[model.weight]["step"] == 1
    assert torch.equal(second.state[model.weight]["exp_avg"], torch.full((2, 3), 0.1))

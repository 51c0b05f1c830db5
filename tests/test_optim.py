import json

import pytest
import torch

from fastlm.optim import NTASGD, NonMonotone

SCALES = [0.5, 1.0, 2.0, 1.0, 0.25, 1.5, 1.0]


def parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g)) for s in [(5, 3), (3,), (1,), (0,)]]


def set_grads(params, step):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)


def run(optimizer, params, steps, first=0):
    for k in range(first, first + steps):
        set_grads(params, k)
        optimizer.step(lr_scale=SCALES[k % len(SCALES)])


def copies(params):
    return [p.detach().clone() for p in params]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def mean_of(iterates):
    return [torch.stack(x).mean(0) for x in zip(*iterates, strict=True)]


def test_sgd_phase_equals_torch_sgd():
    ours, theirs = parameters(), parameters()
    a = NTASGD(ours, lr=0.3, weight_decay=0.1)
    b = torch.optim.SGD(theirs, lr=0.3, weight_decay=0.1)
    for k in range(6):
        set_grads(ours, k)
        set_grads(theirs, k)
        a.step(lr_scale=SCALES[k])
        b.param_groups[0]["lr"] = 0.3 * SCALES[k]
        b.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["contiguous", "transposed gradient", "transposed parameter"])
def test_clipping_equals_that_of_torch_for_any_strides(dtype, kind):
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        values = torch.randn(5, 7).t() if kind == "transposed parameter" else torch.randn(7, 5)
        p = torch.nn.Parameter(values.to(dtype))
        grad = torch.randn(5, 7).t() if kind == "transposed gradient" else torch.randn(7, 5)
        p.grad = grad.to(dtype)
        q = torch.nn.Parameter(torch.randn(3).to(dtype))
        q.grad = torch.randn(3).to(dtype)
        before = [x.grad.clone() for x in (p, q)]
        if ours:
            NTASGD([p, q], lr=0.3, weight_decay=0.1).step(clip=0.5)
            NTASGD([p, q], lr=0.3, weight_decay=0.1).step(clip=1e9)
        else:
            sgd = torch.optim.SGD([p, q], lr=0.3, weight_decay=0.1, foreach=False)
            torch.nn.utils.clip_grad_norm_([p, q], 0.5)
            sgd.step()
            sgd.step()
        assert not any(torch.equal(x.grad, g) for x, g in zip((p, q), before, strict=True))
        results += [p.detach(), q.detach()]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(results[:2], results[2:], rtol=tolerance, atol=tolerance)


def test_lag_reproduces_torch_asgd():
    ours, theirs = parameters(), parameters()
    a = NTASGD(ours, lr=0.3, weight_decay=0.1, lag="awd-lstm-lm")
    a.start_averaging()
    b = torch.optim.ASGD(theirs, lr=0.3, t0=0, lambd=0.0, weight_decay=0.1)
    for k in range(7):
        set_grads(ours, k)
        set_grads(theirs, k)
        a.step(lr_scale=SCALES[k])
        b.param_groups[0]["lr"] = 0.3 * SCALES[k]
        b.step()
        torch.testing.assert_close(ours, theirs)
        with a.average():
            torch.testing.assert_close(copies(ours), [b.state[p]["ax"] for p in theirs])


@pytest.mark.parametrize(("lag", "expected"), [(None, [15, 30, 60, 30]), ("awd-lstm-lm", [15, 15, 30, 60])])
def test_rates_with_and_without_lag(lag, expected):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = NTASGD([p], lr=30, lag=lag)
    optimizer.start_averaging()
    rates = []
    for scale in [0.5, 1, 2, 1]:
        before = p.item()
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step(lr_scale=scale)
        rates.append(before - p.item())
    assert rates == expected


@pytest.mark.parametrize(("lag", "left_out"), [(None, 0), ("awd-lstm-lm", 1)])
def test_average_is_the_mean_of_the_iterates_since_the_switch(lag, left_out):
    params = parameters()
    optimizer = NTASGD(params, lr=0.3, lag=lag)
    run(optimizer, params, 3)
    optimizer.start_averaging()
    iterates = []
    for k in range(3, 10):
        run(optimizer, params, 1, first=k)
        iterates.append(copies(params))
    with optimizer.average():
        torch.testing.assert_close(copies(params), mean_of(iterates[left_out:]))
    assert optimizer.averaged_steps == 7


def test_parameters_without_gradient_are_averaged_too():
    params = parameters()
    optimizer = NTASGD(params, lr=0.3)
    optimizer.start_averaging()
    run(optimizer, params[:2], 3)
    before = copies(params)
    with optimizer.average():
        assert torch.equal(params[2], before[2])
    assert len(optimizer.state_dict()["state"]) == len(params)


def test_average_swaps_back_even_after_an_exception():
    params = parameters()
    optimizer = NTASGD(params, lr=0.3)
    optimizer.start_averaging()
    run(optimizer, params, 4)
    before = copies(params)
    with pytest.raises(KeyError), optimizer.average():
        assert not equal(params, before)
        raise KeyError
    assert equal(params, before)


def test_average_before_the_switch_leaves_the_parameters():
    params = parameters()
    optimizer = NTASGD(params, lr=0.3)
    run(optimizer, params, 2)
    before = copies(params)
    with optimizer.average():
        assert equal(params, before)
    NTASGD(params, lr=1).load_state_dict(optimizer.state_dict())


def test_16_bit_parameters_have_fp32_averages():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = NTASGD([p], lr=1.0)
    optimizer.start_averaging()
    for k in range(2000):
        with torch.no_grad():
            p.fill_(0.0 if k < 1000 else 2.0)
        optimizer.step()
    state = optimizer.state_dict()
    average = state["state"][0]["average"]
    torch.testing.assert_close(average, torch.ones(4), rtol=1e-3, atol=0)
    with optimizer.average():
        assert p[0].item() == 1.0
    assert p[0].item() == 2.0
    other = NTASGD([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], lr=1.0)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["state"][0]["average"], average)


def test_trigger_compares_with_the_best_seen_more_than_n_ago():
    trigger = NonMonotone(2)
    # 4.5 is worse than the loss before it but not than the best of the log without its last two, which is 5.
    answers = [trigger.observe(x) for x in [5.0, 4.0, 3.0, 4.5, 4.1, 2.9]]
    assert answers == [False, False, False, False, True, False]
    assert trigger.log == [5.0, 4.0, 3.0, 4.5, 4.1, 2.9]


def test_trigger_needs_more_than_n_losses():
    trigger = NonMonotone(5)
    assert [trigger.observe(x) for x in [1.0, 2, 3, 4, 5, 6, 7]] == [False] * 6 + [True]
    trigger = NonMonotone(0)
    assert [trigger.observe(x) for x in [1.0, 2.0, 0.5]] == [False, True, False]


def test_log_stops_at_the_switch():
    optimizer = NTASGD(parameters(), lr=1, n=1)
    answers = [optimizer.observe(x) for x in [3.0, 2.0, 3.5, 9.0, 1.0]]
    assert answers == [False, False, True, False, False]
    assert optimizer.trigger.log == [3.0, 2.0, 3.5]
    assert optimizer.averaging


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("lag", [None, "awd-lstm-lm"])
def test_state_dict_through_json_goes_on_to_the_same_numbers(switch, lag):
    def start():
        params = parameters()
        optimizer = NTASGD(params, lr=0.3, n=1, weight_decay=0.01, lag=lag)
        optimizer.observe(2.0)
        optimizer.observe(1.0)
        run(optimizer, params, 2)
        if switch:
            assert optimizer.observe(3.0)
        run(optimizer, params, 3, first=2)
        return params, optimizer

    def go_on(params, optimizer):
        triggered = optimizer.observe(5.0)
        run(optimizer, params, 4, first=5)
        with optimizer.average():
            return triggered, copies(params)

    params, straight = start()
    expected = go_on(params, straight)

    old_params, old = start()
    state = old.state_dict()
    tensors = {i: {k: v.clone() for k, v in s.items()} for i, s in state.pop("state").items()}
    plain = json.loads(json.dumps(state))
    new_params = [torch.nn.Parameter(p.detach().clone()) for p in old_params]
    restored = NTASGD(new_params, lr=99.0)
    restored.load_state_dict({"state": tensors, **plain})
    triggered, average = go_on(new_params, restored)
    assert triggered == expected[0] == (not switch)
    assert equal(average, expected[1])
    assert equal(new_params, params)
    assert restored.trigger.log == straight.trigger.log


def test_parameter_groups_have_their_own_rate():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = NTASGD([{"params": [a]}, {"params": [b], "lr": 2.0}], lr=1.0)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item()) == (-1.0, -2.0)


@pytest.mark.parametrize(
    "kwargs", [{"lr": 0.0}, {"lr": 1, "n": -1}, {"lr": 1, "weight_decay": -1}, {"lr": 1, "lag": "x"}]
)
def test_bad_values(kwargs):
    with pytest.raises(ValueError, match="must be"):
        NTASGD(parameters(), **kwargs)


def test_state_of_another_optimiser_is_refused():
    params = parameters()
    with pytest.raises(ValueError, match="ntasgd"):
        NTASGD(params, lr=1).load_state_dict(torch.optim.SGD(params, lr=1).state_dict())


def test_a_step_takes_a_closure_as_those_of_torch_do():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = NTASGD([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert p.tolist() == [0.0, 0.0]
    optimizer.step(closure, lr_scale=0.0)
    with pytest.raises(TypeError):
        optimizer.step(None, 1.0)


@pytest.mark.parametrize("clip", [-1.0, float("nan")])
def test_wrong_clip(clip):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="clip must be at least 0"):
        NTASGD([weight], lr=1.0).step(clip=clip)
    assert torch.equal(weight, torch.ones(2))

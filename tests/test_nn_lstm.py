"""nn.LSTM against torch.nn.LSTM, and what wrappers of the past broke when weights were dropped."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from fastlm import nn
from fastlm.ops import dropconnect_mask, philox

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4},
]


def pair(**options):
    """torch.nn.LSTM and ours, initialised under the same seed."""
    torch.manual_seed(5)
    expected = torch.nn.LSTM(4, 6, **options)
    torch.manual_seed(5)
    return expected, nn.LSTM(4, 6, **options)


def states(module, batch):
    shape = (module.num_layers * (1 + module.bidirectional), batch, 6)
    return torch.randn(shape), torch.randn(shape)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_equals_torch(options, given):
    """Same initial weights, same outputs, same gradients, and the same dropout between layers."""
    expected, actual = pair(**options)
    for name, p in expected.named_parameters():
        assert torch.equal(p, actual.get_parameter(name))
    x = torch.randn(5, 3, 4)
    hx = states(expected, 5 if actual.batch_first else 3) if given else None
    results = []
    for module in (expected, actual):
        torch.manual_seed(9)
        y, (h, c) = module(x, hx)
        (y.square().sum() + h.sum() + c.square().sum()).backward()
        results.append((y, h, c))
    close(*reversed(results))
    for name, p in expected.named_parameters():
        close(actual.get_parameter(name).grad, p.grad)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_goes_both_ways(options):
    expected, actual = pair(**options, dtype=torch.float64)
    assert list(actual.state_dict()) == list(expected.state_dict())
    actual.load_state_dict({k: torch.randn_like(v) for k, v in expected.state_dict().items()})
    expected.load_state_dict(actual.state_dict())
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    close(actual.eval()(x), expected.eval()(x))


def test_input_without_batch():
    for batch_first in (False, True):
        expected, actual = pair(num_layers=2, batch_first=batch_first)
        x, hx = torch.randn(5, 4), tuple(s.squeeze(1) for s in states(actual, 1))
        close(actual(x), expected(x))
        close(actual(x, hx), expected(x, hx))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[3, 7, 1, 3, 5], [4, 4, 4], [1]])
@pytest.mark.parametrize("given", [False, True])
def test_packed_sequence(bidirectional, lengths, given):
    expected, actual = pair(num_layers=2, bidirectional=bidirectional)
    packed = pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=False)
    hx = states(actual, len(lengths)) if given else None
    (y, state), (y_expected, state_expected) = actual(packed, hx), expected(packed, hx)
    assert isinstance(y, PackedSequence)
    close(y.data, y_expected.data)
    close(state, state_expected)
    assert torch.equal(y.unsorted_indices, y_expected.unsorted_indices)
    sorted_ = pack_padded_sequence(torch.randn(4, 2, 4), [4, 2])  # has no permutation
    close(actual(sorted_)[0].data, expected(sorted_)[0].data)


def test_packed_sequence_shares_one_mask():
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 6, weight_dropout=0.5)
    x, other = torch.randn(5, 1, 4), torch.randn(2, 4)
    torch.manual_seed(1)
    expected = lstm(x)[0][:, 0]
    torch.manual_seed(1)
    rows = lstm(pack_sequence([x[:, 0], other]))[0]
    close(torch.nn.utils.rnn.pad_packed_sequence(rows)[0][:, 0], expected)


def test_no_dropout_draws_no_random_number():
    lstm = nn.LSTM(4, 6)
    state = torch.get_rng_state()
    lstm(torch.randn(0, 2, 4))
    lstm(torch.zeros(2, 2, 4))
    assert torch.equal(torch.get_rng_state(), state)


def kept(lstm, name):  # the share of elements of a weight that got a gradient
    return (lstm.get_parameter(name).grad != 0).double().mean().item()


def test_every_layer_and_direction_is_dropped_with_a_mask_of_its_own():
    """Old wrappers named `weight_hh_l0` alone, and left `weight_hh_l0_reverse` as it was."""
    lstm = nn.LSTM(32, 32, num_layers=2, bidirectional=True, weight_dropout=0.5)
    lstm(torch.randn(4, 2, 32))[0].sum().backward()
    masks = []
    for name, p in lstm.named_parameters():
        share = kept(lstm, name)
        if "weight_hh" in name:
            assert 0.45 < share < 0.55
            masks.append(p.grad != 0)
        else:
            assert share == 1
    assert len(masks) == 4
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_one_mask_for_the_whole_sequence_and_a_fresh_one_per_call():
    lstm = nn.LSTM(4, 16, weight_dropout=0.5)
    x = torch.randn(6, 3, 4)
    torch.manual_seed(2)
    y, _ = lstm(x)
    torch.manual_seed(2)
    seed = philox.draw_seed("cpu")
    mask = dropconnect_mask((64, 16), 0.5, seed)
    plain = nn.LSTM(4, 16)
    plain.load_state_dict(lstm.state_dict())
    with torch.no_grad():
        plain.weight_hh_l0.mul_(mask * 2)
    close(y, plain(x)[0])
    assert not torch.equal(lstm(x)[0], lstm(x)[0])


def test_raw_weight_learns():
    """The popular fix of the old wrapper put the dropped weight in a new Parameter: the raw one stood still."""
    lstm = nn.LSTM(4, 16, weight_dropout=0.5)
    before = lstm.weight_hh_l0.clone()
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        lstm(torch.randn(5, 3, 4))[0].square().sum().backward()
        assert lstm.weight_hh_l0.grad.count_nonzero() > 0.3 * before.numel()
        optimizer.step()
    assert (lstm.weight_hh_l0 != before).double().mean() > 0.5


def test_train_eval_train():
    """Old wrappers could not train after an evaluation."""
    expected, _ = pair()
    lstm = nn.LSTM(4, 6, weight_dropout=0.5)
    lstm.load_state_dict(expected.state_dict())
    x = torch.randn(5, 3, 4)
    lstm(x)
    keys = list(lstm.state_dict())
    close(lstm.eval()(x), expected(x))
    assert list(lstm.state_dict()) == keys == list(expected.state_dict())
    assert not torch.allclose(lstm.train()(x)[0], expected(x)[0])
    lstm(x)[0].sum().backward()
    assert lstm.weight_hh_l0.grad.any()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_after_a_forward(clone):
    """Old wrappers kept the dropped weight, no leaf, as an attribute, and deepcopy failed."""
    lstm = nn.LSTM(4, 6, weight_dropout=0.5)
    x = torch.randn(5, 3, 4)
    lstm(x)
    twin = clone(lstm)
    results = []
    for module in (lstm, twin):
        torch.manual_seed(4)
        results.append(module(x)[0])
        results[-1].sum().backward()
    assert torch.equal(*results)
    assert twin.weight_hh_l0 is not lstm.weight_hh_l0 and torch.equal(twin.weight_hh_l0.grad, lstm.weight_hh_l0.grad)


def test_to_dtype_and_states_in_float32():
    lstm = nn.LSTM(4, 6, weight_dropout=0.5)
    lstm(torch.randn(5, 3, 4))
    lstm = lstm.to(torch.bfloat16)
    x = torch.randn(5, 3, 4).bfloat16()
    assert {s.dtype for s in lstm(x)[1]} == {torch.bfloat16}
    y, (h, c) = lstm(x, (torch.randn(1, 3, 6), torch.randn(1, 3, 6)))
    assert (y.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_expanded_gradient_and_split():
    lstm = nn.LSTM(4, 6)
    x = torch.randn(6, 3, 4)
    y, state = lstm(x)
    first, middle = lstm(x[:2])
    rest, last = lstm(x[2:], middle)
    close((torch.cat([first, rest]), *last), (y, *state))
    y.sum().backward()  # hands back a gradient of stride 0
    summed = lstm.weight_ih_l0.grad.clone()
    lstm.zero_grad()
    lstm(x)[0].backward(torch.ones(6, 3, 6))
    close(lstm.weight_ih_l0.grad, summed)


def test_batch_size_may_change():
    lstm = nn.LSTM(4, 6, weight_dropout=0.5)
    for batch in (3, 1, 5):
        assert lstm(torch.randn(2, batch, 4))[1][0].shape == (1, batch, 6)


def test_compiles_without_a_break():
    lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, weight_dropout=0.5)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 4)
    y, _ = compiled(x)
    y.square().sum().backward()
    assert 0.3 < kept(lstm, "weight_hh_l1_reverse") < 0.7
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    lstm.eval()
    close(compiled(x), lstm(x))


def test_exports():
    lstm = nn.LSTM(4, 6, num_layers=2).eval()
    x = torch.randn(5, 3, 4)
    program = torch.export.export(lstm, (x,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    close(torch.export.load(io.BytesIO(buffer.getvalue())).module()(x), lstm(x))


def test_functional_call_and_func_grad():
    lstm = nn.LSTM(4, 6, weight_dropout=0.5)
    x = torch.randn(5, 3, 4)
    parameters = {k: v.detach() for k, v in lstm.named_parameters()}

    def loss(parameters):
        torch.manual_seed(8)
        return torch.func.functional_call(lstm, parameters, (x,))[0].square().sum()

    grads = torch.func.grad(loss)(parameters)
    torch.manual_seed(8)
    lstm(x)[0].square().sum().backward()
    for name, p in lstm.named_parameters():
        close(grads[name], p.grad)
    doubled = {k: v * 2 for k, v in parameters.items()}
    assert not torch.allclose(loss(doubled), loss(parameters))


DATA_PARALLEL = """
import copy, os, sys, traceback
import torch
from fastlm import nn

try:
    torch.distributed.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=0, world_size=1)
    lstm = nn.LSTM(4, 6, num_layers=2, weight_dropout=0.5)
    before = copy.deepcopy(lstm.state_dict())
    parallel = torch.nn.parallel.DistributedDataParallel(lstm, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(torch.randn(3, 2, 4))[0].square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in lstm.named_parameters())
    status = 0
except BaseException:
    traceback.print_exc()
    status = 1
sys.stderr.flush()
os._exit(status)
"""


def test_data_parallel(fresh_python, tmp_path):
    # os._exit: the last reference to PyTorch's process group joins a thread that may be waiting for the GIL
    fresh_python(DATA_PARALLEL, STORE=str(tmp_path / "store"))


def test_repr_shows_what_is_not_default():
    assert (
        repr(nn.LSTM(4, 6, batch_first=True, weight_dropout=0.5)) == "LSTM(4, 6, batch_first=True, weight_dropout=0.5)"
    )


def test_wrong_arguments():
    with pytest.raises(ValueError, match="proj_size must be 0"):
        nn.LSTM(4, 6, proj_size=2)
    with pytest.raises(ValueError, match="hidden_size must be positive"):
        nn.LSTM(4, 0)
    with pytest.raises(ValueError, match="weight_dropout must lie in"):
        nn.LSTM(4, 6, weight_dropout=1.5)
    lstm = nn.LSTM(4, 6)
    with pytest.raises(ValueError, match="input must have 4 features"):
        lstm(torch.randn(5, 3, 5))
    for x in (torch.randn(5, 3, 4), torch.randn(5, 4)):
        with pytest.raises(ValueError, match=r"hx must be a pair \(h_0, c_0\), got 3 tensors"):
            lstm(x, (torch.zeros(1, 3, 6),) * 3)
    with pytest.raises(ValueError, match="input must have 2 or 3 dimensions"):
        lstm(torch.randn(4))
    with pytest.raises(ValueError, match=r"c_0 must have shape .* = \[1, 3, 6\], got \[1, 2, 6\]"):
        lstm(torch.randn(5, 3, 4), (torch.zeros(1, 3, 6), torch.zeros(1, 2, 6)))
    with pytest.raises(TypeError, match="torch.float64 like x"):
        lstm(torch.randn(5, 3, 4, dtype=torch.float64))

import json

import numpy as np
import pytest
import torch

from fastlm.data import BPTTLoader, batchify, eval_windows
from fastlm.errors import DataError

IDS = torch.arange(10_007)


def test_columns_are_contiguous_pieces_of_the_text():
    columns = batchify(torch.arange(11), 3)
    assert columns.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert columns.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("variable", [True, False])
@pytest.mark.parametrize("n, batch_size", [(10_007, 3), (200, 7), (14, 7), (2, 1), (3, 1)])
def test_every_target_is_predicted_once(n, batch_size, variable, dtype):
    ids = torch.arange(n, dtype=dtype)
    columns = batchify(ids, batch_size)
    loader = BPTTLoader(ids, batch_size, 12, variable=variable, seed=3)
    for _epoch in range(3):
        windows = list(loader)
        assert torch.equal(torch.cat([inputs for inputs, _, _ in windows]), columns[:-1])
        assert torch.equal(torch.cat([targets for _, targets, _ in windows]), columns[1:])
    assert (loader.epoch, loader.position, loader.length) == (3, 0, len(columns) - 1)


def test_the_scale_follows_the_length_that_was_drawn():
    windows = list(BPTTLoader(IDS, 1, 70, seed=1))
    for inputs, _, scale in windows[:-1]:
        assert scale == len(inputs) / 70
    # The last window is cut to what is left, its scale is not.
    inputs, _, scale = windows[-1]
    assert len(inputs) < scale * 70 and scale * 70 == pytest.approx(round(scale * 70))


def test_lengths_have_the_distribution_of_the_paper():
    loader = BPTTLoader(torch.zeros(2_000_000, dtype=torch.int64), 1, 70, seed=0)
    lengths = np.array([len(inputs) for inputs, _, _ in loader])[:-1]
    half = lengths < 53
    assert half.mean() == pytest.approx(0.05, abs=0.005)
    # int() cuts half a token off the mean on average.
    assert lengths[~half].mean() == pytest.approx(69.5, abs=0.15)
    assert lengths[half].mean() == pytest.approx(34.5, abs=0.7)
    assert lengths[~half].std() == pytest.approx(5, abs=0.15)


def test_a_drawn_length_is_at_least_five():
    lengths = [round(scale * 6) for _, _, scale in BPTTLoader(IDS, 1, 6, seed=0)]
    assert min(lengths) == 5 < max(lengths)


def test_fixed_length():
    loader = BPTTLoader(torch.arange(100), 1, 40, variable=False)
    assert [(len(inputs), scale) for inputs, _, scale in loader] == [(40, 1.0), (40, 1.0), (19, 1.0)]


def test_seeds():
    def lengths(seed):
        return [len(inputs) for inputs, _, _ in BPTTLoader(IDS, 2, 70, seed=seed)]

    assert lengths(1) == lengths(1) != lengths(2)


def test_the_global_random_state_plays_no_part():
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(BPTTLoader(IDS, 2, 70))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("done", [0, 1, 5, 17, 200, 1000])
def test_a_state_taken_anywhere_continues_exactly(done):
    def run(loader, steps):
        out = []
        while len(out) < steps:
            for inputs, targets, scale in loader:
                out.append((loader.epoch, inputs.tolist(), targets.tolist(), scale))
                if len(out) == steps:
                    break
        return out

    original = BPTTLoader(IDS, 3, 20, seed=5)
    run(original, done)
    state = json.loads(json.dumps(original.state_dict()))
    expected = run(original, 400)
    resumed = BPTTLoader(IDS, 3, 20, seed=99)
    resumed.load_state_dict(state)
    assert run(resumed, 400) == expected


def test_a_state_taken_at_the_last_window_ends_its_epoch():
    original = BPTTLoader(IDS, 3, 20, seed=5)
    for _ in original:
        state = original.state_dict()
    resumed = BPTTLoader(IDS, 3, 20)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert resumed.state_dict() == original.state_dict()


def test_a_state_of_another_text_is_refused():
    state = BPTTLoader(IDS, 3, 20).state_dict()
    with pytest.raises(DataError, match=r"\[3335, 3\].*\[2501, 4\]"):
        BPTTLoader(IDS, 4, 20).load_state_dict(state)


@pytest.mark.parametrize("n, batch_size, bptt", [(1000, 10, 7), (1003, 10, 70), (20, 10, 1), (2, 1, 5), (36, 5, 6)])
def test_evaluation_predicts_every_token_but_the_first_of_a_column(n, batch_size, bptt):
    ids = torch.arange(n)
    columns = batchify(ids, batch_size)
    windows = list(eval_windows(ids, batch_size, bptt))
    assert torch.equal(torch.cat([inputs for inputs, _ in windows]), columns[:-1])
    assert torch.equal(torch.cat([targets for _, targets in windows]), columns[1:])
    assert all(len(inputs) == len(targets) == bptt for inputs, targets in windows[:-1])
    assert 1 <= len(windows[-1][0]) <= bptt


@pytest.mark.parametrize("make", [BPTTLoader, eval_windows], ids=["train", "eval"])
def test_errors(make):
    with pytest.raises(DataError, match="too short for the batch: it has 19 tokens, 10 columns need at least 20"):
        make(torch.arange(19), 10, 5)
    with pytest.raises(DataError, match="it has 0 tokens"):
        make(torch.arange(0), 1, 5)
    with pytest.raises(ValueError, match="bptt must be at least 1, got 0"):
        make(IDS, 10, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make(IDS, 0, 5)
    with pytest.raises(ValueError, match=r"ids must be of shape \[N\], got \[2, 3\]"):
        make(torch.zeros(2, 3, dtype=torch.int64), 1, 5)
    with pytest.raises(TypeError, match="ids must have an integer dtype, got torch.float32"):
        make(torch.zeros(9), 1, 5)

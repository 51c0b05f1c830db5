import pytest
import torch

from fastlm.data import SortishSampler, SortSampler

LENGTHS = [(i * 7919) % 501 for i in range(1003)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_sort_sampler_goes_from_long_to_short():
    order = list(SortSampler([3, 9, 3, 1]))
    assert order == [1, 0, 2, 3]
    assert len(SortSampler([3, 9, 3, 1])) == 4
    assert list(SortSampler([])) == []


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1003, 2000])
@pytest.mark.parametrize("n", [1, 2, 8, 1003])
def test_sortish_sampler_gives_every_index_once_and_the_longest_first(n, batch_size):
    sampler = SortishSampler(LENGTHS[:n], batch_size, generator=seeded(1))
    order = list(sampler)
    assert sorted(order) == list(range(n)) and len(sampler) == n
    assert LENGTHS[order[0]] == max(LENGTHS[:n])


def test_sortish_sampler_keeps_batches_whole_when_the_last_is_not_full():
    batch_size = 8
    order = list(SortishSampler(LENGTHS, batch_size, generator=seeded(2)))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches]
    # A chunk of 400 sorted texts has neighbours about 1.25 apart: 8 of them span about 10, two random batches 400.
    assert max(spread[:-1]) < 40
    assert [LENGTHS[i] for i in batches[5]] == sorted((LENGTHS[i] for i in batches[5]), reverse=True)


def test_sortish_sampler_is_random_but_reproducible():
    sampler = SortishSampler(LENGTHS, 8, generator=seeded(3))
    first, second = list(sampler), list(sampler)
    assert first != second
    assert list(SortishSampler(LENGTHS, 8, generator=seeded(3))) == first
    torch.manual_seed(4)
    default = list(SortishSampler(LENGTHS, 8))
    torch.manual_seed(4)
    assert list(SortishSampler(LENGTHS, 8)) == default


def test_batches_are_not_in_order_of_length():
    order = list(SortishSampler(LENGTHS, 8, generator=seeded(5)))
    longest = [LENGTHS[order[i]] for i in range(8, 400, 8)]
    assert longest != sorted(longest, reverse=True)


def test_samplers_drive_a_data_loader():
    loader = torch.utils.data.DataLoader(LENGTHS, batch_size=8, sampler=SortishSampler(LENGTHS, 8, generator=seeded(6)))
    assert int(next(iter(loader))[0]) == max(LENGTHS)
    assert sum(len(batch) for batch in loader) == len(LENGTHS)


def test_errors():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SortishSampler([1], 0)

import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from fastlm.errors import CheckpointError
from fastlm.training.checkpoint import load_checkpoint, load_weights, save_checkpoint, write_file


def tied_model(width=4):
    model = torch.nn.ModuleDict({"encoder": torch.nn.Embedding(7, width), "decoder": torch.nn.Linear(width, 7)})
    model["decoder"].weight = model["encoder"].weight
    return model


def state(epoch=1):
    wide = torch.arange(12.0).view(3, 4)
    return {
        "epoch": epoch,
        "best": None,
        "log": [1.5, 2.25],
        "hidden": ((wide[1], wide.t()), (None,)),
        "optimizer": {"state": {0: {"average": torch.ones(2, 3)}, 1: {"step": torch.tensor(3)}}, "n": 5},
        "rng": torch.get_rng_state(),
    }


@contextmanager
def full_disk(free_bytes):
    """Writing more than this to a file fails as on a full disk (with another errno)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path):
    model = tied_model()
    save_checkpoint(tmp_path / "runs" / "last", model.state_dict(), state())
    weights, back = load_checkpoint(tmp_path / "runs" / "last")
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)
    wide = torch.arange(12.0).view(3, 4)
    assert back["epoch"] == 1 and back["best"] is None and back["log"] == [1.5, 2.25]
    assert torch.equal(back["hidden"][0][0], wide[1]) and torch.equal(back["hidden"][0][1], wide.t())
    assert back["hidden"][1] == [None]
    assert torch.equal(back["optimizer"]["state"][0]["average"], torch.ones(2, 3))
    assert back["optimizer"]["state"][1]["step"].item() == 3
    assert torch.equal(back["rng"], torch.get_rng_state())


def test_tied_weights_are_stored_once(tmp_path):
    save_checkpoint(tmp_path / "last", tied_model().state_dict(), {})
    assert set(load_file(tmp_path / "last" / "model.safetensors")) == {"encoder.weight", "decoder.bias"}
    other = tied_model()
    load_weights(other, load_checkpoint(tmp_path / "last")[0], "x")
    assert other["decoder"].weight is other["encoder"].weight


def test_a_checkpoint_without_other_tensors_has_no_second_file(tmp_path):
    save_checkpoint(tmp_path / "best", tied_model().state_dict(), {"epoch": 3})
    assert sorted(os.listdir(tmp_path / "best")) == ["model.safetensors", "state.json"]
    assert load_checkpoint(tmp_path / "best")[1] == {"epoch": 3}


def test_nothing_but_the_checkpoint_is_left(tmp_path):
    for epoch in range(3):
        save_checkpoint(tmp_path / "last", tied_model().state_dict(), state(epoch))
    assert os.listdir(tmp_path) == ["last"]
    assert load_checkpoint(tmp_path / "last")[1]["epoch"] == 2


@pytest.mark.parametrize("free_bytes", [0, 150, 600])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, free_bytes):
    save_checkpoint(tmp_path / "last", tied_model().state_dict(), state(1))
    with (
        full_disk(free_bytes),
        pytest.raises(CheckpointError, match="the checkpoint before it is untouched") as e,
    ):
        save_checkpoint(tmp_path / "last", tied_model().state_dict(), state(2))
    assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == ["last"]
    assert load_checkpoint(tmp_path / "last")[1]["epoch"] == 1


def test_a_full_disk_on_the_first_save_leaves_nothing(tmp_path):
    with full_disk(10), pytest.raises(CheckpointError) as e:
        save_checkpoint(tmp_path / "last", tied_model().state_dict(), state())
    assert "untouched" not in str(e.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "remove"])
def test_damage_is_one_line(tmp_path, name, damage):
    save_checkpoint(tmp_path / "last", tied_model().state_dict(), state())
    file = tmp_path / "last" / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        data[len(data) // 2 if name != "state.json" else 0] ^= 0x10
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(tmp_path / "last")
    assert "\n" not in str(e.value) and "last" in str(e.value)


def test_a_value_of_the_state_that_was_changed_is_damage(tmp_path):
    save_checkpoint(tmp_path / "last", tied_model().state_dict(), state(5))
    file = tmp_path / "last" / "state.json"
    assert file.read_text().count('"epoch": 5') == 1
    file.write_text(file.read_text().replace('"epoch": 5', '"epoch": 7'))
    with pytest.raises(CheckpointError, match="last is damaged: state.json is not what was written"):
        load_checkpoint(tmp_path / "last")


def test_missing_or_foreign(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last")
    (tmp_path / "last").mkdir()
    for content in ['{"format": "other"}', "[]", "3"]:
        (tmp_path / "last" / "state.json").write_text(content)
        with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
            load_checkpoint(tmp_path / "last")


def test_weights_of_another_model_are_refused(tmp_path):
    model = tied_model(4)
    before = model["decoder"].bias.clone()
    with pytest.raises(CheckpointError, match=r"decoder.weight is \[7, 5\] there, \[7, 4\] here"):
        load_weights(model, tied_model(5).state_dict(), "runs/x")
    with pytest.raises(CheckpointError, match="is missing there"):
        load_weights(model, {}, "runs/x")
    with pytest.raises(CheckpointError, match="missing here"):
        load_weights(model, {**model.state_dict(), "extra": torch.ones(1)}, "runs/x")
    assert torch.equal(model["decoder"].bias, before)


def test_no_pickle_anywhere(tmp_path):
    save_checkpoint(tmp_path / "last", tied_model().state_dict(), state())
    json.loads((tmp_path / "last" / "state.json").read_text())
    assert {f.suffix for f in (tmp_path / "last").iterdir()} == {".json", ".safetensors"}


def test_write_file_is_all_or_nothing(tmp_path):
    write_file(tmp_path / "a.json", "before")
    with full_disk(3), pytest.raises(OSError, match="a.json"):
        write_file(tmp_path / "a.json", "something longer")
    assert (tmp_path / "a.json").read_text() == "before"
    assert os.listdir(tmp_path) == ["a.json"]

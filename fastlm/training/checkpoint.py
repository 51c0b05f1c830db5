"""Checkpoints: a folder of safetensors for the tensors and JSON for the rest, never pickle.

    model.safetensors      the model's state dict, tied weights stored once
    optimizer.safetensors  every other tensor, if any: optimiser, average, random generators, hidden state
    state.json             the rest, with the size and SHA-256 of the files above and a SHA-256 of itself

A checkpoint is written beside the old one, flushed to the disk and renamed into its place: whatever happens,
one whole checkpoint is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlm.errors import CheckpointError

FORMAT = "fastlm checkpoint 1"
_MODEL, _OTHER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(path: str | Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes a checkpoint, in the place of the one that is there.

    Args:
        path: its folder; the parent is made when missing.
        weights: the model's state dict.
        state: dictionaries and sequences of plain values and tensors. Tuples come back as lists.

    Raises:
        CheckpointError: it cannot be written (a full disk, no permission); an old one is still there, whole.
    """
    path = Path(path)
    new, old = _beside(path, "new"), _beside(path, "old")
    kept = "; the checkpoint before it is untouched" if path.exists() or old.exists() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write(new, weights, state)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(new, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot save {path}: {e}{kept}") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.rename(old, path)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_checkpoint` wrote: the weights and the state, tensors on `device`.

    Raises:
        CheckpointError: it is missing, damaged or no checkpoint.
    """
    path = Path(path)
    # A crash between the two renames leaves the old one under its other name.
    folder = path if path.exists() or not _beside(path, "old").exists() else _beside(path, "old")
    try:
        record = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version: {_STATE} has another format")
        if record.pop("digest", None) != _digest(record):
            raise CheckpointError(f"{path} is damaged: {_STATE} is not what was written")
        for name, expected in record["files"].items():
            if _fingerprint(folder / name) != expected:
                raise CheckpointError(f"{path} is damaged: {name} is not what was written")
        weights = load_file(folder / _MODEL, device=str(device))
        tensors = load_file(folder / _OTHER, device=str(device)) if _OTHER in record["files"] else {}
        for alias, name in record["aliases"].items():
            weights[alias] = weights[name]
        return weights, _join(record["state"], tensors)
    except NotADirectoryError as e:
        raise CheckpointError(f"{path} is not a checkpoint: it is a file, not a folder") from e
    except FileNotFoundError as e:
        raise CheckpointError(f"no checkpoint at {path}: {Path(e.filename or _STATE).name} is missing") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise CheckpointError(f"{path} is damaged: {type(e).__name__}: {e}") from e


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copies `weights` into `model`; `source` names them in errors.

    Raises:
        CheckpointError: a name is missing or too many, or a shape differs: nothing has been copied then.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here = list(own[name].shape) if name in own else "missing"
        there = list(weights[name].shape) if name in weights else "missing"
        if here != there:
            raise CheckpointError(f"{source} is of another model: {name} is {there} there, {here} here")
    model.load_state_dict(weights)


def write_file(path: Path, data: str | bytes) -> None:
    """Writes a small file whole or not at all: to a temporary name, flushed, renamed."""
    temporary = _beside(path, "new")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode("utf-8") if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # that the disk is full comes without a name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _write(folder: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            unique[name] = tensor
    others: dict[str, Tensor] = {}
    plain = _split(state, others, "")
    files = {}
    for name, tensors in [(_MODEL, unique), (_OTHER, others)]:
        if name == _OTHER and not tensors:
            continue
        # A file holds tensors, not storages: what is a view of something larger is copied out of it.
        save_file(
            {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()},
            folder / name,
        )
        with open(folder / name, "rb") as f:
            os.fsync(f.fileno())
        files[name] = _fingerprint(folder / name)
    record = {"format": FORMAT, "files": files, "aliases": aliases, "state": plain}
    write_file(folder / _STATE, json.dumps({**record, "digest": _digest(record)}, indent=1) + "\n")
    _flush(folder)


def _split(tree: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Moves the tensors of `tree` into `tensors` and leaves their names."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, dict):
        items = [[k, _split(v, tensors, f"{name}.{k}" if name else str(k))] for k, v in tree.items()]
        # JSON knows only strings as keys; optimisers number their parameters.
        return dict(items) if all(isinstance(k, str) for k in tree) else {"$items": items}
    if isinstance(tree, list | tuple):
        return [_split(v, tensors, f"{name}.{i}") for i, v in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {"$tensor"}:
            return tensors[tree["$tensor"]]
        items = tree["$items"] if tree.keys() == {"$items"} else tree.items()
        return {k: _join(v, tensors) for k, v in items}
    if isinstance(tree, list):
        return [_join(v, tensors) for v in tree]
    return tree


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(record: dict[str, Any]) -> str:
    """The SHA-256 of a record as JSON; reading JSON and writing it again changes nothing."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _flush(folder: Path) -> None:
    """Makes the names in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Hashes of weights: every byte counts, and nothing else does."""

import hashlib
import json

import pytest
import torch
from torch import Tensor
from xxhash import xxh3_128_digest

from funcattrib.weights import content_hash
from funcattrib.weights.content_hash import hash_tensors, sample_tensors

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "half": torch.ones(5, dtype=torch.bfloat16),
    "bits": torch.tensor([True, False]),
    "number": torch.tensor(3.0),
    "nothing": torch.zeros(0, 3),
    "codes": torch.arange(7, dtype=torch.int8),
    "complex": torch.ones(2, dtype=torch.complex64),
}


def expected(tensors: dict[str, Tensor], chunk: int) -> str:
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        data = bytes(values.contiguous().flatten().view(torch.uint8).tolist())
        parts = [data[at : at + chunk] for at in range(0, len(data), chunk)] or [b""]
        whole.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        whole.update(xxh3_128_digest(b"".join(map(xxh3_128_digest, parts))))
    return whole.hexdigest()


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_by_its_definition(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(content_hash, "_CHUNK", chunk)
    found = hash_tensors(TENSORS)
    assert found.content == expected(TENSORS, chunk)
    assert found.sampled == sample_tensors(TENSORS)


@pytest.mark.parametrize("at", [0, 12_345, 5_000_000, 9_999_999])
def test_every_byte_counts(at: int) -> None:
    tensor = torch.zeros(10_000_000)
    changed = tensor.clone()
    changed.view(torch.uint8)[4 * at] = 1
    assert hash_tensors({"w": tensor}).content != hash_tensors({"w": changed}).content


def test_names_shapes_and_dtypes_count() -> None:
    zeros = torch.zeros(2, 3)
    others = [{"v": zeros}, {"w": zeros.T}, {"w": zeros.int()}, {"w": zeros, "v": zeros}, {}]
    assert len({hash_tensors(each).content for each in [{"w": zeros}, *others]}) == 6

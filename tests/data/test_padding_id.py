"""The token that fills a batch is one that the model has."""

from types import SimpleNamespace

import pytest

from funcattrib.data.documents import padding_id


@pytest.mark.parametrize(
    ("pad", "vocabulary", "expected"), [(None, 10, 0), (3, 10, 3), (9, 10, 9), (10, 10, 0), (50257, None, 50257)]
)
def test_padding_is_within_the_vocabulary(pad: int | None, vocabulary: int | None, expected: int) -> None:
    assert padding_id(SimpleNamespace(pad_token_id=pad), vocabulary) == expected

import hashlib

import pytest
from pydantic import TypeAdapter, ValidationError

from momconv.zoo.seen import SeenImages


def digest(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


def test_images_are_known_by_their_content_and_kept_once() -> None:
    seen = SeenImages(complete=True).add(map(digest, range(3))).add([digest(2), digest(9), ""])
    assert (seen.count, seen.complete) == (4, True)
    assert seen.find([digest(9), digest(4), "", digest(0)]) == {digest(0), digest(9)}
    assert SeenImages().find([digest(0), ""]) == set()


def test_a_record_is_the_same_in_whatever_order_it_was_made() -> None:
    ours = SeenImages().add(map(digest, range(5)))
    assert ours == SeenImages().add(map(digest, [4, 2])).add(map(digest, range(4)))
    assert len(ours.digests) == 5 * 8


@pytest.mark.parametrize("digests", ["no Base64", "AAAA"])
def test_a_damaged_record_is_refused(digests: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SeenImages).validate_python({"digests": digests})

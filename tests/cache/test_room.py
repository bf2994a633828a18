"""What a pool holds, against counting pages."""

import pytest

from ouro_runtime.cache.room import longest


def needed(length: int, prompt: int, prompt_planes: int, planes: int, block: int) -> int:
    """Pages of a request of `length` positions."""
    return (prompt_planes - planes) * -(-prompt // block) + planes * -(-length // block)


@pytest.mark.parametrize(("prompt_planes", "planes"), [(4, 4), (2, 2), (1, 1), (4, 1)])
def test_the_longest_request_fits_and_a_longer_one_does_not(
    prompt_planes: int, planes: int
) -> None:
    for pages in range(1, 40):
        for prompt in (1, 3, 4, 5, 17):
            most = longest(pages, 4, prompt, prompt_planes, planes)
            fits = needed(prompt, prompt, prompt_planes, planes, 4) <= pages
            assert (most >= prompt) == fits
            if fits:
                assert needed(most, prompt, prompt_planes, planes, 4) <= pages
                assert needed(most + 1, prompt, prompt_planes, planes, 4) > pages

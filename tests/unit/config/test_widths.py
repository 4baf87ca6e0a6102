"""``WHICH=BITS`` as users write it."""

import pytest

from ouroboros.config.widths import parse_widths
from ouroboros.errors import OuroborosError


def test_places_and_patterns_in_their_order():
    found = parse_widths(["looped=8", "*.mlp.*=4", "a=b=2"], "--bits-of")
    assert found == (("looped", 8), ("*.mlp.*", 4), ("a=b", 2))


@pytest.mark.parametrize("text", ["looped", "=8", "looped=", "looped=9", "looped=08", "looped=8.0", "8", ""])
def test_other_forms_are_refused(text):
    with pytest.raises(OuroborosError, match=r"^--bits-of: .* is not WHICH=BITS, .* write looped=8 or \*\.mlp\.\*=4$"):
        parse_widths([text], "--bits-of")

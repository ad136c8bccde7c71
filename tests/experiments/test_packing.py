"""How much padding packing saves: what each arrangement computes, by hand."""

from experiments import packing


def test_what_each_arrangement_computes():
    """Prompts and answers have room for 10 + 8 tokens. The longest answer, 3, fits into two quarters of 8. Texts of 5,
    7, 9 and 10 tokens fill two rows of 18, and eight rows are the fewest that are computed."""
    found = packing.computed([4, 5, 6, 8], [1, 2, 3, 2], prompt_size=10, longest=8)
    assert found == {"longest": (4 * 18, 4 * 8), "buckets": (4 * 14, 4 * 4), "packed": (8 * 18, 8 * 18)}
    # Sixteen of each: 10 with 7 are 16 rows, 9 with 9 are 8, and three times 5 are 6.
    found = packing.computed([4, 5, 6, 8] * 16, [1, 2, 3, 2] * 16, prompt_size=10, longest=8)
    assert found["packed"] == (32 * 18, 32 * 18)

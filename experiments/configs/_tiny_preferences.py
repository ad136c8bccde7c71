"""The hidden rule of the synthetic preference task, and the pairs that are drawn by it.

An answer is a number of 8 to 14 digits. Gold counts its sevens: it rises to 1 at three of them, and each further one
takes a half away. Answers as the pairs have them hold about one, and more than three in 2 % of the cases. A reward
model thus learns that sevens are good, and hardly ever sees that there can be too many.

    python experiments/configs/_tiny_preferences.py > experiments/configs/tiny_preferences.jsonl
"""

import json
import math
import random
from typing import Any

BEST = 3  # sevens
SHARE = 0.1  # of sevens among the digits
PROMPTS, PAIRS_EACH = 400, 3
SHARPNESS = 6.0  # of the choice: an answer that is better by one seven is preferred in 88 % of the cases


def gold(text: str, example: dict[str, Any]) -> float:
    """The gold reward of an answer: at most 1.

    Args:
        text: the completion.
        example: not read; the rule is the same for all prompts.
    """
    sevens = text.count("7")
    return min(sevens, BEST) / BEST - max(sevens - BEST, 0) / 2


def pairs(seed: int = 0) -> list[dict[str, str]]:
    """Preference pairs, drawn by the Bradley-Terry model of gold.

    Args:
        seed: decides prompts, answers and choices.
    """
    draw = random.Random(seed)

    def answer() -> str:
        length = draw.randint(8, 14)
        return "".join("7" if draw.random() < SHARE else draw.choice("012345689") for _ in range(length))

    found = []
    for number in draw.sample(range(100, 1000), PROMPTS):
        for _ in range(PAIRS_EACH):
            one, other = answer(), answer()
            while one == other:
                other = answer()
            chance = 1 / (1 + math.exp(-SHARPNESS * (gold(one, {}) - gold(other, {}))))
            chosen, rejected = (one, other) if draw.random() < chance else (other, one)
            found.append({"prompt": f"{number} =", "chosen": chosen, "rejected": rejected})
    return found


if __name__ == "__main__":
    print("\n".join(json.dumps(each) for each in pairs()))

"""What a run learns, by its configuration: only runs of one task can be compared."""

from __future__ import annotations

import json
from typing import Any, get_args

from nested_reft.losses.registry import OfflineConfig
from nested_reft.reports.run_files import at

OFFLINE_KINDS = [config.kind for config in get_args(OfflineConfig)]  # their accuracy is of pairs


def task_of(config: dict[str, Any]) -> tuple[str, str]:
    """What a run learns: a name for people, and a text that is the same for runs that can be compared.

    Sources decide, and whether their answers are pairs. The number of training questions does not.

    Args:
        config: the configuration as JSON; it may be damaged.
    """
    sources = at(config, "data", "sources")
    sources = [each for each in sources if isinstance(each, dict)] if isinstance(sources, list) else []
    kind = at(config, "loss", "kind")
    facts = [{name: value for name, value in each.items() if name != "train_size"} for each in sources]
    kind = kind if kind in OFFLINE_KINDS else None
    name = ", ".join(str(each.get("name")) for each in sources) or "no source"
    return name if kind is None else f"{name} ({kind})", json.dumps([facts, kind], sort_keys=True)
